"""The plots that compare several settings, each with its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from suite.comparison.results import Setting
from suite.training.evaluation import SPLITS, Calibration
from suite.training.plots import BLUE, GREY, ORANGE, new_figure, no_formula, save_figures

COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # distinct for the colour-blind, too
DASHES = ("-", "--", ":", "-.")  # the next one each time the colours have run out


def save_plots(folder: Path, summary: dict[str, Any], settings: Sequence[Setting]) -> list[Path]:
    """Write accuracy.png, learning_curves.png and reliability.png; returns their paths. `summary`: see `summarize`."""
    figures = {"accuracy": plot_accuracies(summary, settings), "learning_curves": plot_curves(settings),
               "reliability": plot_reliabilities(settings)}
    return save_figures(folder, figures)


def legend_below(figure: Figure, axis: Axes, columns: int = 2) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False,
                  fontsize=9)


def plot_accuracies(summary: dict[str, Any], settings: Sequence[Setting]) -> Figure:
    """Each setting's mean accuracy with its interval, the accuracies of its seeds, and published ones."""
    rows = summary["settings"]
    sources = list(dict.fromkeys(source for row in rows for source in row["published"]))
    figure = new_figure(settings[0].runs[0].config, f"accuracy on {summary['reviews']:,} {summary['split']} reviews",
                        (9, 1.8 + 0.55 * len(rows) + 0.25 * len(sources)))
    axis = figure.subplots()
    for place, row in enumerate(rows):
        mean, (low, high) = row["accuracy"], row["accuracy_ci95"]
        axis.errorbar(100 * mean, place, xerr=[[100 * (mean - low)], [100 * (high - mean)]], fmt="o", color=BLUE,
                      markersize=8, capsize=4, linewidth=2,
                      label=None if place else "mean over seeds, with its 95 % interval")
        if len(row["seeds"]) > 1:
            axis.plot(100 * np.array(row["accuracies"]), np.full(len(row["seeds"]), place - 0.18), "|", color=BLUE,
                      markersize=9, markeredgewidth=1.5, linestyle="none", label=None if place else "one seed")
        for source, marker in zip(sources, "DsvP^<>X*" * len(sources), strict=False):
            if source in row["published"]:
                known = f"published: {source}" in axis.get_legend_handles_labels()[1]
                axis.plot(100 * row["published"][source], place + 0.2, marker, color=ORANGE, markersize=6,
                          markerfacecolor="none", linestyle="none", label=None if known else f"published: {source}")
    axis.set_yticks(range(len(rows)), [no_formula(row["setting"]) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"{summary['split']} accuracy (% of reviews)")
    axis.grid(axis="x", alpha=0.3)
    legend_below(figure, axis)
    return figure


def plot_curves(settings: Sequence[Setting]) -> Figure:
    """A line for the mean over seeds, in a band from the lowest to the highest seed."""
    figure = new_figure(settings[0].runs[0].config, "learning curves: mean over seeds, and the band between the lowest "
                        "and the highest", (10, 4.4 + 0.2 * len(settings)))
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
            if len(epochs) == 1:  # neither a line nor a band of one point is visible
                axis.plot(epochs * len(points[epochs[0]]), points[epochs[0]], "_", markersize=12, **style)
            axis.plot(epochs, [np.mean(points[epoch]) for epoch in epochs], label=no_formula(setting.label),
                      linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
                      marker="o" if scale == 100 else None, linewidth=1.5, **style)
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    legend_below(figure, axes[1])
    return figure


def plot_reliabilities(settings: Sequence[Setting]) -> Figure:
    """A panel for each setting: accuracy against confidence, of all seeds together and of each seed."""
    columns = 2 if len(settings) == 4 else min(3, len(settings))
    rows = -(-len(settings) // columns)
    first = settings[0].runs[0]
    figure = new_figure(first.config, f"reliability on {len(first.predicted):,} {SPLITS[first.split]} reviews",
                        (3.4 * columns + 0.6, 3.4 * rows + 0.9))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low = 100 / len(first.label_names)  # no prediction is less confident than an even guess
    for axis, setting in zip(axes.flat, settings, strict=False):
        axis.plot([low, 100], [low, 100], color=GREY, linestyle="--", label="perfectly calibrated")
        seeds = [Calibration(run.predictions) for run in setting.runs]
        for place, bins in enumerate(seeds):
            filled = bins.counts > 0
            axis.plot(100 * bins.confidences[filled], 100 * bins.accuracies[filled], color=BLUE, alpha=0.3, linewidth=1,
                      label=None if place else "one seed")
        counts = sum(bins.counts for bins in seeds)
        filled = counts > 0
        confidences = 100 * sum(bins.counts * bins.confidences for bins in seeds)[filled] / counts[filled]
        accuracies = 100 * sum(bins.counts * bins.accuracies for bins in seeds)[filled] / counts[filled]
        axis.plot(confidences, accuracies, color=BLUE, marker="o", markersize=4, label="all seeds")
        error = np.mean(setting.figures(first.split, "ece"))
        axis.set_title(f"{no_formula(setting.label)}\nexpected calibration error {100 * error:.1f} points", fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_xlim(low, 100)
    for axis in axes.flat[len(settings):]:
        axis.set_visible(False)
    for number, axis in enumerate(axes.flat[:len(settings)]):
        if number + columns >= len(settings):  # no panel below this one
            axis.set_xlabel("confidence (%)")
            axis.tick_params(labelbottom=True)
        if number % columns == 0:
            axis.set_ylabel("accuracy (% of reviews)")
    legend_below(figure, axes.flat[0], columns=3)
    return figure
