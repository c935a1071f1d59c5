#!/usr/bin/env bash
# confidenceinterval 1.0.5, scikit-learn 1.9.1, scipy 1.17.1, numpy 2.3.5 (Python 3.11): 95 % intervals around macro
# averages. Test sets are drawn from a known table of classes and predictions, so that the true value is known.
#
# Guess, written before the run: its intervals are right, and that of macro F1 is near the bootstrap's.
# What happens: the interval errs in both directions. With a large class, it covers the true macro precision in 65 % of
# the draws; for five stars, the true macro recall in 79 %. For two balanced classes, the interval for macro F1 is two
# and a half times too wide. Around the macro precision of one draw, the bootstrap's interval is nearly twice as wide as
# the formula's. A delta method from the influence of each row, `ours`, covers 94 % or 95 % everywhere, so the test sets
# are large enough for one.
#
# Output (2026-11-29; covered: of 1,000 draws; width: half the mean interval, in standard deviations over the draws,
# which should be near 1.96):
#     two classes    recall     covered 97.5%  width 2.20   ours 95.3%  1.99
#     two classes    precision  covered 97.6%  width 2.20   ours 95.1%  1.99
#     two classes    f1         covered 100.0%  width 5.02   ours 95.3%  1.99
#     five stars     recall     covered 78.6%  width 1.25   ours 94.0%  1.88
#     five stars     precision  covered 82.9%  width 1.37   ours 94.6%  1.91
#     five stars     f1         covered 94.6%  width 1.89   ours 94.3%  1.89
#     a large class  recall     covered 94.6%  width 1.95   ours 94.0%  1.91
#     a large class  precision  covered 65.3%  width 0.98   ours 94.8%  1.89
#     a large class  f1         covered 96.9%  width 2.05   ours 95.1%  1.90
#     macro precision of one draw, a large class: formula 0.476 to 0.521, bootstrap 0.457 to 0.542
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check confidenceinterval==1.0.5 scikit-learn==1.9.1 \
    scipy==1.17.1 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import confidenceinterval
import numpy as np

# Rows: the true class. Columns: the predicted one.
TABLES = {
    "two classes": (500, [[45, 5], [5, 45]]),
    "five stars": (1000, [[6, 2, 1, 0, 1], [2, 4, 3, 1, 0], [1, 2, 10, 5, 2], [0, 1, 4, 20, 5], [0, 0, 1, 9, 20]]),
    "a large class": (600, [[140, 40, 20], [12, 16, 2], [2, 1, 7]])}


def ours(truth, guess, classes, metric):
    """The standard error: the spread of each row's influence on the metric."""
    right = truth == guess
    rows, columns, hits = (np.bincount(part, minlength=classes) / len(truth) for part in (truth, guess, truth[right]))
    if metric == "recall":
        influence = (right - (hits / rows)[truth]) / rows[truth]
    elif metric == "precision":
        influence = (right - (hits / columns)[guess]) / columns[guess]
    else:
        both = rows + columns
        share = 2 * hits / both / both
        influence = 2 * right / both[truth] - share[truth] - share[guess]
    return influence.std() / classes / len(truth) ** 0.5


seen = {}
for name, (size, table) in TABLES.items():
    shares = np.array(table) / np.sum(table)
    classes, hits, rows, columns = len(shares), shares.diagonal(), shares.sum(1), shares.sum(0)
    true = {"recall": (hits / rows).mean(), "precision": (hits / columns).mean(),
            "f1": (2 * hits / (rows + columns)).mean()}
    generator = np.random.default_rng(0)
    draws = [np.divmod(generator.choice(classes**2, size, p=shares.ravel()), classes) for _ in range(1000)]
    for metric, value in true.items():
        score = getattr(confidenceinterval, f"{metric}_score")
        answers = [score(truth, guess, average="macro") for truth, guess in draws]
        found, low, high = np.array([(found, *interval) for found, interval in answers]).T
        errors = np.array([ours(truth, guess, classes, metric) for truth, guess in draws])
        covered = ((low <= value) & (value <= high)).mean()
        covered_by_ours = (abs(found - value) < 1.96 * errors).mean()
        width, width_of_ours = (high - low).mean() / 2 / found.std(), 1.96 * errors.mean() / found.std()
        print(f"{name:14} {metric:10} covered {covered:5.1%}  width {width:.2f}   "
              f"ours {covered_by_ours:5.1%}  {width_of_ours:.2f}")
        assert 0.93 < covered_by_ours < 0.97 and 1.8 < width_of_ours < 2.1
        seen[name, metric] = covered, width
truth, guess = draws[0]
_, formula = confidenceinterval.precision_score(truth, guess, average="macro")
_, bootstrap = confidenceinterval.precision_score(truth, guess, average="macro", method="bootstrap_percentile",
                                                  n_resamples=2000, random_state=np.random.default_rng(0))
widths = [interval[1] - interval[0] for interval in (formula, bootstrap)]
print("macro precision of one draw, a large class: "
      "formula {:.3f} to {:.3f}, bootstrap {:.3f} to {:.3f}".format(*formula, *bootstrap))
assert seen["five stars", "recall"][0] < 0.85 and seen["a large class", "precision"][0] < 0.75
assert seen["two classes", "f1"][1] > 4 and widths[1] > 1.5 * widths[0]
PYTHON
