"""Whatever is wrong around a run, its disks, memory and terminal: one line with the fix, and nothing is lost."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, run_here

from suite.common import cli
from utils import UserError, say


def test_fp16_on_a_cpu_that_nobody_named_is_refused(refused, monkeypatch):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    assert "a CPU cannot train in" in refused("train_config.mixed_precision=fp16", "train_config.device=auto")


def test_an_output_dir_that_cannot_be(overrides, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/nowhere", str(tmp_path / "file")):
        result = run_here(*overrides, f"output_dir={folder}")
        assert result.returncode == 2
        assert folder in result.stderr
        assert "set output_dir" in result.stderr


@pytest.mark.parametrize(("mode", "overrides"), [
    ("train", ["data_config.dataset=absent.csv"]), ("train", ["model_config.model_name=./absent"]), ("test", []),
    ("train", ["train_config.resume=must"])])
def test_nothing_is_made_for_wrong_input(tmp_path, monkeypatch, mode, overrides):
    monkeypatch.chdir(tmp_path)
    result = run_here("log_config.wandb_mode=disabled", f"model_config.model_name={PROJECT / 'demo/bert'}",
                      f"data_config.dataset={PROJECT / 'demo/reviews.csv'}", *overrides, mode=mode)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    # The lock stays, because another process may wait for it.
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}
    assert not any((tmp_path / "checkpoints").glob("[!.]*"))


def raising(error: Exception):
    """cli.run_with_exit_code with work that ends so."""
    def work():
        raise error

    cli.run_with_exit_code(work)


MEMORY = "error: out of memory: set a smaller data_config.batch_size"


@pytest.mark.parametrize(("error", "line"), [
    (OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/run/last"), "error: runs/run/last: Read-only file system: "),
    (MemoryError(), MEMORY), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MEMORY)])
def test_what_the_user_can_mend_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as left:
        raising(error)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("a bug"), OSError("a bug")])
def test_an_unforeseen_error_keeps_its_traceback(error):
    """Python shows it, and ends with exit code 1."""
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def test_a_reader_that_leaves_ends_the_command_without_a_word():
    """As `| head` does. `true` is gone before anything is printed."""
    command = shlex.join([sys.executable, "-c", "from suite.common import cli; "
                          "cli.run_with_exit_code(lambda: print(1, flush=True))"])
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(["bash", "-c", f"{command} | true; exit $PIPESTATUS"], cwd=PROJECT, env=buffered,
                            capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_name_that_the_terminal_cannot_show_ends_nothing(monkeypatch):
    """A run that says such a name must come to its end: it would fail again whenever it went on."""
    written = io.BytesIO()
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.begin()
    say("the class schön")
    assert written.getvalue() == b"the class sch\\xf6n\n"


def test_control_characters_do_not_reach_the_terminal(capsys):
    """One in the name of a class could turn one line into two."""
    say("a\x07b\n\x9bc")
    with pytest.raises(SystemExit):
        cli.leave(UserError("a\x1b[31m"))
    assert tuple(capsys.readouterr()) == ("a\\x07b\n\\x9bc\n", "error: a\\x1b[31m\n")
