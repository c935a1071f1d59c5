"""experiment.py: its files are right, bad ones are refused in one line, runs are known by their configurations, and an
experiment that is killed in the middle goes on without repeating what was finished.
"""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT, SHARED, run_script, start_script, write_reviews
from test_compare import write_run

from experiment import list_cells, main, read_command, write_report
from suite.common.run_folder import config_for, content_of, shaping_values
from suite.common.storage import read_json, write_json
from suite.comparison.grid import read_experiment
from suite.comparison.running import remaining_time, run_cell
from utils import UserError, load_config


@pytest.fixture(autouse=True)
def _in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(PROJECT)  # the base configurations are named from there


def write_experiment(folder: Path, **changes) -> str:
    """An experiment file of two settings and two seeds; None leaves a key out."""
    content = {"config": "demo.yaml", "grid": {"train_config.learning_rate": [0.001, 0.002]}, "seeds": [1, 2]} | changes
    path = folder / "study.yaml"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(path)


def finished_experiment(folder: Path, **changes):
    """(the experiment, its arguments) with all runs finished, without having been run."""
    arguments = write_experiment(folder, **changes), [f"output_dir={folder / 'runs'}"]
    for cell in read_experiment(*arguments).cells:
        write_run(cell.folder, 0.8, *cell.arguments[3:], base=cell.arguments[2])
    return read_experiment(*arguments), arguments


# ---------------------------------------------------------------------------------------------------------------------
# Experiment files


@functools.cache
def shipped(name: str):
    return read_experiment(f"experiments/{name}.yaml", ["data_config.limit=900"])


