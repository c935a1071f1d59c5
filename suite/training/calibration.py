"""Calibration by a temperature (Guo et al. 2017): the logits are divided by the number under which the labels of the
validation reviews are most likely. In an encoder, the weights and bias of the head are divided, so that whatever reads
the model is calibrated without knowing of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from suite.training.evaluation import Predictions, ReliabilityBins, effective_groups, standard_error

LEAST, MOST = 0.05, 20.0  # validation without a mistake would ask for 0, and one wrong review would cost any loss


def fit_temperature(predictions: Predictions) -> float:
    """The temperature between LEAST and MOST at which these predictions have the least cross-entropy."""
    from scipy.optimize import minimize_scalar  # here, because most runs do not need it

    def loss(log_temperature: float) -> float:
        return at_temperature(predictions, np.exp(log_temperature)).losses.sum()

    return float(np.exp(minimize_scalar(loss, bounds=np.log([LEAST, MOST]), method="bounded").x))


def at_temperature(predictions: Predictions, temperature: float) -> Predictions:
    return replace(predictions, logits=predictions.logits.astype(np.float64) / temperature)


def calibration_figures(predictions: Predictions, temperature: float) -> dict[str, float | list[float]]:
    """What the temperature has changed: the loss, with its 95 % interval, and the calibration error, before and after.
    `predictions`: those after it. A calibration error has no interval: resampled ones are all larger, as it is a mean
    of absolute values."""
    figures: dict[str, float | list[float]] = {"temperature": temperature}
    for when, given in (("before", at_temperature(predictions, 1 / temperature)), ("after", predictions)):
        loss = float(given.losses.mean())
        error, quantile = standard_error(given.losses - loss, given.groups)
        figures |= {f"loss_{when}": loss, f"ece_{when}": ReliabilityBins(given).error}
        if given.groups is None or effective_groups(given.groups) > 1:  # one group tells nothing about others
            figures[f"loss_{when}_ci95"] = [max(0.0, loss - quantile * error), loss + quantile * error]
    return figures
