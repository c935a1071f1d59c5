"""One process at a time in a folder: whatever the folder is called, and also after somebody removed the lock file."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, content_of

from suite.common import locks
from suite.common.storage import replace_folder, write_json
from utils import UserError


@pytest.fixture
def other_process():
    """other_process(folder): another process locks it."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        code = ("import pathlib, sys; from suite.common import locks; locks.lock(pathlib.Path(sys.argv[1])); "
                "print('locked', flush=True); input()")
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=PROJECT, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_every_name_of_a_folder_leads_to_the_same_lock(tmp_path, other_process, monkeypatch):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "runs" / "run")
    (tmp_path / "other").symlink_to("runs")
    other_process(tmp_path / "alias")
    assert (tmp_path / "runs" / ".run.lock").exists()
    monkeypatch.chdir(tmp_path)
    for name in ("alias", "other/run", "runs/run", "runs/../other/run", str(tmp_path / "runs" / "run")):
        assert locks.is_locked(Path(name))
        with pytest.raises(UserError, match=f"{name} is in use by another process"):
            locks.lock(Path(name))


@pytest.mark.parametrize("write", [
    lambda folder: write_json(folder / "file.json", 1), lambda folder: replace_folder(folder / "best", Path.mkdir)])
def test_a_lock_file_that_was_removed(tmp_path, other_process, write):
    folder, lock_file = tmp_path / "run", tmp_path / ".run.lock"
    folder.mkdir()
    locks.lock(folder)
    lock_file.unlink()
    write_json(folder / "file.json", 0)  # nobody has taken it: it is made and locked again
    process = subprocess.run([sys.executable, "-c", "import pathlib, sys; from suite.common import locks; "
                              "sys.exit(locks.is_locked(pathlib.Path(sys.argv[1])))", folder], cwd=PROJECT, check=False)
    assert process.returncode == 1
    lock_file.unlink()
    other = other_process(folder)
    before = content_of(tmp_path)
    with pytest.raises(UserError, match=f"{folder} is in use by another process, which began when {lock_file} had"):
        write(folder)
    assert content_of(tmp_path) == before
    other.kill()
    other.wait()
    write_json(folder / "file.json", 2)


def test_a_file_system_without_locks_is_used_with_a_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    locks.lock(tmp_path / "run")
    assert "make sure that no other process uses this folder" in capsys.readouterr().out
    assert not locks.is_locked(tmp_path / "run")
