"""SIGINT, SIGTERM and SIGUSR1: finish the optimizer step, save, leave; the same command goes on later.

A second SIGINT leaves at once.
"""

import os
import signal
from contextlib import contextmanager

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}  # schedulers announce preemption by SIGUSR1


class StopRequested(Exception):
    """A signal arrived; everything up to the last optimizer step is consistent and can be saved."""


class StopSignals:
    """Outside of `deferred` a signal ends the process at once; inside, it waits for the next `received` check."""

    def __init__(self):
        self.received: str | None = None
        self.importing = False  # C++ modules abort on an exception in their midst, and there is nothing to tidy up yet
        self._deferring = False

    def install(self) -> None:
        for name in EXIT_CODES:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number, frame) -> None:
        name = signal.Signals(number).name
        # A launcher passes on the Ctrl-C that the terminal has sent to this process already: no second one there.
        again = name == "SIGINT" and self.received == "SIGINT" and "LOCAL_RANK" not in os.environ
        if again or self.importing:
            os._exit(EXIT_CODES[name])  # at once: in the middle of a save, torch would turn an exception into its own
        self.received = name
        if not self._deferring:
            raise SystemExit(EXIT_CODES[name])

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
        return self.received or "SIGTERM"  # another process was told, and this one stops with it

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.name]


SIGNALS = StopSignals()
