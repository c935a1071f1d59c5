"""The statistics against known cases: intervals cover at the promised rate, the bootstrap meets closed forms, the
paired test and Holm's correction give scipy's and statsmodels' values, false claims stay below 5 %, and the detectable
difference is one.

Settings are simulated as a latent score, the sum of a review's ease, a seed's luck and chance of its own, which is
right where it is above zero. The true accuracy is then the normal distribution's value at mean / spread.
"""

import numpy as np
import pytest
from scipy.stats import binomtest, norm, permutation_test, t, ttest_ind

from suite.comparison.significance import (
    accuracy_interval,
    bootstrap_interval,
    compare,
    detectable_difference,
    holm,
    paired_test,
    sentence,
)
from suite.training.evaluation import share_interval, wilson_interval

SIMULATIONS, FEWER = 1000, 300
CHANCE = 0.6  # standard deviation of the latent score that neither review nor seed explains; reviews have 1


def simulate(generator, means: list[float], seeds: int, reviews: int, luck: float) -> list[np.ndarray]:
    """Settings (seeds, reviews) of bool, on the same reviews; `luck`: the standard deviation between seeds."""
    ease = generator.standard_normal(reviews)
    return [mean + ease + luck * generator.standard_normal((seeds, 1))
            + CHANCE * generator.standard_normal((seeds, reviews)) > 0 for mean in means]


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (3, 0.0), (3, 0.05), (3, 0.15)])
def test_intervals_cover_the_truth_at_the_promised_rate(seeds, luck):
    """With luck 0.05 the scatter of seeds weighs about as much as that of reviews, with 0.15 far more."""
    generator = np.random.default_rng(1)
    means = [1.2, 1.3]
    truth = norm.cdf(np.array(means) / np.sqrt(1 + luck**2 + CHANCE**2))
    covered = np.zeros(2)
    for number in range(SIMULATIONS):
        first, second = simulate(generator, means, seeds, 400, luck)
        low, high = bootstrap_interval(second, first, draws=1000, seed=number)
        covered[0] += low <= truth[1] - truth[0] <= high
        low, high = accuracy_interval(first) if seeds == 1 else bootstrap_interval(first, draws=1000, seed=number)
        covered[1] += low <= truth[0] <= high
    assert (covered / SIMULATIONS >= 0.935).all()  # 0.95 less two standard errors
    assert (covered / SIMULATIONS <= 0.98).all()  # nor does it promise less than it knows


