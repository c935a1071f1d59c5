"""The plots of a run: learning curves, confusion matrix, reliability, risk against coverage. The comparisons have their
style, too.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter
from sklearn.metrics import ConfusionMatrixDisplay

from suite.common.storage import atomic_write
from suite.training.evaluation import SUREST, Predictions, ReliabilityBins, risk_coverage, share_interval
from utils import Config

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"  # distinct for the colour-blind, too (Okabe and Ito)


def save_plots(folder: Path, config: Config, history: list[dict[str, Any]], predictions: Predictions,
               label_names: list[str]) -> list[Path]:
    """Write learning_curves.png, confusion_matrix.png, reliability.png and risk_coverage.png; returns their paths."""
    figures = {"learning_curves": plot_learning_curves(config, history),
               "confusion_matrix": plot_confusion_matrix(config, predictions, label_names),
               "reliability": plot_reliability(config, predictions),
               "risk_coverage": plot_risk_coverage(config, predictions)}
    return save_figures(folder, figures)


def save_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Write each figure as NAME.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with atomic_write(path, "wb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the name of a class in a script that the font lacks
            figure.savefig(file, format="png", dpi=150)
        paths.append(path)
    return paths


def new_figure(config: Config, title: str, size: tuple[float, float]) -> Figure:
    """An empty figure of (width, height) in inches, with a title that marks the demo's figures."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(config.demo_mark + title, fontsize=10)
    return figure


def no_formula(text: str) -> str:
    """The text as matplotlib has to get it: between two dollar signs, it would read a formula."""
    return text.replace("$", r"\$")


def over_epochs(axis: Axes) -> None:
    axis.set_xlabel("epoch")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def draw_diagonal(axis: Axes, classes: int) -> None:
    """On it, 80 % of the reviews with confidence 0.8 are right. It begins at an even guess, the least confidence."""
    axis.plot([100 / classes, 100], [100 / classes, 100], color=GREY, linestyle="--", label="perfectly calibrated")
    axis.set_xlim(100 / classes, 100)
    axis.grid(alpha=0.3)


def points_of(calibration: ReliabilityBins) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, accuracy) of each bin that is not empty, in percent."""
    filled = calibration.counts > 0
    return 100 * calibration.confidences[filled], 100 * calibration.accuracies[filled]


def plot_learning_curves(config: Config, history: list[dict[str, Any]]) -> Figure:
    figure = new_figure(config, f"learning curves\n{config.run_name}", (9, 4))
    steps = config.log_config.log_every_steps
    train = "train" + (f", mean of {steps} steps" if steps > 1 else "")
    train += ", weighted by class" if config.train_config.class_weights else ""
    for axis, metric, scale, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100),
                                         ("cross-entropy (nats)", "accuracy (% of reviews)"), strict=True):
        for key, label, style in ((f"train/{metric}", train, {"color": BLUE, "linewidth": 1}),
                                  (f"valid/{metric}", "validation", {"color": ORANGE, "marker": "o"})):
            points = [(record["epoch"], scale * record[key]) for record in history if key in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
                axis.legend()
        axis.set_ylabel(name)
        over_epochs(axis)
    return figure


def plot_confusion_matrix(config: Config, predictions: Predictions, label_names: list[str]) -> Figure:
    size = 4.5 + 0.5 * len(label_names)
    figure = new_figure(config, f"{len(predictions.labels):,} test reviews\n{config.run_name}", (size, size))
    axis = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        predictions.labels, predictions.predicted, labels=range(len(label_names)),
        display_labels=[no_formula(name) for name in label_names], ax=axis, cmap="Blues", values_format=",d",
        im_kw={"vmin": 0}, colorbar=False, xticks_rotation=45 if len(label_names) > 4 else "horizontal")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    return figure


def plot_reliability(config: Config, predictions: Predictions) -> Figure:
    """Accuracy against confidence, above the number of reviews with that confidence."""
    bins = ReliabilityBins(predictions)
    figure = new_figure(config, f"reliability on {bins.counts.sum():,} test reviews\n{config.run_name}", (5.5, 6))
    axis, histogram = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    draw_diagonal(axis, predictions.logits.shape[1])
    x, y = points_of(bins)
    is_right, groups = predictions.predicted == predictions.labels, predictions.groups
    in_bins = [bins.index == place for place in np.flatnonzero(bins.counts)]
    low, high = 100 * np.transpose([share_interval(is_right[rows], None if groups is None else groups[rows])
                                    for rows in in_bins])
    axis.errorbar(x, y, yerr=[y - low, high - y], color=BLUE, marker="o", elinewidth=1, capsize=2,
                  label=f"model, with 95 % intervals\n(expected calibration error {100 * bins.error:.1f} points)")
    axis.set_ylabel("accuracy (% of reviews)")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False)
    histogram.bar(100 * bins.edges[:-1], bins.counts, width=100 * np.diff(bins.edges), align="edge", color=BLUE,
                  edgecolor="white")
    histogram.set_xlabel("confidence: probability of the predicted class (%)")
    histogram.set_ylabel("reviews")
    histogram.set_yscale("log")  # most reviews are in the last bin; a linear scale would hide the others
    histogram.set_ylim(bottom=0.8)
    histogram.yaxis.set_major_formatter(ScalarFormatter())
    histogram.yaxis.set_minor_formatter(NullFormatter())
    return figure


def plot_risk_coverage(config: Config, predictions: Predictions) -> Figure:
    """The mistakes among the reviews that the model decides on, if it leaves those of lower confidence to a person."""
    risk = 100 * risk_coverage(predictions)
    coverage = 100 * np.arange(1, len(risk) + 1) / len(risk)
    figure = new_figure(config, f"mistakes among the surest of {len(risk):,} test reviews\n{config.run_name}", (5.5, 4))
    axis = figure.subplots()
    axis.plot(coverage, risk, color=BLUE, label=f"model (area {risk.mean() / 100:.4f})")
    axis.axhline(risk[-1], color=GREY, linestyle="--", label="all reviews")
    axis.axvline(100 * SUREST, color=ORANGE, linewidth=1, label=f"surest {100 * SUREST:.0f} %")
    axis.set_xlabel("coverage: share of the reviews that are decided on, the surest first (%)")
    axis.set_ylabel("risk: mistakes among them (%)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
