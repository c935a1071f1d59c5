"""The command line that main.py and main_accumulation.py share, and their exit codes."""

import argparse
import atexit
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.common.checks import INPUTS, encodes
from suite.common.hub import usable_cache
from suite.common.launcher import refuse_lost_processes
from suite.common.run_folder import (
    is_encoder,
    is_same_place,
    read_saved_config,
    run_of,
    shaping_values,
    without_encoder,
)
from suite.common.storage import refuse_existing
from utils import BAG_OF_WORDS, ROW_FILES, Config, UserError, file_kind, load_config, num_processes, printable

MODES = {"train": (), "test": (), "baseline": (), "pretrain": (), "predict": ("model", "text", "input", "output"),
         "export": ("model", "output", "format", "int8"), "explain": ("model", "text", "output"),
         "publish": ("model", "public", "license", "yes")}  # and the options that each takes besides the configuration
RUN_MODES = ("train", "test", "baseline", "pretrain")  # they write a run folder; the others need only a model's folder
FORMATS = ("onnx", "transformers")  # of --mode export


@dataclass
class Command:
    mode: str
    config: Config
    model: str | None = None  # the folder of a trained model; None: the run's best
    text: str | None = None
    input: str | None = None  # a file, or - for standard input
    output: str | None = None  # a file or folder; None: standard output, or where the mode writes by default
    formats: tuple[str, ...] = FORMATS[:1]
    int8: bool = False
    repo: str = ""  # OWNER/NAME on the Hub
    public: bool = False
    license: str | None = None
    yes: bool = False  # send what would be sent


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
        check_options(given)
        config = config_for(given.mode, given.config, given.overrides, given.model, bool(given.int8))
        if not accumulates:
            refuse_accumulation(given.mode, config)
    except UserError as error:
        leave(error)
    except OSError as error:  # such as a file name that is too long
        leave(UserError(f"command line: {error.filename}: {error.strerror}"))
    if given.mode in RUN_MODES:
        usable_cache()
    return Command(given.mode, config, given.model, given.text, given.input,
                   None if given.output == "-" else given.output, given.formats, bool(given.int8), given.repo,
                   bool(given.public), given.license, bool(given.yes))


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring, and says on one line what is wrong: with the options, or with what
    surrounds them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: leave(UserError(f"command line: {message}; see --help"))
    try:
        refuse_other_encodings(sys.argv[1:])
        refuse_environment()
        refuse_lost_processes()
    except UserError as error:
        leave(error)
    return parser


def refuse_other_encodings(arguments: Sequence[str]) -> None:
    """Raises UserError for an argument that is not UTF-8, which neither libraries nor JSON files could hold."""
    for argument in arguments:
        if not encodes(argument, "utf-8"):
            raise UserError(f"command line: {argument} is not UTF-8: set the terminal to UTF-8, or rename the file")


def refuse_environment() -> None:
    """Raises UserError for environment variables that cannot be right: those by which a launcher tells processes apart,
    and the address of the Hub."""
    numbers = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
    fix = "start the processes with accelerate launch, or unset it"
    for name in numbers:
        if (text := os.environ.get(name)) is not None:
            if not re.fullmatch("[0-9]{1,6}", text):
                raise UserError(f"the environment variable {name} is {text!r}, not a number of processes: {fix}")
            numbers[name] = int(text)
    world_size, rank, local_rank = numbers.values()
    if world_size < 1 or max(rank, local_rank) >= world_size:
        raise UserError(f"the environment variables WORLD_SIZE={world_size}, RANK={rank}, LOCAL_RANK={local_rank} "
                        "contradict each other: start the processes with accelerate launch, or unset them")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world_size > 1 and not os.environ.get(name):
            raise UserError(f"the environment variable WORLD_SIZE is {world_size}, but {name} is not set: {fix}")
    if not re.fullmatch(r"https?://[\w.:-]+(/.*)?", address := os.environ.get("HF_ENDPOINT") or "https://hf.co"):
        raise UserError(f"the environment variable HF_ENDPOINT is {address!r}, not an address such as "
                        "https://huggingface.co: correct it, or unset it")
    if not re.fullmatch("[0-9]{1,5}", os.environ.get("MASTER_PORT") or "0"):
        raise UserError(f"the environment variable MASTER_PORT is {os.environ['MASTER_PORT']!r}, not a port: {fix}")


