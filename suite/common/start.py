"""What every script does first: it settles what signals, closed or full streams, and unforeseen errors do.

A signal can come at once, so this module imports as little as it can: what takes longer is imported where it is needed.
"""

from __future__ import annotations

import os
import sys

from suite.common.stopping import SIGNALS

CLOSED = {name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None}  # when the process began


def start(doing: str) -> None:
    """`doing`: what an unforeseen error interrupts, such as `the start of main.py`."""
    SIGNALS.install()
    SIGNALS.importing = True
    open_streams()
    LAST_NET.doing = doing
    sys.excepthook = LAST_NET.catch


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Console:
    """Standard output or error. When it cannot be written any more, because a disk is full or a reader such as `head`
    is gone, the rest of it is dropped and the work goes on: a log must not end a training run. If what is printed is
    the command's result, OSError is raised."""

    def __init__(self, stream, name: str):
        self.stream, self.name, self.is_result = stream, name, False

    def __getattr__(self, attribute: str):
        return getattr(self.stream, attribute)

    def write(self, text: str) -> int:
        return self._attempt(self.stream.write, text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # so that it fails no more, even at exit
            if self.is_result:
                raise OSError(error.errno, error.strerror, self.name) from None  # a BrokenPipeError stays one
            print(f"{self.name}: {error.strerror}: the rest of it is dropped", file=sys.stderr)
            return None


def open_streams() -> None:
    """Give the null device to closed streams: the next file to be opened would get their number, and what a library
    prints would go into it. Wrap the others in a `Console`."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, stream, name in ((0, "stdin", None), (1, "stdout", "standard output"), (2, "stderr", "standard error")):
        if stream in CLOSED:
            setattr(sys, stream, os.fdopen(number, "w" if name else "r"))
        elif name:
            getattr(sys, stream).reconfigure(errors="backslashreplace")  # for characters that its encoding lacks
            setattr(sys, stream, Console(getattr(sys, stream), name))


# ---------------------------------------------------------------------------------------------------------------------
# Unforeseen errors


class LastNet:
    """Ends a process that meets an error nobody foresaw: one line, the traceback in a file, and exit code 1."""

    def __init__(self):
        self.doing, self.folder = "", None  # the folder that the traceback goes to; None: that of temporary files

    def catch(self, kind: type[BaseException], error: BaseException, trace) -> None:
        import platform
        import traceback

        report = (f"{' '.join(sys.argv)}\nPython {platform.python_version()}, {platform.platform()}\n\n"
                  + "".join(traceback.format_exception(kind, error, trace)))
        what = " ".join(f"{kind.__name__}: {error}".split())[:300]
        print(f"error: unforeseen in {self.doing}: {what}; nothing that was saved is lost; {self._kept(report)}",
              file=sys.stderr, flush=True)

    def _kept(self, report: str) -> str:
        """Where the report lies; all of it if no file can be written."""
        import tempfile

        for folder in (self.folder, None) if self.folder else (None,):
            try:
                descriptor, name = tempfile.mkstemp(prefix="traceback-", suffix=".txt", dir=folder)
                with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(report)
            except OSError:  # there is no such folder yet, or no room
                continue
            return f"the traceback is in {name}"
        return f"the traceback could not be written to a file:\n{report}"


LAST_NET = LastNet()
