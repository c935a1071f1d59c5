"""Put finished runs side by side, with intervals and paired tests: is a difference between them real?

    python compare.py checkpoints/RUN checkpoints/RUN ...              the report: checkpoints/comparison-report/
    python compare.py checkpoints/bert-*seed4? --output bert-report    another folder for it

Runs that differ in their seeds alone are put together. All must have been tested on the same reviews.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from suite.common import cli
from utils import UserError, say


def read_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", metavar="FOLDER", help="of the report (default: comparison-report beside the runs)")
    parser.error = lambda message: cli.leave(UserError(f"command line: {message}; see --help"))
    command = parser.parse_args()
    command.runs = list(dict.fromkeys(map(Path, command.runs)))
    if len(command.runs) < 2:
        cli.leave(UserError("command line: name at least two run folders, such as checkpoints/NAME; see --help"))
    command.output = Path(command.output or command.runs[0].parent / "comparison-report")
    return command


def compare_runs(runs: Sequence[Path], output: Path) -> None:
    from suite.comparison.report import (  # here, so that --help does not wait for SciPy
        print_summary,
        summarize,
        write_report,
    )
    from suite.comparison.results import group, read_result, refuse_different_tests

    results = [read_result(run) for run in runs]
    refuse_different_tests(results)
    settings = group(results)
    summary = summarize(settings, f"{len(results)} runs compared")
    print_summary(summary)
    try:
        write_report(output, summary, settings)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another folder by --output") from None
    say(f"the report: {output / 'report.html'}")


if __name__ == "__main__":
    COMMAND = read_command()
    cli.run(lambda: compare_runs(COMMAND.runs, COMMAND.output))
