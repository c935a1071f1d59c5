"""The command line that main.py and main_accumulation.py share, and their exit codes."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from suite.common.launcher import refuse_lost_processes
from suite.common.run_folder import config_for, refuse_accumulation
from suite.common.storage import refuse_existing, room_for
from utils import ROW_FILES, Config, UserError, file_kind, num_processes, printable

if TYPE_CHECKING:
    from suite.common.devices import Devices  # torch is imported later

FORMATS = ("onnx", "transformers", "web")  # of --mode export


class Mode(NamedTuple):
    """What `--mode NAME` does."""

    does: str
    function: str | None  # module:function, which is imported when it is asked for; None: the script has it
    writes_run: bool = False  # it fills a run folder, and gets (config, devices); the others get (command, devices)


MODES = {
    "train": Mode("train, validate after each epoch, and test the best model", None, writes_run=True),
    "test": Mode("test the best model of the run again", None, writes_run=True),
    "baseline": Mode("a bag of words on the same split", "suite.training.baseline:baseline", writes_run=True),
    "pretrain": Mode("learn the masked words of reviews without labels", None, writes_run=True),
    "distill": Mode("train on a finished run's labels of unlabelled reviews, too", None, writes_run=True),
    "predict": Mode("label new reviews", "suite.inference.predict:predict"),
    "export": Mode("write the model as ONNX, for transformers, or as a web page", "suite.inference.export:export"),
    "decide": Mode("choose the threshold between two classes on validation", "suite.comparison.threshold:decide"),
    "explain": Mode("show the words that a decision rests on", "suite.inference.explain:explain"),
    "audit": Mode("list the labels that are probably wrong", "suite.comparison.audit:audit"),
    "publish": Mode("send the model to the Hugging Face Hub", "suite.inference.publish:publish"),
}


def option(modes: str, help: str, default: Any = None, **of_parser: Any) -> Any:
    """An option of the command line, for these modes. `of_parser`: arguments for argparse, and `flag`, if it is not
    called as the field is."""
    return field(default=default, metadata={"modes": modes.split(", "), "help": f"{modes}: {help}", **of_parser})


@dataclass
class Command:
    """What a command line asks for."""

    mode: str
    config: Config
    model: str | None = option("predict, export, explain, publish, audit, decide", "a trained model, or its run "
                               "(default: the best one of the run; for audit: none but bags of words)",
                               metavar="FOLDER")
    text: str | None = option("predict, explain", "one review", metavar="TEXT")
    input: str | None = option("predict", "reviews in a .csv, .tsv, .jsonl, .json, .parquet or .txt file (one review "
                               "per line), in a folder of .txt files (one review each), or - for lines from standard "
                               "input", metavar="FILE")
    output: str | None = option("predict, export, explain, audit", "what to write. predict: a .csv or .jsonl "
                                "file, or .parquet if the input is one (default: standard output); export: a folder; "
                                "explain: an .html file; audit: a .csv file", metavar="FILE")
    min_confidence: float | None = option("predict", "give a text no class whose probability is below this: a person "
                                          "decides", flag="min-confidence", metavar="P", type=float)
    threshold: str | None = option("decide", "f1, precision>=0.95 or recall>=0.99 of class 1, with your own number, or "
                                   "none", metavar="AIM")
    confirmed: str | None = option("audit", "what people said of some labels: a .csv file with the columns split, row "
                                   "and label", metavar="FILE")
    formats: Sequence[str] = option("export", "one or more of them, with commas between (default: onnx)",
                                    FORMATS[:1], flag="format", metavar="{" + ",".join(FORMATS) + "}",
                                    type=lambda text: [part.strip() for part in text.split(",")], action="extend")
    int8: bool = option("export", "the ONNX in 8 bits, too", False, action="store_true")
    teacher: str | None = option("distill", "the finished run, such as a stack, that labels the unlabelled reviews",
                                 metavar="FOLDER")
    yes: bool = option("publish", "send to the Hub what is listed without it", False, action="store_true")
    public: bool = option("publish", "for everybody (default: private)", False, action="store_true")
    license: str | None = option("publish", "the licence, such as apache-2.0 (default: none)", metavar="NAME")
    repo: str = ""  # OWNER/NAME on the Hub, for --mode publish


OPTIONS = {entry.name: dict(entry.metadata) for entry in fields(Command) if entry.metadata}


def begin() -> None:
    """What every script does first."""
    # Ctrl-C ends the process at once: a KeyboardInterrupt amid torch's import would abort it, and would wait as long as
    # the process waits for others. Around the training, SIGNALS does more.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of classes and files that its encoding lacks


def read_command(description: str, accumulates: bool) -> Command:
    """Parse and check the command line; if it is wrong, print one line and leave with exit code 2.

    It imports no torch, so scripts call it before their slow imports. `accumulates`: whether the script can train with
    several micro-batches and processes.
    """
    given = parse(description)
    try:
        refuse_lost_processes()
        check_options(given)
        config = config_for(given.mode, given.config, given.overrides, given.model, bool(given.int8), given.teacher)
        if not accumulates:
            refuse_accumulation(given.mode, config)
        if MODES[given.mode].writes_run:
            refuse_missing_tracker(config.log_config.tracker)
    except UserError as error:
        leave(error)
    options = {name: getattr(given, name) for name in OPTIONS if getattr(given, name) is not None}
    return Command(given.mode, config, repo=given.repo, **options)


def refuse_missing_tracker(name: str) -> None:
    """Raises UserError if the run asks for a tracker that is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"log_config.tracker={name} needs {name}: pip install -r requirements-trackers.txt")