def films(generator, count: int, most: int = 30) -> np.ndarray:
    """(reviews,) the film of each review. The films have 1 to 30 reviews; if `most` is larger, so many of the first
    film, half as many of the second, a third of the third, and so on, as products have."""
    sizes = generator.integers(1, 31, count) if most == 30 else np.maximum(1, most // np.arange(1, count + 1))
    return np.repeat(np.arange(count), sizes)


@pytest.mark.parametrize(("seeds", "count", "most"), [(1, 60, 30), (3, 60, 30), (1, 8, 30), (3, 60, 150)])
def test_intervals_of_groups_cover_the_truth_where_those_of_single_reviews_do_not(seeds, count, most):
    """A film's reviews share a part of their ease, and of what one setting has over the other."""
    generator, of_film, own = np.random.default_rng(8), 0.8, 0.6
    means = np.array([1.2, 1.3])
    truth = norm.cdf(means / np.sqrt(of_film**2 + own**2 + 1))
    covered = np.zeros((2, 2))
    for number in range(FEWER):
        film = films(generator, count, most)
        ease = of_film * generator.standard_normal((2, count))[:, film] + own * generator.standard_normal(len(film))
        first, second = (mean + ease[place] + generator.standard_normal((seeds, len(film))) > 0
                         for place, mean in enumerate(means))
        for place, groups in enumerate((film, None)):
            low, high = bootstrap_interval(second, first, groups, draws=300, seed=number)
            covered[place, 0] += low <= truth[1] - truth[0] <= high
            low, high = accuracy_interval(first, groups)
            covered[place, 1] += low <= truth[0] <= high
    assert (covered[0] / FEWER >= 0.91).all()
    assert (covered[0] / FEWER <= 0.995).all()
    assert (covered[1] / FEWER < 0.8).all()


def test_models_that_are_right_about_whole_films_are_not_certain():
    generator, means, covered = np.random.default_rng(10), 4.0, 0
    for _ in range(SIMULATIONS):
        film = films(generator, 20)
        ease = 2 * generator.standard_normal(20)[film]
        low, high = share_interval(means + ease + generator.standard_normal(len(film)) > 0, film)
        covered += low <= norm.cdf(means / np.sqrt(5)) <= high
    assert covered / SIMULATIONS >= 0.935


def test_seeds_of_equal_accuracy_take_nothing_from_the_interval():
    """In groups, too, where their means may differ in the last bit."""
    film = np.repeat(np.arange(30), 7)
    generator = np.random.default_rng(11)
    right = np.stack([generator.permutation(np.arange(210) < 150) for _ in range(3)])
    low, high = bootstrap_interval(right, right[:1], film)
    assert high - low > 0.05


def test_an_interval_ends_at_0_and_1_to_the_last_bit():
    """Or error bars would be negative."""
    assert all(wilson_interval(0.0, n)[0] == 0 and wilson_interval(1.0, n)[1] == 1 for n in range(1, 3000))
    assert wilson_interval(0.9, 200) == pytest.approx(binomtest(180, 200).proportion_ci(method="wilson"))


@pytest.mark.parametrize(("reviews", "groups", "said"), [
    (200, np.repeat(np.arange(5), 40), "200 reviews of 5 groups and 1 seed each; so few groups can hardly show one, "),
    (5, None, "5 reviews and 1 seed each; so few reviews can hardly show one, ")])
def test_what_so_few_cannot_show_is_not_promised(reviews, groups, said):
    generator = np.random.default_rng(0)
    wrong, right = generator.random((2, 1, reviews)) < np.array([[[0.02]], [[0.98]]])
    text = sentence(compare("AB", [wrong, right], groups)[0])
    assert said in text
    assert text.endswith(" The interval does not contain 0, but the test does not confirm it.")


def test_groups_of_one_review_are_reviews_and_equal_groups_count_once():
    generator = np.random.default_rng(9)
    first, second = simulate(generator, [1.2, 1.3], 3, 400, 0.05)
    alone, hits = np.arange(400), first[0]
    assert share_interval(hits, alone) == pytest.approx(share_interval(hits), abs=2e-3)
    assert share_interval(np.repeat(hits, 5), np.repeat(alone, 5)) == pytest.approx(share_interval(hits, alone))
    assert share_interval(np.ones(60, bool), np.repeat(np.arange(3), 20)) == pytest.approx(
        share_interval(np.ones(3, bool)))
    five = [np.repeat(runs, 5, axis=1) for runs in (first, second)]
    for (runs, other), groups in ((five, np.repeat(alone, 5)), ((first, second), alone)):
        assert bootstrap_interval(other, runs, groups, draws=20_000) == pytest.approx(
            bootstrap_interval(second, first, draws=20_000), abs=3e-3)
    assert paired_test(*five, np.repeat(alone, 5))[1] == pytest.approx(paired_test(first, second)[1], rel=1e-9)


def test_seeds_that_answer_the_opposite_are_not_certain():
    always = np.tile([True, False], 50)
    low, high = bootstrap_interval(np.arange(100)[None] % 4 > 0, np.stack([always, ~always]))
    assert low < 0.18  # 0.25 less two standard errors over the reviews
    assert high > 0.32


def test_the_bootstrap_over_reviews_meets_the_closed_form():
    generator = np.random.default_rng(2)
    first, second = simulate(generator, [1.2, 1.3], 1, 5000, 0.0)
    difference = second[0].astype(int) - first[0]
    half = norm.ppf(0.975) * difference.std() / np.sqrt(5000)
    low, high = bootstrap_interval(second, first, draws=100_000)
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.03 * half)


