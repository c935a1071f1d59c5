"""train_config.calibrate: the temperature is found, changes no label, and is part of what every reader gets."""


from dataclasses import replace

import numpy as np
import pytest
from conftest import PROJECT, metrics_of, rows_of, run_here, stop_at, train_here
from scipy.special import softmax

from suite.common.devices import Devices
from suite.inference.classifier import open_classifier
from suite.training.calibration import LEAST, at_temperature, calibration_figures, fit_temperature
from suite.training.evaluation import Predictions
from utils import load_config

NOISY = ["data_config.split=[0.5,0.3,0.2]", "train_config.learning_rate=0.02", "model_config.pooling=cls"]


def draw(n: int, temperature: float, classes: int = 3) -> Predictions:
    """Labels that follow the softmax of logits, and these logits times `temperature`: too confident above 1."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(n, classes))
    labels = [generator.choice(classes, p=row) for row in softmax(logits, axis=1)]
    return Predictions(np.arange(n), np.array(labels), temperature * logits)


def test_the_temperature_is_found():
    for temperature in (0.5, 1.0, 3.0):
        assert fit_temperature(draw(20_000, temperature)) == pytest.approx(temperature, rel=0.03)
    certain = Predictions(np.arange(5), np.zeros(5, int), np.tile([1.0, 0.0], (5, 1)))
    assert fit_temperature(certain) == pytest.approx(LEAST, rel=0.01)  # without a mistake it would be 0


def test_its_figures():
    calibrated = at_temperature(draw(2000, 3.0), 3.0)
    figures = calibration_figures(calibrated, 3.0)
    assert figures["loss_before"] == pytest.approx(draw(2000, 3.0).losses.mean())
    assert figures["ece_after"] < 0.5 * figures["ece_before"]
    assert figures["loss_after_ci95"][1] < figures["loss_before_ci95"][0]
    half = 1.96 * calibrated.losses.std() / np.sqrt(2000)
    assert figures["loss_after_ci95"] == pytest.approx(
        [figures["loss_after"] - half, figures["loss_after"] + half], abs=0.02 * half)
    five = replace(calibrated, ids=np.arange(10_000), labels=calibrated.labels.repeat(5),
                   logits=calibrated.logits.repeat(5, axis=0), groups=np.arange(2000).repeat(5))
    assert calibration_figures(five, 3.0)["loss_after_ci95"] == pytest.approx(
        figures["loss_after_ci95"], abs=0.01 * half)  # copies tell nothing new
    alone = calibration_figures(replace(five, groups=np.zeros(10_000, int)), 3.0)
    assert "loss_after_ci95" not in alone  # nor does one group about others


@pytest.fixture(scope="module")
def noisy(undisturbed, tmp_path_factory):
    """(overrides, run folder, run folder without calibration) of runs whose validation reviews hold mistakes."""
    overrides, folder = undisturbed
    source = folder.parent.parent / "reviews.csv"
    lines = source.read_text().splitlines()
    for row in range(1, len(lines), 8):
        text, _, name = lines[row].rpartition(",")
        lines[row] = f"{text},{'good' if name == 'bad' else 'bad'}"
    changed = tmp_path_factory.mktemp("noisy") / "noisy.csv"
    changed.write_text("\n".join(lines) + "\n")
    given = [*overrides, *NOISY, f"data_config.dataset={changed}", f"output_dir={changed.parent / 'runs'}"]
    train_here(*given, "run_name=plain")
    train_here(*given, "run_name=run", "train_config.calibrate=true")
    return given, changed.parent / "runs" / "run", changed.parent / "runs" / "plain"


def test_every_reader_gets_calibrated_probabilities_and_the_same_labels(noisy, tmp_path):
    given, run, plain = noisy
    metrics, before = metrics_of(run), metrics_of(plain)
    temperature = metrics["valid"]["temperature"]
    assert abs(temperature - 1) > 0.05
    assert metrics["valid"]["epoch"] == before["valid"]["epoch"]
    for split in ("valid", "test"):
        assert metrics[split]["accuracy"] == before[split]["accuracy"]
    assert metrics["valid"]["loss"] < before["valid"]["loss"]
    calibration = metrics["calibration"]
    assert calibration["loss_before"] == pytest.approx(before["test"]["loss"], rel=1e-5)
    assert calibration["loss_after"] == pytest.approx(metrics["test"]["loss"], rel=1e-9)
    for name in ("valid_predictions.csv", "test_predictions.csv"):
        of_plain, of_run = rows_of(plain / name), rows_of(run / name)
        assert [row["predicted"] for row in of_run] == [row["predicted"] for row in of_plain]
        logits = np.log([[float(row[f"probability_{label}"]) for label in ("bad", "good")] for row in of_plain])
        probabilities = [float(row["probability_good"]) for row in of_run]
        assert probabilities == pytest.approx(softmax(logits / temperature, axis=1)[:, 1], abs=1e-5)
    config = load_config(PROJECT / "config.yaml", given)
    texts = [row["review"] for row in rows_of(given_file(given))][:20]
    of_run, of_plain = (open_classifier(folder / "best", config, Devices(config)).logits(texts)
                        for folder in (run, plain))
    assert of_run * temperature == pytest.approx(of_plain, rel=1e-4, abs=1e-5)
    exported = run_here(*given, mode="export", model=str(run), output=str(tmp_path / "out"), formats=("transformers",))
    assert exported.returncode == 0, exported.stderr  # its own check compares the logits
    assert "calibrated" in (run / "best" / "README.md").read_text()


def given_file(overrides: list[str]) -> str:
    return next(item for item in reversed(overrides) if item.startswith("data_config.dataset=")).partition("=")[2]


def test_stopped_and_continued_with_the_same_bits(noisy, monkeypatch):
    given, run, _ = noisy
    stopped = run.with_name("stopped")
    arguments = [*given, "train_config.calibrate=true", "run_name=stopped"]
    stop_at(9, arguments, monkeypatch)  # after the first epoch's model was kept
    train_here(*arguments)
    assert metrics_of(stopped)["calibration"] == metrics_of(run)["calibration"]
    names = ("history.jsonl", "valid_predictions.csv", "test_predictions.csv", "best/model.safetensors")
    assert [name for name in names if (stopped / name).read_bytes() != (run / name).read_bytes()] == []


def test_a_bag_of_words(noisy):
    given, run, _ = noisy
    for name, calibrate in (("words", "true"), ("plain-words", "false")):
        result = run_here(*given, f"run_name={name}", f"train_config.calibrate={calibrate}", mode="baseline")
        assert result.returncode == 0, result.stderr
    metrics, before = (metrics_of(run.with_name(name)) for name in ("words", "plain-words"))
    assert metrics["valid"]["loss"] < before["valid"]["loss"]
    assert metrics["test"]["accuracy"] == before["test"]["accuracy"]
    assert metrics["calibration"]["loss_before"] == pytest.approx(before["test"]["loss"])
    again = run_here(f"output_dir={run.parent}", "run_name=words", mode="test")
    assert again.returncode == 0, again.stderr
    assert metrics_of(run.with_name("words"))["test"] == metrics["test"]
