"""Calibration by a temperature (Guo et al. 2017): the logits are divided by the number under which the labels of the
validation reviews are most likely. In an encoder, the weights and bias of the head are divided, so that whatever reads
the model is calibrated without knowing of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from suite.training.evaluation import Calibration, Predictions

LEAST, MOST = 0.05, 20.0  # validation without a mistake would ask for 0, and one wrong review would cost any loss
RESAMPLES = 1000  # of the bootstrap


def fit_temperature(predictions: Predictions) -> float:
    """The temperature between LEAST and MOST at which these predictions have the least cross-entropy."""
    from scipy.optimize import minimize_scalar  # here, because most runs do not need it

    def loss(log_temperature: float) -> float:
        return at_temperature(predictions, np.exp(log_temperature)).losses.sum()

    return float(np.exp(minimize_scalar(loss, bounds=np.log([LEAST, MOST]), method="bounded").x))


def at_temperature(predictions: Predictions, temperature: float) -> Predictions:
    return replace(predictions, logits=predictions.logits.astype(np.float64) / temperature)


def calibration_figures(predictions: Predictions, temperature: float) -> dict[str, float | list[float]]:
    """What the temperature has changed: the loss and the calibration error before and after, with 95 % intervals by the
    percentiles of a bootstrap over the reviews, or over whole groups. `predictions`: those after it."""
    figures: dict[str, float | list[float]] = {"temperature": temperature}
    n, groups = len(predictions.labels), predictions.groups
    if groups is not None:
        _, counts = np.unique(groups, return_counts=True)
        members = np.split(np.argsort(groups, kind="stable"), counts.cumsum()[:-1])  # the reviews of each group
    for when, given in (("before", at_temperature(predictions, 1 / temperature)), ("after", predictions)):
        losses, generator, resampled = given.losses, np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            if groups is None:
                rows = generator.integers(0, n, n)
            else:
                rows = np.concatenate([members[group] for group in generator.integers(0, len(members), len(members))])
            drawn = Predictions(np.arange(len(rows)), given.labels[rows], given.logits[rows])
            resampled.append((losses[rows].mean(), Calibration(drawn).error))
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
        for name, value, place in (("loss", losses.mean(), 0), ("ece", Calibration(given).error, 1)):
            figures[f"{name}_{when}"] = float(value)
            figures[f"{name}_{when}_ci95"] = [float(low[place]), float(high[place])]
    return figures
