"""What SIGINT, SIGTERM, SIGUSR1 and SIGHUP do to training and labelling: they finish a step or a chunk, save and leave.

The same command resumes it later. A second SIGINT leaves at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suite.common.devices import Devices


# Schedulers such as SLURM announce the end by SIGUSR1; a terminal that is closed, as by a broken connection, by SIGHUP.
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 129}


class StopRequested(Exception):
    """A signal has arrived. Everything up to the last optimizer step is consistent and can be saved."""


class StopSignals:
    """Inside `deferred`, a signal is only noted, and the code looks at `received`. Outside, it ends the process."""

    def __init__(self):
        self.received: str | None = None
        self.passed_to: subprocess.Popen | None = None  # a process that gets the signals, too

    def _handle(self, number, frame) -> None:
        if self.passed_to is not None:
            self.passed_to.send_signal(number)
        name = signal.Signals(number).name
        # Under a launcher, one Ctrl-C arrives twice: from the terminal, and passed on by the launcher.
        if name == "SIGINT" and self.received == "SIGINT" and "LOCAL_RANK" not in os.environ:
            os._exit(EXIT_CODES[name])  # no exception, because torch.save would replace it with its own
        self.received = name

    @contextmanager
    def deferred(self):
        numbers = [getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)]  # Windows has not all of them
        before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in before.items():
            if signal.Signals(number).name != "SIGHUP" or handler != signal.SIG_IGN:  # nohup wants it to be ignored
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received:
            raise SystemExit(self.exit_code)

    @property
    def name(self) -> str:
        return self.received or "SIGTERM"  # none: another process has received one, and this one stops with it

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.name]


SIGNALS = StopSignals()


def stop_if_asked(devices: Devices) -> None:
    """Raises StopRequested if any process has received a signal."""
    if devices.any(SIGNALS.received is not None):
        raise StopRequested
