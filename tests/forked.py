"""The real scripts as processes of their own, at the price of a fork instead of six seconds of imports.

A server, started once by each process of pytest, has imported the libraries and nothing of the project. For each script
it forks a child, which takes its arguments, environment and output files, and runs the script as `python SCRIPT` does.
The project is imported anew, signals and exit codes are real, and nothing that a test has patched gets in.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
LIBRARIES = ["suite", "torch", "transformers", "transformers.models.bert.modeling_bert", "accelerate", "datasets",
             "transformers.models.modernbert.modeling_modernbert", "matplotlib.figure", "omegaconf", "scipy.stats",
             "sklearn.linear_model", "sklearn.metrics", "torch.distributed.fsdp", "torch.distributed.tensor"]
# What Python, glibc or a library reads when it starts
READ_AT_START = ("GLIBC_", "HF_", "LANG", "LC_", "LD_", "MALLOC_", "OMP_", "PYTHON", "TRANSFORMERS_")
FIRST_ENVIRONMENT = dict(os.environ)  # what the server starts with
CONTEXT = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
if CONTEXT:
    CONTEXT.set_forkserver_preload(LIBRARIES)


def can_fork(arguments: tuple[str, ...], environment: dict[str, str]) -> bool:
    """Whether this is a script whose environment differs from the server's in nothing that is read at the start."""
    changed = {name for name, _ in environment.items() ^ FIRST_ENVIRONMENT.items()}
    return CONTEXT is not None and arguments[0].endswith(".py") and not any(
        name.startswith(READ_AT_START) for name in changed)


class Forked:
    """What a test needs of subprocess.Popen."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], merged: bool):
        self.args, self._folder = arguments, tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output")
        self._error = Path(self._folder.name, "output" if merged else "error")
        for path in (self._output, self._error):
            path.touch()  # a kill may be quicker than the process
        self._process = CONTEXT.Process(target=become, args=(list(arguments), environment, self._output, self._error))
        with contextlib.chdir(PROJECT):  # where the server, which the first process starts, finds `suite`
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error; merged, both are in the first."""
        self.wait(timeout)
        return self._output.read_text(), self._error.read_text()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()  # nothing, if it has ended


def become(arguments: list[str], environment: dict[str, str], output: Path, error: Path) -> None:
    """`python ARGUMENTS` in the project's folder. Never returns."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(PROJECT)
    for number, path in ((1, output), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # data loaders start their processes as Python does by default
    sys.argv, sys.path[:0] = arguments, [str(Path(arguments[0]).resolve().parent)]
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            code = left.code or 0
        else:
            print(left.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
