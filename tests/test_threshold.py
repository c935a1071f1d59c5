"""--mode decide: a threshold for two classes, chosen on validation, followed by predict, reported on the test."""

import numpy as np
import pytest
from conftest import expect, metrics_of, rows_of, run_here
from sklearn.metrics import f1_score, precision_score, recall_score

from suite.common.storage import read_json
from suite.comparison.threshold import Aim, choose
from suite.training.evaluation import Predictions
from utils import UserError


def draw(n: int = 300) -> Predictions:
    """Predictions whose probabilities of class 1 are hundredths, so that many are equal."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, n)
    scores = np.clip(np.round(generator.normal(0.4 + 0.3 * labels, 0.2), 2), 0.01, 0.99)
    return Predictions(np.arange(n), labels, np.log(np.stack([1 - scores, scores], axis=1)))


@pytest.mark.parametrize("text", ["f1", "precision>=0.9", "recall >= 0.95", "recall>=1"])
def test_no_other_threshold_is_better(text):
    predictions, aim = draw(), Aim.parse(text)
    scores, labels = predictions.probabilities[:, 1], predictions.labels
    score_of = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    goal = {"f1": f1_score, "precision": recall_score, "recall": precision_score}[aim.metric]
    at = [scores >= threshold for threshold in np.unique(scores)]
    reaching = {tuple(decided): goal(labels, decided) for decided in at
                if score_of[aim.metric](labels, decided) >= aim.least}
    chosen = choose(predictions, aim)
    assert reaching[tuple(scores >= chosen)] == pytest.approx(max(reaching.values()))


def test_what_cannot_be_reached_is_refused_with_what_can():
    predictions = draw()
    predictions.labels[predictions.probabilities[:, 1].argmax()] = 0
    with pytest.raises(UserError, match=r"no threshold reaches precision>=1 on the validation .*: the most is 0\.9"):
        choose(predictions, Aim.parse("precision>=1"))
    for text in ("accuracy", "precision>=2", "recall", "f1>=0.9"):
        with pytest.raises(UserError, match="is not an aim: give f1, precision>=0.95"):
            Aim.parse(text)


@pytest.fixture(scope="module")
def words(undisturbed, tmp_path_factory):
    """(overrides, run folder, reviews) of a bag of words on reviews of which each eighth has the other label."""
    lines = (undisturbed[1].parent.parent / "reviews.csv").read_text().splitlines()
    for row in range(1, len(lines), 8):
        text, _, name = lines[row].rpartition(",")
        lines[row] = f"{text},{'good' if name == 'bad' else 'bad'}"
    folder = tmp_path_factory.mktemp("words")
    source = folder / "noisy.csv"
    source.write_text("\n".join(lines) + "\n")
    given = [*undisturbed[0], "data_config.split=[0.4,0.3,0.3]", "run_name=words", f"output_dir={folder}",
             f"data_config.dataset={source}"]
    expect(0, run_here(*given, mode="baseline"))
    return given, folder / "words", source


def test_an_export_is_not_decided_on(words):
    given, run, _ = words
    (run / "export").mkdir()
    refused = expect(2, run_here(*given, mode="decide", threshold="f1", model=str(run / "export"))).stderr
    assert "is an export, which keeps the threshold that it was made with: decide with --model" in refused
    (run / "export").rmdir()


def test_predict_follows_it_and_the_test_is_reported_both_ways(words, tmp_path, monkeypatch):
    given, run, source = words
    before, card = metrics_of(run), (run / "best" / "README.md").read_text()
    (run / "best" / "README.md").write_text(card + "Written by hand.\n")
    monkeypatch.chdir(tmp_path)  # where a relative path of the run's configuration leads nowhere
    for threshold in ("f1", "none", "recall>=0.99"):
        expect(0, run_here(*given, mode="decide", threshold=threshold))
        now = (run / "best" / "README.md").read_text().splitlines()
        decision = [line for line in now if line.startswith("Decision: ")]
        assert len(decision) == (threshold != "none")
        assert [line for line in now if line not in decision] == [*card.splitlines(), "Written by hand."]
    threshold, metrics = read_json(run / "best" / "threshold.json")["threshold"], metrics_of(run)
    assert metrics["test"] == before["test"]
    tested = rows_of(run / "test_predictions.csv")
    decided = [float(row["probability_good"]) >= threshold for row in tested]
    labels = [row["label"] == "good" for row in tested]
    assert metrics["threshold"]["recall"] == recall_score(labels, decided)
    assert metrics["threshold"]["accuracy"] == np.mean(np.equal(labels, decided))
    assert "`threshold.json` says from which probability on a text gets the class good" in (
        run / "best" / "README.md").read_text()
    positive = [row for row in rows_of(run / "valid_predictions.csv") if row["label"] == "good"]
    assert np.mean([float(row["probability_good"]) >= threshold for row in positive]) >= 0.99

    expect(0, run_here(*given, mode="predict", input=str(source), output=str(tmp_path / "out.csv")))
    rows = rows_of(tmp_path / "out.csv")
    assert [row["predicted"] == "good" for row in rows] == [
        float(row["probability_good"]) >= threshold for row in rows]
    assert {row["predicted"] for row in rows if 0.5 > float(row["probability_good"]) >= threshold} == {"good"}
    expect(0, run_here(f"output_dir={run.parent}", "run_name=words", mode="test"))
    assert metrics_of(run)["threshold"] == metrics["threshold"]

    expect(0, run_here(*given, mode="decide", threshold="none"))
    assert metrics_of(run).keys() == before.keys() | {"tested_on"}
    assert not (run / "best" / "threshold.json").exists()
