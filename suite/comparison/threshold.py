"""--mode decide: from which probability on a review gets class 1, of two, chosen on a run's validation reviews.

    python main.py --mode decide --threshold f1                    the best F1 of class 1
    python main.py --mode decide --threshold "precision>=0.95"     the most recall at this precision
    python main.py --mode decide --threshold "recall>=0.99"        the most precision at this recall
    python main.py --mode decide --threshold none                  the more probable class, as without it

Nothing is computed again: the run has saved its predictions. The threshold lies beside the model, in threshold.json,
where --mode predict finds it. The test reviews are judged both ways.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import precision_recall_curve

from suite.common.cli import Command
from suite.common.devices import Devices
from suite.common.figures import show
from suite.common.pages import write_decision
from suite.common.run_folder import best_folder, read_metrics, run_of
from suite.common.storage import THRESHOLD, lock, remove, write_json
from suite.comparison.results import read_result
from suite.training.evaluation import Predictions, threshold_figures
from utils import UserError, say


class Aim(NamedTuple):
    """`f1`, or the least value that `precision` or `recall` must have."""

    metric: str
    least: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Aim:
        found = re.fullmatch(r"(f1)|(precision|recall)\s*>=\s*(0?\.\d+|1(?:\.0*)?)", text.strip())
        if found is None:
            raise UserError(f"--threshold: {text!r} is not an aim: give f1, precision>=0.95 or recall>=0.99, in "
                            "quotes, or none")
        return cls("f1") if found[1] else cls(found[2], float(found[3]))


def decide(command: Command, devices: Devices) -> None:
    """Raises UserError if the run is not finished, has other than two classes, or cannot reach the aim."""
    aim = None if command.threshold == "none" else Aim.parse(command.threshold)
    run = (run_of(Path(command.model)) or Path(command.model)) if command.model else command.config.run_folder
    if command.model and Path(command.model).resolve() not in (run.resolve(), (run / "best").resolve()):
        raise UserError(f"--model: {command.model} is an export, which keeps the threshold that it was made with: "
                        f"decide with --model {run}, and export it again")
    valid = read_result(run, "valid")
    names = valid.label_names
    if len(names) != 2:
        raise UserError(f"--threshold: {run} has {len(names)} classes, and a threshold divides two: use "
                        "--min-confidence of --mode predict")
    lock(run)
    best, metrics = best_folder(run), read_metrics(run)
    metrics.pop("threshold", None)
    if aim is None:
        remove(best / THRESHOLD)
        say(f"{run}: a review gets its more probable class again")
    else:
        threshold = choose(valid.predictions, aim)
        saved = {"aim": command.threshold, "threshold": threshold, "class": names[1]}
        write_json(best / THRESHOLD, saved)
        of_valid = threshold_figures(valid.predictions, saved)
        say(f"{run}: {names[1]} from a probability of {threshold:.4g} on ({command.threshold}); validation "
            + in_words(of_valid))
        if "test" in metrics:
            test = read_result(run).predictions
            metrics["threshold"] = threshold_figures(test, saved)
            say(f"test {in_words(metrics['threshold'])}; at 0.5, {in_words(metrics['test'])}")
    if "test" in metrics:
        write_decision(best, metrics.get("threshold"), names)
    write_json(run / "metrics.json", metrics)


def in_words(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {show(figures, name)}" for name in ("accuracy", "precision", "recall", "f1"))


def choose(predictions: Predictions, aim: Aim) -> float:
    """The probability of class 1 from which on class 1 meets the aim best: half way between those of two reviews that
    are decided differently. Of equally good ones, it is the nearest to 0.5.

    Raises UserError if none meets it.
    """
    precision, recall, scores = precision_recall_curve(predictions.labels, predictions.probabilities[:, 1])
    precision, recall = precision[:-1], recall[:-1]  # the last ones are of no score
    thresholds = (scores + np.append(0, scores[:-1])) / 2  # scores: ascending, each once
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    values = {"f1": f1, "precision": precision, "recall": recall}[aim.metric]
    goal = {"f1": f1, "precision": recall, "recall": precision}[aim.metric]
    reached = values >= aim.least
    if not reached.any():
        raise UserError(f"--threshold: no threshold reaches {aim.metric}>={aim.least:g} on the validation reviews: the "
                        f"most is {values.max():.4f}")
    best = reached & (goal == goal[reached].max())
    return float(thresholds[best][np.abs(thresholds[best] - 0.5).argmin()])
