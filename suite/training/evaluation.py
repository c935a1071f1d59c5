"""Judge a model by its logits on a split: metrics, predictions and mistakes.

Every metric is a sum over reviews divided by their number. The sum is computed in float64 and in the order of the
reviews' ids, so it depends neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from suite.common.storage import atomic_write

SPLITS = {"valid": "validation", "test": "test"}  # what a model is measured on, as texts call it
VALID_PREDICTIONS, TEST_PREDICTIONS = "valid_predictions.csv", "test_predictions.csv"  # in a run folder
MISTAKE_COLUMNS = ["id", "text", "label", "predicted", "confidence"]  # of misclassified.csv


@dataclass
class Predictions:
    """The logits of a split, sorted by the reviews' ids."""

    ids: np.ndarray  # (n,) int64, rows in the pooled data
    labels: np.ndarray  # (n,) int64
    logits: np.ndarray  # (n, num_labels) float32; float64 from a bag of words or a stack
    groups: np.ndarray | None = None  # (n,) int64, the first id of each review's group; None: each stands alone

    def __post_init__(self):
        order = np.argsort(self.ids)
        self.ids, self.labels, self.logits = self.ids[order], self.labels[order], self.logits[order]
        self.groups = None if self.groups is None else self.groups[order]

    def in_groups(self, groups: np.ndarray | None) -> Predictions:
        """The same predictions, of reviews that belong to `groups` (rows of the pooled data,), or to none."""
        if groups is None:
            return self
        _, first, inverse = np.unique(groups[self.ids], return_index=True, return_inverse=True)
        return replace(self, groups=self.ids[first[inverse]])

    @functools.cached_property
    def log_probabilities(self) -> np.ndarray:
        """(n, num_labels) float64."""
        return log_softmax(self.logits.astype(np.float64), axis=1)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """(n, num_labels) float64."""
        return np.exp(self.log_probabilities)

    @property
    def losses(self) -> np.ndarray:
        """(n,) float64: the cross-entropy of each review, in nats."""
        return -self.log_probabilities[np.arange(len(self.labels)), self.labels]

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """(n,) int64: the class with the largest logit."""
        return self.logits.argmax(axis=1)

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """(n,) float64: the probability of the predicted class."""
        return self.probabilities.max(axis=1)


NORMAL = 1.959963984540054  # the 0.975 quantile of the normal distribution, for 95 % intervals
SUREST = 0.9  # the share of the reviews whose accuracy is given apart, as if the others were left to a person


