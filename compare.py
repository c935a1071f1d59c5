"""Put finished runs side by side, with intervals and paired tests: is a difference between them real?

    python compare.py checkpoints/RUN checkpoints/RUN ...              the report: checkpoints/comparison-report/
    python compare.py checkpoints/bert-*seed4? --output bert-report    another folder for it

Runs that differ only in their seeds count as one setting. All runs must have been tested on the same reviews.
"""

import argparse
from pathlib import Path

from suite.common import cli


def read_command() -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", metavar="FOLDER", help="of the report (default: comparison-report beside the runs)")
    command = parser.parse_args()
    command.runs = list(dict.fromkeys(map(Path, command.runs)))
    if len(command.runs) < 2:
        parser.error("name two or more different folders, as in checkpoints/NAME")
    command.output = Path(command.output or command.runs[0].parent / "comparison-report")
    return command


def main(command: argparse.Namespace) -> None:
    from suite.comparison.report import compare_runs  # imported here, so that --help does not wait for SciPy

    compare_runs(command.runs, command.output, f"{len(command.runs)} runs compared")


if __name__ == "__main__":
    cli.begin()
    COMMAND = read_command()
    cli.run_with_exit_code(lambda: main(COMMAND))
