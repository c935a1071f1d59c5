"""The command line that main.py and main_accumulation.py share, and their exit codes."""

import argparse
import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from hub import usable_cache
from stopping import SIGNALS
from utils import Config, UserError, load_config, num_processes

MODES = ("train", "test")


@dataclass
class Command:
    mode: str
    config: Config


def read_command(description: str, accumulates: bool) -> Command:
    """Parse and check the command line; leaves with exit code 2 and one line if it is wrong.

    Fast, for it imports no torch: scripts call it before their other imports.
    """
    SIGNALS.install()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="configuration (default: config.yaml)")
    parser.add_argument("--mode", default="train", metavar="{" + ",".join(MODES) + "}", help="default: train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="replaces a value of the configuration; README.md has the table")
    parser.error = lambda message: leave(UserError(f"command line: {message}; see --help"))
    arguments, unknown = parser.parse_known_intermixed_args()
    try:
        if arguments.mode not in MODES:
            raise UserError(f"--mode {arguments.mode}: choose one of {', '.join(MODES)}")
        config = load_config(arguments.config, [*unknown, *arguments.overrides])
        if num_processes() > 1 and not accumulates:
            raise UserError(f"WORLD_SIZE is {num_processes()}: main.py is for one process; run main_accumulation.py "
                            "with the same arguments, or unset WORLD_SIZE")
        steps = config.train_config.gradient_accumulation_steps
        if steps > 1 and not accumulates:
            effective = config.train_config.effective_batch_size
            raise UserError(f"train_config.gradient_accumulation_steps={steps} (effective_batch_size={effective}): "
                            "main.py takes one micro-batch a step; run main_accumulation.py with the same arguments")
    except UserError as error:
        leave(error)
    usable_cache()
    return Command(arguments.mode, config)


def run(work: Callable[[], None]) -> None:
    """Call `work` and leave with the exit code that its outcome means."""
    # The reviews are tokenized by several threads of one process already; forked loaders must not start their own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    code = 1  # that of a traceback

    def leave_without_finalization() -> None:
        # gloo's threads outlive their process group. One that still frees the last exchange's tensors aborts an
        # interpreter in shutdown: SIGABRT after all the work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    if num_processes() > 1:
        atexit.register(leave_without_finalization)  # registered first, so called last
    try:
        work()
        code = 0
    except UserError as error:
        code = 2
        leave(error)
    except FloatingPointError as error:  # the training went astray, not the program: its message says all
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except SystemExit as stop:
        code = stop.code
        raise


def leave(error: UserError) -> None:
    """Print the one line and exit with code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
