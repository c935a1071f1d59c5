"""Compare finished runs and report: on the console, and in a folder as Markdown, web page, JSON, CSV and plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.storage import atomic_write, write_json
from suite.comparison.report_folder import SUMMARY, refuse_foreign_report
from suite.comparison.report_page import write_page
from suite.comparison.results import Setting, group, read_results, refuse_different_tests, texts
from suite.comparison.summary import LEGEND, PUBLISHED, counts, hard_reviews, published_table, settings_table, summarize
from suite.training.tracking import try_plots
from utils import DEMO_WARNING, Config, say


def compare_runs(folders: Sequence[Path], output: Path, title: str, question: str = "", notes: Sequence[str] = (),
                 published: Mapping[Path, dict[str, float]] | None = None, base: Config | None = None) -> None:
    """Compare the runs in these folders, print the summary, and write the report into the folder `output`.

    `published`: {run folder: {source: accuracy}}, figures of others to show beside a run's setting. `base`: the
    configuration of an experiment's first setting. Raises UserError if the runs are not finished or cannot be compared,
    or if `output` holds other files.
    """
    refuse_foreign_report(output)
    runs = read_results(folders)
    refuse_different_tests(runs)
    settings = group(runs, base)
    for setting in settings:
        setting.published = (published or {}).get(setting.runs[0].folder, {})
    summary = summarize(settings, title, question, notes)
    print_summary(summary)
    write_report(output, summary, settings)
    say(f"the report: {output / 'report.html'}")


def print_summary(summary: dict[str, Any]) -> None:
    if summary["demo"]:
        say(DEMO_WARNING)
    for rows in filter(None, (settings_table(summary), published_table(summary))):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            say("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
        say("")
    for pair in summary["pairs"]:
        say(pair["sentence"])
    say(counts(summary))


def write_report(folder: Path, summary: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Write comparison.json, report.md, report.html, two CSV files and plots/."""
    runs = [run for setting in settings for run in setting.runs]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SUMMARY, summary)
    found = texts(runs)
    for name, places in hard_reviews(runs).items():
        _write_reviews(folder / f"{name}.csv", settings, places, found)
    plots = try_plots("suite.comparison.plots", folder / "plots", summary, settings)
    with atomic_write(folder / "report.md") as file:
        file.write(markdown(summary, plots))
    write_page(folder / "report.html", summary, settings, plots, found)


def _write_reviews(path: Path, settings: Sequence[Setting], places: np.ndarray, found: dict[int, str]) -> None:
    """One row for each of these places in the test split: id, text, label, and every run's class and confidence."""
    runs = {f"{setting.label}, seed {run.seed}": run for setting in settings for run in setting.runs}
    first, *_ = runs.values()
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label",
                         *(f"{name}: {what}" for name in runs for what in ("predicted", "confidence"))])
        for place in places:
            review = int(first.predictions.ids[place])
            row = [review, found.get(review, ""), first.label_names[first.predictions.labels[place]]]
            for run in runs.values():
                row += [run.label_names[run.predicted[place]], f"{run.predictions.probabilities[place].max():.6f}"]
            writer.writerow(row)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(summary: dict[str, Any], plots: Sequence[Path]) -> str:
    lines = [f"# {summary['title']}", ""]
    if summary["demo"]:
        lines += [f"> **{DEMO_WARNING}**", ""]
    if summary["question"]:
        lines += [summary["question"], ""]
    lines += [*_markdown_table(settings_table(summary)), "", LEGEND, ""]
    if published := published_table(summary):
        lines += [PUBLISHED, "", *_markdown_table(published), ""]
    lines += [f"- {_escape(pair['sentence'])}" for pair in summary["pairs"]]
    lines += ["", counts(summary) + " They are in `wrong_in_all_runs.csv` and `disagreements.csv`.", ""]
    lines += [f"![{path.stem.replace('_', ' ')}](plots/{path.name})\n" for path in plots]
    lines += [f"- {_escape(note)}" for note in summary["notes"]]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
