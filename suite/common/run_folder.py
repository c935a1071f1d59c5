"""The configuration of a command, and those files of a run folder that need no torch: the saved configuration, metrics,
history, mistakes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from suite.common.checks import problems_of
from suite.common.storage import (
    MANIFEST,
    OLD,
    PARTIAL,
    atomic_write,
    read_json,
    refuse_damage,
    sha256_of,
    sum_of_files,
)
from utils import (
    BAG_OF_WORDS,
    INPUTS,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    config_fields,
    file_kind,
    leaves,
    load_config,
    num_processes,
    read_override,
    read_yaml,
    shapes_result,
)

REPLACED = ("best", "best" + PARTIAL, "best" + OLD, "plots", "export",  # folders that a new run in the place removes
            "onnx")  # what earlier versions have exported

REVIEWS = ("dataset", "subset", "text_column", "label_column", "group_column", "split", "split_seed", "drop_duplicates",
           "limit", "train_limit", "line_breaks")
BAG_OF_WORDS_KEYS = ("model_config.model_name", "model_config.num_labels", "train_config.calibrate",
                     *(f"data_config.{key}" for key in REVIEWS))  # what shapes a bag of words
SAME_TEST = tuple(f"data_config.{key}" for key in REVIEWS  # to be compared
                  if key not in ("dataset", "train_limit", "line_breaks"))
TEACHER = "teacher"  # in the run folder of a student: what its teacher says
STACK_OF = "stack of "  # how the model_name of runs that were combined begins


def best_folder(run_folder: Path) -> Path:
    """The folder of a run's best model. Raises UserError if there is none, or it is damaged."""
    folder = run_folder / "best"
    if not folder.is_dir():
        raise UserError(f"{folder}: no trained model there: train this run first, or name another one with --config "
                        "FILE, run_name=NAME or --model FOLDER")
    refuse_damage(folder)
    return folder


def inputs_of(config: Config) -> dict[str, str]:
    """{key: value} of the dataset, the encoder and, if there is one, the teacher."""
    values = shaping_values(config)
    return {key: values[key] for key in INPUTS if values[key] is not None}


def content_of(key: str, value: str) -> str | None:
    """A sum, in hex, of the files of an input that lies here: of a dataset, or of a model of this suite; else None.

    A dataset's README.md may name classes. A model is known by its list of sums.
    """
    path = Path(value)
    if key != "data_config.dataset":
        lists = [folder / MANIFEST for folder in (path, path / "best") if (folder / MANIFEST).is_file()]
        return sha256_of(lists[0]) if lists else None
    files = [path] * path.is_file()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file_kind(file) or file == path / "README.md"]
    return sum_of_files(path, files) if files else None


def contents_of(config: Config, content: Callable[[str, str], str | None] = content_of) -> dict[str, str | None]:
    """{key: `content_of`} of the inputs. `content`: `content_of`, or what remembers its answers."""
    return {key: content(key, value) for key, value in inputs_of(config).items()}


def changed_input(data: dict[str, Any], now: dict[str, str | None]) -> str | None:
    """The key of the first input whose files are not those with which a run began; None if there is none, as far as
    both are known. `data`: that of its metrics.json; `now`: see `contents_of`."""
    then = data.get("contents", {"data_config.dataset": data.get("content")})  # an earlier version knew this one alone
    return next((key for key in now if None not in (then.get(key), now[key]) and then[key] != now[key]), None)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of metrics.json; {} if there is no such file."""
    path = folder / "metrics.json"
    return read_json(path) if path.exists() else {}


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records in history.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def shaping_values(config: Config) -> dict[str, Any]:
    """{dotted key: value} of everything that shapes a run's result. Runs that agree in it are the same run."""
    known = config_fields()
    return {key: value for key, value in leaves(asdict(config)) if shapes_result(known[key])}


def is_encoder(config: Config) -> bool:
    """Whether the run's model is an encoder, and no bag of words or stack."""
    name = config.model_config.model_name
    return name != BAG_OF_WORDS and not name.startswith(STACK_OF)


def stack_name(names: Iterable[str]) -> str:
    """The model_name of a stack of runs with these names: the same for all seeds and training sizes of one grid."""
    ending = r"-train_limit=\w+|-[0-9a-f]{8}$"  # the last is put after a name that was taken
    return STACK_OF + ", ".join(re.sub(ending, "", without_seed(name)) or name for name in names)


