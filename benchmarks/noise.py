"""Measuring in turn on a quiet machine. On a busy one, ratios between programs that ran in turn were seen to triple."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

Name, Result = TypeVar("Name"), TypeVar("Result")
USUAL = 0.05  # the share of all cores' time that other programs may take before figures count for nothing
LOOK_SECONDS = 2.0  # at the machine, before anything is measured
ATTEMPTS = 4  # at one measurement


def most_noise() -> float:
    """The share of all cores' time, 0 to 1, up to which figures count: USUAL, unless the environment says another."""
    told = os.environ.get("MOST_NOISE", str(USUAL))
    try:
        if 0 <= (most := float(told)) <= 1:
            return most
    except ValueError:
        pass
    raise SystemExit(f"MOST_NOISE={told}: give the share of the cores' time that others may take, from 0 to 1")


MOST = most_noise()


class Watch:
    """What other programs take of the machine, from now on. A hypervisor that lends the cores to others counts too."""

    def __init__(self):
        self.started, self.others_before = time.perf_counter(), self._others()

    @staticmethod
    def _others() -> float:
        """Seconds of all cores since they started, except for those of this process and of its children that ended."""
        cores, own = psutil.cpu_times(), os.times()
        idle = cores.idle + getattr(cores, "iowait", 0.0)
        twice = getattr(cores, "guest", 0.0) + getattr(cores, "guest_nice", 0.0)  # they are a part of user and nice
        return sum(cores) - idle - twice - sum(own[:4])

    def others(self) -> float:
        """The share, 0 to 1, of all cores' time that others have taken."""
        cores = (time.perf_counter() - self.started) * (os.cpu_count() or 1)
        return min(max(0.0, (self._others() - self.others_before) / cores), 1.0)  # the kernel counts in ticks


def refuse_busy_machine() -> None:
    """Raises SystemExit if other programs are running now, and says so if they may."""
    watch = Watch()
    time.sleep(LOOK_SECONDS)
    if (share := watch.others()) > MOST:
        raise SystemExit(f"other programs take {share:.0%} of the cores, and no figure would be worth anything: stop "
                         f"them first, or set MOST_NOISE={min(share + 0.1, 1):.1f} in the environment")
    if MOST > USUAL:
        print(f"MOST_NOISE={MOST:g}: rounds count although other programs take up to so much of the cores", flush=True)


def quietly(measure: Callable[[], Result], name: str) -> Result:
    """measure(), and again if other programs disturbed it. Raises SystemExit if they do not leave off."""
    for _ in range(ATTEMPTS):
        watch = Watch()
        result = measure()
        if (share := watch.others()) <= MOST:
            return result
        print(f"  {name}: other programs took {share:.0%} of the cores: it does not count, and is measured again",
              flush=True)
    raise SystemExit(f"no verdict: {name} was disturbed {ATTEMPTS} times; stop the other programs first")


def in_turn(measure: Callable[[Name], Result], names: Iterable[Name], rounds: int,
            report: Callable[[dict[Name, Result]], None] = lambda found: None) -> dict[Name, list[Result]]:
    """What is measured of each name, round after round, each of them quietly. `report` is told of each round."""
    results: dict[Name, list[Result]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        found = quietly(lambda: {name: measure(name) for name in results}, f"round {number}")
        for name, result in found.items():
            results[name].append(result)
        report(found)
    return results


def ratios(over: Iterable[float], under: Iterable[float]) -> str:
    """The ratios of two programs within their rounds: `median (least to most)`."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
