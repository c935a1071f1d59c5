"""Promise 2: two processes cannot write one run. The lock ends with its process, though data loaders live on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from suite.common import storage
from utils import UserError

LOCKED = "import pathlib, sys; from suite.common import storage; storage.lock(pathlib.Path(sys.argv[1])); "


@pytest.fixture
def other_process():
    """other_process(folder, code): another process locks it, and then runs the code."""
    started = []

    def start(folder: Path, code: str = "") -> subprocess.Popen:
        code = f"{LOCKED}\n{code}\nprint('locked', flush=True); input()"
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
        assert storage.is_locked(Path(name))
        with pytest.raises(UserError, match=f"{name} is in use by another process"):
            storage.lock(Path(name))


def test_a_killed_process_leaves_no_lock_even_if_what_it_has_forked_lives_on(tmp_path, other_process):
    """Promise 1: the same command continues a killed run, at once."""
    fork = f"""
import os, time
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"1")  # the fork is complete: filelock has closed its file here
    time.sleep(60)
    os._exit(0)
os.read(reader, 1)
open({str(tmp_path / "child")!r}, "w").write(str(child))
"""
    other = other_process(tmp_path / "run", fork)
    assert storage.is_locked(tmp_path / "run")
    other.kill()
    other.wait()
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)  # it lives
    try:
        assert not storage.is_locked(tmp_path / "run")
        storage.lock(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_is_not_said_to_be_in_use(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=r"\.run\.lock cannot be written \(Permission denied\): choose another"):
        storage.lock(tmp_path / "run")
