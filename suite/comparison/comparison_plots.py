"""The plots that compare several settings, each with its seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.comparison.results import Setting
from suite.training.evaluation import SPLITS, Predictions, ReliabilityBins
from suite.training.plots import (
    BLUE,
    ORANGE,
    draw_diagonal,
    new_figure,
    no_formula,
    over_epochs,
    points_of,
    save_figures,
)

COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # distinct for the colour-blind, too
LONG_LABEL = 40  # characters; two longer ones do not fit side by side
DASHES = ("-", "--", ":", "-.")  # the next one each time the colours have run out


def save_plots(folder: Path, summary: dict[str, Any], settings: Sequence[Setting]) -> list[Path]:
    """Write accuracy.png, learning_curves.png, reliability.png and, where training sizes differ, data_size.png; returns
    their paths. `summary`: see `summarize`."""
    figures = {"accuracy": plot_accuracies(summary, settings), "learning_curves": plot_curves(settings),
               "reliability": plot_reliabilities(settings)}
    if summary["data_size"]:
        figures["data_size"] = plot_sizes(summary, settings)
    return save_figures(folder, figures)


def legend_below(figure: Figure, axis: Axes, columns: int = 2) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > LONG_LABEL else columns
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def plot_accuracies(summary: dict[str, Any], settings: Sequence[Setting]) -> Figure:
    """Each setting's mean accuracy with its interval, the accuracies of its seeds, and published ones."""
    rows = summary["settings"]
    sources = list(dict.fromkeys(source for row in rows for source in row["published"]))
    figure = new_figure(settings[0].runs[0].config, f"accuracy on {summary['reviews']:,} {summary['split']} reviews",
                        (9, 1.8 + 0.55 * len(rows) + 0.25 * len(sources)))
    axis = figure.subplots()
    places = np.arange(len(rows))
    means = np.array([row["accuracy"] for row in rows])
    low, high = np.transpose([row["accuracy_ci95"] for row in rows])
    axis.errorbar(100 * means, places, xerr=100 * np.stack([means - low, high - means]), fmt="o", color=BLUE,
                  markersize=8, capsize=4, linewidth=2, label="mean over seeds, with its 95 % interval")
    seeds = [(100 * accuracy, place - 0.18) for place, row in enumerate(rows) for accuracy in row["accuracies"]]
    axis.plot(*zip(*seeds, strict=True), "|", color=BLUE, markersize=9, markeredgewidth=1.5, label="one seed")
    for source, marker in zip(sources, itertools.cycle("DsvP^<>X*")):
        points = [(100 * row["published"][source], place + 0.2) for place, row in enumerate(rows)
                  if source in row["published"]]
        axis.plot(*zip(*points, strict=True), marker, color=ORANGE, markersize=6, markerfacecolor="none",
                  label=f"published: {source}")
    axis.set_yticks(places, [no_formula(row["setting"]) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"{summary['split']} accuracy (% of reviews)")
    axis.grid(axis="x", alpha=0.3)
    legend_below(figure, axis)
    return figure


def plot_sizes(summary: dict[str, Any], settings: Sequence[Setting]) -> Figure:
    """Accuracy against the number of training reviews: a line for each kind of model, and its power law, dashed, up to
    twice the largest size."""
    curves = summary["data_size"]["curves"]
    figure = new_figure(settings[0].runs[0].config, "accuracy against training reviews, with 95 % intervals\ndashed: a "
                        "power law, and what it expects of twice the data", (9, 5 + 0.2 * len(curves)))
    axis, sizes, heights = figure.subplots(), set(), []

    def draw(points: Sequence[dict[str, Any]], **style: Any) -> np.ndarray:
        x, y = [point["trained_on"] for point in points], 100 * np.array([point["accuracy"] for point in points])
        low, high = 100 * np.transpose([point["accuracy_ci95"] for point in points])
        axis.errorbar(x, y, yerr=[y - low, high - y], capsize=3, **style)
        sizes.update(x)
        return np.concatenate([y, low, high])

    for curve, colour in zip(curves, itertools.cycle(COLOURS)):
        points, law = curve["points"], curve["law"]
        heights += draw(points, fmt="o-", color=colour, label=no_formula(curve["model"])).tolist()
        if law:
            line = np.geomspace(points[0]["trained_on"], law["twice"]["trained_on"], 100)
            axis.plot(line, 100 * (1 - law["factor"] * line**-law["exponent"]), "--", color=colour, linewidth=1)
            forecast = draw([law["twice"]], fmt="s", color=colour, markerfacecolor="none")
            heights.append(forecast[0])  # the interval of few sizes is wide, and may leave the frame
    axis.set_xscale("log")
    axis.set_xticks(sorted(sizes), [f"{size:,}" for size in sorted(sizes)], rotation=30)
    axis.minorticks_off()
    room = 0.05 * (max(heights) - min(heights)) + 0.1
    axis.set_ylim(min(heights) - room, max(heights) + room)
    axis.set_xlabel("training reviews")
    axis.set_ylabel(f"{summary['split']} accuracy (% of reviews)")
    axis.grid(alpha=0.3)
    legend_below(figure, axis)
    return figure


def plot_curves(settings: Sequence[Setting]) -> Figure:
    """A line for the mean over seeds, in a band from the lowest to the highest seed."""
    figure = new_figure(settings[0].runs[0].config, "learning curves: mean over seeds, and the band between the lowest "
                        "and the highest", (10, 4.4 + 0.2 * len(settings)))
    axes = figure.subplots(1, 2)
    for axis, key, scale, name in ((axes[0], "train/loss", 1, "training cross-entropy (nats)"),
                                   (axes[1], "valid/accuracy", 100, "validation accuracy (% of reviews)")):
        for number, setting in enumerate(settings):
            points: dict[float, list[float]] = {}
            for record in (record for run in setting.runs for record in run.history if key in record):
                points.setdefault(record["epoch"], []).append(scale * record[key])
            epochs, colour = sorted(points), COLOURS[number % len(COLOURS)]
            lowest, mean, highest = ([of(points[epoch]) for epoch in epochs] for of in (min, np.mean, max))
            axis.fill_between(epochs, lowest, highest, alpha=0.15, linewidth=0, color=colour)
            axis.plot(epochs, mean, label=no_formula(setting.label), color=colour, linewidth=1.5,
                      linestyle=DASHES[number // len(COLOURS) % len(DASHES)], marker="o" if scale == 100 else None)
        axis.set_ylabel(name)
        over_epochs(axis)
    legend_below(figure, axes[1])
    return figure


def plot_reliabilities(settings: Sequence[Setting]) -> Figure:
    """A panel for each setting: accuracy against confidence, of all seeds together and of each seed."""
    columns = 2 if len(settings) == 4 else min(3, len(settings))
    rows = -(-len(settings) // columns)
    first = settings[0].runs[0]
    figure = new_figure(first.config, f"reliability on {len(first.predicted):,} {SPLITS[first.split]} reviews",
                        (3.4 * columns + 0.6, 3.4 * rows + 0.9))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, setting in zip(axes.flat, settings, strict=False):
        seeds = [run.predictions for run in setting.runs]
        together = Predictions(*(np.concatenate([getattr(seed, name) for seed in seeds])
                                 for name in ("ids", "labels", "logits")))
        draw_diagonal(axis, len(first.label_names))
        for number, seed in enumerate(seeds):
            axis.plot(*points_of(ReliabilityBins(seed)), color=BLUE, alpha=0.3, linewidth=1,
                      label=None if number else "one seed")
        axis.plot(*points_of(ReliabilityBins(together)), color=BLUE, marker="o", markersize=4, label="all seeds")
        error = np.mean(setting.figures(first.split, "ece"))
        axis.set_title(f"{no_formula(setting.label)}\nexpected calibration error {100 * error:.1f} points", fontsize=9)
        axis.set_xlabel("confidence (%)")
    for axis in axes.flat[len(settings):]:
        axis.set_visible(False)
    figure.supylabel("accuracy (% of reviews)", fontsize=10)
    legend_below(figure, axes.flat[0], columns=3)
    return figure
