"""The plots that compare several settings, each with its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from suite.comparison.results import Setting
from suite.training.evaluation import calibration
from suite.training.plots import BLUE, COLOURS, DASHES, GREY, ORANGE, plain, save_figures


def save_plots(folder: Path, summary: dict[str, Any], settings: Sequence[Setting]) -> list[Path]:
    """Write accuracy.png, learning_curves.png and reliability.png; returns their paths. `summary`: as report.py has."""
    heading = settings[0].runs[0].config.demo_mark + "{}"
    figures = {"accuracy": plot_accuracies(summary, heading), "learning_curves": plot_curves(settings, heading),
               "reliability": plot_reliabilities(settings, heading)}
    return save_figures(folder, figures)


def plot_accuracies(summary: dict[str, Any], heading: str) -> Figure:
    """Mean accuracies with their intervals, the seeds behind them, and published figures."""
    rows = summary["settings"]
    sources = list(dict.fromkeys(source for row in rows for source in row["published"]))
    figure = Figure(figsize=(9, 1.8 + 0.55 * len(rows) + 0.25 * len(sources)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        mean, (low, high) = row["accuracy"], row["accuracy_ci95"]
        label = {} if place else {"label": "mean over seeds, with its 95 % interval"}
        axis.errorbar(100 * mean, place, xerr=[[100 * (mean - low)], [100 * (high - mean)]], fmt="o", color=BLUE,
                      markersize=8, capsize=4, linewidth=2, **label)
        if len(row["seeds"]) > 1:
            label = {} if place else {"label": "one seed"}
            axis.plot(100 * np.array(row["accuracies"]), np.full(len(row["seeds"]), place - 0.18), "|", color=BLUE,
                      markersize=9, markeredgewidth=1.5, linestyle="none", **label)
        for source, marker in zip(sources, "DsvP^<>X*" * len(sources), strict=False):
            if source in row["published"]:
                known = f"published: {source}" in axis.get_legend_handles_labels()[1]
                axis.plot(100 * row["published"][source], place + 0.2, marker, color=ORANGE, markersize=6,
                          markerfacecolor="none", linestyle="none", label=None if known else f"published: {source}")
    axis.set_yticks(range(len(rows)), [plain(row["setting"]) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("test accuracy (% of reviews)")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(heading.format(f"accuracy on {summary['test_reviews']:,} test reviews"), fontsize=10)
    return figure


def plot_curves(settings: Sequence[Setting], heading: str) -> Figure:
    """Means over seeds, in bands from the lowest to the highest seed."""
    figure = Figure(figsize=(10, 4.4 + 0.2 * len(settings)), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, name in ((axes[0], "train/loss", "training cross-entropy (nats)"),
                            (axes[1], "valid/accuracy", "validation accuracy (% of reviews)")):
        scale = 100 if "accuracy" in key else 1
        for number, setting in enumerate(settings):
            points: dict[float, list[float]] = {}
            for record in (record for run in setting.runs for record in run.history if key in record):
                points.setdefault(record["epoch"], []).append(scale * record[key])
            epochs = sorted(points)
            style = {"color": COLOURS[number % len(COLOURS)]}
            axis.fill_between(epochs, [min(points[epoch]) for epoch in epochs],
                              [max(points[epoch]) for epoch in epochs], alpha=0.15, linewidth=0, **style)
            if len(epochs) == 1:  # a line of one point would not be seen, nor a band
                axis.plot(epochs * len(points[epochs[0]]), points[epochs[0]], "_", markersize=12, **style)
            axis.plot(epochs, [np.mean(points[epoch]) for epoch in epochs], label=plain(setting.label),
                      linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
                      marker="o" if scale == 100 else None, linewidth=1.5, **style)
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(heading.format("learning curves: mean over seeds, and the band between the lowest and the highest"),
                    fontsize=10)
    return figure


def plot_reliabilities(settings: Sequence[Setting], heading: str) -> Figure:
    """A panel a setting: accuracy against confidence, all seeds pooled, and each seed behind them."""
    columns = 2 if len(settings) == 4 else min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 3.4 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low = 100 / len(settings[0].runs[0].label_names)  # no prediction is less confident than an even guess
    for axis, setting in zip(axes.flat, settings, strict=False):
        axis.plot([low, 100], [low, 100], color=GREY, linestyle="--", label="perfectly calibrated")
        found = [calibration(run.predictions)[1:] for run in setting.runs]
        for place, (accuracies, confidences, counts) in enumerate(found):
            axis.plot(100 * confidences[counts > 0], 100 * accuracies[counts > 0], color=BLUE, alpha=0.3, linewidth=1,
                      label=None if place else "one seed")
        counts = sum(count for *_, count in found)
        filled = counts > 0
        pooled = [100 * sum(count * part[index] for part, count in zip(found, (part[2] for part in found), strict=True))
                  [filled] / counts[filled] for index in (0, 1)]
        axis.plot(pooled[1], pooled[0], color=BLUE, marker="o", markersize=4, label="all seeds")
        error = np.mean(setting.values("test", "ece"))
        axis.set_title(f"{plain(setting.label)}\nexpected calibration error {100 * error:.1f} points", fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_xlim(low, 100)
    for axis in axes.flat[len(settings):]:
        axis.set_visible(False)
    for number, axis in enumerate(axes.flat[:len(settings)]):
        if number + columns >= len(settings):  # nothing below it
            axis.set_xlabel("confidence (%)")
            axis.tick_params(labelbottom=True)
        if number % columns == 0:
            axis.set_ylabel("accuracy (% of reviews)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
                  fontsize=9)
    figure.suptitle(heading.format(f"reliability on {len(settings[0].runs[0].predicted):,} test reviews"), fontsize=10)
    return figure
