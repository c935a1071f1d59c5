"""The command line that main.py and main_accumulation.py share, and their exit codes."""

import argparse
import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from suite.common.hub import usable_cache
from suite.common.stopping import SIGNALS
from suite.common.storage import refuse_existing
from utils import Config, UserError, load_config, num_processes

MODES = {"train": (), "test": (), "predict": ("model", "text", "input", "output"), "export": ("model", "output"),
         "explain": ("model", "text", "output")}  # with the options that each takes beside the configuration
ROW_FILES = (".csv", ".jsonl", ".parquet", ".txt")


@dataclass
class Command:
    mode: str
    config: Config
    model: str | None = None  # the folder of a trained model; None: the run's best
    text: str | None = None
    input: str | None = None  # a file, or - for standard input
    output: str | None = None  # a file; None: standard output, or the mode's own place


def read_command(description: str, accumulates: bool) -> Command:
    """Parse and check the command line; leaves with exit code 2 and one line if it is wrong.

    Fast, for it imports no torch: scripts call it before their other imports.
    """
    SIGNALS.install()
    SIGNALS.importing = True
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="configuration (default: config.yaml)")
    parser.add_argument("--mode", default="train", metavar="{" + ",".join(MODES) + "}", help="default: train")
    parser.add_argument("--model", metavar="FOLDER", help="predict, export, explain: a trained model (default: the "
                        "best one of the run)")
    parser.add_argument("--text", metavar="TEXT", help="predict, explain: one review")
    parser.add_argument("--input", metavar="FILE", help="predict: reviews in a .csv, .jsonl, .parquet or .txt file (a "
                        "review a line), or - for lines from standard input")
    parser.add_argument("--output", metavar="FILE", help="predict: a .csv, .jsonl or, from .parquet, .parquet file "
                        "(default: standard output); export: a folder; explain: an .html file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="replaces a value of the configuration; README.md has the table")
    parser.error = lambda message: leave(UserError(f"command line: {message}; see --help"))
    arguments, unknown = parser.parse_known_intermixed_args()
    try:
        if arguments.mode not in MODES:
            raise UserError(f"--mode {arguments.mode}: choose one of {', '.join(MODES)}")
        try:
            check_options(arguments)
        except OSError as error:  # such as a name that is too long
            raise UserError(f"command line: {error.filename}: {error.strerror}") from None
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
    if arguments.mode in ("train", "test"):
        usable_cache()
    output = None if arguments.output == "-" else arguments.output
    return Command(arguments.mode, config, arguments.model, arguments.text, arguments.input, output)


def check_options(given: argparse.Namespace) -> None:
    """Raises UserError for what cannot work with this mode, before anything is loaded."""
    for option in ("model", "text", "input", "output"):
        modes = [mode for mode in MODES if option in MODES[mode]]
        if getattr(given, option) is not None and given.mode not in modes:
            raise UserError(f"--{option} is for --mode {' and '.join(modes)}, not for {given.mode}: leave it out")
    if given.model is not None and not Path(given.model).is_dir():
        raise UserError(f"--model: no such folder: {given.model}")
    if given.text is not None and not given.text.strip():
        raise UserError("--text is empty: give a review")
    if given.text is not None and given.text != given.text.encode(errors="replace").decode():
        raise UserError("--text is not UTF-8: set the terminal to it, or give a file with --input")
    if given.mode == "predict":
        if (given.text is None) == (given.input is None):
            raise UserError('--mode predict: give either --text "..." or --input FILE')
        if given.input is None and given.output is not None:
            raise UserError("--output is for the rows of --input FILE: leave it out, the label of --text is printed")
        if given.input is not None:
            check_files(given.input, given.output)
    elif given.output is not None and Path(given.output).exists():
        raise UserError(f"--output: {given.output} exists already: choose another name, or remove it")
    elif given.mode == "explain" and given.output is not None and Path(given.output).suffix != ".html":
        raise UserError(f"--output: {given.output}: the file must end in .html")


def check_files(path: str, output: str | None) -> None:
    """Raises UserError if the rows of `path` cannot be predicted into `output`."""
    kind = Path(path).suffix
    if path != "-":
        if Path(path).is_dir():
            raise UserError(f"--input: {path} is a folder: name one file in it")
        if not Path(path).is_file():
            raise UserError(f"--input: no such file: {path}")
        if kind not in ROW_FILES:
            raise UserError(f"--input: {path}: a file must end in {', '.join(ROW_FILES)}")
    if output in (None, "-"):
        if num_processes() > 1:
            raise UserError("--output: several processes cannot share standard output: give a file")
        return
    kinds = [".csv", ".jsonl"] + [".parquet"] * (kind == ".parquet")
    if Path(output).suffix not in kinds:
        raise UserError(f"--output: {output}: from {'standard input' if path == '-' else kind}, the file must end in "
                        f"{', '.join(kinds)}")
    if len(os.fsencode(Path(output).name)) > 235:
        raise UserError(f"--output: {output}: the name is too long, for others are made from it: choose a shorter one")
    if not Path(output + ".parts").is_dir():  # what an interrupted job has left decides later
        refuse_existing(output, output + ".rejected.csv")
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {Path(output).absolute().parent}")


def run(work: Callable[[], None]) -> None:
    """Call `work` and leave with the exit code that its outcome means."""
    # The reviews are tokenized by several threads of one process already; forked loaders must not start their own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    SIGNALS.importing = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the work
            stream.reconfigure(errors="backslashreplace")
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
    except BrokenPipeError:  # whoever read the output has gone: as `SIGPIPE` would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
        raise SystemExit(code) from None
    except FloatingPointError as error:  # the training went astray, not the program: its message says all
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except SystemExit as stop:
        code = stop.code
        raise


def leave(error: UserError) -> None:
    """Print the one line and exit with code 2."""
    print("error:", *str(error).splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2) from None
