"""trackio and TensorBoard show each record of the history once, and the test's results, however a run was interrupted.

wandb's tests are in tests/test_training.py and tests/test_outside.py. Those of the other two need
requirements-trackers.txt, and are skipped without it.
"""

import importlib.util
import io
import json
import shutil
import sqlite3
import sys

import numpy as np
import pytest
from conftest import PROJECT, history_of, metrics_of, rows_of, stop_at, train_here
from PIL import Image

from suite.common import cli
from suite.common.checks import choices
from suite.training import finish
from suite.training.tracking import TRACKERS, TensorBoardRun
from utils import config_fields, load_config


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(monkeypatch, capsys, name):
    def read(mode: str, *more: str) -> cli.Command:
        monkeypatch.setattr(sys, "argv", ["main.py", "--mode", mode, f"log_config.tracker={name}", *more])
        return cli.read_command("", accumulates=False)

    monkeypatch.setitem(sys.modules, name, None)
    for mode in ("train", "test", "baseline"):
        with pytest.raises(SystemExit) as left:
            read(mode)
        assert left.value.code == 2
        assert capsys.readouterr().err == (
            f"error: log_config.tracker={name} needs {name}: pip install -r requirements-trackers.txt\n")
    assert read("predict", "--text", "a film").config.log_config.tracker == name  # it follows no run


def test_the_trackers_of_the_setting_are_those_of_the_table():
    assert choices(config_fields()["log_config.tracker"]) == tuple(TRACKERS)


class InTrackio:
    """What trackio's file holds."""

    def __init__(self, folder):
        with sqlite3.connect(folder / "trackio" / "imdb-sentiment.db") as file:
            runs = file.execute("SELECT DISTINCT run_id, run_name FROM metrics").fetchall()
            rows = [(step, json.loads(text)) for step, text in file.execute("SELECT step, metrics FROM metrics "
                                                                           "ORDER BY id")]
            [[config]] = file.execute("SELECT config FROM configs").fetchall()
        assert [name for _, name in runs] == ["run"]
        self.values, self.config = {}, json.loads(config)
        for step, values in rows:
            for name, value in values.items():
                self.values.setdefault(name, []).append((step, value))
        [(_, table)] = self.values["test/misclassified"]
        self.mistakes = [str(row["id"]) for row in table["_value"]]
        self.pictures = {name: (folder / "trackio" / "media" / found[0][1]["file_path"]).read_bytes()
                         for name, found in self.values.items() if name.startswith("plots/")}

    @staticmethod
    def rounded(value):
        return value


class InTensorBoard:
    """What TensorBoard reads from its event files."""

    def __init__(self, folder):
        events = events_of(folder / "tensorboard" / "run")
        self.values = {name: [(event.step, event.value) for event in events.Scalars(name)]
                       for name in events.Tags()["scalars"]}
        [config], [table] = (events.Tensors(f"{name}/text_summary") for name in ("config", "test/misclassified"))
        self.config = json.loads(config.tensor_proto.string_val[0].decode().split("```")[1])
        head, _, *lines = table.tensor_proto.string_val[0].decode().splitlines()
        assert head == "| id | text | label | predicted | confidence |"
        self.mistakes = [line.split()[1] for line in lines]
        self.pictures = {name: event.encoded_image_string for name in events.Tags()["images"]
                         for event in events.Images(name)}

    @staticmethod
    def rounded(value):
        return float(np.float32(value))


PICTURE = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) + 200  # RGBA


def save_picture(path):
    Image.fromarray(PICTURE).save(path)
    return path


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


@pytest.mark.parametrize(("tracker", "reader"), [("trackio", InTrackio), ("tensorboard", InTensorBoard)])
def test_a_run_that_was_killed_has_each_record_once(tmp_path, overrides, monkeypatch, tracker, reader):
    if importlib.util.find_spec(tracker) is None:  # not importorskip: trackio's import reads the folder that it uses
        pytest.skip(f"{tracker} is not installed")
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")  # restored at the end, whatever the run sets
    overrides, run = [*overrides, f"log_config.tracker={tracker}"], tmp_path / "runs" / "run"
    stop_at(4, overrides, monkeypatch)
    shutil.copytree(run / "last", tmp_path / "last")
    stop_at(12, overrides, monkeypatch)  # the records of steps 6, 9, 10 and 12, and those of the first validation
    shutil.rmtree(run / "last")
    (tmp_path / "last").rename(run / "last")  # as if the run had been killed there, and its last state were that of 4
    monkeypatch.setattr(finish, "try_plots", lambda *_: [save_picture(tmp_path / "a_plot.png")])
    result = train_here(*overrides)

    found, history, metrics = reader(run.parent), history_of(run), metrics_of(run)
    assert tracker in result.stdout.splitlines()[-1]
    names = {name for record in history for name in record} - {"step", "epoch"}
    for name in names:
        assert found.values[name] == [(record["step"], reader.rounded(record[name])) for record in history
                                      if name in record], name
    assert len(found.values["train/loss"]) == 8  # steps 3, 6, 9, 10, 12, 15, 18 and 20
    assert [step for step, _ in found.values["train/samples_per_second"]] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert found.values["summary/test/accuracy"] == [(20, reader.rounded(metrics["test"]["accuracy"]))]
    assert found.values["summary/valid/loss"] == [(20, reader.rounded(metrics["valid"]["loss"]))]
    assert found.config["train_config"]["learning_rate"] == 0.01
    assert found.mistakes == [row["id"] for row in rows_of(run / "misclassified.csv")]
    [(name, picture)] = found.pictures.items()
    assert name == "plots/a_plot"
    assert (np.asarray(Image.open(io.BytesIO(picture))) == PICTURE).all()


def test_tensorboard_hides_an_earlier_run_of_the_same_name(tmp_path):
    pytest.importorskip("tensorboard")
    config = load_config(PROJECT / "config.yaml", [f"output_dir={tmp_path}", "run_name=run"])
    for loss in (0.7, 0.5):
        run = TensorBoardRun(config, None, "train", 0)
        run.log({"step": 1, "epoch": 0.5, "train/loss": loss})
        run.finish()
    [event] = events_of(tmp_path / "tensorboard" / "run").Scalars("train/loss")
    assert (event.step, event.value) == (1, 0.5)
