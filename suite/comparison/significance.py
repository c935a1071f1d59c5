"""Is a difference between two settings real? Intervals and tests on the same test reviews, over seeds.

`correct` always means an array (seeds, reviews) of bool: which reviews each run of a setting gets right. The reviews
are the same in all settings and in the same order, so comparisons pair them. Seeds are not paired: seed 42 of one model
has nothing in common with seed 42 of another. `groups` (reviews,) tells which reviews belong together, see `_units`;
None: each stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suite.training.evaluation import effective_groups, group_influence, share_interval, wilson_interval

LEVEL = 0.95  # of the intervals; a difference counts as shown if the corrected p is below 1 - LEVEL
ENDS = (1 - LEVEL) / 2, (1 + LEVEL) / 2
FEW = 20  # of so few reviews or groups, the formula of `detectable_difference` promises too much
POWER = 0.8  # the share of comparisons that would show the smallest difference that we call detectable
DRAWS = 10_000  # of the bootstrap; with so many, an interval's ends vary by about 2 % of its half-width


@dataclass
class Pair:
    """How the second setting of a pair compares with the first. Differences are shares: 0.01 is a point of accuracy."""

    first: str
    second: str
    reviews: int
    groups: int | None  # that they belong to; None: each stands alone
    seeds: tuple[int, int]
    difference: float  # mean accuracy of the second minus that of the first
    interval: tuple[float, float]  # see `bootstrap_interval`
    better_on: tuple[int, int]  # on how many reviews the first, and the second, is right more often than the other
    p_value: float  # see `paired_test`
    p_holm: float  # corrected for the number of pairs, see `holm`
    p_seeds: float  # the larger of p_value and of the bootstrap's p, see `_lead`, corrected likewise
    detectable: float | None  # see `detectable_difference`; None for fewer than FEW reviews or groups

    @property
    def is_shown(self) -> bool:
        """Test and bootstrap must agree: the test is about these trained models only, the bootstrap about other seeds,
        too."""
        return self.p_seeds < 1 - LEVEL


def compare(names: Sequence[str], correct: Sequence[np.ndarray], groups: np.ndarray | None = None, draws: int = DRAWS
            ) -> list[Pair]:
    """Compare every pair of settings; `names` and `correct` have one entry for each setting."""
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    tests = [paired_test(correct[i], correct[j], groups) for i, j in pairs]
    corrected = holm([p_value for _, p_value in tests])
    draws = max(draws, 400 * len(pairs))  # or no p could be small enough for so many pairs
    leads = [_lead(correct[j], correct[i], groups, draws) for i, j in pairs]
    with_seeds = holm([max(p_value, p_drawn) for (_, p_value), (_, p_drawn) in zip(tests, leads, strict=True)])
    result = []
    for (i, j), (better_on, p_value), (interval, _), p_holm, p_seeds in zip(pairs, tests, leads, corrected, with_seeds,
                                                                           strict=True):
        reviews, number = correct[i].shape[1], None if groups is None else len(np.unique(groups))
        detectable = detectable_difference(interval, len(pairs)) if (number or reviews) >= FEW else None
        result.append(Pair(
            names[i], names[j], reviews, number, (len(correct[i]), len(correct[j])),
            float(correct[j].mean() - correct[i].mean()), interval, better_on, p_value, p_holm, p_seeds, detectable))
    return result


def bootstrap_interval(correct: np.ndarray, other: np.ndarray | None = None, groups: np.ndarray | None = None,
                       draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval, over reviews and seeds, of a setting's accuracy, or of its lead over `other`.

    Reviews, or whole groups, are resampled with replacement, the same for both settings (Efron and Tibshirani 1993,
    chapter 13). Three seeds are too few to resample: their variance would come out a third too small, and the tails
    would be those of a normal distribution. Instead, each draw adds a deviation from Student's t, scaled by the
    standard error over the seeds. When two settings are compared, it has Welch's degrees of freedom (1947). The
    interaction of reviews and seeds (a review that only some seeds get right) is part of both variances, so it is
    subtracted from that of the reviews: the model is the two-way layout with random effects (Searle, Casella and
    McCulloch 1992, chapter 4). Nothing is subtracted where the seeds' accuracies are equal, as those of two seeds that
    always answer the opposite. A single seed says nothing about other seeds, so its interval is over reviews only.
    """
    if other is not None:
        return _lead(correct, other, groups, draws, seed)[0]
    drawn = _bootstrap(correct, None, groups, draws, seed)
    if (drawn == drawn[0]).all():  # all reviews are alike
        return wilson_interval(drawn[0], _independent(correct, groups))
    low, high = np.quantile(drawn, ENDS)
    return float(max(low, 0.0)), float(min(high, 1.0))


