"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized
from typing import Any

from tqdm import tqdm

from suite.common.protocols import Devices
from suite.common.stopping import stop_if_asked
from utils import process_rank, say


class ProgressBar:
    """A bar with the running loss, accuracy and speed; plain lines where the output is no terminal."""

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "step"):
        self.name, self.total, self.done, self.printed = name, total, done, done
        is_terminal = process_rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(desc=name, total=total, initial=done, unit=unit, leave=False, dynamic_ncols=True,
                        disable=not is_terminal)

    def update(self) -> None:
        self.done += 1
        self.bar.update()

    def show(self, loss: float, accuracy: float, speed: str) -> None:
        text = f"loss {loss:.4f}, accuracy {accuracy:.4f}, {speed}"
        self.bar.set_postfix_str(text)
        if self.bar.disable and (self.done - self.printed) * 10 >= self.total:  # about ten lines an epoch
            say(f"{self.name}, step {self.done}/{self.total}: {text}")
            self.printed = self.done

    def close(self) -> None:
        self.bar.close()


def watched(batches: Sized, devices: Devices, name: str) -> Iterator[Any]:
    """The batches, with a progress bar. Raises StopRequested between two of them."""
    bar = ProgressBar(name, len(batches), unit="batch")
    for batch in batches:
        stop_if_asked(devices)
        yield batch
        bar.update()
    bar.close()
