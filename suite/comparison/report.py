"""A comparison of settings: as data, as tables for the console and Markdown, as CSV, with plots, and as a web page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.storage import atomic_write, write_json
from suite.comparison.results import Result, Setting, texts
from suite.comparison.significance import Pair, accuracy_interval, compare, sentence
from suite.comparison.webpage import write_page
from suite.training.tracking import try_plots
from utils import DEMO_WARNING, say

COLUMNS = {  # heading: (part of metrics.json, figure, format)
    "test loss (nats)": ("test", "loss", ".4f"), "F1": ("test", "f1", ".4f"), "ECE": ("test", "ece", ".4f"),
    "optimizer steps": ("train", "optimizer_steps", ",.0f"), "training (s)": ("train", "seconds", ",.1f"),
    "peak memory (MB)": ("train", "peak_memory_mb", ",.0f"), "reviews/s": ("train", "samples_per_second", ",.1f")}
LEGEND = (
    "Accuracy: mean over seeds ± their standard deviation; its interval covers other reviews and, where there are "
    "several seeds, other seeds, too. The other columns are means over seeds. ECE: expected calibration error, 0 is "
    "best. Training time is that of the optimizer steps alone.")


def summarize(settings: Sequence[Setting], title: str, question: str = "", notes: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison as plain data, as comparison.json has it. Accuracies and differences are shares of reviews."""
    results = [run for setting in settings for run in setting.runs]
    pairs = compare([setting.label for setting in settings], [setting.correct for setting in settings])
    wrong = np.stack([~run.correct for run in results])
    return {
        "title": results[0].config.demo_mark + title, "question": question, "demo": results[0].config.is_demo,
        "test_reviews": wrong.shape[1], "settings": [_row(setting) for setting in settings],
        "pairs": [_pair(pair) for pair in pairs],
        "wrong_in_all_runs": int(wrong.all(axis=0).sum()), "runs_disagree": len(_disagreements(results)),
        "notes": [*notes, *_conditions(results)]}


def _row(setting: Setting) -> dict[str, Any]:
    accuracies = setting.correct.mean(axis=1)
    figures = {name: setting.values(split, name) for split, name, _ in COLUMNS.values()}
    return {"setting": setting.label, "runs": [run.folder.name for run in setting.runs],
            "seeds": [run.seed for run in setting.runs], "accuracies": accuracies.tolist(),
            "accuracy": float(accuracies.mean()),
            "accuracy_sd": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else None,
            "accuracy_ci95": list(accuracy_interval(setting.correct)),
            **{name: float(np.mean(values)) if values else None for name, values in figures.items()},
            "published": setting.published}


def _pair(pair: Pair) -> dict[str, Any]:
    return asdict(pair) | {"is_shown": pair.is_shown, "sentence": sentence(pair)}


def _conditions(results: Sequence[Result]) -> list[str]:
    """On which data, with which machines and versions the runs were done."""
    data, tested = results[0].config.data_config, len(results[0].predicted)
    dataset = Path(data.dataset).name if Path(data.dataset).exists() else data.dataset
    limit = f", limited to {data.limit:,} rows" if data.limit else ""
    lines = [f"Data: {dataset}, split {data.split}, split_seed {data.split_seed}{limit}; all runs were tested on the "
             f"same {tested:,} reviews with the weights that were best on validation."]
    places = {f"{found.get('device_name')} ({found.get('device')}, {found.get('precision')}, "
              f"{found.get('processes')} process(es), {found.get('threads')} thread(s)), torch {found.get('torch')}, "
              f"transformers {found.get('transformers')}, commit {str(found.get('git_commit'))[:10]}"
              for found in (run.metrics.get("environment", {}) for run in results)}
    lines.append("Measured on: " + "; ".join(sorted(places)) + ".")
    if len(places) > 1:
        lines.append("The runs come from different machines or versions: time, memory and reviews a second do not "
                     "compare, and small differences of accuracy may come from there.")
    return lines


def _disagreements(results: Sequence[Result]) -> np.ndarray:
    """(some,) the places of the test reviews that not all runs put into the same class."""
    predicted = np.stack([run.predicted for run in results])
    return np.flatnonzero((predicted != predicted[0]).any(axis=0))


# ---------------------------------------------------------------------------------------------------------------------
# Tables of text


