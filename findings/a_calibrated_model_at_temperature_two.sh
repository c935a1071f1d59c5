#!/usr/bin/env bash
# scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6 (Python 3.11): CalibratedClassifierCV(method="temperature"), new in 1.8,
# around models that are calibrated already.
#
# Guess, written before the run: the temperature is 1, because dividing the logits by 1 leaves the probabilities as they
# are, and they are right.
# What happens: with two classes it is 2 where the model has a decision_function, and 1 where it has predict_proba
# alone; with three classes it is 1 in both cases. A decision of two classes is one number x, the log-odds, and is made
# into the logits (-x, x), which are twice as far apart as the log-odds say. The probabilities come out right. But a
# temperature that is read from the attribute `beta_`, its inverse, says "twice too confident" of a model that is not,
# and two models of one task cannot be compared by it if only one of them has a decision_function.
#
# Output (2026-11-30; 20,000 points, logistic regression on labels that were drawn from one):
#     2 classes, decision_function  temperature 2.000, probabilities change by 0.0000
#     2 classes, predict_proba      temperature 1.000, probabilities change by 0.0000
#     3 classes, decision_function  temperature 1.000, probabilities change by 0.0000
#     3 classes, predict_proba      temperature 1.000, probabilities change by 0.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6 \
    2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression


class ProbabilitiesOnly(ClassifierMixin, BaseEstimator):
    """The same model, seen through predict_proba alone, as most networks and forests are."""

    def __init__(self, model):
        self.model, self.classes_ = model, model.classes_

    def fit(self, x, y):
        return self

    def predict(self, x):
        return self.model.predict(x)

    def predict_proba(self, x):
        return self.model.predict_proba(x)


def temperature(model, x, y):
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(x, y)
    return 1 / calibrated.calibrated_classifiers_[0].calibrators[0].beta_, calibrated.predict_proba(x)


generator, seen = np.random.default_rng(0), {}
for classes in (2, 3):
    x = generator.standard_normal((20_000, 5))
    scores = x @ generator.standard_normal((5, classes)) + generator.gumbel(size=(20_000, classes))
    y = scores.argmax(axis=1)  # drawn from the softmax of x @ weights, so logistic regression is the true model
    model = LogisticRegression(C=1e6).fit(x, y)
    for name, given in (("decision_function", model), ("predict_proba", ProbabilitiesOnly(model))):
        seen[classes, name], probabilities = temperature(given, x, y)
        change = abs(probabilities - model.predict_proba(x)).max()
        print(f"{classes} classes, {name:17}  temperature {seen[classes, name]:.3f}, "
              f"probabilities change by {change:.4f}")

assert abs(seen.pop((2, "decision_function")) - 2) < 0.01
assert all(abs(found - 1) < 0.02 for found in seen.values())
PYTHON
