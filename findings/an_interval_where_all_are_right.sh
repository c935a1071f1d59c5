#!/usr/bin/env bash
# svy 0.35.0 (svy-rs 0.19.1, polars 2.1.0, numpy 2.4.6, Python 3.11), a package for surveys: 95 % intervals of a share
# whose observations come in groups, such as 20 films of 10 reviews each, by each `ci_method` of estimation.prop.
#
# Guess, written before the run: `wilson` gives an interval where all observations are alike, because that is what
# Wilson's interval is known for; the other methods come close to it.
# What happens: where every review is right, `logit`, `beta` and `wilson` are NaN at both ends, as a note below the
# printed estimate says. They start from the variance between the groups, which is 0 then. `korn-graubard` alone
# answers, and knows the groups by its degrees of freedom only: 80 reviews of 8 films get nearly the interval of 80
# films. Models that are right about whole films make such draws common: at a true accuracy of 0.98, 18 % of them. Where
# all groups have the same share of right reviews, every method gives an interval without any width, and no note.
#
# Output (2026-11-30; covered: of 400 draws of 20 films with 10 reviews each, whose own accuracies vary around 0.98,
# with a correlation of 0.3 within a film):
#     80 of 80, 8 films   logit nan to nan  beta nan to nan  korn-graubard 0.937 to 1.000  wilson nan to nan
#     80 of 80, 80 films  logit nan to nan  beta nan to nan  korn-graubard 0.955 to 1.000  wilson nan to nan
#     8 of 10 in each     logit 0.800 to 0.800  beta 0.800 to 0.800  korn-graubard 0.800 to 0.800  wilson 0.800 to 0.800
#     logit          covered 77.8%, without an interval 17.8%
#     beta           covered 80.5%, without an interval 17.8%
#     korn-graubard  covered 98.2%, without an interval  0.0%
#     wilson         covered 77.8%, without an interval 17.8%
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check svy==0.35.0 svy-rs==0.19.1 svy-io==0.7.1 \
    polars==2.1.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import polars
import svy

METHODS = ("logit", "beta", "korn-graubard", "wilson")


def intervals(film, right):
    data = polars.DataFrame({"film": film, "right": right.astype(int), "weight": np.ones(len(film))})
    estimation = svy.Sample(data=data, design=svy.Design(psu="film", wgt="weight")).estimation
    found = {}
    for method in METHODS:
        of_right = estimation.prop("right", ci_method=method).estimates[-1]  # the last level, 1
        found[method] = (float(of_right.lci), float(of_right.uci))
    return found


def show(name, found):
    print(f"{name:18}", *(f"{method} {low:.3f} to {high:.3f}" for method, (low, high) in found.items()), sep="  ")


film = np.repeat(np.arange(8), 10)
all_right = intervals(film, np.ones(80))
show("80 of 80, 8 films", all_right)
alone = intervals(np.arange(80), np.ones(80))
show("80 of 80, 80 films", alone)
alike = intervals(film, np.tile([1, 1, 1, 1, 0], 16))
show("8 of 10 in each", alike)

accuracy, correlation, draws = 0.98, 0.3, 400
strength = 1 / correlation - 1
generator, covered, empty = np.random.default_rng(0), dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0)
film = np.repeat(np.arange(20), 10)
for _ in range(draws):
    of_film = generator.beta(accuracy * strength, (1 - accuracy) * strength, 20)
    for method, (low, high) in intervals(film, generator.random(200) < of_film[film]).items():
        covered[method] += low <= accuracy <= high
        empty[method] += bool(np.isnan(low) and np.isnan(high))
for method in METHODS:
    print(f"{method:14} covered {covered[method] / draws:5.1%}, without an interval {empty[method] / draws:5.1%}")

for method in ("logit", "beta", "wilson"):
    assert np.isnan(all_right[method]).all() and np.isnan(alone[method]).all()
    assert np.ptp(alike[method]) < 1e-6 and empty[method] / draws > 0.1 and covered[method] / draws < 0.85
assert 0.9 < all_right["korn-graubard"][0] < alone["korn-graubard"][0] and empty["korn-graubard"] == 0
PYTHON
