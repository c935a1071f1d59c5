"""Run a grid of settings and seeds, skip what is done, and write the report: which setting is better, and is it real?

    python experiment.py experiments/demo.yaml                   the built-in demo: a few minutes, no download
    python experiment.py experiments/exp2.yaml --dry-run         list the runs: finished, unfinished, to do
    python experiment.py experiments/exp2.yaml                   run what is left; give it again after any interruption
    python experiment.py experiments/exp2.yaml --only 7          the 7th run alone (they count from 1), without a report
    python experiment.py experiments/exp2.yaml --report          the report on what is finished; nothing is run
    python experiment.py experiments/exp2.yaml output_dir=/scratch/runs data_config.limit=2000
                                                                 overrides hold for every run
    python experiment.py experiments/data_size.yaml seeds=[42] "grid.data_config.train_limit=[500,1000]"
                                                                 fewer seeds and settings than the file names

Each run is a process of main.py, main_accumulation.py or ensemble.py. Ctrl-C and SIGTERM let it save its state. When a
run fails, the others still take place. Two such commands at the same time share the work.
"""

import argparse
from pathlib import Path

from suite.common import cli
from suite.common.run_folder import is_encoder
from suite.comparison.grid import Cell, Experiment, describe, find_finished, read_experiment
from suite.comparison.running import remaining_time, run_cells
from utils import UserError, say


def read_command() -> tuple[Experiment, list[Cell], argparse.Namespace]:
    """The experiment, the cells that were asked for, and the options; leaves with exit code 2 if anything is wrong."""
    parser = cli.new_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="the experiment, such as experiments/exp1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value in every run")
    parser.add_argument("--only", type=int, metavar="INDEX", help="run this one alone, from 1; for job arrays")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their states")
    parser.add_argument("--report", action="store_true", help="write the report on what is finished")
    arguments, unknown = parser.parse_known_intermixed_args()
    try:
        experiment = read_experiment(arguments.file, [*unknown, *arguments.overrides])
        cells = [cell for cell in experiment.cells if arguments.only in (None, cell.index)]
        if arguments.report and arguments.only is not None:
            raise UserError("--report is on all runs, and --only runs one: leave one of them out")
        if not cells:
            raise UserError(f"--only {arguments.only}: {arguments.file} has the runs 1 to {len(experiment.cells)}")
    except UserError as error:
        cli.leave(error)
    return experiment, cells, arguments


def list_cells(experiment: Experiment, cells: list[Cell]) -> None:
    width = len(str(len(experiment.cells)))
    for cell in cells:
        state = "finished" if cell.is_finished else "unfinished" if cell.is_begun else "to do"
        say(f"{cell.index:>{width}}  {state:10}  {cell.folder}  {describe(cell.setting)}, seed {cell.seed}")
    left = [cell for cell in cells if not cell.is_finished]
    say(f"{len(cells) - len(left)} of {len(cells)} runs are finished"
        + (f", {len(left)} left{remaining_time(experiment, left)}" if left else ""))


def write_report(experiment: Experiment, failed: dict[int, str]) -> None:
    """Compare the finished runs, if there are two or more. `failed`: {index: last line} of those that failed now."""
    # In the order of the grid, even where the first runs of a setting are missing
    order = [cell.setting for cell in experiment.cells]
    finished = [cell for cell in experiment.cells if cell.is_finished]
    finished.sort(key=lambda cell: order.index(cell.setting))
    if len(finished) < 2:
        say(f"no report: {len(finished)} of {len(experiment.cells)} runs finished")
        return
    published = {cell.folder: experiment.published_for(cell.setting) for cell in finished if is_encoder(cell.config)}
    notes = []
    if missing := len(experiment.cells) - len(finished):
        reasons = "; ".join(f"run {index} failed: {line}" for index, line in failed.items()) or "they are not finished"
        notes.append(f"{missing} of {len(experiment.cells)} runs are missing here: {reasons}.")
    if experiment.overrides:
        # The folders of a path mean nothing on another machine.
        pairs = (item.split("=", 1) for item in experiment.overrides)
        values = ", ".join(f"{key}={Path(value).name if Path(value).exists() else value}" for key, value in pairs)
        notes.append(f"All runs used {values}, which is not what the experiment's file says"
                     + ("; the published figures were obtained without it." if any(published.values()) else "."))
    from suite.comparison.report import compare_runs  # imported here, so that --help does not wait for SciPy

    compare_runs([cell.folder for cell in finished], experiment.report_folder, experiment.name, experiment.question,
                 notes, published, on_validation=any(not cell.config.train_config.test for cell in experiment.cells))


def main(experiment: Experiment, cells: list[Cell], options: argparse.Namespace) -> None:
    if options.dry_run:
        list_cells(experiment, cells)
        return
    from suite.comparison.report import refuse_other_files  # it waits for SciPy, which --help does not

    refuse_other_files(experiment.report_folder)
    failed = {} if options.report else run_cells(experiment, cells)
    if options.only is None:
        find_finished(experiment.cells)
        write_report(experiment, failed)
    for index, line in failed.items():
        say(f"failed: run {index}, {experiment.cells[index - 1].folder}: {line}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.begin()
    COMMAND = read_command()
    cli.run_with_exit_code(lambda: main(*COMMAND))
