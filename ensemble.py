"""Combine finished runs of one split by stacking: any mix of seeds, models, and the bag of words of --mode baseline.

    python ensemble.py checkpoints/RUN checkpoints/bag-of-words --output checkpoints/stack    their stack, a run folder
    python main.py --mode predict --model checkpoints/stack --text "A wonderful film."       label a review with it
    python compare.py checkpoints/stack checkpoints/RUN checkpoints/bag-of-words             is it better?

The weights are fitted on the runs' predictions for the validation reviews. The test reviews only measure the result.
"""

import argparse
from pathlib import Path

from suite.common import cli


def read_command() -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", metavar="FOLDER", help="run folder of the stack; it must not exist yet")
    command = parser.parse_args()
    if len(command.runs) < 2 or command.output is None:
        parser.error("name two or more folders, as in checkpoints/NAME, and --output FOLDER")
    return command


def main(command: argparse.Namespace) -> None:
    from suite.comparison.stacking import stack_runs  # imported here, so that --help does not wait for torch

    stack_runs(list(map(Path, command.runs)), Path(command.output))


if __name__ == "__main__":
    cli.begin()
    COMMAND = read_command()
    cli.run_with_exit_code(lambda: main(COMMAND))
