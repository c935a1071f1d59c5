"""The figures of a run: their names in metrics.json, and how cards, console, comparisons and docs show them.

    python -m suite.common.figures      prints the table in docs/settings.md
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Figure(NamedTuple):
    section: str  # of metrics.json
    label: str  # what cards, tables and the console call it
    unit: str  # "" for a share or a number
    style: str  # its format specification
    meaning: str
    shown_in: tuple[str, ...] = ()  # "card" (model cards), "console" (the end of a run), "table" (comparisons)


MEASURED = "valid, test"  # the sections of what was measured on reviews
FIGURES = {
    "accuracy": Figure(MEASURED, "accuracy", "", ".4f", "share of the reviews that get their own class",
                       ("card", "console")),
    "accuracy_ci95": Figure(MEASURED, "95 % interval", "", ".4f", "the accuracy's 95 % interval (Wilson 1927): two "
                            "numbers"),
    "loss": Figure(MEASURED, "loss", "nats", ".4f", "mean cross-entropy, in nats", ("card", "console", "table")),
    "perplexity": Figure("valid", "perplexity", "", ".2f", "of a pretraining run: e to the power of the loss",
                         ("card", "console")),
    "precision": Figure(MEASURED, "precision", "", ".4f", "with two classes, that of class 1; with more, the mean over "
                        "the classes"),
    "recall": Figure(MEASURED, "recall", "", ".4f", "likewise"),
    "f1": Figure(MEASURED, "F1", "", ".4f", "likewise", ("card", "console", "table")),
    "macro_f1": Figure(MEASURED, "macro F1", "", ".4f", "the mean over the classes, with two classes, too",
                       ("card",)),
    "roc_auc": Figure(MEASURED, "ROC AUC", "", ".4f", "of each class against the rest, the mean over the classes; null "
                      "if a class does not occur", ("card",)),
    "ece": Figure(MEASURED, "calibration error", "", ".4f", "the expected calibration error (Guo et al. 2017) in 15 "
                  "bins; 0 is best", ("card", "table")),
    "n": Figure(MEASURED, "reviews", "", ",", "number of reviews; of a pretraining run, of masked words"),
    "epoch": Figure("valid", "best epoch", "", ",", "the epoch of the best model"),
    "optimizer_steps": Figure("train", "optimizer steps", "", ",.0f", "optimizer steps; of a model that a solver fits, "
                              "its iterations", ("table",)),
    "seconds": Figure("train", "training", "s", ",.1f", "seconds of the optimizer steps, without validation and saving",
                      ("table",)),
    "peak_memory_mb": Figure("train", "peak memory", "MB", ",.0f", "the most memory of the GPU that torch held, or of "
                             "the process on a CPU, in MB (10^6 bytes)", ("table",)),
    "samples_per_second": Figure("train", "reviews/s", "", ",.1f", "reviews a second of training", ("table",)),
    "tokens_per_second": Figure("train", "tokens/s", "", ",.0f", "tokens a second, padding not counted"),
    "model_tflops_per_second": Figure("train", "TFLOP/s", "", ".3f", "10^12 operations a second, counted for the "
                                      "whole model on real tokens"),
    "executed_tflops_per_second": Figure("train", "executed TFLOP/s", "", ".3f", "the same for what was computed of "
                                         "it"),
    "model_flops_utilization": Figure("train", "utilization", "", ".3f", "model_tflops_per_second as a share of the "
                                      "device's peak; null where that is unknown, as on a CPU"),
    "executed_flops_utilization": Figure("train", "executed utilization", "", ".3f", "the same share of "
                                         "executed_tflops_per_second"),
}


def shown_in(place: str) -> dict[str, Figure]:
    return {name: figure for name, figure in FIGURES.items() if place in figure.shown_in}


def heading(name: str) -> str:
    """`loss (nats)`"""
    figure = FIGURES[name]
    return f"{figure.label} ({figure.unit})" if figure.unit else figure.label


def show(figures: dict[str, Any], name: str) -> str:
    """A figure as text, with its 95 % interval if `figures` has that; a dash for what is null or missing."""
    value, style = figures.get(name), FIGURES[name].style
    if value is None:
        return "-"
    text = format(value, style)
    if interval := figures.get(f"{name}_ci95"):
        text += f" (95 % interval {interval[0]:{style}} to {interval[1]:{style}})"
    return text


def on_console(figures: dict[str, Any]) -> str:
    """`accuracy 0.9000 (95 % interval 0.8912 to 0.9080), loss 0.2500, F1 0.9000`"""
    return ", ".join(f"{figure.label} {show(figures, name)}" for name, figure in shown_in("console").items()
                     if name in figures)


def on_card(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(heading, text) of each row of a model card's table."""
    return [(heading(name), show(figures, name)) for name in shown_in("card") if name in figures]


def figures_table() -> str:
    """A Markdown table with one row for each figure."""
    rows = ["| figure | in | meaning |", "| --- | --- | --- |"]
    return "\n".join(rows + [f"| `{name}` | {figure.section} | {figure.meaning} |" for name, figure in FIGURES.items()])


if __name__ == "__main__":
    print(figures_table())
