"""Compare finished runs and report: on the console, and in a folder as Markdown, web page, JSON, CSV and plots."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.figures import show
from suite.common.pages import render
from suite.common.run_folder import read_saved_config
from suite.common.storage import atomic_write, remove, write_json, write_text
from suite.comparison.data_size import ABOUT
from suite.comparison.results import (
    Setting,
    group_by_setting,
    groups_of,
    read_result,
    read_results,
    refuse_different_tests,
    wrong_texts,
)
from suite.comparison.running import LOGS
from suite.comparison.significance import compare, sentence
from suite.comparison.summary import LEGEND, PUBLISHED, counts, hard_reviews, published_table, settings_table, summarize
from suite.training.finish import try_plots
from utils import BAG_OF_WORDS, DEMO_WARNING, Config, UserError, process_rank, say

SUMMARY = "comparison.json"  # written first: it tells that the folder holds a report
MOST_REVIEWS = 5000  # on the page, those that most runs get wrong; a review of IMDB takes 1.3 kB


def compare_runs(folders: Sequence[Path], output: Path, title: str, question: str = "", notes: Sequence[str] = (),
                 published: Mapping[Path, dict[str, float]] | None = None, on_validation: bool = False) -> None:
    """Compare the runs in these folders, print the summary, and write the report into the folder `output`.

    `published`: {run folder: {source: accuracy}}, figures of others to show beside a run's setting. Raises UserError if
    the runs are not finished or cannot be compared, or if `output` holds other files.
    """
    refuse_other_files(output)
    runs = read_results(folders, on_validation)
    refuse_different_tests(runs)
    settings = group_by_setting(runs)
    for setting in settings:
        setting.published = (published or {}).get(setting.runs[0].folder, {})
    summary = summarize(settings, title, question, notes)
    print_summary(summary)
    write_report(output, summary, settings)
    say(f"the report: {output / 'report.html'}")


def refuse_other_files(folder: Path) -> None:
    """Raises UserError if a report would come among the files of something else."""
    found = {path.name for path in folder.glob("[!.]*")} - {LOGS}  # an experiment writes them before there is a report
    if folder.is_file() or found and SUMMARY not in found:
        raise UserError(f"{folder} holds files that are not of a report: name another folder, by --output of "
                        "compare.py or name in the experiment's file")


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
    for curve in (summary["data_size"] or {}).get("curves", ()):
        say(curve["sentence"])
    say(counts(summary))


def write_report(folder: Path, summary: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Write comparison.json, report.md, report.html, two CSV files and plots/.

    The web page is one file that needs neither a server nor the network. Its own security policy forbids it to load
    anything, and its script shows the reviews by `textContent`: as text, whatever they contain.
    """
    runs = [run for setting in settings for run in setting.runs]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SUMMARY, summary)
    found = wrong_texts(runs)
    for name, places in hard_reviews(runs).items():
        _write_reviews(folder / f"{name}.csv", settings, places, found)
    remove(folder / "plots")  # those of an earlier report, which may have had others
    plots = try_plots("suite.comparison.comparison_plots", folder / "plots", summary, settings)
    words = {"data_size": summary["data_size"]["words"]} if summary["data_size"] else {}
    shared = {"summary": summary, "settings": settings_table(summary), "published": published_table(summary),
              "legend": LEGEND, "about_published": PUBLISHED, "counts": counts(summary),
              "about_sizes": ABOUT,
              "plots": [{"file": path.name, "alt": words.get(path.stem, path.stem.replace("_", " ")),
                         "base64": base64.b64encode(path.read_bytes()).decode()} for path in plots]}
    write_text(folder / "report.md", render("report.md", **shared))
    write_text(folder / "report.html", render("report.html", **shared, **_wrong_reviews(settings, found)))


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


def _wrong_reviews(settings: Sequence[Setting], found: dict[int, str]) -> dict[str, Any]:
    """What the page's script shows: the reviews that at least one run gets wrong, first those that most runs do; and
    how many are left out (`skipped`). `found`: {id: text}."""
    runs = [run for setting in settings for run in setting.runs]
    wrong = np.stack([~run.correct for run in runs])  # (runs, reviews)
    confidence = np.stack([run.predictions.confidence for run in runs])
    times = wrong.sum(axis=0)  # (reviews,) how many runs get it wrong
    order = np.lexsort((-(wrong * confidence).sum(axis=0), -times))[:np.count_nonzero(times)]
    ids, labels = runs[0].predictions.ids.tolist(), runs[0].predictions.labels.tolist()
    rows = [{"id": ids[place], "label": labels[place], "text": found.get(ids[place], ""),
             "answers": [[int(run.predicted[place]), round(float(sure[place]), 3)]
                         for run, sure in zip(runs, confidence, strict=True)]} for place in order[:MOST_REVIEWS]]
    return {"reviews": {"classes": runs[0].label_names, "rows": rows,
                        "settings": [setting.label for setting in settings],
                        "runs": [{"setting": number, "seed": run.seed} for number, setting in enumerate(settings)
                                 for run in setting.runs]},
            "skipped": max(0, len(order) - MOST_REVIEWS)}


# ---------------------------------------------------------------------------------------------------------------------
# At the end of a training run: is the encoder worth its price?


def show_baseline(config: Config) -> None:
    """Print what a finished bag of words of the same split gets right, and how the finished run compares with it.

    It is looked for in the other run folders of output_dir. Whatever these hold, the run has ended well.
    """
    if process_rank() > 0 or not config.train_config.test:
        return
    run = read_result(config.run_folder)
    for path in sorted(Path(config.output_dir).glob("*/config.yaml")):
        with suppress(Exception):
            saved = read_saved_config(path)
            if (saved.model_config.model_name == BAG_OF_WORDS
                    and saved.data_config.train_limit == config.data_config.train_limit):
                words = read_result(path.parent)
                refuse_different_tests([run, words])
                break
    else:
        return
    [pair] = compare([BAG_OF_WORDS, config.run_name], [words.correct[None], run.correct[None]],
                     groups_of([run, words]))
    say(f"{config.demo_mark}a bag of words on the same reviews, {words.folder}: test accuracy "
        f"{show(words.metrics['test'], 'accuracy')}, {show(words.metrics['train'], 'seconds')} s of training\n"
        f"{config.demo_mark}{sentence(pair)}")