def test_the_interval_over_seeds_meets_students_and_welchs():
    """With very many reviews, only seeds scatter."""
    generator = np.random.default_rng(3)
    first = generator.random((3, 200_000)) < np.array([[0.79], [0.80], [0.81]])
    second = generator.random((5, 200_000)) < np.array([[0.82], [0.84], [0.81], [0.82], [0.83]])
    accuracies, others = first.mean(axis=1), second.mean(axis=1)
    half = t.ppf(0.975, 2) * accuracies.std(ddof=1) / np.sqrt(3)
    low, high = bootstrap_interval(first, draws=100_000)
    assert (low, high) == pytest.approx((accuracies.mean() - half, accuracies.mean() + half), abs=0.04 * half)
    expected = ttest_ind(others, accuracies, equal_var=False).confidence_interval(0.95)
    half = (expected.high - expected.low) / 2
    assert bootstrap_interval(second, first, draws=100_000) == pytest.approx(tuple(expected), abs=0.04 * half)


def from_table(table: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Two models of one seed each; `table`: [[both right, only the first], [only the second, both wrong]]."""
    counts = np.ravel(table)
    return np.repeat([[1, 1, 0, 0]], counts, axis=1) == 1, np.repeat([[1, 0, 1, 0]], counts, axis=1) == 1


@pytest.mark.parametrize(("table", "p_value"), [  # statsmodels 0.15.0, contingency_tables.mcnemar(table, exact=True)
    ([[101, 121], [59, 33]], 4.4344492637551645e-06), ([[4400, 130], [95, 375]], 0.023197506839685394),
    ([[50, 1], [9, 40]], 0.021484375), ([[10, 5], [5, 2]], 1.0), ([[4000, 0], [3, 900]], 0.25)])
def test_mcnemars_exact_test(table, p_value):
    first, second = from_table(table)
    better_on, found = paired_test(first, second)
    assert better_on == (table[0][1], table[1][0])
    assert found == pytest.approx(p_value, rel=1e-9)
    # The same answers with any number of seeds are the same evidence: reviews are counted, not answers.
    assert paired_test(first.repeat(3, axis=0), second.repeat(2, axis=0)) == (better_on, pytest.approx(found))


@pytest.mark.parametrize("seeds", [(1, 3), (2, 2), (3, 2)])
def test_the_randomization_test_meets_scipys(seeds):
    """scipy's `permutation_test` tries all exchanges of the two settings on 12 reviews."""
    generator = np.random.default_rng(6)
    first, second = (runs[:count] for runs, count in zip(simulate(generator, [0, 0.8], 3, 12, 0.0), seeds, strict=True))
    expected = permutation_test((first.mean(axis=0), second.mean(axis=0)), lambda a, b: (b - a).mean().round(9),
                                permutation_type="samples", n_resamples=np.inf)
    assert 0 < expected.pvalue < 1
    assert paired_test(first, second)[1] == pytest.approx(expected.pvalue, rel=1e-9)


def test_whole_groups_are_exchanged():
    generator = np.random.default_rng(5)
    film = films(generator, 10)
    first, second = simulate(generator, [0, 0.1], 2, len(film), 0.0)
    leads = np.array([(second[:, film == group].astype(int) - first[:, film == group]).sum() for group in range(10)])
    signs = 1 - 2 * (np.arange(2**10)[:, None] >> np.arange(10) & 1)
    expected = (abs(signs @ leads) >= abs(leads.sum())).mean()
    assert 0.01 < expected < 0.9
    assert paired_test(first, second, film)[1] == pytest.approx(expected, rel=1e-9)


def test_a_probability_as_small_as_it_is():
    right, wrong = np.ones((1, 300), dtype=bool), np.zeros((3, 300), dtype=bool)
    assert paired_test(right, wrong)[1] == pytest.approx(2 * 0.5**300, rel=1e-9)


@pytest.mark.parametrize(("p_values", "corrected"), [  # statsmodels 0.15.0, multipletests(p_values, method="holm")
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.0001, 0.9, 0.02, 0.02, 0.049, 0.3], [0.0006, 0.9, 0.1, 0.1, 0.147, 0.6]), ([0.6, 0.5], [1, 1]), ([], [])])
def test_holms_correction(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected, rel=1e-9)