@pytest.mark.parametrize("name", [path.stem for path in PROJECT.glob("experiments/*.yaml")])
def test_the_shipped_experiments_are_what_they_say(name):
    experiment = shipped(name)
    runs = {"exp1": 6, "exp2": 18, "demo": 12, "minilm": 6, "line_breaks": 6, "recipe": 39, "data_size": 42,
            "speedrun": 11}[name]
    assert len(experiment.cells) == len({cell.folder for cell in experiment.cells}) == runs
    assert [cell.index for cell in experiment.cells] == list(range(1, runs + 1))
    published = sum(len(experiment.published_for(cell.setting)) for cell in experiment.cells[:runs // 3])
    assert published == sum(len(entry.accuracy) for entry in experiment.published) == {
        "exp1": 8, "exp2": 21}.get(name, 0)
    for cell in experiment.cells[::5]:  # a run gets the settings of its cell
        if not cell.members:
            options = cell.command[1:cell.command.index("--config")]
            base, *overrides = cell.command[cell.command.index("--config") + 1:]
            assert config_for("baseline" if options else "train", base, overrides) == cell.config


def test_the_settings_are_the_published_ones():
    cells = shipped("exp2").cells
    assert [cell.config.train_config.effective_batch_size for cell in cells[:6]] == [64, 256, 1024] * 2
    assert {cell.config.data_config.batch_size for cell in cells} == {64}
    first = shaping_values(cells[0].config)
    assert first == shaping_values(load_config("config.yaml", ["data_config.limit=900"]))
    assert first == shaping_values(shipped("exp1").cells[0].config)


RATES = {"train_config.learning_rate": [0.001, 0.002]}
BAD_FILES = [  # (changes of the file, its problems)
    ({"grids": {}, "wandb": {}, "seeds": [1, -1, "two", True], "script": "train.py", "name": "a/b"}, [
        "7 problems: ", "unknown key grids: the keys are name, question, script", "unknown key wandb: ",
        "seeds.1 is -1: it must be at least 0", "seeds.2 is two: it must be a valid int",
        "seeds.3 is true: it must be a valid integer", "script is train.py: it must be 'main.py' or",
        "name is a/b: it must match"]),
    ({"seeds": None}, ["missing key seeds"]),
    ({"grid": {"train_config.epochs": 3, "train_config": {"seed": []}}}, [
        "grid.train_config.epochs is 3: it must be a valid list", "train_config.seed is []: it must have"]),
    ({"published": [{"where": {"train_config.learning_rate": 0.001}, "accuracy": {"them": 90}}]},
     ["published.0.accuracy.them is 90: it must be at most 1"]),
    ({"config": "absent.yaml"}, ["absent.yaml: no such file"]),
    ({"grid": None}, ["give the settings either as a grid"]),
    ({"settings": [{}]}, ["give the settings either as a grid"]),
    ({"grid": RATES | {"data_config.split": ["official"]},
      "published": [{"where": {"train_config.learning_rate": 0.1}, "accuracy": {"them": 0.9}}]}, [
          "2 problems: ", "data_config.split varies: set it under overrides",
          "published: where is {'train_config.learning_rate': '0.1'}, which is of no setting"]),
    ({"grid": {"train_config.epoch": [3]}}, ["unknown key train_config.epoch; did you mean train_config.epochs?"]),
    ({"overrides": {"train_config.epochs": 0}}, ["train_config.epochs is 0"]),
    ({"grid": {"data_config.batch_size": [16, 64], "train_config.effective_batch_size": [64]}},
     ["script main.py takes one micro-batch a step, and batch_size=16, effective_batch_size=64 needs 4"]),
    ({"grid": {"train_config.effective_batch_size": [None, 32]}, "seeds": [1]}, ["runs 1 and 2 are the same"]),
    ({"grid": RATES, "seeds": [1, 1]}, ["runs 1 and 3 are the same (learning_rate=0.001, seed 1): ", "; "]),
]


@pytest.mark.parametrize(("changes", "problems"), BAD_FILES, ids=[problems[-1][:40] for _, problems in BAD_FILES])
def test_a_bad_file_is_refused(tmp_path, changes, problems):
    """Wrong settings end in one line with the fix, and all of a kind are counted at once."""
    with pytest.raises(UserError) as refused:
        read_experiment(write_experiment(tmp_path, **changes))
    assert all(problem in str(refused.value) for problem in problems), refused.value
    assert "\n" not in str(refused.value)
    assert ("absent.yaml" if "config" in changes else str(tmp_path / "study.yaml")) in str(refused.value)


def test_settings_can_be_listed_one_by_one(tmp_path):
    settings = [{}, {"model_config.pooling": "cls"}, {"model_config": {"pooling": "cls", "dropout_rate": 0.2}}]
    cells = read_experiment(write_experiment(tmp_path, grid=None, settings=settings,
                                             overrides={"model_config.dropout_rate": 0.3}, seeds=[1, 2])).cells
    found = [(cell.seed, cell.config.model_config.pooling, cell.config.model_config.dropout_rate) for cell in cells]
    assert found == [(seed, *rest) for seed in (1, 2) for rest in (("mean", 0.3), ("cls", 0.3), ("cls", 0.2))]
    assert len({cell.folder for cell in cells}) == 6


@pytest.mark.parametrize(("overrides", "problem"), [
    (["train_config.learning_rate=0.1"],
     'train_config.learning_rate varies, so one value of it is not for the command line: give '
     '"grid.train_config.learning_rate=[...]"'),
    (["train_config.seed=5"], "train_config.seed: give seeds, such as seeds=[42]"),
    (["train_config.epoch=5"], "command line: unknown key train_config.epoch; did you mean train_config.epochs?")])
def test_a_bad_override_is_refused(tmp_path, overrides, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        read_experiment(write_experiment(tmp_path), overrides)


def test_all_problems_come_at_once_before_any_slow_import(tmp_path):
    path = write_experiment(tmp_path, script="train.py", seeds=[-1], names="x")
    result = run_script("-X", "importtime", "experiment.py", path)
    assert not re.search(r"\| *(torch|scipy|sklearn)$", result.stderr, re.MULTILINE)
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2
    assert line.startswith(f"error: {path}: 3 problems: ")


def test_a_smaller_grid_may_leave_published_figures_without_their_setting(tmp_path):
    published = [{"where": {"train_config.learning_rate": 0.002}, "accuracy": {"them": 0.9}}]
    path = write_experiment(tmp_path, published=published)
    assert len(read_experiment(path, ["grid.train_config.learning_rate=[0.001]"]).cells) == 2
    with pytest.raises(UserError, match="published: where is"):
        read_experiment(write_experiment(tmp_path, published=published, grid={"train_config.learning_rate": [0.001]}))


@pytest.mark.parametrize("index", ["0", "5", "-1"])
def test_only_is_a_number_of_a_run(tmp_path, monkeypatch, capsys, index):
    monkeypatch.setattr(sys, "argv", ["experiment.py", write_experiment(tmp_path), f"--only={index}"])
    with pytest.raises(SystemExit) as left:
        read_command()
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith("study.yaml has the runs 1 to 4\n")


# ---------------------------------------------------------------------------------------------------------------------
# Which runs exist


def test_finished_runs_are_known_by_their_configurations(tmp_path, capsys):
    experiment, arguments = finished_experiment(tmp_path)
    first, second, third, fourth = [cell.folder for cell in experiment.cells]
    assert all(cell.is_finished for cell in experiment.cells)
    first.rename(first.with_name("renamed by somebody"))  # the same run under another name
    second.rename(tmp_path / "elsewhere")
    third.rename(second)  # another run under this name
    (fourth / "metrics.json").unlink()  # interrupted
    experiment = read_experiment(*arguments)
    assert [cell.is_finished for cell in experiment.cells] == [True, False, True, False]
    assert [cell.folder for cell in experiment.cells][0] == first.with_name("renamed by somebody")
    assert experiment.cells[1].folder not in (first, second, third, fourth)  # what is there stays there
    assert not experiment.cells[1].folder.exists()
    assert experiment.cells[2].folder == second
    assert experiment.cells[3].folder == fourth
    list_cells(experiment, experiment.cells)
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["finished", "to", "finished", "unfinished", "of"]


def test_runs_on_reviews_that_were_edited_twice_have_a_place(tmp_path):
    reviews, folders = tmp_path / "reviews.csv", []
    for content in ("once", "twice", "three times"):
        reviews.write_text(content)
        found, _ = finished_experiment(tmp_path, overrides={"data_config.dataset": str(reviews)})
        for cell in found.cells:
            metrics = read_json(cell.folder / "metrics.json")
            metrics["data"]["contents"] = {"data_config.dataset": content_of("data_config.dataset", str(reviews))}
            write_json(cell.folder / "metrics.json", metrics)
        folders += [cell.folder for cell in found.cells]
    assert len(set(folders)) == 12


def test_an_experiment_that_chooses_settings_stays_on_validation_when_its_runs_are_tested(tmp_path, capsys):
    found, _ = finished_experiment(tmp_path, overrides={"train_config.test": False})
    for cell in found.cells:
        write_run(cell.folder.parent.parent / "valid" / cell.folder.name, 0.7, *cell.arguments[3:],
                  base=cell.arguments[2], split="valid")
        shutil.copy(cell.folder.parent.parent / "valid" / cell.folder.name / "valid_predictions.csv", cell.folder)
        metrics = read_json(cell.folder / "metrics.json")
        write_json(cell.folder / "metrics.json", metrics | {"valid": metrics["test"]})
    write_report(found, {})
    assert "validation accuracy" in capsys.readouterr().out


def test_settings_that_do_not_shape_a_result_may_differ(tmp_path):
    _, (path, overrides) = finished_experiment(tmp_path)
    experiment = read_experiment(path, [*overrides, "data_config.eval_batch_size=8", "log_config.wandb_mode=disabled"])
    assert all(cell.is_finished for cell in experiment.cells)
    assert experiment.overrides == []
    other = read_experiment(path, [*overrides, "data_config.max_len=32"])
    assert not any(cell.is_finished for cell in other.cells)
    assert other.overrides == ["data_config.max_len=32"]


def test_the_remaining_time_is_that_of_finished_runs(tmp_path):
    experiment, _ = finished_experiment(tmp_path)
    cells = experiment.cells
    cells[2].is_finished = cells[3].is_finished = False
    for cell, seconds in zip(cells, (100.0, 7100.0), strict=False):
        write_json(cell.folder / "metrics.json", {"train": {"seconds": seconds}})
    assert remaining_time(experiment, cells[2:]) == ", about 2:00:00 of training"


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_training(folder: Path):
    return lambda: any((folder / "last").glob("*-step-*"))


def ended(tmp_path: Path, script: str) -> str | None:
    """What `run_cell` says about a script with this content."""
    (tmp_path / "script.py").write_text(script)
    cell = SimpleNamespace(config=SimpleNamespace(run_name="run"), command=[str(tmp_path / "script.py")])
    return run_cell(SimpleNamespace(report_folder=tmp_path), cell)


def test_a_run_does_not_wait_for_a_reader_that_has_left(tmp_path, monkeypatch):
    """`experiment.py FILE | head` comes to an end. A pipe holds 64 KB, and a run waits until somebody reads on."""
    def say(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("suite.comparison.running.say", say)
    assert ended(tmp_path, "import signal; signal.alarm(20); print('a line\\n' * 20_000, end='')") is None
    assert (tmp_path / "logs/run.txt").read_text() == "a line\n" * 20_000


@pytest.mark.parametrize(("end", "reason"), [
    ("os.kill(os.getpid(), signal.SIGTERM)", "ended by SIGTERM"),  # while it was starting: nothing about memory
    ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL, as the system ends a process that needs too much"),
    ("sys.exit(143)", "stopped by a signal; its state is saved"), ("sys.exit(3)", "exit code 3"),
    ("print('error: no such file', flush=True); print('more'); sys.exit(2)", "error: no such file")])
def test_why_a_run_ended(tmp_path, end, reason):
    assert ended(tmp_path, f"import os, signal, sys; {end}").startswith(reason)


def test_a_run_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    path, overrides = write_experiment(tmp_path, seeds=[1, 2]), [f"output_dir={tmp_path / 'runs'}"]

    def run(experiment, cell):
        if cell.index == 2:
            return "error: no such folder"
        write_run(cell.folder, 0.8, *cell.arguments[3:], base=cell.arguments[2])
        return None

    monkeypatch.setattr("suite.comparison.running.run_cell", run)
    monkeypatch.setattr(sys, "argv", ["experiment.py", path, *overrides])
    with pytest.raises(SystemExit) as left:
        main(*read_command())
    assert left.value.code == 1
    failing = read_experiment(path, overrides).cells[1].folder
    assert capsys.readouterr().out.splitlines()[-1] == f"failed: run 2, {failing}: error: no such folder"
    summary = json.loads((tmp_path / "runs" / "study-report" / "comparison.json").read_text())
    assert [row["seeds"] for row in summary["settings"]] == [[1, 2], [2]]
    assert summary["notes"][0] == "1 of 4 runs are missing here: run 2 failed: error: no such folder."


def test_killed_in_the_middle_it_goes_on_without_repeating_a_finished_run(tmp_path, encoder_folder):
    """The promise that a run may be stopped or killed at any moment holds for the runs of an experiment, too: the first
    is stopped by SIGTERM, the second by SIGKILL."""
    reviews = write_reviews(tmp_path / "reviews.csv")
    path = write_experiment(tmp_path, config="config.yaml", seeds=[1], grid={
        "train_config.learning_rate": [0.01, 0.02]}, overrides={
        "data_config.dataset": str(reviews), "data_config.text_column": "review", "data_config.max_len": 32,
        "data_config.label_column": "verdict", "data_config.batch_size": 16, "model_config.pooling": "mean",
        "train_config.mixed_precision": "no", "train_config.device": "cpu", "log_config.wandb_mode": "disabled",
        "train_config.epochs": 8, "model_config.model_name": encoder_folder("bert")})
    arguments = ["experiment.py", path, f"output_dir={tmp_path / 'runs'}"]
    first, second = [cell.folder for cell in read_experiment(path, arguments[2:]).cells]

    process = start_script(*arguments)
    wait_for(is_training(first), process)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 143, output
    assert "SIGTERM: saved at optimizer step" in output
    assert not (first / "metrics.json").exists()

    process = start_script(*arguments)
    wait_for(is_training(second), process)
    process.kill()
    process.communicate(timeout=60)
    assert not (second / "metrics.json").exists()
    finished = (first / "metrics.json").read_bytes(), (first / "metrics.json").stat().st_mtime_ns
    assert "continuing from" in (tmp_path / "runs" / "study-report" / "logs" / f"{first.name}.txt").read_text()

    result = run_script(*arguments)  # the orphan saves and leaves, or this one waits for it
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 of 2 runs are finished" in result.stdout
    assert "continuing from" in result.stdout
    assert ((first / "metrics.json").read_bytes(), (first / "metrics.json").stat().st_mtime_ns) == finished
    assert (second / "metrics.json").exists()
    summary = json.loads((tmp_path / "runs" / "study-report" / "comparison.json").read_text())
    assert [row["setting"] for row in summary["settings"]] == ["learning_rate 0.01", "learning_rate 0.02"]


@pytest.mark.long
@pytest.mark.skipif(not SHARED.exists(), reason="needs the stand-in for the Hub")
def test_experiments_1_and_2_through_the_hubs_own_protocol(tmp_path):
    """All cells with tiny limits; another model stands in for both encoders, which shows the way and no accuracy."""
    model, imdb = SHARED / "models/all-MiniLM-L6-v2", SHARED / "data/imdb"
    port = "8919"
    names = ("google-bert/bert-base-uncased", "answerdotai/ModernBERT-base")
    server = subprocess.Popen([sys.executable, SHARED / "tools/local_hub.py", "--port", port,
                               *(part for name in names for part in ("--model", f"{name}={model}")),
                               "--alias", "bert-base-uncased=google-bert/bert-base-uncased",
                               "--dataset", f"stanfordnlp/imdb={imdb}"], stdout=subprocess.PIPE)
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
           "HF_HUB_OFFLINE": "0"}
    arguments = [f"output_dir={tmp_path / 'runs'}", "data_config.limit=200", "train_config.epochs=1"]

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}

    try:
        server.stdout.readline()
        for name, total, wanted in (("exp1", 6, 3), ("exp2", 18, 9)):
            command = [f"experiments/{name}.yaml", *arguments]
            process = start_script("experiment.py", *command, environment=hub)
            wait_for(lambda wanted=wanted: len(finished()) == wanted, process)
            process.kill()
            process.communicate(timeout=60)
            before = finished()
            result = run_script("experiment.py", *command, environment=hub, timeout=900)
            assert result.returncode == 0, result.stdout + result.stderr
            assert len(finished()) == total
            assert before.items() <= finished().items()
            summary = json.loads((tmp_path / "runs" / f"{name}-report" / "comparison.json").read_text())
            assert [len(row["seeds"]) for row in summary["settings"]] == [3] * (total // 3)
            assert all(len(row["published"]) >= 3 for row in summary["settings"])
    finally:
        server.kill()
        server.wait()
