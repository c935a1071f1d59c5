"""A comparison of settings as data, and as tables and sentences that the console, Markdown and web page share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.figures import heading, show, shown_in
from suite.comparison.data_size import data_size
from suite.comparison.results import TRAIN_AGAIN, Result, Setting, groups_of
from suite.comparison.significance import accuracy_interval, compare, sentence
from suite.training.evaluation import SPLITS

COLUMNS = shown_in("table")  # besides the accuracy and its interval
LEGEND = (
    "Accuracy: mean over seeds ± their standard deviation. Its interval allows for other reviews and, where there "
    "are several seeds, for other seeds. The other columns are means over seeds. A calibration error of 0 is best. "
    "Training time is that of the optimizer steps alone.")
PUBLISHED = "Each published figure is the accuracy of a single run without an interval, under its authors' conditions."


def summarize(settings: Sequence[Setting], title: str, question: str = "", notes: Sequence[str] = ()) -> dict[str, Any]:
    """The contents of comparison.json. Accuracies and differences are shares of reviews."""
    runs = [run for setting in settings for run in setting.runs]
    config, hard = runs[0].config, hard_reviews(runs)
    groups = groups_of(runs)
    rows = [_row(setting, groups) for setting in settings]
    pairs = compare([setting.label for setting in settings], [setting.correct for setting in settings],
                    groups)
    return {
        "title": config.demo_mark + title, "question": question, "demo": config.is_demo,
        "split": SPLITS[runs[0].split], "reviews": len(runs[0].predicted),
        "settings": rows, "data_size": data_size(settings, rows),
        "pairs": [asdict(pair) | {"is_shown": pair.is_shown, "sentence": sentence(pair)} for pair in pairs],
        "wrong_in_all_runs": len(hard["wrong_in_all_runs"]), "runs_disagree": len(hard["disagreements"]),
        "notes": [*notes, *_conditions(runs, groups)]}


def _row(setting: Setting, groups: np.ndarray | None) -> dict[str, Any]:
    accuracies = setting.correct.mean(axis=1)
    figures = {name: setting.figures("train" if figure.section == "train" else setting.runs[0].split, name)
               for name, figure in COLUMNS.items()}
    return {"setting": setting.label, "runs": [run.folder.name for run in setting.runs],
            "seeds": [run.seed for run in setting.runs],
            "trained_on": setting.runs[0].metrics.get("data", {}).get("train"), "accuracies": accuracies.tolist(),
            "accuracy": float(accuracies.mean()),
            "accuracy_sd": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else None,
            "accuracy_ci95": list(accuracy_interval(setting.correct, groups)),
            **{name: float(np.mean(values)) if values else None for name, values in figures.items()},
            "published": setting.published}


def _conditions(runs: Sequence[Result], groups: np.ndarray | None) -> list[str]:
    """Sentences about the data, machines and versions that the runs were done with."""
    data = runs[0].config.data_config
    dataset = Path(data.dataset).name if Path(data.dataset).exists() else data.dataset
    limit = f", limited to {data.limit:,} rows" if data.limit else ""
    if data.train_limit and len({run.train_limit for run in runs}) == 1:
        limit += f", train_limit {data.train_limit:,}"
    whole = f", each {data.group_column} in one part" if data.group_column else ""
    lines = [f"Data: {dataset}, split {data.split}{whole}, split_seed {data.split_seed}{limit}. All runs were "
             f"measured on the same {len(runs[0].predicted):,} {SPLITS[runs[0].split]} reviews with the weights that "
             "were best on validation."]
    if runs[0].split == "valid":
        lines.append("The runs are compared on validation, where the best epochs and settings were chosen. The figure "
                     "to report is that of a test, which also saves the texts of wrong reviews: they are missing here.")
    if groups is not None:
        lines.append(f"The reviews are of {len(np.unique(groups)):,} groups. Those of one "
                     f"{data.group_column or 'text'} may resemble each other, so intervals and tests count whole ones.")
    elif data.group_column:
        again = TRAIN_AGAIN if runs[0].split == "valid" else "test the runs again with --mode test"
        lines.append("The runs' predictions are of an earlier version and do not name the groups, so intervals and "
                     f"tests take the reviews as independent: {again}")
    places = {_place(found) for run in runs
              for found in (run.metrics.get("environment", {}), run.metrics.get("tested_on")) if found is not None}
    lines.append("Measured on: " + "; ".join(sorted(places)) + ".")
    if len(places) > 1:
        lines.append("The runs come from different machines, versions or precisions. Do not compare their time, memory "
                     "or reviews a second; small differences in accuracy may have the same cause.")
    return lines


def _place(environment: dict[str, Any]) -> str:
    """Where a run was trained or tested, as metrics.json says it."""
    found = defaultdict(lambda: None, environment)
    precision = "fp32" if found["precision"] == "no" else found["precision"]
    return (f"{found['device_name']} ({found['device']}, {precision}, {found['processes']} process(es), "
            f"{found['threads']} thread(s)), torch {found['torch']}, transformers {found['transformers']}, "
            + (f"numba {found['numba']}, " if found["numba"] else "") + f"commit {str(found['git_commit'])[:10]}")


def hard_reviews(runs: Sequence[Result]) -> dict[str, np.ndarray]:
    """The reviews that every run gets wrong, and those that not all runs put into the same class.

    Each value: (n,) int64, their places in the split.
    """
    return {"wrong_in_all_runs": np.flatnonzero(~np.any([run.correct for run in runs], axis=0)),
            "disagreements": np.flatnonzero(np.any([run.predicted != runs[0].predicted for run in runs], axis=0))}


def settings_table(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the headings first."""
    sizes = ["training reviews"] if summary["data_size"] else []
    rows = [["setting", *sizes, "seeds", f"{summary['split']} accuracy", "95 % interval", *map(heading, COLUMNS)]]
    for row in summary["settings"]:
        spread = f" ± {row['accuracy_sd']:.4f}" if row["accuracy_sd"] is not None else ""
        interval = "{:.4f} to {:.4f}".format(*row["accuracy_ci95"])
        trained_on = [f"{row['trained_on']:,}" for _ in sizes]
        rows.append([row["setting"], *trained_on, str(len(row["seeds"])), f"{row['accuracy']:.4f}{spread}", interval,
                     *(show(row, name) for name in COLUMNS)])
    return rows


def published_table(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the headings first; empty if nothing was published for these settings."""
    sources = list(dict.fromkeys(source for row in summary["settings"] for source in row["published"]))
    rows = [["setting", "here", *sources]]
    for row in summary["settings"]:
        figures = [f"{row['published'][source]:.4f}" if source in row["published"] else "-" for source in sources]
        rows.append([row["setting"], f"{row['accuracy']:.4f}", *figures])
    return rows if sources else []


def counts(summary: dict[str, Any]) -> str:
    return (f"Of {summary['reviews']:,} {summary['split']} reviews, all runs get {summary['wrong_in_all_runs']:,} "
            f"wrong, and on {summary['runs_disagree']:,} they disagree.")