def without_seed(name: str) -> str:
    """`checkpoints/stack` of `checkpoints/stack-seed42`"""
    return re.sub(r"[-_]?seed[-_]?\d+", "", name)


def without_encoder(config: Config, model_name: str) -> Config:
    """The configuration of a run of `model_name`, which is no encoder, on the reviews of `config`.

    What does not shape such a model has its default, so that two commands that differ only there mean the same run.
    """
    data, train = config.data_config, config.train_config
    return Config(
        config.run_name, config.output_dir, ModelConfig(model_name, num_labels=config.model_config.num_labels),
        DataConfig(**{key: getattr(data, key) for key in REVIEWS}),
        TrainConfig(train.seed, effective_batch_size=DataConfig.batch_size, device="cpu", mixed_precision="no",
                    calibrate=train.calibrate and model_name == BAG_OF_WORDS, test=train.test, resume=train.resume,
                    overwrite=train.overwrite), config.log_config)


def run_of(folder: Path) -> Path | None:
    """The run whose model or export the folder is; None if it lies elsewhere."""
    parent = folder.resolve().parent
    return parent if (parent / "config.yaml").is_file() and (parent / "best").is_dir() else None


def read_saved_config(path: Path) -> Config:
    """The configuration that a run has saved. Raises UserError if another version has."""
    saved = read_yaml(path, "it belongs to its run folder")
    try:
        return Config(**saved)
    except ValidationError as error:
        problems = "; ".join(problems_of(error, config_fields()).values())
        raise UserError(f"{path}: of another version: {problems}") from None


def differences(path: Path, config: Config, ignored: tuple[str, ...] = ()) -> list[str]:
    """`key: old -> new` for every key that shapes the result and whose saved value is not the one in `config`.

    `ignored`: keys or sections that may differ.
    """
    saved, current = shaping_values(read_saved_config(path)), shaping_values(config)
    return [f"{key}: {saved[key]} -> {current[key]}" for key in current
            if not key.startswith(ignored) and saved[key] != current[key]
            and not (key in INPUTS and is_same_place(saved[key], current[key]))]


def is_same_place(path: str | None, other: str | None) -> bool:
    """Whether two paths lead to the same file or folder, from here or, for a relative one, from where it was given."""
    if path is None or other is None:
        return False
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return not os.path.isabs(path) and os.path.exists(other) and Path(other).as_posix().endswith(f"/{path}")


def save_config(config: Config, path: str | Path) -> None:
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def how_to_write_again(run_folder: Path) -> str:
    """What to do about a file of the run folder that a test of the run writes."""
    return (f"write it again with python main.py --mode test output_dir={run_folder.parent} "
            f"run_name={run_folder.name}")


