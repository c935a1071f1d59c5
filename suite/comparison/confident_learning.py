"""Which labels are probably wrong: confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning:
Estimating Uncertainty in Dataset Labels", section 3.1) on the probabilities of a model that has not seen these labels.

The threshold of a class is the mean probability of the class over the rows that are labelled with it. A label is
flagged if the model predicts another class, and if of the classes that reach their thresholds, another one is the most
probable.

How many are flagged depends on how sharp the probabilities are: soft ones flag few labels, and none of a rare class. So
they are calibrated first.
"""

from __future__ import annotations

import numpy as np


def class_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes,) float64; infinite for a class without labels. `probabilities`: (n, classes); `labels`: (n,) int64."""
    classes = probabilities.shape[1]
    sums = np.bincount(labels, probabilities[np.arange(len(labels)), labels], minlength=classes)
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts, sums / np.maximum(counts, 1), np.inf)


def flagged(probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(n,) bool: whether each label is probably wrong, see the top of this file."""
    reaching = np.where(probabilities >= thresholds, probabilities, -1)
    return (reaching.max(axis=1) >= 0) & (reaching.argmax(axis=1) != labels) & (probabilities.argmax(axis=1) != labels)


def expected_flags(probabilities: np.ndarray, thresholds: np.ndarray) -> float:
    """How many labels are flagged in the mean if each is drawn with the probabilities of its row, so that none is wrong
    and some reviews are hard.

    It is always near the number that is flagged, because the probabilities are calibrated to the given labels. No model
    alone can tell wrong labels from hard reviews.
    """
    classes = probabilities.shape[1]
    return float(sum(probabilities[flagged(probabilities, np.full(len(probabilities), label), thresholds), label].sum()
                     for label in range(classes)))
