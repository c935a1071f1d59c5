"""What SIGINT, SIGTERM, SIGUSR1 and SIGHUP do: the run finishes its optimizer step, saves its state and leaves.

The same command resumes it later. A second SIGINT leaves at once.
"""

import os
import signal
from contextlib import contextmanager

# Schedulers such as SLURM announce the end by SIGUSR1; a terminal that is closed, as by a broken connection, by SIGHUP.
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 129}


class StopRequested(Exception):
    """A signal has arrived. Everything up to the last optimizer step is consistent and can be saved."""


class StopSignals:
    """Outside `deferred`, a signal ends the process at once. Inside, the code itself looks at `received`."""

    def __init__(self):
        self.received: str | None = None
        self.importing = False  # then leave without an exception: torch's import would abort, and nothing is open yet
        self._deferring = False

    def install(self) -> None:
        for name in EXIT_CODES:
            is_wanted = name != "SIGHUP" or hasattr(signal, name) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
            if hasattr(signal, name) and is_wanted:  # Windows has not all of them, and nohup wants SIGHUP to be ignored
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number, frame) -> None:
        name = signal.Signals(number).name
        # Under a launcher, one Ctrl-C arrives twice: from the terminal, and passed on by the launcher.
        again = name == "SIGINT" and self.received == "SIGINT" and "LOCAL_RANK" not in os.environ
        if again or self.importing:
            os._exit(EXIT_CODES[name])  # no exception, because torch.save would replace it with its own
        self.received = name
        if not self._deferring:
            raise SystemExit(EXIT_CODES[name])

    @contextmanager
    def at_once(self):
        """Around code that waits outside Python, where no handler is called: a signal ends the process as usual."""
        numbers = [getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)]
        before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self):
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received:
            raise SystemExit(self.exit_code)

    @property
    def name(self) -> str:
        return self.received or "SIGTERM"  # none: another process has received one, and this one stops with it

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.name]


SIGNALS = StopSignals()