def parse(description: str) -> argparse.Namespace:
    """The options of the command line, and all `section.key=value` in the order in which they were given."""
    parser = new_parser(description)
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="configuration (default: config.yaml)")
    parser.add_argument("--mode", default="train", metavar="{" + ",".join(MODES) + "}", help="default: train")
    parser.add_argument("--model", metavar="FOLDER", help="predict, export, explain, publish: a trained model, or its "
                        "run (default: the best one of the run)")
    parser.add_argument("--text", metavar="TEXT", help="predict, explain: one review")
    parser.add_argument("--input", metavar="FILE", help="predict: reviews in a .csv, .tsv, .jsonl, .json, .parquet or "
                        ".txt file (one review per line), in a folder of .txt files (one review each), or - for lines "
                        "from standard input")
    parser.add_argument("--output", metavar="FILE", help="predict: a .csv or .jsonl file, or .parquet if the input is "
                        "one (default: standard output); export: a folder; explain: an .html file")
    parser.add_argument("--format", metavar="{" + ",".join(FORMATS) + "}", help="export: one or both of them, with a "
                        "comma between (default: onnx)")
    parser.add_argument("--int8", action="store_true", default=None, help="export: the ONNX in 8 bits, too")
    parser.add_argument("--yes", action="store_true", default=None, help="publish: send to the Hub what is listed "
                        "without it")
    parser.add_argument("--public", action="store_true", default=None, help="publish: for everybody (default: private)")
    parser.add_argument("--license", metavar="NAME", help="publish: the licence, such as apache-2.0 (default: none)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="replaces a value of the configuration; docs/settings.md lists them all")
    given, unknown = parser.parse_known_intermixed_args()
    given.overrides = [*unknown, *given.overrides]
    names = [item for item in given.overrides if "=" not in item and not item.startswith("-")]
    given.repo = names[0] if given.mode == "publish" and names else ""
    if given.mode == "publish" and names:
        given.overrides.remove(given.repo)
    given.formats = FORMATS[:1] if given.format is None else tuple(given.format.split(","))
    return given


def config_for(mode: str, path: str | Path, overrides: Sequence[str], model: str | None = None,
               int8: bool = False) -> Config:
    """The configuration of a command: that of `path` with the overrides applied.

    `--mode baseline` takes only what shapes a bag of words. `--mode test` takes the one that the run has saved, so
    nobody has to repeat what the run was trained with. Overrides still apply; the test itself refuses those that
    contradict the run, and so does the check of `int8`, which reads the run's reviews. `--mode predict` takes the text
    column of the run, or of the run folder `model`.
    """
    if mode == "baseline":
        if num_processes() > 1:
            raise UserError("--mode baseline is the work of one process: start it with python main.py --mode baseline")
        named = load_config(path, [*overrides, f"model_config.model_name={BAG_OF_WORDS}"])
        return without_encoder(named, BAG_OF_WORDS)
    if mode == "pretrain":
        config = load_config(path, [*overrides, "train_config.objective=masked_lm", "train_config.test=false"],
                             {"--mode pretrain": {"train_config.best_metric": "loss"}})
    else:
        config = load_config(path, overrides)
    if mode == "train" and config.pretrains:
        raise UserError("train_config.objective is 'masked_lm': leave it out and give --mode pretrain, which sets it")
    if mode in ("train", "pretrain") and not is_encoder(config):
        raise UserError(f"model_config.model_name={config.model_config.model_name} is no encoder: make a bag of words "
                        "with --mode baseline, a stack with ensemble.py")
    saved = (Path(model) if model else config.run_folder) / "config.yaml"
    given = {item.partition("=")[0] for item in overrides}
    if mode == "predict" and saved.exists() and "data_config.text_column" not in given:
        config.data_config.text_column = read_saved_config(saved).data_config.text_column
    if int8 and model and not saved.exists() and (run := run_of(Path(model))):
        saved = run / "config.yaml"
    if int8 and not saved.exists():
        raise UserError(f"--int8 is checked on the validation reviews of the model's run, and {saved} is missing: name "
                        "the run, or its best model")
    if not (mode == "test" or int8) or not saved.exists():
        return config
    # A relative path may have been found from another folder. Then what the given configuration says is looked at.
    kept = read_saved_config(saved)
    before, there = shaping_values(kept), shaping_values(config)
    gone = {key: there[key] for key in INPUTS
            if not os.path.exists(before[key]) and is_same_place(before[key], there[key])}
    # The run's batch may not fit the number of processes that test it. They take no optimizer step, so its check is
    # passed by; the model card names the batch that the run was trained with.
    config = load_config(saved, overrides, {str(path): gone | {
        "output_dir": config.output_dir, "run_name": config.run_name, "train_config.auto_micro_batch": False,
        "train_config.effective_batch_size": None, "train_config.gradient_accumulation_steps": 1}})
    if "train_config.effective_batch_size" not in given:
        config.train_config.effective_batch_size = kept.train_config.effective_batch_size
    return config


def refuse_accumulation(mode: str, config: Config) -> None:
    """Raises UserError if the command needs main_accumulation.py."""
    steps, effective = config.train_config.gradient_accumulation_steps, config.train_config.effective_batch_size
    if num_processes() > 1:
        raise UserError(f"WORLD_SIZE is {num_processes()}: main.py is for one process; run main_accumulation.py with "
                        "the same arguments, or unset WORLD_SIZE")
    if mode in ("train", "pretrain") and steps > 1:
        raise UserError(f"train_config.gradient_accumulation_steps={steps} (effective_batch_size={effective}): main.py "
                        "trains on one micro-batch a step; run main_accumulation.py with the same arguments")


def check_options(given: argparse.Namespace) -> None:
    """Raises UserError for an option that cannot work in this mode, before anything is loaded."""
    if given.mode not in MODES:
        raise UserError(f"--mode {given.mode}: choose one of {', '.join(MODES)}")
    for option in ("model", "text", "input", "output", "format", "int8", "public", "license", "yes"):
        modes = [mode for mode in MODES if option in MODES[mode]]
        if getattr(given, option) is not None and given.mode not in modes:
            hint = "name the run with run_name=" if option == "model" else "leave it out"
            raise UserError(f"--{option} is for --mode {', '.join(modes)}, not for {given.mode}: {hint}")
    if given.model is not None and not Path(given.model).is_dir():
        raise UserError(f"--model: no such folder: {given.model}")
    if given.text is not None and not given.text.strip():
        raise UserError("--text is empty: give a review")
    if wrong := [name for name in given.formats if name not in FORMATS or given.formats.count(name) > 1]:
        raise UserError(f"--format {','.join(given.formats)}: {wrong[0]!r} is not one of {', '.join(FORMATS)}, each at "
                        "most once")
    if given.int8 and "onnx" not in given.formats:
        raise UserError("--int8 is made of the ONNX: give --format onnx,transformers for both")
    if given.mode == "publish":
        check_publishing(given)
    if given.mode == "predict":
        check_prediction(given)
    elif given.output is not None:
        if given.output in ("", "-") and not (given.mode == "explain" and given.text):
            raise UserError(f"--output {given.output!r}: give the name of a file or folder")
        refuse_existing(given.output)
        if given.mode == "explain" and Path(given.output).suffix != ".html":
            raise UserError(f"--output: {given.output}: the file must end in .html")


def check_publishing(given: argparse.Namespace) -> None:
    """Raises UserError for options of `--mode publish` that cannot be right."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given.repo, re.ASCII):
        raise UserError(f"--mode publish: {given.repo or 'no repository'}: name one on the Hub, as OWNER/NAME")
    if given.license is not None and not re.fullmatch("[a-z0-9][a-z0-9.-]*", given.license):
        raise UserError(f"--license {given.license}: give the Hub's short name of one, such as apache-2.0 or mit")


def check_prediction(given: argparse.Namespace) -> None:
    """Raises UserError for options of `--mode predict` that do not fit together."""
    if (given.text is None) == (given.input is None):
        raise UserError('--mode predict: give either --text "..." or --input FILE')
    if given.input is None:
        if given.output is not None:
            raise UserError("--output is for the rows of --input FILE: leave it out, the label of --text is printed")
        return
    check_files(given.input, given.output)


def check_files(source: str, output: str | None) -> None:
    """Raises UserError if the rows of `source` cannot be labelled into `output`; - is standard input and output."""
    kind = file_kind(source)
    if source != "-":
        if Path(source).is_dir():
            if not any(file_kind(path) == ".txt" for path in Path(source).rglob("*")):
                raise UserError(f"--input: {source} is a folder without .txt files: name one file in it")
        elif not Path(source).is_file():
            raise UserError(f"--input: no such file: {source}")
        elif not kind:
            raise UserError(f"--input: {source}: a file must end in {', '.join(ROW_FILES)}, or one of them and .gz")
    if output in (None, "-"):
        if num_processes() > 1:
            raise UserError("--output: several processes cannot share standard output: give a file")
        return
    kinds = [".csv", ".jsonl"] + [".parquet"] * (kind == ".parquet")
    if Path(output).suffix not in kinds:
        raise UserError(f"--output: {output}: from {kind or 'texts'}, the file must end in {', '.join(kinds)}")
    if not Path(output + ".parts").is_dir():  # it belongs to an interrupted job, which checks later what can stay
        refuse_existing(output, output + ".rejected.csv")
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {Path(output).absolute().parent}")


def run(work: Callable[[], None]) -> None:
    """Call `work` and leave with the exit code that its outcome means."""
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
        work()
        code = 0
    except UserError as error:
        code = 2
        leave(error)
    except BrokenPipeError:  # leave as SIGPIPE would
        drop_output()
        code = 141
        raise SystemExit(code) from None
    except OSError as error:
        if error.filename is None:
            raise
        code = 2
        leave(UserError(f"{error.filename}: {error.strerror}: mend that, and give the same command again; what was "
                        "saved before is intact"))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        code = 2
        leave(UserError("out of memory: set a smaller data_config.batch_size (main_accumulation.py keeps the effective "
                        "batch by train_config.effective_batch_size), data_config.eval_batch_size or "
                        "data_config.max_len"))
    except FloatingPointError as error:  # the training diverged, the program did not fail: the message is enough
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except SystemExit as stop:
        code = stop.code
        raise


def drop_output() -> None:
    """After a BrokenPipeError: the reader of standard output, such as `head`, has closed it. What is still in its
    buffer must not make the flush fail with which Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(error: UserError) -> None:
    """Print the error on one line and exit with code 2."""
    # In one piece, because the other processes of a launcher print theirs at the same time.
    sys.stderr.write(f"error: {printable(' '.join(str(error).splitlines()))}\n")
    sys.stderr.flush()
    raise SystemExit(2) from None
