"""What stands where a run or a report is to be written: what another has put there stays as it was, and one line says
so. A kill while the best model is replaced leaves the old one or the new one, and nothing in between."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT, content_of, expect, run_here, train_here, write_reviews
from test_compare import write_run

from suite.common import cli
from suite.common.run_folder import read_metrics
from suite.common.storage import atomic_write, replace_folder, seal, temporary_name
from suite.comparison.report import compare_runs
from suite.encoders.loading import best_model
from suite.training.states import saved_states
from utils import load_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder_folder):
    """(overrides without output_dir, folder with the run `run`)"""
    folder = tmp_path_factory.mktemp("finished")
    overrides = ["run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={write_reviews(folder / 'reviews.csv')}", "data_config.text_column=review",
                 "data_config.label_column=verdict", "data_config.max_len=32", "data_config.batch_size=16",
                 "train_config.epochs=2", "train_config.learning_rate=0.01", "train_config.mixed_precision=no",
                 "train_config.device=cpu", "log_config.wandb_mode=disabled"]
    train_here(*overrides, f"output_dir={folder}")
    return overrides, folder


@pytest.fixture
def run(finished, tmp_path):
    """(overrides, run folder) of a copy."""
    folder = shutil.copytree(finished[1] / "run", tmp_path / "run")
    return [*finished[0], f"output_dir={tmp_path}"], folder


@pytest.fixture
def unfinished(run):
    """The same, as if it had been killed in its second epoch."""
    overrides, folder = run
    (folder / "metrics.json").unlink()
    shutil.rmtree(saved_states(folder / "last")[0])
    return overrides, folder


def everything(folder: Path) -> dict:
    """The files, and the kind of all that is there."""
    kinds = {str(path.relative_to(folder)): os.lstat(path).st_mode for path in folder.rglob("*")}
    return {"files": content_of(folder), "kinds": kinds}


def refusal(overrides: list[str], folder: Path, mode: str = "train", **options) -> str:
    """The one line of a command that changes nothing."""
    before = everything(folder)
    error = expect(2, run_here(*overrides, mode=mode, **options)).stderr
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert everything(folder) == before
    return error


# ---------------------------------------------------------------------------------------------------------------------
# The run's own best model, and its states


def other_model(folder: Path) -> None:
    """Seal another model of the same architecture in the place of the best one."""
    weights = folder / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    seal(folder / "best")


def test_another_run_s_best_model_is_not_this_run_s(unfinished):
    overrides, folder = unfinished
    assert subprocess.run(["sha256sum", "-c", "best.sha256"], cwd=folder, check=True, capture_output=True)
    other_model(folder)
    said = f"{folder / 'best'} is not the model that this run has saved"
    for mode, text in (("train", None), ("test", None), ("predict", "a film"), ("explain", "a film")):
        assert said in refusal(overrides, folder, mode, **({"text": text} if text else {}))
    (folder / "best.sha256").unlink()  # as in a run of an earlier version
    assert best_model(folder)


def test_a_model_that_is_exchanged_during_training_is_not_tested(unfinished, monkeypatch):
    import main

    overrides, folder = unfinished
    train = main.train
    monkeypatch.setattr(main, "train", lambda run: (train(run), other_model(folder)))
    assert "is not the model that this run has saved" in run_here(*overrides).stderr
    assert not (folder / "metrics.json").exists()


def test_a_run_folder_that_is_moved_while_it_trains_is_not_made_again(unfinished, tmp_path, monkeypatch):
    import main

    overrides, folder = unfinished
    step, moved = main.train_step, tmp_path / "moved"
    monkeypatch.setattr(main, "train_step", lambda *rest: (
        folder.rename(moved) if folder.exists() else None, step(*rest))[1])
    assert "No such file or directory" in expect(2, run_here(*overrides)).stderr
    monkeypatch.undo()
    assert not folder.exists()
    moved.rename(folder)
    expect(0, run_here(*overrides))


@pytest.mark.parametrize("call", range(6))
def test_killed_at_any_point_of_replacing_the_best_model(tmp_path, monkeypatch, call):
    folder, calls = tmp_path / "best", []

    def write(text):
        replace_folder(folder, lambda path: (path / "model").write_text(text), recorded=True)

    def stopping(*arguments, replace=os.replace):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise SystemExit(9)
        replace(*arguments)

    (tmp_path / "best.sha256").write_text("")
    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        if call < 5:  # manifest, record, two renames, record
            with pytest.raises(SystemExit):
                write("new")
        else:
            write("new")
    if not folder.exists():
        os.replace(tmp_path / "best.old", folder)
    assert best_model(tmp_path) == folder
    assert (folder / "model").read_text() == ("old" if call < 4 else "new")
    write("newer")
    assert (best_model(tmp_path) / "model").read_text() == "newer"
    assert len((tmp_path / "best.sha256").read_text().splitlines()) == 1


@pytest.mark.parametrize("is_best_there", [True, False])
def test_removed_states_are_said_before_anything_is_replaced(unfinished, is_best_there):
    overrides, folder = unfinished
    shutil.rmtree(folder / "last")
    if not is_best_there:
        shutil.rmtree(folder / "best")
    error = refusal(overrides, folder)
    assert f"{folder / 'last'} is missing, and this run is not finished" in error
    assert "train_config.resume=never" in error
    (folder / "last").mkdir()
    result = expect(0, run_here(*overrides))
    assert ("holds no saved state: the run starts again from the beginning" in result.stdout) == is_best_there
    assert read_metrics(folder)["train"]["optimizer_steps"] == 20


def test_a_folder_that_cannot_be_written_is_refused_with_nothing_left(run, tmp_path):
    overrides, folder = run
    command = ["mount", "-o", "bind,ro", str(folder), str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        before = everything(tmp_path)
        assert f"{folder} cannot be written" in refusal(overrides, folder, "test")
        assert everything(tmp_path) == before
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reports and names


@pytest.fixture
def two_runs(tmp_path):
    return [write_run(tmp_path / name, 0.8, f"train_config.seed={seed}")[0] for seed, name in enumerate("ab")]


def thesis(folder: Path) -> None:
    folder.mkdir()
    (folder / "report.md").write_text("my thesis")


@pytest.mark.parametrize("make", [
    thesis, lambda path: path.write_text("mine"), lambda path: path.symlink_to(path.parent / "a")])
def test_a_report_replaces_nothing_but_a_report(two_runs, tmp_path, capsys, make):
    output = tmp_path / "report"
    make(output)
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: compare_runs(two_runs, output, "a comparison"))
    assert left.value.code == 2
    assert f"error: {output} " in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_a_report_replaces_an_earlier_one_even_a_half_written_one(two_runs, tmp_path, monkeypatch):
    (tmp_path / "report" / "logs").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("suite.comparison.report.try_plots", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            compare_runs(two_runs, tmp_path / "report", "a comparison")
    monkeypatch.setattr("suite.comparison.report.try_plots", lambda *_: [])
    compare_runs(two_runs, tmp_path / "report", "again")
    assert "again" in (tmp_path / "report" / "report.html").read_text()


def test_a_file_may_have_the_longest_name_that_there_is(tmp_path):
    for name in ("n" * 255, "ä" * 127):
        with atomic_write(tmp_path / name) as file:
            file.write("all of it")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_names_that_are_made_of_others_are_not_too_long(tmp_path):
    from suite.comparison.grid import read_experiment

    name = "ä" * 120
    assert len(load_config(PROJECT / "config.yaml", [f"model_config.model_name={name}"]).run_name.encode()) < 200
    values = {"max_grad_norm": 1, "weight_decay": 1, "warmup_ratio": 1, "class_weights": "balanced", "max_steps": 1,
              "early_stopping_patience": 1, "scheduler": "linear", "optimizer": "sgd"}
    grid = "\n".join(f"  train_config.{key}: [{value}]" for key, value in values.items())
    (tmp_path / "long.yaml").write_text(f"grid:\n{grid}\n  model_config.model_name: [{name}, {name}b]\nseeds: [1]\n")
    names = {cell.config.run_name for cell in read_experiment(str(tmp_path / "long.yaml")).cells}
    assert len(names) == 2
    assert all(len(run_name.encode()) <= 200 for run_name in names)


def test_a_temporary_file_that_leads_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / temporary_name("file")).symlink_to("thesis")
    with atomic_write(tmp_path / "file") as file:
        file.write("ours")
    assert (tmp_path / "thesis").read_text() == "mine"
