#!/usr/bin/env bash
# pycm 4.6 against krippendorff 0.9.0 (numpy 2.3.5, Python 3.11): Krippendorff's alpha of two raters of 1,000 reviews,
# as pycm's `weighted_alpha` with squared distances for weights, and as krippendorff's alpha for interval data.
#
# Guess, written before pycm's measures were compared with other libraries': the same numbers.
# What happens: with five classes, weighted_alpha is another number, and can lie above 1. Two who rate at random,
# six reviews in ten with five stars, agree by 3.05; two that often differ by a star, by 1.21. So the worse raters look
# like the better ones. For the agreement by chance, it squares half the sum of one class's share by the first rater and
# the other class's by the second, where Krippendorff multiplies the two classes' shares of all ratings. With two
# classes, both are the same. pycm's `weighted_kappa`, with the same weights, lies within 0.01 of krippendorff's alpha.
#
# Output (2026-11-29):
#     the same                       pycm  1.000   krippendorff  1.000   pycm's weighted_kappa  1.000
#     often a star off               pycm  1.207   krippendorff  0.925   pycm's weighted_kappa  0.925
#     at random                      pycm  3.052   krippendorff  0.017   pycm's weighted_kappa  0.017
#     two classes, often a star off  pycm  0.716   krippendorff  0.716   pycm's weighted_kappa  0.718
#     two classes, at random         pycm  0.009   krippendorff  0.009   pycm's weighted_kappa  0.010
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pycm==4.6 krippendorff==0.9.0 \
    numpy==2.3.5 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import krippendorff
import numpy as np
from pycm import ConfusionMatrix

SHARES = [0.08, 0.05, 0.07, 0.2, 0.6]  # of one star to five
generator = np.random.default_rng(0)
first = generator.choice(5, 1000, p=SHARES)
near = np.clip(first + generator.choice([-1, 0, 1], 1000, p=[0.15, 0.7, 0.15]), 0, 4)
random = generator.choice(5, 1000, p=SHARES)
seen = {}
for title, one, two in (
        ("the same", first, first), ("often a star off", first, near), ("at random", first, random),
        ("two classes, often a star off", first // 4, near // 4), ("two classes, at random", first // 4, random // 4)):
    classes = one.max() + 1
    squares = {row: {column: (row - column) ** 2 for column in range(classes)} for row in range(classes)}
    matrix = ConfusionMatrix(one.tolist(), two.tolist(), digit=9)
    alpha, kappa = matrix.weighted_alpha(squares), matrix.weighted_kappa(squares)
    reference = krippendorff.alpha([one, two], level_of_measurement="interval")
    # The same by hand, with the chance agreement of the pooled ratings, and with the other one.
    table = np.zeros((classes, classes))
    np.add.at(table, (one, two), 1 / len(one))
    weights = 1 - np.subtract.outer(range(classes), range(classes)) ** 2 / (classes - 1) ** 2
    small = 1 / (2 * len(one))
    agreed = (1 - small) * (table * weights).sum() + small
    rows, columns = table.sum(1), table.sum(0)
    pooled = (rows + columns) / 2
    by_pooled, by_other = ((agreed - chance) / (1 - chance) for chance in (
        (np.multiply.outer(pooled, pooled) * weights).sum(), ((np.add.outer(rows, columns) / 2) ** 2 * weights).sum()))
    assert abs(reference - by_pooled) < 1e-9 and abs(alpha - by_other) < 1e-9
    print(f"{title:30} pycm {alpha:6.3f}   krippendorff {reference:6.3f}   pycm's weighted_kappa {kappa:6.3f}")
    assert abs(kappa - reference) < 0.01
    seen[title] = alpha, reference
assert seen["at random"][0] > 2 > 1.1 > 0.95 > seen["often a star off"][1] and abs(seen["at random"][1]) < 0.05
assert seen["often a star off"][0] > 1.1
assert all(abs(alpha - reference) < 1e-9 for title, (alpha, reference) in seen.items() if "two classes" in title)
PYTHON
