"""The plots of a run (learning curves, confusion matrix, reliability), and those that compare settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter
from sklearn.metrics import ConfusionMatrixDisplay

from suite.common.storage import atomic_write
from suite.training.evaluation import Predictions, calibration, wilson_interval
from utils import Config

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"  # told apart with any colour vision (Okabe and Ito)
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of settings, likewise
DASHES = ("-", "--", ":", "-.")  # once the colours have run out


def title(config: Config, text: str) -> str:
    """The plot's title: what it shows, and of which run; the demo is named as such."""
    return f"{config.demo_mark}{text}\n{config.run_name}"


def save_plots(folder: Path, config: Config, history: list[dict[str, Any]], predictions: Predictions,
               label_names: list[str]) -> list[Path]:
    """Write learning_curves.png, confusion_matrix.png and reliability.png; returns their paths."""
    figures = {"learning_curves": plot_learning_curves(config, history),
               "confusion_matrix": plot_confusion_matrix(config, predictions, label_names),
               "reliability": plot_reliability(config, predictions)}
    return save_figures(folder, figures)


def save_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Write each as NAME.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with atomic_write(path, "wb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a class named in a script that the font lacks
            figure.savefig(file, format="png", dpi=150)
        paths.append(path)
    return paths


def plot_learning_curves(config: Config, history: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title(config, "learning curves"), fontsize=10)
    for axis, metric, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("nats", None), strict=True):
        for split, colour, style in (("train", BLUE, {"linewidth": 1}), ("valid", ORANGE, {"marker": "o"})):
            key = f"{split}/{metric}"
            points = [(record["epoch"], record[key]) for record in history if key in record]
            if points:
                steps = config.log_config.log_every_steps
                label = {"train": "train" + (f", mean of {steps} steps" if steps > 1 else ""), "valid": "validation"}
                axis.plot(*zip(*points, strict=True), color=colour, label=label[split], **style)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"cross-entropy ({unit})" if unit else "accuracy (% of reviews)")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if metric == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        if axis.has_data():
            axis.legend()
    return figure


def plot_confusion_matrix(config: Config, predictions: Predictions, label_names: list[str]) -> Figure:
    size = 4.5 + 0.5 * len(label_names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    matrix = np.zeros((len(label_names), len(label_names)), dtype=int)
    np.add.at(matrix, (predictions.labels, predictions.predicted), 1)
    ConfusionMatrixDisplay(matrix, display_labels=[plain(name) for name in label_names]).plot(
        ax=axis, cmap="Blues", values_format=",d", im_kw={"vmin": 0}, colorbar=False,
        xticks_rotation=45 if len(label_names) > 4 else "horizontal")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    figure.suptitle(title(config, f"{len(predictions.labels):,} test reviews"), fontsize=10)
    return figure


def plot_reliability(config: Config, predictions: Predictions) -> Figure:
    """Accuracy against confidence: on the diagonal, of the reviews with confidence 0.8 the model gets 80 % right."""
    edges, accuracies, confidences, counts = calibration(predictions)
    filled = counts > 0
    error = (counts * np.abs(accuracies - confidences)).sum() / counts.sum()
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    axis, histogram = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    low = 100 / predictions.logits.shape[1]  # no prediction is less confident than an even guess
    axis.plot([low, 100], [low, 100], color=GREY, linestyle="--", label="perfectly calibrated")
    x, y = 100 * confidences[filled], 100 * accuracies[filled]
    intervals = 100 * np.array([wilson_interval(round(n * share), n) for n, share in
                                zip(counts[filled].tolist(), accuracies[filled].tolist(), strict=True)])
    axis.errorbar(x, y, yerr=[y - intervals[:, 0], intervals[:, 1] - y], color=BLUE, marker="o", elinewidth=1,
                  capsize=2, label=f"model, with 95 % intervals\n(expected calibration error {100 * error:.1f} points)")
    axis.set_ylabel("accuracy (% of reviews)")
    figure.suptitle(title(config, f"reliability on {counts.sum():,} test reviews"), fontsize=10)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False)
    axis.grid(alpha=0.3)
    histogram.bar(100 * edges[:-1], counts, width=100 * np.diff(edges), align="edge", color=BLUE, edgecolor="white")
    histogram.set_xlabel("confidence: probability of the predicted class (%)")
    histogram.set_yscale("log")  # most reviews are in the last bin, and the others still count
    histogram.set_ylim(bottom=0.8)
    histogram.yaxis.set_major_formatter(ScalarFormatter())
    histogram.yaxis.set_minor_formatter(NullFormatter())
    histogram.set_ylabel("reviews")
    histogram.set_xlim(low, 100)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Several settings, each with its seeds


def plain(text: str) -> str:
    """matplotlib takes $...$ for a formula."""
    return text.replace("$", r"\$")
