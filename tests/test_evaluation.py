"""Metrics: against scikit-learn and by hand; sums over reviews, so that no batch, process or order moves them."""

import csv

import numpy as np
import pytest
from sklearn import metrics as reference

from suite.common.figures import heading, on_console, show
from suite.training.evaluation import (
    Predictions,
    ReliabilityBins,
    compute_metrics,
    mistakes,
    risk_coverage,
    wilson_interval,
    write_mistakes,
    write_predictions,
)


def draw(n: int = 500, classes: int = 2, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes)) + 1.2 * np.eye(classes)[labels]
    return Predictions(np.arange(n), labels, logits.astype(np.float32))


@pytest.mark.parametrize("classes", [2, 4])
def test_against_scikit_learn(classes):
    predictions = draw(classes=classes)
    computed, p = compute_metrics(predictions), predictions.probabilities
    average = "binary" if classes == 2 else "macro"
    labels, predicted = predictions.labels, predictions.predicted
    expected = {
        "loss": reference.log_loss(labels, p), "accuracy": reference.accuracy_score(labels, predicted),
        "precision": reference.precision_score(labels, predicted, average=average),
        "recall": reference.recall_score(labels, predicted, average=average),
        "f1": reference.f1_score(labels, predicted, average=average),
        "macro_f1": reference.f1_score(labels, predicted, average="macro"),
        "mcc": reference.matthews_corrcoef(labels, predicted),
        "roc_auc": reference.roc_auc_score(labels, p[:, 1] if classes == 2 else p, multi_class="ovr"), "n": 500,
        "average_precision": np.mean([reference.average_precision_score(labels == label, p[:, label])
                                      for label in ([1] if classes == 2 else range(classes))])}
    assert {name: computed[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert set(computed) == set(expected) | {"accuracy_ci95", "ece", "aurc", "surest_accuracy",
                                             "surest_accuracy_ci95"}


def test_the_mean_is_over_reviews_not_over_batches():
    # Two batches, 64 right of 64 and 0 right of 1: the mean of their means would be 0.5.
    logits = np.tile(np.float32([2, -2]), (65, 1))
    assert compute_metrics(Predictions(np.arange(65), np.array([0] * 64 + [1]), logits))["accuracy"] == 64 / 65


def test_order_changes_no_bit():
    predictions = draw()
    order = np.random.default_rng(1).permutation(500)
    shuffled = Predictions(predictions.ids[order], predictions.labels[order], predictions.logits[order])
    assert compute_metrics(shuffled) == compute_metrics(predictions)


def test_wilson_interval_of_a_published_case():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    logits = np.float32([[1, 0]] * 263)
    low, high = compute_metrics(Predictions(np.arange(263), np.array([0] * 81 + [1] * 182), logits))["accuracy_ci95"]
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_calibration_error_by_hand():
    # Four reviews at confidence 0.9, three right; four at 0.6, one right: (4 |.75 - .9| + 4 |.25 - .6|) / 8 = 0.25.
    confidence = np.array([0.9] * 4 + [0.6] * 4)
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1).astype(np.float32)
    predictions = Predictions(np.arange(8), np.array([0, 0, 0, 1, 0, 1, 1, 1]), logits)
    assert compute_metrics(predictions)["ece"] == pytest.approx(0.25, abs=1e-6)
    assert ReliabilityBins(predictions).counts.sum() == 8


def test_risk_and_coverage_by_hand():
    # From the surest on: right, wrong, right, right; so 0, 1/2, 1/3, 1/4 of those decided on are wrong.
    confidence = np.array([0.7, 0.9, 0.99, 0.6])
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    predictions = Predictions(np.arange(4), np.array([0, 1, 0, 0]), logits)
    assert risk_coverage(predictions) == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert compute_metrics(predictions)["aurc"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 4)
    # The one review in ten that is left to a person is the one that is wrong.
    confidence = np.array([0.9] * 9 + [0.55])
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    computed = compute_metrics(Predictions(np.arange(10), np.array([0] * 9 + [1]), logits))
    assert (computed["accuracy"], computed["surest_accuracy"]) == (0.9, 1.0)
    assert computed["surest_accuracy_ci95"] == pytest.approx(wilson_interval(1.0, 9))


def test_edge_cases():
    one_class = Predictions(np.arange(3), np.zeros(3, dtype=int), np.float32([[1, 0]] * 3))
    computed = compute_metrics(one_class)
    assert (computed["mcc"], computed["roc_auc"], computed["average_precision"]) == (None, None, None)
    assert (computed["precision"], computed["accuracy"]) == (0.0, 1.0)
    certain = Predictions(np.arange(2), np.array([0, 1]), np.float32([[500, -500], [500, -500]]))
    assert compute_metrics(certain)["loss"] == 500  # finite although the probability underflows


def test_how_a_figure_is_shown():
    figures = {"accuracy": 0.9, "accuracy_ci95": [0.8912, 0.908], "loss": 0.25, "roc_auc": None, "new": [1, 2]}
    assert show(figures, "accuracy") == "0.9000 (95 % interval 0.8912 to 0.9080)"
    assert (show(figures, "roc_auc"), show(figures, "seconds")) == ("-", "-")
    assert show({"optimizer_steps": 12345}, "optimizer_steps") == "12,345"
    assert (heading("loss"), heading("f1")) == ("loss (nats)", "F1")
    assert on_console(figures) == "accuracy 0.9000 (95 % interval 0.8912 to 0.9080), loss 0.2500"


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files(tmp_path):
    predictions = draw(50)
    names, texts = ["neg", "pos"], {i: f'He said "{i}",\nand left' for i in range(50)}
    write_predictions(tmp_path / "p.csv", predictions, names)
    rows = read_csv(tmp_path / "p.csv")
    assert list(rows[0]) == ["id", "label", "predicted", "probability_neg", "probability_pos"]
    assert [int(row["id"]) for row in rows] == list(range(50))
    assert all(abs(float(row["probability_neg"]) + float(row["probability_pos"]) - 1) < 1e-8 for row in rows)
    assert sum(row["label"] == row["predicted"] for row in rows) / 50 == compute_metrics(predictions)["accuracy"]

    write_mistakes(tmp_path / "m.csv", mistakes(predictions, texts.get, names))
    wrong = read_csv(tmp_path / "m.csv")
    assert {int(row["id"]) for row in wrong} == {int(row["id"]) for row in rows if row["label"] != row["predicted"]}
    assert all(row["text"] == texts[int(row["id"])] for row in wrong)
    confidence = [float(row["confidence"]) for row in wrong]
    assert confidence == sorted(confidence, reverse=True)
