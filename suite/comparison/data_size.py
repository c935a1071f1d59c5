"""How much data is enough? Accuracy against the number of training reviews, and what twice as many would bring.

Over a wide range of sizes, the error falls as a power of the size: error = a x n^-b (Hestness et al. 2017, arXiv
1712.00409). Somewhere it levels off at what no data can teach, such as wrong labels (Rosenfeld et al. 2020, arXiv
1909.12673). Six sizes cannot tell a third constant for that from noise, so the law here has none: its forecast is
rather too high, and goes no further than twice the largest size. What the smaller sizes predict for the largest one
stands beside it, for the reader to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suite.comparison.results import Setting, group_by_kind
from suite.comparison.significance import LEVEL
from suite.training.evaluation import SPLITS

FEWEST = 3  # sizes of a fit: through two, any law passes
ABOUT = (
    "A power law, error = a x n^-b, is fitted to each model by least squares on the logarithms, all sizes counting the "
    "same (Hestness et al. 2017). Its interval is that of the regression's next point (Student's t): it allows for the "
    "scatter of the sizes around the law, not for other test reviews. The law has no floor, so its forecast is rather "
    "too high (Rosenfeld et al. 2020).")


@dataclass
class PowerLaw:
    """error = factor x n^-exponent; errors are shares of reviews."""

    factor: float
    exponent: float
    sizes: np.ndarray  # (sizes,) of the fit
    spread: float  # standard deviation of log error around the law; nan for two sizes, which leave none

    def error(self, size: float) -> float:
        return float(self.factor * size**-self.exponent)

    def interval(self, size: float) -> tuple[float, float]:
        """The 95 % prediction interval of the error at this size (Draper and Smith 1998, section 3.1); at most 1."""
        from scipy.stats import t  # here, because most modes of main.py do not need it

        x, count = np.log(self.sizes), len(self.sizes)
        distance = (np.log(size) - x.mean())**2 / ((x - x.mean())**2).sum()
        width = t.ppf((1 + LEVEL) / 2, count - 2) * self.spread * np.sqrt(1 + 1 / count + distance)
        low, high = self.error(size) * np.exp([-width, width])
        return float(low), float(min(high, 1.0))


def fit_power_law(sizes: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """The law that is nearest to these errors, all above 0, in the sum of squared differences of their logarithms."""
    x, y = np.log(sizes), np.log(errors)
    slope, start = np.polyfit(x, y, 1)
    squares, freedom = float(((y - start - slope * x)**2).sum()), len(x) - 2
    return PowerLaw(float(np.exp(start)), float(-slope), np.asarray(sizes, float),
                    np.sqrt(squares / freedom) if freedom else np.nan)


def data_size(settings: Sequence[Setting], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The curves of comparison.json, and what they show in words; None if all runs have one data_config.train_limit.

    `rows`: those of the settings in comparison.json.
    """
    if len({setting.runs[0].train_limit for setting in settings}) == 1:
        return None
    row_of = {setting.label: row for setting, row in zip(settings, rows, strict=True)}
    run = settings[0].runs[0]
    where = f"{len(run.predicted):,} {SPLITS[run.split]} reviews"
    curves = []
    for model, of_kind in group_by_kind(settings).items():
        ascending = sorted((row_of[setting.label] for setting in of_kind), key=lambda row: row["trained_on"])
        curves.append(_curve(model, ascending, where))
    ends = [(curve["model"], curve["points"][0], curve["points"][-1]) for curve in curves]
    words = "; ".join(f"{model} from {first['accuracy']:.4f} at {first['trained_on']:,} to {last['accuracy']:.4f} at "
                      f"{last['trained_on']:,}" for model, first, last in ends)
    return {"curves": curves, "words": f"Accuracy on {where} against the number of training reviews, with 95 % "
                                       f"intervals: {words}."}


def _curve(model: str, rows: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    """`rows`: those of one kind of model, from the smallest size to the largest."""
    rows = list({row["trained_on"]: row for row in rows}.values())  # a limit above all reviews is the same as none
    points = [{key: row[key] for key in ("trained_on", "accuracy", "accuracy_ci95")} for row in rows]
    sizes, errors = [point["trained_on"] for point in points], [1 - point["accuracy"] for point in points]
    curve, last, count = {"model": model, "points": points, "law": None}, sizes[-1], len(sizes)
    if count < FEWEST:
        return curve | {"sentence": f"{model}: a forecast needs {FEWEST} training sizes, and there are {count}."}
    if min(errors) == 0:
        return curve | {"sentence": f"{model}: no forecast, because at one of the sizes nothing is wrong."}
    law = fit_power_law(sizes, errors)
    if law.exponent <= 0:
        return curve | {"sentence": f"{model}: no forecast, because the error does not fall with more reviews."}
    twice, without_last = _forecast(law, 2 * last), _forecast(fit_power_law(sizes[:-1], errors[:-1]), last)
    curve["law"] = {"factor": law.factor, "exponent": law.exponent, "twice": twice, "without_last": without_last}
    seen, interval, verdict = points[-1]["accuracy"], without_last["accuracy_ci95"], ""
    if interval:
        verdict = ("; what was seen lies within" if interval[0] <= seen <= interval[1] else
                   "; what was seen lies outside, so the law does not hold here, and its forecast is not to be trusted")
    return curve | {"sentence": (
        f"{model}: {seen:.4f} at {last:,} training reviews. With twice as many, a power law, error = "
        f"{law.factor:.3g} x n^-{law.exponent:.3f} from {count} sizes, expects {_in_words(twice)} on the same {where}. "
        f"Fitted without {last:,}, it expects {_in_words(without_last)} there{verdict}.")}


def _forecast(law: PowerLaw, size: int) -> dict[str, Any]:
    interval = [1 - error for error in law.interval(size)[::-1]] if len(law.sizes) >= FEWEST else None
    return {"trained_on": size, "accuracy": 1 - law.error(size), "accuracy_ci95": interval}


def _in_words(forecast: dict[str, Any]) -> str:
    low, high = forecast["accuracy_ci95"] or (None, None)
    return f"{forecast['accuracy']:.4f}" + (f" (95 % interval {low:.4f} to {high:.4f})" if low is not None else "")
