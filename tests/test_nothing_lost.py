"""What stands where a run or a report is to be written: what another has put there stays as it was, and one line says
so. A kill while the best model is replaced leaves the old one or the new one, and nothing in between."""

import os
from pathlib import Path

import pytest
from conftest import content_of, train_here
from test_compare import write_run

from suite.common import cli
from suite.common.run_folder import best_folder
from suite.common.storage import replace_folder, restore
from suite.comparison.report import compare_runs


@pytest.mark.parametrize("call", range(4))
def test_killed_at_any_point_of_replacing_the_best_model(tmp_path, monkeypatch, call):
    folder, calls = tmp_path / "best", []

    def write(text):
        replace_folder(folder, lambda path: (path / "model").write_text(text))

    def stopping(*arguments, replace=os.replace):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise SystemExit(9)
        replace(*arguments)

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        if call < 3:  # manifest, two renames
            with pytest.raises(SystemExit):
                write("new")
        else:
            write("new")
    restore(folder)
    assert (best_folder(tmp_path) / "model").read_text() == ("old" if call < 3 else "new")
    write("newer")
    assert (best_folder(tmp_path) / "model").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, overrides):
    (tmp_path / "runs" / "run" / "plots").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "plots" / "thesis.png").write_bytes(b"precious")
    before = content_of(tmp_path / "runs" / "run")
    assert "config.yaml is missing, and with it the settings of this run" in train_here(*overrides, code=2).stderr
    assert content_of(tmp_path / "runs" / "run") == before


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
    before = content_of(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.run_with_exit_code(lambda: compare_runs(two_runs, output, "a comparison"))
    assert left.value.code == 2
    assert f"error: {output} " in capsys.readouterr().err
    assert content_of(tmp_path) == before


def test_a_report_replaces_an_earlier_one_even_a_half_written_one(two_runs, tmp_path, monkeypatch):
    (tmp_path / "report" / "logs").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("suite.comparison.report.try_plots", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            compare_runs(two_runs, tmp_path / "report", "a comparison")
    monkeypatch.setattr("suite.comparison.report.try_plots", lambda *_: [])
    compare_runs(two_runs, tmp_path / "report", "again")
    assert "again" in (tmp_path / "report" / "report.html").read_text()