def read_mistakes(run_folder: Path, most: int | None = None) -> list[dict[str, str]]:
    """The first `most` rows of misclassified.csv (None: all): id, text, label, predicted and confidence.

    Raises UserError if the file is missing.
    """
    path = run_folder / "misclassified.csv"
    csv.field_size_limit(2**31 - 1)  # the csv module's own limit is 131,072 characters, less than some reviews have
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(itertools.islice(csv.DictReader(file), most))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {how_to_write_again(run_folder)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The configuration of a command


def config_for(mode: str, path: str | Path, overrides: Sequence[str], model: str | None = None,
               int8: bool = False, teacher: str | None = None) -> Config:
    """The configuration of a command: that of `path` with the overrides applied, as its mode needs it.

    `--mode baseline` and `--mode audit` take only what shapes a bag of words. `--mode distill` takes `teacher`, a
    folder. `--mode predict` takes the text column of the run, or of the run folder `model`. `--mode test`, `--mode
    audit` with a `model`, and an export whose `int8` is checked, take what the run has saved.
    """
    if mode in ("baseline", "audit") and num_processes() > 1:
        raise UserError(f"--mode {mode} is the work of one process: start it with python main.py --mode {mode}")
    if mode == "baseline" or mode == "audit" and model is None:
        named = load_config(path, [*overrides, f"model_config.model_name={BAG_OF_WORDS}"])
        return without_encoder(named, BAG_OF_WORDS)
    if mode == "pretrain":
        config = load_config(path, [*overrides, "train_config.objective=masked_lm", "train_config.test=false"],
                             {"--mode pretrain": {"train_config.best_metric": "loss"}})
    elif mode == "distill":
        named = [] if teacher is None else [f"train_config.teacher={teacher}"]
        config = load_config(path, [*overrides, *named, "train_config.objective=distillation"])
        if config.train_config.teacher is None:
            raise UserError("--mode distill: it has no teacher: give --teacher FOLDER, a finished run such as "
                            "checkpoints/stack")
    else:
        config = load_config(path, overrides)
    if mode == "train" and config.pretrains:
        raise UserError("train_config.objective is 'masked_lm': leave it out and give --mode pretrain, which sets it")
    train_config = config.train_config
    if mode in ("train", "pretrain") and (train_config.teacher or train_config.objective == "distillation"):
        raise UserError("train_config.teacher and train_config.objective=distillation are set by --mode distill "
                        "--teacher FOLDER: give that command, or leave them out")
    if mode in ("train", "pretrain", "distill") and not is_encoder(config):
        raise UserError(f"model_config.model_name={config.model_config.model_name} does not name an encoder: make a "
                        "bag of words with --mode baseline, a stack with ensemble.py")
    run = Path(model) if model else config.run_folder
    if mode in ("predict", "audit") or int8:
        run = run_of(run) or run
    if mode == "predict" and (run / "config.yaml").exists() and not _replaces(overrides, "data_config.text_column"):
        config.data_config.text_column = read_saved_config(run / "config.yaml").data_config.text_column
    audits = mode == "audit"  # a run
    if (int8 or audits) and not (run / "config.yaml").exists():
        needs = "--mode audit reads the predictions" if audits else "--int8 is checked on the validation reviews"
        raise UserError(f"{needs} of the model's run, and {run}/config.yaml is missing: name the run, or its best "
                        "model" + audits * ", or leave --model out")
    if int8 or audits or mode == "test" and (run / "config.yaml").exists():
        config = _config_of_run(run / "config.yaml", path, overrides, config)
    return without_encoder(config, BAG_OF_WORDS) if audits else config  # no encoder is loaded


def _config_of_run(saved: Path, path: str | Path, overrides: Sequence[str], config: Config) -> Config:
    """The configuration `saved` by a run, with the overrides applied: nobody has to repeat what it was trained with.

    What uses it refuses overrides that contradict the run. `config`: that of `path` with the overrides applied.
    """
    saved_config = read_saved_config(saved)
    saved_values, given = shaping_values(saved_config), shaping_values(config)
    # A relative path that was saved may not lead there from this folder. Then the given path counts.
    moved = {key: given[key] for key in INPUTS
             if is_same_place(saved_values[key], given[key]) and not os.path.exists(saved_values[key])}
    # The run's batch may not suit the number of processes that test it, and need not, because they take no optimizer
    # step. The model card still names the batch that the run was trained with.
    config = load_config(saved, overrides, {str(path): moved | {
        "output_dir": config.output_dir, "run_name": config.run_name, "train_config.auto_micro_batch": False,
        "train_config.effective_batch_size": None, "train_config.gradient_accumulation_steps": 1}})
    if not _replaces(overrides, "train_config.effective_batch_size"):
        config.train_config.effective_batch_size = saved_config.train_config.effective_batch_size
    return config


def _replaces(overrides: Sequence[str], key: str) -> bool:
    return any(key == replaced for item in overrides for replaced, _ in read_override(item))


def refuse_accumulation(mode: str, config: Config) -> None:
    """Raises UserError if the command needs main_accumulation.py."""
    steps, effective = config.train_config.gradient_accumulation_steps, config.train_config.effective_batch_size
    if num_processes() > 1:
        raise UserError(f"WORLD_SIZE is {num_processes()}: main.py is for one process; run main_accumulation.py with "
                        "the same arguments, or unset WORLD_SIZE")
    if mode in ("train", "pretrain", "distill") and steps > 1:
        raise UserError(f"train_config.gradient_accumulation_steps={steps} (effective_batch_size={effective}): main.py "
                        "trains on one micro-batch a step; run main_accumulation.py with the same arguments")
