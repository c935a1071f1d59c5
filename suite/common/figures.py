"""The figures of a run: their names in metrics.json, and how cards, console, comparisons and docs show them.

    python -m suite.common.figures      prints the table in docs/settings.md
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Figure(NamedTuple):
    section: str  # of metrics.json
    meaning: str
    label: str = ""  # what cards, tables and the console call it
    style: str = ".4f"  # its format specification
    shown_in: str = ""  # card: in model cards; console: at the end of a run; table: in comparisons
    unit: str = ""


MEASURED = "valid, test"  # the sections of what was measured on reviews
FIGURES = {
    "accuracy": Figure(MEASURED, "share of the reviews that get their own class", "accuracy", ".4f", "card console"),
    "accuracy_ci95": Figure(MEASURED, "the accuracy's 95 % interval (Wilson 1927): two numbers; where there "
                            "are `groups`, it counts whole ones"),
    "loss": Figure(MEASURED, "mean cross-entropy, in nats", "loss", ".4f", "card console table", "nats"),
    "perplexity": Figure("valid", "of a pretraining run: e to the power of the loss", "perplexity", ".2f",
                         "card console"),
    "precision": Figure(MEASURED, "with two classes, that of class 1; with more, the mean over the classes"),
    "recall": Figure(MEASURED, "likewise"),
    "f1": Figure(MEASURED, "likewise", "F1", ".4f", "card console table"),
    "macro_f1": Figure(MEASURED, "the mean over the classes, with two classes, too", "macro F1", ".4f", "card"),
    "mcc": Figure(MEASURED, "Matthews' correlation coefficient: 1 is best, 0 is chance; null if a class does not "
                  "occur"),
    "roc_auc": Figure(MEASURED, "of each class against the rest, the mean over the classes; null if a class does not "
                      "occur", "ROC AUC", ".4f", "card"),
    "average_precision": Figure(MEASURED, "likewise: the area under the curve of precision against recall"),
    "ece": Figure(MEASURED, "the expected calibration error (Guo et al. 2017) in 15 bins; 0 is best",
                  "calibration error", ".4f", "card table"),
    "aurc": Figure(MEASURED, "the area under the risk-coverage curve (El-Yaniv and Wiener 2010): the mean share of "
                   "mistakes among the k surest reviews, over all k; 0 is best"),
    "surest_accuracy": Figure(MEASURED, "the accuracy of the 90 % of the reviews with the highest confidence",
                              "accuracy of the surest 90 %", ".4f", "card"),
    "surest_accuracy_ci95": Figure(MEASURED, "its 95 % interval: two numbers"),
    "temperature": Figure("valid, calibration", "with train_config.calibrate: what the logits are divided by"),
    "loss_before": Figure("calibration", "the test loss without the temperature; `loss_after` with it; `ece_before` "
                          "and `ece_after` likewise. A loss has a 95 % interval, such as `loss_after_ci95`"),
    "threshold": Figure("threshold", "of --mode decide: the probability from which on a review gets class 1, its "
                        "`aim`, and what it gives on the test reviews: `accuracy`, `precision`, `recall`, `f1`"),
    "n": Figure(MEASURED, "number of reviews; of a pretraining run, of masked words", "reviews", ","),
    "groups": Figure(MEASURED, "with data_config.group_column: of how many groups; with data_config.drop_duplicates="
                     "false: of how many texts, or groups of these", "groups", ","),
    "epoch": Figure("valid", "the epoch of the best model"),
    "optimizer_steps": Figure("train", "optimizer steps; of a model that a solver fits, its iterations",
                              "optimizer steps", ",.0f", "table"),
    "seconds": Figure("train", "seconds of the optimizer steps, without validation and saving", "training", ",.1f",
                      "table", "s"),
    "peak_memory_mb": Figure("train", "the most memory of the GPU that torch held, or of the process on a CPU, in MB "
                             "(10^6 bytes)", "peak memory", ",.0f", "table", "MB"),
    "samples_per_second": Figure("train", "reviews a second of training", "reviews/s", ",.1f", "table"),
    "tokens_per_second": Figure("train", "tokens a second, padding not counted"),
    "model_tflops_per_second": Figure("train", "10^12 operations a second, counted for the whole model on real tokens"),
    "executed_tflops_per_second": Figure("train", "the same for what was computed of it"),
    "model_flops_utilization": Figure("train", "model_tflops_per_second as a share of the device's peak; null where "
                                      "that is unknown, as on a CPU"),
    "executed_flops_utilization": Figure("train", "the same share of executed_tflops_per_second"),
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