class Once(argparse.Action):
    """An option that cannot be repeated: the last one would replace the others in silence."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


def new_parser(description: str, **arguments: Any) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring, and says on one line what is wrong with the options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, **arguments)
    parser.error = lambda message: leave(UserError(f"command line: {message}; see --help"))
    return parser


def parse(description: str) -> argparse.Namespace:
    """The options of the command line, and all `section.key=value` in the order in which they were given."""
    modes = "\n".join(f"  {name:10}{mode.does}" for name, mode in MODES.items())
    parser = new_parser(description, epilog=f"modes:\n{modes}")
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="configuration (default: config.yaml)")
    parser.add_argument("--mode", default="train", choices=MODES, help="default: train")
    for name, how in OPTIONS.items():
        of_parser = {key: value for key, value in how.items() if key not in ("modes", "flag")}
        parser.add_argument(f"--{how.get('flag', name)}", dest=name, **{"default": None, "action": Once} | of_parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="replaces a value of the configuration; docs/settings.md lists them all")
    given, unknown = parser.parse_known_intermixed_args()
    given.overrides = [*unknown, *given.overrides]
    given.repo = ""
    if given.mode == "publish":
        given.repo = next((item for item in given.overrides if "=" not in item and not item.startswith("-")), "")
        given.overrides = [item for item in given.overrides if item != given.repo]
    if given.mode == "predict" and given.output == "-":
        given.output = None  # standard output, as without it
    return given


def check_options(given: argparse.Namespace) -> None:
    """Raises UserError for options that cannot work in this mode or together, before anything is loaded."""
    mode, output = given.mode, given.output
    for name, how in OPTIONS.items():
        if getattr(given, name) is not None and mode not in how["modes"]:
            raise UserError(f"--{how.get('flag', name)} is for --mode {', '.join(how['modes'])}, not for {mode}: "
                            + ("name the run with run_name=" if name == "model" else "leave it out"))
    if given.model is not None and not Path(given.model).is_dir():
        raise UserError(f"--model: no such folder: {given.model}")
    if given.text is not None and not given.text.strip():
        raise UserError("--text: it is empty: give a review")
    if given.min_confidence is not None and not 0 < given.min_confidence <= 1:
        raise UserError(f"--min-confidence: {given.min_confidence:g} is not a probability: give one above 0, up to 1")
    if wrong := set(given.formats or ()) - set(FORMATS):
        raise UserError(f"--format: {min(wrong)!r} is not one of {', '.join(FORMATS)}")
    if given.int8 and set(given.formats or ()) == {"transformers"}:
        raise UserError("--int8 is made of the ONNX: give --format onnx,transformers for both")
    if mode == "publish" and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given.repo, re.ASCII):
        raise UserError(f"--mode publish: {given.repo or 'no repository'}: name one on the Hub, as OWNER/NAME")
    if mode == "predict":
        if (given.text is None) == (given.input is None):
            raise UserError('--mode predict: give either --text "..." or --input FILE')
        if given.text is not None and output is not None:
            raise UserError("--output is for the rows of --input FILE: leave it out, the label of --text is printed")
        if given.input is not None:
            check_files(given.input, output)
    elif mode == "decide":
        if given.threshold is None:
            raise UserError('--mode decide: give --threshold f1, --threshold "precision>=0.95" or "recall>=0.99"')
    elif mode == "audit":
        check_audit(output, given.confirmed)
    elif output is not None:
        if mode == "explain":
            if Path(output).suffix != ".html":
                raise UserError(f"--output: {output}: the file must end in .html")
            refuse_missing_folder(output)
        refuse_existing(output)


def check_audit(output: str | None, confirmed: str | None) -> None:
    """Raises UserError if the suspects cannot be written, or what people said of labels is no file."""
    if output is None or Path(output).suffix != ".csv":
        raise UserError("--mode audit: give --output FILE.csv; a page is written beside it")
    refuse_existing(output, Path(output).with_suffix(".html"))
    refuse_missing_folder(output)
    if confirmed is not None and not (Path(confirmed).is_file() and file_kind(confirmed) == ".csv"):
        raise UserError(f"--confirmed: {confirmed}: give a .csv file with the columns split, row and label")


def refuse_missing_folder(output: str) -> None:
    if not (folder := Path(output).absolute().parent).is_dir():
        raise UserError(f"--output: no such folder: {folder}")


def check_files(source: str, output: str | None) -> None:
    """Raises UserError if the rows of `source`, or of standard input (-), cannot be labelled into `output`."""
    kind, path = file_kind(source), Path(source)
    if path.is_dir():
        if not any(file_kind(file) == ".txt" for file in path.rglob("*")):
            raise UserError(f"--input: {source} is a folder without .txt files: name one file in it")
    elif source != "-" and not path.is_file():
        raise UserError(f"--input: no such file: {source}")
    elif source != "-" and not kind:
        raise UserError(f"--input: {source}: a file must end in {', '.join(ROW_FILES)}, or one of them and .gz")
    if output is None:
        if num_processes() > 1:
            raise UserError("--output: several processes cannot share standard output: give a file")
        return
    kinds = [".csv", ".jsonl"] + [".parquet"] * (kind == ".parquet")
    if Path(output).suffix not in kinds:
        raise UserError(f"--output: {output}: from {kind or 'texts'}, the file must end in {', '.join(kinds)}")
    if not Path(output + ".parts").is_dir():  # it belongs to an interrupted job, which checks later what can stay
        refuse_existing(output, output + ".rejected.csv")
    refuse_missing_folder(output)


def run_mode(command: Command, devices_class: type[Devices], own_modes: dict[str, Callable]) -> None:
    """Do what the command asks for. `own_modes`: the functions of the script's own modes."""
    from suite.common.devices import make_deterministic
    from suite.common.hub import check_hub, quiet_libraries  # these import torch

    config, mode = command.config, MODES[command.mode]
    if mode.writes_run or command.int8:
        check_hub(config)
    quiet_libraries()
    make_deterministic()
    devices = devices_class(config)
    work = own_modes.get(command.mode) or pkgutil.resolve_name(mode.function)
    if mode.writes_run:
        with room_for(config.run_folder):
            work(config, devices)
    else:
        work(command, devices)
    devices.close()


