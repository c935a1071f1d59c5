"""Run the cells of an experiment one after the other, each as a process of its script."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean

from tqdm import tqdm

from suite.common.run_folder import is_encoder, read_metrics
from suite.common.stopping import EXIT_CODES, SIGNALS
from suite.common.storage import is_locked
from suite.comparison.grid import Cell, Experiment, describe, find_finished
from utils import PROJECT, say

LOGS = "logs"  # in the report's folder
WAIT_SECONDS = 2  # between two looks for a run that no other process is working on


def run_cells(experiment: Experiment, cells: Sequence[Cell]) -> dict[int, str]:
    """Run the cells that are not finished; returns {index: last line} of those that failed.

    When a signal asks to stop, the cell that is running saves its state, and this process exits.
    """
    failed: dict[int, str] = {}
    pending = [cell for cell in cells if not cell.is_finished]
    say(f"{experiment.name}: {len(cells) - len(pending)} of {len(cells)} runs are finished")
    with SIGNALS.deferred():
        while pending and (cell := _next_free(pending)):
            pending.remove(cell)
            find_finished([cell])
            if cell.is_finished:  # by another process, in the meantime
                continue
            number = f"[{cell.index}/{len(experiment.cells)}]"
            say(f"{number} {describe(cell.setting)}, seed {cell.seed}: {cell.folder}"
                f"{', going on' if cell.is_begun else ''}")
            problem = run_cell(experiment, cell)
            if SIGNALS.received:
                break
            find_finished([cell])
            if problem and is_locked(cell.folder):  # another process was quicker to begin this run
                pending.append(cell)
                continue
            if not cell.is_finished:  # else this process has finished it, or another one that was quicker to begin it
                failed[cell.index] = problem or "ended without results"
                say(f"{number} failed: {failed[cell.index]}")
            if pending:
                say(f"{len(pending)} left{remaining_time(experiment, pending)}")
        if SIGNALS.received:
            say(f"{SIGNALS.received}: give the same command again to go on; {len(pending)} other runs are left")
    return failed


def _next_free(pending: Sequence[Cell]) -> Cell | None:
    """The first cell that no other process is working on; waits until there is one. A stack comes after its members.
    None if a signal asks to stop."""
    is_waiting = False
    while not SIGNALS.received:
        if free := next((cell for cell in pending if not is_locked(cell.folder) and not any(
                member in pending or is_locked(member.folder) for member in cell.members)), None):
            return free
        if not is_waiting:
            say(f"{', '.join(str(cell.folder) for cell in pending)}: in use by other processes; waiting")
        is_waiting = True
        time.sleep(WAIT_SECONDS)
    return None


def run_cell(experiment: Experiment, cell: Cell) -> str | None:
    """Run the script of a cell, show its output, and append it to a log file beside the report.

    A signal is passed on, so that the script saves its state and ends. Returns None if the script succeeded, else one
    line that says why it failed: its first line that starts with "error:", or else its last line.
    """
    log = experiment.report_folder / LOGS / f"{cell.config.run_name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = cell.command
    last = ""
    # The script gets a process group of its own. Otherwise the terminal would send it Ctrl-C, we would pass on a second
    # one, and at the second one the script leaves without saving.
    with (open(log, "a", encoding="utf-8") as file,
          subprocess.Popen([sys.executable, str(PROJECT / script), *arguments], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True) as process):
        SIGNALS.passed_to = process
        if SIGNALS.received:  # while the process began
            process.send_signal(getattr(signal, SIGNALS.received))
        for line in process.stdout:
            file.write(line)
            file.flush()
            with suppress(BrokenPipeError):  # the log still has it; unread, the pipe would fill and stop the script
                say("    " + line.rstrip())
            if line.strip() and not last.startswith("error:"):
                last = line.strip()
    SIGNALS.passed_to = None
    code = process.returncode
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (
            ", as the system ends a process that needs too much memory" if code == -signal.SIGKILL else "")
    if code in EXIT_CODES.values():
        return "stopped by a signal; its state is saved"
    return (last or f"exit code {code}") if code else None


def remaining_time(experiment: Experiment, pending: Sequence[Cell]) -> str:
    """How long the pending encoders will train, if they take as long as the finished ones."""
    known = [read_metrics(cell.folder)["train"]["seconds"] for cell in experiment.cells
             if cell.is_finished and is_encoder(cell.config)]
    left = sum(is_encoder(cell.config) for cell in pending)
    return f", about {tqdm.format_interval(left * fmean(known))} of training" if known and left else ""