@pytest.mark.parametrize(("seeds", "luck"), [((1, 1, 1), 0.0), ((3, 3, 3), 0.05), ((1, 3, 3), 0.0)])
def test_false_claims_among_equal_settings_stay_below_five_percent(seeds, luck):
    generator = np.random.default_rng(4)
    claims = 0
    for _ in range(SIMULATIONS):
        settings = simulate(generator, [1.2] * 3, 3, 300, luck)
        correct = [runs[:count] for runs, count in zip(settings, seeds, strict=True)]
        claims += any(pair.is_shown for pair in compare("ABC", correct, draws=500))
    assert claims / SIMULATIONS <= 0.05


def test_false_claims_among_six_settings_with_scattered_seeds():
    """There the intervals decide, for nearly every test sees that the trained models differ."""
    generator, claims = np.random.default_rng(6), 0
    for _ in range(100):
        luck = 1.2 + 0.05 * generator.standard_normal((6, 3, 1))
        answers = luck + generator.standard_normal(2000) + 0.6 * generator.standard_normal((6, 3, 2000)) > 0
        claims += any(pair.is_shown for pair in compare("ABCDEF", list(answers), draws=500))
    assert claims <= 5  # with intervals of 95 %: about 25


def test_one_run_is_not_favoured_over_the_mean_of_three():
    """Equally good settings: p should be as often above 0.5 as below, and below 0.05 in one of twenty comparisons."""
    generator = np.random.default_rng(7)
    found = []
    for _ in range(SIMULATIONS):
        first, second = simulate(generator, [1.2, 1.2], 3, 2000, 0.0)
        found.append(paired_test(first[:1], second)[1])
    assert 0.03 < np.mean(np.array(found) < 0.05) < 0.07


def test_the_detectable_difference_is_shown_in_four_of_five_comparisons():
    generator = np.random.default_rng(5)
    reviews, only_first = 5000, 0.04
    first = np.zeros((1, reviews), dtype=bool)
    excess = 0.0  # of what the second alone gets right
    for _ in range(5):  # a fixed point: the interval depends on how often the two disagree, and so on the difference
        half = norm.ppf(0.975) * np.sqrt((2 * only_first + excess - excess**2) / reviews)
        excess = detectable_difference((-half, half), pairs=1)
    shown = {}
    for share in (1.0, 0.5, 0.0):  # of the detectable difference
        shown[share] = 0
        chances = [only_first, only_first + share * excess]
        for _ in range(300):
            kind = generator.choice(3, size=(1, reviews), p=[*chances, 1 - sum(chances)])
            shown[share] += compare("AB", [first | (kind == 0), first | (kind == 1)], draws=2000)[0].is_shown
    assert 0.74 < shown[1.0] / 300 < 0.86
    assert shown[0.5] / 300 < 0.4
    assert shown[0.0] / 300 < 0.07


def test_each_pair_gets_one_plain_sentence():
    first, second = from_table([[4400, 130], [95, 375]])
    text = sentence(compare(["A", "B"], [second, first])[0])  # the better one second
    assert text.startswith("B is better than A by 0.7 points (95 % interval 0.1 to 1.3; McNemar's exact test p "
                           "= 0.023)")
    assert text.endswith("at 5,000 reviews and 1 seed each.")
    assert sentence(compare(["A", "B"], [first, second])[0]).startswith("A is better than B by 0.7 points (95 % ")
    first, second = from_table([[4400, 100], [95, 405]])
    text = sentence(compare(["A", "B"], [first, second])[0])
    assert "no difference shown at 5,000 reviews and 1 seed each; 0.8 points would be needed, -0.1 for the" in text
    everything = np.ones((1, 5000), dtype=bool)
    assert "McNemar's exact test p < 1e-300)" in sentence(compare(["A", "B"], [~everything, everything])[0])
    assert "get the same of the 5,000 reviews right" in sentence(compare(["A", "B"], [first, first])[0])


def test_no_interval_is_empty_where_nothing_scatters():
    right = np.ones((3, 100), dtype=bool)
    assert accuracy_interval(right) == pytest.approx((0.963, 1), abs=0.001)
    low, high = bootstrap_interval(right, right)
    assert low == -high < 0 < high == pytest.approx(0.037, abs=0.001)