def run_other_mode(command: Command) -> None:
    """Run a mode that is not the script's own, and leave: it needs none of the imports that follow in the script."""
    if MODES[command.mode].function is not None:
        from suite.common.devices import Devices

        run_with_exit_code(lambda: run_mode(command, Devices, {}))
        raise SystemExit(0)


def run_with_exit_code(work: Callable[[], None]) -> None:
    """Call `work`; if it fails, leave with the exit code that says how."""
    # One process tokenizes the reviews in several threads before data loaders are forked from it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    code = 1  # that of an error nobody foresaw

    def leave_without_finalization() -> None:
        # gloo's threads outlive their process group. If one still frees the tensors of the last exchange while the
        # interpreter shuts down, it aborts the process (SIGABRT) after all the work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    if num_processes() > 1:
        atexit.register(leave_without_finalization)  # registered first, so called last
    try:
        with foreseen_errors():
            work()
        code = 0
    except SystemExit as stop:
        code = stop.code
        raise


@contextmanager
def foreseen_errors():
    """Turns the errors that a user can correct into one line and an exit code. Others keep their traceback."""
    try:
        yield
    except UserError as error:
        leave(error)
    except BrokenPipeError:  # the reader of standard output, such as `head`, has closed it: leave as SIGPIPE would
        # What is still in the buffer must not make the flush fail with which Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.filename is None:
            raise
        leave(UserError(f"{error.filename}: {error.strerror}: correct that, and give the same command again; what "
                        "was saved before is intact"))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        leave(UserError("out of memory: set a smaller data_config.batch_size (main_accumulation.py keeps the effective "
                        "batch by train_config.effective_batch_size), data_config.eval_batch_size or "
                        "data_config.max_len"))
    except FloatingPointError as error:  # the training diverged, the program did not fail: the message is enough
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def leave(error: UserError) -> None:
    """Print the error on one line and exit with code 2."""
    # In one piece, because the other processes of a launcher print theirs at the same time.
    sys.stderr.write(f"error: {printable(' '.join(str(error).splitlines()))}\n")
    sys.stderr.flush()
    raise SystemExit(2) from None