def compute_metrics(predictions: Predictions) -> dict[str, float | list[float] | int | None]:
    """The metrics of metrics.json. Raises FloatingPointError if a logit is not finite.

    `loss` is the mean cross-entropy in nats. With two classes, `precision`, `recall` and `f1` are those of class 1;
    with more, they are unweighted means over the classes. `macro_f1` is always such a mean. `roc_auc` and
    `average_precision` compare each class with the rest and average over the classes, or are those of class 1 with two
    classes; `mcc` is Matthews' correlation coefficient. These three are None if a class does not occur in the split.
    `accuracy_ci95`: see `share_interval`. `ece`: see `ReliabilityBins`. `aurc`: see `risk_coverage`.
    """
    from sklearn.metrics import (  # here, because labelling does not need it
        average_precision_score,
        f1_score,
        matthews_corrcoef,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    if not np.isfinite(predictions.logits).all():
        raise FloatingPointError("the model's logits are not finite: lower train_config.learning_rate or set "
                                 "train_config.max_grad_norm")
    labels, predicted = predictions.labels, predictions.predicted
    n, num_labels = predictions.logits.shape
    is_right, groups = predicted == labels, predictions.groups
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=range(num_labels), average="binary" if num_labels == 2 else "macro", zero_division=0)
    macro_f1 = f1_score(labels, predicted, labels=range(num_labels), average="macro", zero_division=0)
    scores = predictions.probabilities[:, 1] if num_labels == 2 else predictions.probabilities
    mcc = roc_auc = average_precision = None
    if len(set(labels)) == num_labels:
        mcc = float(matthews_corrcoef(labels, predicted))
        roc_auc = float(roc_auc_score(labels, scores, multi_class="ovr"))
        average_precision = float(average_precision_score(labels, scores))
    surest = np.argsort(-predictions.confidence, kind="stable")[:round(SUREST * n)]
    metrics = {
        "loss": float(predictions.losses.sum() / n),
        "accuracy": float(is_right.mean()),
        "accuracy_ci95": list(share_interval(is_right, groups)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "macro_f1": float(macro_f1),
        "mcc": mcc,
        "roc_auc": roc_auc,
        "average_precision": average_precision,
        "ece": ReliabilityBins(predictions).error,
        "aurc": float(risk_coverage(predictions).mean()),
        "surest_accuracy": float(is_right[surest].mean()),
        "surest_accuracy_ci95": list(share_interval(is_right[surest], None if groups is None else groups[surest])),
        "n": n,
    }
    return metrics if groups is None else metrics | {"groups": len(np.unique(groups))}


def quality(metrics: dict[str, Any], best_metric: str) -> tuple[float, ...]:
    """The larger, the better. Equal accuracies, which small validation splits often have, are decided by the loss."""
    return (-metrics["loss"],) if best_metric == "loss" else (metrics[best_metric], -metrics["loss"])


def threshold_figures(predictions: Predictions, saved: dict[str, Any]) -> dict[str, Any]:
    """What `saved`, the content of threshold.json, makes of these predictions of two classes."""
    from sklearn.metrics import precision_recall_fscore_support

    decided = (predictions.probabilities[:, 1] >= saved["threshold"]).astype(int)
    precision, recall, f1, _ = precision_recall_fscore_support(predictions.labels, decided, average="binary",
                                                               zero_division=0)
    is_right = decided == predictions.labels
    return {"aim": saved["aim"], "threshold": saved["threshold"], "accuracy": float(is_right.mean()),
            "accuracy_ci95": list(share_interval(is_right, predictions.groups)), "precision": float(precision),
            "recall": float(recall), "f1": float(f1)}


def risk_coverage(predictions: Predictions) -> np.ndarray:
    """(n,) the share of mistakes among the k reviews with the highest confidence, k = 1 ... n (El-Yaniv and Wiener
    2010). Its mean is the area under the curve; reviews of equal confidence stand in the order of their ids."""
    order = np.argsort(-predictions.confidence, kind="stable")
    wrong = (predictions.predicted != predictions.labels)[order]
    return np.cumsum(wrong) / np.arange(1, len(wrong) + 1)


def share_interval(hits: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of the share of True among `hits` (n,) bool: Wilson's.

    Reviews of one of the `groups` (n,) may resemble each other. So they count as many as the independent reviews whose
    share would scatter as that of whole groups does, and fewer where few groups tell so (Korn and Graubard 1998, Survey
    Methodology 24:193), but at least as many as `effective_groups`.
    """
    n, share = len(hits), float(hits.mean())
    if groups is None:
        return wilson_interval(share, n)
    error, quantile = standard_error(hits - share, groups)
    least, binomial = effective_groups(groups), share * (1 - share) / n
    if error == 0:  # one group, or all hits are alike
        return wilson_interval(share, least)
    return wilson_interval(share, max(least, n * binomial / max(binomial, error**2) * (NORMAL / quantile)**2))


def standard_error(deviations: np.ndarray, groups: np.ndarray | None) -> tuple[float, float]:
    """(that of a mean, the factor that makes a 95 % interval of it); `deviations` (n,): from the mean; `groups`: (n,).

    With groups, it is the jackknife's, which leaves out one of them at a time. The factor is Student's t for the
    degrees of freedom of the jackknife's terms (Satterthwaite 1946).
    """
    if groups is None:
        return float(deviations.std(ddof=1)) / len(deviations)**0.5, NORMAL
    from scipy.stats import t  # here, because labelling does not need it

    squares = group_influence(deviations, groups)**2
    terms = squares.sum()**2 / max((squares**2).sum(), 1e-300)
    freedom = max(min(effective_groups(groups), terms) - 1, 0.05)
    return float(np.sqrt((1 - 1 / len(squares)) * squares.sum())) / len(groups), float(t.ppf(0.975, freedom))


def effective_groups(groups: np.ndarray) -> float:
    """So many groups of one size would tell as much as these, whose sizes differ (Kish 1965). `groups`: (n,)."""
    sizes = np.unique(groups, return_counts=True)[1]
    return float(sizes.sum()**2 / (sizes**2).sum())


def group_influence(deviations: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(groups,) n times what leaving out each group would take from the mean; `deviations` (n,) from it."""
    number = np.unique(groups, return_inverse=True)[1]
    others = 1 - np.bincount(number) / len(groups)  # the share of the other groups' reviews
    return np.bincount(number, deviations) / np.maximum(others, 1 / len(groups))


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """The 95 % score interval of a share of `n` independent reviews (Wilson 1927)."""
    square = NORMAL**2 / n
    center, half = share + square / 2, np.sqrt(square * share * (1 - share) + square**2 / 4)
    low, high = (center - half) / (1 + square), (center + half) / (1 + square)
    return max(0.0, min(share, float(low))), min(1.0, max(share, float(high)))  # or the last bit is wrong at 0 and 1


class ReliabilityBins:
    """How often the model is right, and how confident it is, in bins of equal width over the confidence."""

    def __init__(self, predictions: Predictions, bins: int = 15):
        self.edges = np.linspace(0, 1, bins + 1)
        index = np.clip(np.digitize(predictions.confidence, self.edges, right=True) - 1, 0, bins - 1)
        self.index = index  # (n,) the bin of each review
        self.counts = np.bincount(index, minlength=bins)  # (bins,) reviews
        filled, correct = np.maximum(self.counts, 1), predictions.predicted == predictions.labels
        self.accuracies = np.bincount(index, correct, minlength=bins) / filled  # (bins,); 0 in an empty bin
        self.confidences = np.bincount(index, predictions.confidence, minlength=bins) / filled  # (bins,) likewise

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence| (Guo et al. 2017, equation 3)."""
        return float((self.counts * np.abs(self.accuracies - self.confidences)).sum() / self.counts.sum())


def write_predictions(path: Path, predictions: Predictions, label_names: list[str]) -> None:
    """Write the predictions for a split: id, label, predicted, group if there are groups, and one column of
    probabilities for each class."""
    groups = np.empty((len(predictions.ids), 0)) if predictions.groups is None else predictions.groups[:, None]
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", *["group"] * groups.shape[1],
                         *(f"probability_{name}" for name in label_names)])
        for row, label, predicted, group, probabilities in zip(
                predictions.ids, predictions.labels, predictions.predicted, groups, predictions.probabilities,
                strict=True):
            writer.writerow([row, label_names[label], label_names[predicted], *group,
                             *(f"{p:.9g}" for p in probabilities)])


def mistakes(predictions: Predictions, text: Callable[[int], str], label_names: list[str]) -> list[dict]:
    """The rows of misclassified.csv, the most confident mistakes first; `text` returns the review with an id."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    confidence = predictions.confidence
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return [{"id": int(predictions.ids[i]), "text": text(predictions.ids[i]),
             "label": label_names[predictions.labels[i]], "predicted": label_names[predictions.predicted[i]],
             "confidence": round(float(confidence[i]), 6)} for i in wrong]


def write_mistakes(path: Path, rows: list[dict]) -> None:
    """Write misclassified.csv; `rows`: see `mistakes`."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, MISTAKE_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
