"""Run a grid of settings and seeds, skip what is done, and write the report: which setting is better, and is it real?

    python experiment.py experiments/demo.yaml                   the built-in demo: a few minutes, no download
    python experiment.py experiments/exp2.yaml --dry-run         list the runs: finished, unfinished, to do
    python experiment.py experiments/exp2.yaml                   run what is left; give it again after any interruption
    python experiment.py experiments/exp2.yaml --only 7          the 7th run alone (they count from 1), without a report
    python experiment.py experiments/exp2.yaml --report          the report on what is finished; nothing is run
    python experiment.py experiments/exp2.yaml output_dir=/scratch/runs data_config.limit=2000
                                                                 overrides hold for every run

Each run is a process of main.py or main_accumulation.py. Ctrl-C and SIGTERM let it save its state; a run that fails
does not end the others. Two such commands at the same time share the work.
"""

import argparse
import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.common import cli
from suite.common.stopping import EXIT_CODES, SIGNALS
from suite.comparison.grid import Cell, Experiment, describe, read_experiment, recognise
from utils import PROJECT, UserError, say

POLL_SECONDS = 0.1  # how often a signal, or the end of the run, is looked for
WAIT_SECONDS = 2  # between two looks at runs that other processes have
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Command:
    experiment: Experiment
    cells: list[Cell]  # those that were asked for
    only: bool
    dry_run: bool
    report: bool


def read_command() -> Command:
    """Parse and check command line and experiment file; leaves with exit code 2 and one line if anything is wrong."""
    SIGNALS.install()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="the experiment, such as experiments/exp1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value in every run")
    parser.add_argument("--only", metavar="INDEX", help="run this one alone, from 1; for job arrays")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their states")
    parser.add_argument("--report", action="store_true", help="write the report on what is finished")
    parser.error = lambda message: cli.leave(UserError(f"command line: {message}; see --help"))
    arguments, unknown = parser.parse_known_intermixed_args()
    try:
        experiment = read_experiment(arguments.file, [*unknown, *arguments.overrides])
        cells, last = experiment.cells, len(experiment.cells)
        if arguments.only is not None:
            if not arguments.only.isdecimal() or not 1 <= int(arguments.only) <= last:
                raise UserError(f"--only {arguments.only}: {arguments.file} has the runs 1 to {last}")
            cells = [cells[int(arguments.only) - 1]]
    except UserError as error:
        cli.leave(error)
    return Command(experiment, cells, arguments.only is not None, arguments.dry_run, arguments.report)


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run_cell(experiment: Experiment, cell: Cell) -> str | None:
    """Run the script to its end, showing its lines; None, or the last line that it had to say of its failure.

    A signal is passed on once: the script saves its state and ends. Its whole output goes to a file beside the report.
    """
    log = experiment.report_folder / "logs" / f"{cell.config.run_name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, str(PROJECT / experiment.script), *cell.arguments, f"run_name={cell.config.run_name}"]
    # Its own process group: the terminal's Ctrl-C reaches it through us alone, for a second one would end it unsaved.
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               start_new_session=True, preexec_fn=end_with_parent if LIBC else None)
    last = [""]

    def show() -> None:
        with open(log, "a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                say("    " + line.rstrip())
                if line.strip() and not last[0].startswith("error:"):
                    last[0] = line.strip()

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    passed_on = False
    while process.poll() is None:
        if SIGNALS.received and not passed_on:
            process.send_signal(getattr(signal, SIGNALS.received))
            passed_on = True
        time.sleep(POLL_SECONDS)
    reader.join(timeout=5)  # what the run itself has started may outlive it, and keep its output open
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name} (the system ends what takes too much memory)"
    if process.returncode in EXIT_CODES.values():
        return "stopped by a signal; its state is saved"
    return (last[0] or f"exit code {process.returncode}") if process.returncode else None