def _lead(correct: np.ndarray, other: np.ndarray, groups: np.ndarray | None, draws: int, seed: int = 0
          ) -> tuple[tuple[float, float], float]:
    """(`bootstrap_interval` of the lead over `other`, two-sided p: twice the share of the same draws in which the lead
    is 0 or the opposite of what was seen, at least 2 / (draws + 1))."""
    drawn = _bootstrap(correct, other, groups, draws, seed)
    low, high = np.quantile(drawn, ENDS)
    if (drawn == drawn[0]).all():  # all reviews are alike: they only limit how frequent a different one can be
        rare = wilson_interval(0.0, _independent(correct, groups))[1]
        low, high = drawn[0] - rare, drawn[0] + rare
    p_value = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (draws + 1))
    return (float(max(low, -1.0)), float(min(high, 1.0))), p_value


def _bootstrap(correct: np.ndarray, other: np.ndarray | None, groups: np.ndarray | None, draws: int, seed: int
               ) -> np.ndarray:
    """(draws,) accuracies, or leads over `other`; see `bootstrap_interval`."""
    from scipy.stats import norm, t  # here, because most modes of main.py do not need it

    generator = np.random.default_rng(seed)
    settings = [correct] if other is None else [correct, other]
    units = [_units(runs, groups) for runs in settings]
    n = units[0].shape[1]
    shares = units[0].mean(axis=0) - (0 if other is None else units[1].mean(axis=0))  # (units,)
    center = shares.mean()
    values, counts = np.unique(shares.round(12), return_counts=True)
    if len(values) == 1:
        return np.full(draws, center)
    if groups is None:  # few values, so we draw their counts
        resampled = generator.multinomial(n, counts / n, size=draws) @ values / n
    else:
        freedom = max(effective_groups(groups) - 1, 0.05)
        wider = t.ppf(ENDS[1], freedom) / norm.ppf(ENDS[1]) * np.sqrt(n / (n - 1))  # few groups scatter too little
        some = [generator.choice(shares, (100, n)).mean(axis=1) for _ in range(-(-draws // 100))]  # not all in memory
        resampled = center + wider * (np.concatenate(some)[:draws] - center)
    repeated = [runs for runs in settings if len(runs) > 1]
    variances = np.array([runs.mean(axis=1).var(ddof=1) / len(runs) for runs in repeated])
    interaction = sum(_interaction(runs) / len(runs) for runs in units if len(runs) > 1) if variances.sum() > 0 else 0.0
    reviews_share = max(0.0, 1 - interaction / shares.var(ddof=1))  # of the variance of `shares`
    drawn = center + np.sqrt(reviews_share) * (resampled - center)
    if variances.sum() > 0:
        freedom = variances.sum()**2 / sum(variances**2 / [len(runs) - 1 for runs in repeated])
        drawn = drawn + np.sqrt(variances.sum()) * generator.standard_t(freedom, size=draws)
    return drawn


def _independent(correct: np.ndarray, groups: np.ndarray | None) -> float:
    """As how many independent reviews these count at least."""
    return correct.shape[1] if groups is None else effective_groups(groups)


def _units(correct: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """(seeds, units) float64: what is drawn anew, reviews or whole groups. A group stands for the mean and what leaving
    it out would take away, so that the mean over groups is that of the reviews, and varies as the jackknife has it."""
    if groups is None:
        return correct
    mean = correct.mean(axis=1, keepdims=True)
    moves = np.stack([group_influence(deviations, groups) for deviations in correct - mean])
    return mean + (moves - moves.mean(axis=1, keepdims=True)) * (moves.shape[1] / correct.shape[1])


def _interaction(correct: np.ndarray) -> float:
    """The mean square of the residuals that neither the review nor the seed explains; needs at least two seeds."""
    seeds, reviews = correct.shape
    residual = correct - correct.mean(axis=0) - correct.mean(axis=1, keepdims=True) + correct.mean()
    return float((residual**2).sum() / ((seeds - 1) * (reviews - 1)))


def accuracy_interval(correct: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of a setting's accuracy: `share_interval` for a single seed, else `bootstrap_interval`."""
    if len(correct) == 1:
        return share_interval(correct[0], groups)
    return bootstrap_interval(correct, groups=groups)


def paired_test(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None
                ) -> tuple[tuple[int, int], float]:
    """Fisher's exact randomization test: ((reviews that the first gets right more often, the second), two-sided p).

    If neither setting is better, the names of the two might as well be exchanged, on each review, or whole group,
    independently (Fisher 1935, chapter 3). p is the probability that the leads of the second then add up to as much as
    they do, or more, in either direction. A lead is the difference between the shares of seeds that get the review
    right. With one seed each and no groups, this is McNemar's test (1947) in its exact form.
    """
    from scipy.stats import binom  # here, because most modes of main.py do not need it

    # In units of 1 / (seeds of the first x seeds of the second), the leads are integers.
    leads = second.sum(axis=0) * len(first) - first.sum(axis=0) * len(second)
    better_on = int((leads < 0).sum()), int((leads > 0).sum())
    if groups is not None:
        leads = np.rint(np.bincount(np.unique(groups, return_inverse=True)[1], leads)).astype(int)
    chances = np.ones(1)  # of each possible sum of leads, from the least to the greatest
    for lead, count in zip(*np.unique(np.abs(leads[leads != 0]), return_counts=True), strict=True):
        of_these = np.zeros(2 * lead * count + 1)
        of_these[::2 * lead] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, of_these)
    sums = np.arange(len(chances)) - len(chances) // 2
    return better_on, float(min(1.0, chances[np.abs(sums) >= abs(leads.sum())].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values, corrected so that the chance of any false claim among all of them stays below the level (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, dtype=float)[order]))
    return corrected.tolist()


def detectable_difference(interval: tuple[float, float], pairs: int) -> float:
    """The smallest true difference that a comparison like this one would show in 80 % of all cases.

    Bloom 1995 (Evaluation Review 19:547): (z of the significance level + z of the power) x the standard error. The
    level is divided by the number of pairs, as in Holm's strictest step. The standard error follows from the interval.
    """
    from scipy.stats import norm

    standard_error = (interval[1] - interval[0]) / 2 / norm.ppf((1 + LEVEL) / 2)
    return float((norm.ppf(1 - (1 - LEVEL) / 2 / pairs) + norm.ppf(POWER)) * standard_error)


def sentence(pair: Pair) -> str:
    """What a pair shows, in one plain sentence, with differences in points of accuracy."""
    points, (low, high) = 100 * pair.difference, (100 * end for end in pair.interval)
    seeds = f"{pair.seeds[0]}" if pair.seeds[0] == pair.seeds[1] else f"{pair.seeds[0]} and {pair.seeds[1]}"
    of_groups = f" of {pair.groups:,} group{'' if pair.groups == 1 else 's'}" if pair.groups else ""
    basis = f"{pair.reviews:,} reviews{of_groups} and {seeds} seed{'' if pair.seeds == (1, 1) else 's'}"
    basis += " each" if pair.seeds[0] == pair.seeds[1] else ""
    test = "McNemar's exact test" if pair.seeds == (1, 1) and not pair.groups else "exact randomization test"
    test += f" p {_p(pair.p_value)}"
    if pair.p_holm != pair.p_value:
        test += f", corrected {_p(pair.p_holm).removeprefix('= ')}"
    if sum(pair.better_on) == 0:
        return f"{pair.first} and {pair.second} get the same of the {pair.reviews:,} reviews right, at {basis}."
    if pair.is_shown:
        better, worse, sign = (pair.second, pair.first, 1) if points > 0 else (pair.first, pair.second, -1)
        ends = sorted((sign * low, sign * high))
        return (f"{better} is better than {worse} by {abs(points):.1f} points "
                f"(95 % interval {ends[0]:.1f} to {ends[1]:.1f}; {test}), at {basis}.")
    reason = ""
    if pair.p_holm < 1 - LEVEL and low <= 0 <= high:
        reason = (" The test tells them apart, but the interval does not." if pair.seeds == (1, 1) else
                  " These trained models differ, but with other seeds they might not.")
    elif low > 0 or high < 0:
        reason = " The interval does not contain 0, but " + (
            "the test does not confirm it." if pair.p_holm == pair.p_value else
            "among so many comparisons this may be chance.")
    needed = (f"so few {'groups' if pair.groups else 'reviews'} can hardly show one" if pair.detectable is None else
              f"{100 * pair.detectable:.1f} points would be needed")
    return (f"{pair.first} and {pair.second}: no difference shown at {basis}; {needed}, {points:+.1f} for the second "
            f"were seen (95 % interval {low:+.1f} to {high:+.1f}; {test}).{reason}")


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else f"= {value:.0e}" if value else "< 1e-300"  # smaller than a float