def tables(summary: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """(the settings, the published figures): rows of text with their headings first; the latter may be empty."""
    rows = [["setting", "seeds", "test accuracy", "95 % interval", *COLUMNS]]
    for row in summary["settings"]:
        spread = f" ± {row['accuracy_sd']:.4f}" if row["accuracy_sd"] is not None else ""
        interval = "{:.4f} to {:.4f}".format(*row["accuracy_ci95"])
        rows.append([row["setting"], str(len(row["seeds"])), f"{row['accuracy']:.4f}{spread}", interval,
                     *("-" if row[name] is None else format(row[name], style) for _, name, style in COLUMNS.values())])
    sources = list(dict.fromkeys(source for row in summary["settings"] for source in row["published"]))
    published = [["setting", "here", *sources]] if sources else []
    for row in summary["settings"] if sources else []:
        published.append([row["setting"], f"{row['accuracy']:.4f}",
                          *(f"{row['published'][source]:.4f}" if source in row["published"] else "-"
                            for source in sources)])
    return rows, published


def print_summary(summary: dict[str, Any]) -> None:
    if summary["demo"]:
        say(DEMO_WARNING)
    for rows in filter(None, tables(summary)):
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        for row in rows:
            say("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                      zip(row[1:], widths[1:], strict=True))]))
        say("")
    for pair in summary["pairs"]:
        say(pair["sentence"])
    say(_counts(summary))


def _counts(summary: dict[str, Any]) -> str:
    return (f"Of {summary['test_reviews']:,} test reviews, all runs get {summary['wrong_in_all_runs']:,} wrong, and on "
            f"{summary['runs_disagree']:,} they disagree.")


def markdown(summary: dict[str, Any], plots: Sequence[Path]) -> str:
    settings, published = tables(summary)
    lines = [f"# {summary['title']}", ""]
    lines += [f"> **{DEMO_WARNING}**", ""] * summary["demo"] + [summary["question"], ""] * bool(summary["question"])
    lines += [*_markdown_table(settings), "", LEGEND, ""]
    if published:
        lines += ["Published accuracies, each a single run without an interval, under its authors' conditions:", "",
                  *_markdown_table(published), ""]
    lines += [f"- {_escape(pair['sentence'])}" for pair in summary["pairs"]]
    lines += ["", _counts(summary) + " They are in `wrong_in_all_runs.csv` and `disagreements.csv`.", ""]
    lines += [f"![{path.stem.replace('_', ' ')}](plots/{path.name})\n" for path in plots]
    lines += [f"- {_escape(note)}" for note in summary["notes"]]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_report(folder: Path, summary: dict[str, Any], settings: Sequence[Setting]) -> None:
    """report.md, report.html, comparison.json, two CSV files and plots/."""
    results = [run for setting in settings for run in setting.runs]
    folder.mkdir(parents=True, exist_ok=True)
    found = texts(results)
    columns = [(f"{setting.label}, seed {run.seed}", run) for setting in settings for run in setting.runs]
    wrong = np.stack([~run.correct for run in results])
    _write_reviews(folder / "wrong_in_all_runs.csv", columns, np.flatnonzero(wrong.all(axis=0)), found)
    _write_reviews(folder / "disagreements.csv", columns, _disagreements(results), found)
    plots = try_plots("suite.comparison.plots", folder / "plots", summary, settings)
    with atomic_write(folder / "report.md") as file:
        file.write(markdown(summary, plots))
    write_page(folder / "report.html", summary, settings, plots, found, tables(summary), LEGEND,
               DEMO_WARNING if summary["demo"] else "")
    write_json(folder / "comparison.json", summary)


def _write_reviews(path: Path, columns: Sequence[tuple[str, Result]], places: np.ndarray, found: dict[int, str]
                   ) -> None:
    """id, text, label, and for each run the predicted class and its confidence; `places`: rows of the test split."""
    first = columns[0][1]
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", *(f"{name}: {what}" for name, _ in columns
                                                  for what in ("predicted", "confidence"))])
        for place in places:
            review = int(first.predictions.ids[place])
            answers = [(run.label_names[run.predicted[place]], f"{run.predictions.confidence[place]:.6f}")
                       for _, run in columns]
            writer.writerow([review, found.get(review, ""), first.label_names[first.predictions.labels[place]],
                             *(value for answer in answers for value in answer)])