def end_with_parent() -> None:
    """In the new process: were this one killed, the run would go on unseen. Linux sends it SIGTERM then: it saves."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def run_cells(experiment: Experiment, cells: Sequence[Cell]) -> dict[int, str]:
    """Run what is not finished; {index: last line} of the runs that failed. Leaves when a signal asks for it."""
    from suite.common.storage import is_locked

    failed: dict[int, str] = {}
    seconds: dict[int, float] = {}  # of the runs that this process has done from their beginnings
    total = len(experiment.cells)
    pending = [cell for cell in cells if not cell.is_finished]
    say(f"{experiment.name}: {len(cells) - len(pending)} of {len(cells)} runs are finished")
    with SIGNALS.deferred():
        while pending and not SIGNALS.received:
            free = [cell for cell in pending if not is_locked(cell.folder)]
            if not free:
                say(f"{', '.join(str(cell.folder) for cell in pending)}: in use by other processes; waiting")
            while not free and not SIGNALS.received:
                time.sleep(WAIT_SECONDS)
                free = [cell for cell in pending if not is_locked(cell.folder)]
            if SIGNALS.received:
                break
            cell = free[0]
            pending.remove(cell)
            recognise([cell])  # another process may have finished it
            if cell.is_finished:
                continue
            is_new = not (cell.folder / "config.yaml").exists()
            say(f"[{cell.index}/{total}] {describe(cell.setting)}, seed {cell.seed}: {cell.folder}"
                + ("" if is_new else ", going on"))
            started = time.monotonic()
            problem = run_cell(experiment, cell)
            if SIGNALS.received:
                break
            recognise([cell])
            if problem is not None and is_locked(cell.folder):
                pending.append(cell)  # another process was quicker to take it
                continue
            if problem is not None or not cell.is_finished:
                failed[cell.index] = problem or "ended without results"
                say(f"[{cell.index}/{total}] failed: {failed[cell.index]}")
            elif is_new:
                seconds[cell.index] = time.monotonic() - started
            if pending:
                say(f"{len(pending)} left{remaining(experiment, pending, seconds)}")
        if SIGNALS.received:
            say(f"{SIGNALS.received}: the same command goes on from here; {len(pending)} runs not begun")
    return failed


def remaining(experiment: Experiment, pending: Sequence[Cell], seconds: dict[int, float]) -> str:
    """How long the pending runs will take, from finished ones of the same setting, or else of any."""
    from suite.common.run_folder import read_metrics

    known = {cell.index: seconds.get(cell.index) or read_metrics(cell.folder)["train"]["seconds"]
             for cell in experiment.cells if cell.is_finished}
    if not known:
        return ""

    def expected(cell: Cell) -> float:
        alike = [known[other.index] for other in experiment.cells
                 if other.index in known and other.setting == cell.setting]
        return sum(alike or known.values()) / len(alike or known)

    left = sum(map(expected, pending))
    return (f", about {left / 3600:.1f} h" if left > 5400 else f", about {round(left / 60)} min" if left > 90 else
            f", about {round(left)} s")


def list_cells(experiment: Experiment, cells: Sequence[Cell]) -> None:
    total = len(experiment.cells)
    for cell in cells:
        state = "finished" if cell.is_finished else "unfinished" if (cell.folder / "config.yaml").exists() else "to do"
        say(f"{cell.index:>{len(str(total))}}  {state:10}  {cell.folder}  {describe(cell.setting)}, seed {cell.seed}")
    left = [cell for cell in cells if not cell.is_finished]
    say(f"{len(cells) - len(left)} of {len(cells)} runs are finished"
        + (f", {len(left)} left{remaining(experiment, left, {})}" if left else ""))


def report(experiment: Experiment, failed: dict[int, str]) -> None:
    """Compare the finished runs; nothing, and a line, if there are too few."""
    from suite.comparison.report import print_summary, summarize, write_report
    from suite.comparison.results import group, read_result, refuse_different_tests

    # In the order of the grid, whichever of its runs are there
    order = [cell.setting for cell in experiment.cells]
    finished = [cell for cell in experiment.cells if cell.is_finished]
    finished.sort(key=lambda cell: order.index(cell.setting))
    if len(finished) < 2:
        say(f"no report: {len(finished)} of {len(experiment.cells)} runs finished")
        return
    results = [read_result(cell.folder) for cell in finished]
    refuse_different_tests(results)
    settings = group(results)
    by_folder = {cell.folder: cell for cell in finished}
    for setting in settings:
        setting.published = experiment.published_for(by_folder[setting.runs[0].folder].setting)
    notes = []
    if missing := len(experiment.cells) - len(finished):
        notes.append(f"{missing} of {len(experiment.cells)} runs are missing here: "
                     + ("; ".join(f"run {index} failed: {line}" for index, line in failed.items())
                        or "they are not finished") + ".")
    if experiment.overrides:
        values = [item if not Path(item.partition("=")[2]).exists() else f"{item.partition('=')[0]}={Path(item).name}"
                  for item in experiment.overrides]  # the rest of a path says nothing outside of this machine
        notes.append(f"Other than the experiment's file says, all runs were done with {', '.join(values)}"
                     + (": published figures were not." if any(setting.published for setting in settings) else "."))
    summary = summarize(settings, experiment.name, experiment.question, notes)
    print_summary(summary)
    write_report(experiment.report_folder, summary, settings)
    say(f"the report: {experiment.report_folder / 'report.html'}")


def main(command: Command) -> None:
    experiment, cells = command.experiment, command.cells
    if command.dry_run:
        list_cells(experiment, cells)
        return
    failed = {}
    try:
        if not command.report:
            failed = run_cells(experiment, cells)
        if not command.only:
            recognise(experiment.cells)
            report(experiment, failed)
    except OSError as error:
        where = error.filename or experiment.report_folder
        raise UserError(f"{where} cannot be written or read ({error.strerror}): set output_dir") from None
    for index, line in failed.items():
        say(f"failed: run {index}, {experiment.cells[index - 1].folder}: {line}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    COMMAND = read_command()
    cli.run(lambda: main(COMMAND))
