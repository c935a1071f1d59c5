"""Finds values of the configuration that have the right type and still cannot work, without importing torch.

`utils.load_config` calls this module, which lies below it and imports nothing of the project.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import yaml

INPUTS = ("model_config.model_name", "data_config.dataset")  # keys whose values may be paths of what is read
DEEPEST = 50  # brackets in a configuration
LARGEST = 2**53  # integers up to here are exact wherever they are computed with
LONGEST_RUN_NAME = 200  # bytes; a file's name has at most 255, and some are made of it


def impossible_values(config: Any, fields: dict[str, Any], processes: int) -> dict[str, str]:
    """{dotted key: what is wrong} for every value of the right type that cannot work.

    `config` is a `utils.Config`, `fields` the dataclass field of every dotted key, `processes` the number launched.
    """
    problems = {}
    for key, entry in fields.items():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, name)
        if value == "":
            problems[key] = f"{key} is empty: give a value, or leave the key out"
        elif value is not None and (problem := _out_of_bounds(value, entry.metadata)):
            problems[key] = f"{key} is {shown(value)}: {problem}"
    data, model, train = config.data_config, config.model_config, config.train_config
    for key, path in zip(("run_name", "output_dir", *INPUTS), (config.run_name or "", config.output_dir,
                                                               model.model_name, data.dataset), strict=True):
        if key not in problems and (problem := _path_problem(path)):
            problems[key] = f"{key} is {shown(path)}: {problem}"
    if problem := _split_problem(data.split):
        problems["data_config.split"] = f"data_config.split is {shown(data.split)}: {problem}"
    if data.text_column == data.label_column:
        problems["data_config.label_column"] = (
            f"data_config.text_column and data_config.label_column are both {data.text_column!r}: name two columns")
    if config.run_name and (not re.fullmatch(r"[\w=+-][\w.=+ -]*", config.run_name)
                            or len(config.run_name.encode()) > LONGEST_RUN_NAME):
        problems["run_name"] = (f"run_name is {shown(config.run_name)}: use up to {LONGEST_RUN_NAME} letters, digits "
                                "and . _ - = + for a folder's name, which does not begin with a dot")
    if train.mixed_precision == "fp16" and train.device == "cpu":
        problems["train_config.mixed_precision"] = (
            "train_config.mixed_precision is 'fp16', which a CPU cannot train in: use auto, bf16 or no")
    if train.gradient_checkpointing and train.compile:
        problems["train_config.gradient_checkpointing"] = (
            "train_config.gradient_checkpointing and train_config.compile are both true, but compiled layers would not "
            "give the same bits: set one of them to false")
    if problem := _batch_problem(data.batch_size, train, processes):
        problems["train_config.effective_batch_size"] = problem
    if train.auto_micro_batch and processes > 1:
        problems["train_config.auto_micro_batch"] = (
            f"train_config.auto_micro_batch is true, but {processes} processes cannot agree on a new micro-batch "
            "in the middle of a step: set a smaller data_config.batch_size")
    if "model_config.model_name" not in problems and (
            problem := too_long(data.max_len, model.model_name, max_positions(model.model_name))):
        problems["data_config.max_len"] = problem
    return problems


def too_long(max_len: int, model_name: str, longest: int | None) -> str | None:
    """What is wrong with max_len if the encoder takes at most `longest` tokens (None: any number); None if nothing."""
    if longest is None or max_len <= longest:
        return None
    return (f"data_config.max_len is {max_len}: {model_name} takes at most {longest} tokens: set "
            f"data_config.max_len={longest}")


def _out_of_bounds(value: Any, bounds: dict[str, Any]) -> str | None:
    if "choices" in bounds and value not in bounds["choices"]:
        near = difflib.get_close_matches(str(value), bounds["choices"], n=1)
        return f"choose one of {', '.join(bounds['choices'])}" + (f"; did you mean {near[0]}?" if near else "")
    if isinstance(value, str) and ("\0" in value or not encodes(value, "utf-8")):
        return "it holds a character that no text has"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"it must be at most {LARGEST}"
    tests = {"at_least": lambda limit: value >= limit, "at_most": lambda limit: value <= limit,
             "above": lambda limit: value > limit, "below": lambda limit: value < limit}
    for name, holds in tests.items():
        if name in bounds and not holds(bounds[name]):
            return f"it must be {name.replace('_', ' ')} {bounds[name]}"
    return None


def encodes(text: str, encoding: str) -> bool:
    """Whether the encoding has every character of the text: UTF-8 lacks halves of characters."""
    return text == text.encode(encoding, errors="replace").decode(encoding)


def _path_problem(path: str) -> str | None:
    if not encodes(path, encoding := sys.getfilesystemencoding()):
        return f"the file system's encoding here, {encoding}, lacks a character of it: set LC_ALL=C.UTF-8"
    return "there is no such user" if path.startswith("~") else None


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def short_name(path: str) -> str:
    """The last part of a model's or dataset's name; of a run's `best` folder, the name of the run."""
    return Path(path).absolute().parent.name if Path(path).name == "best" else Path(path).name


def deep_yaml(text: str) -> str | None:
    """What is wrong with YAML whose brackets are nested so deeply that the parser would crash."""
    depth = 0
    for token in yaml.scan(text):
        kind = type(token).__name__
        depth += kind.endswith("StartToken") - kind.endswith("EndToken")
        if depth > DEEPEST:
            return f"more than {DEEPEST} brackets are nested: no configuration needs that"
    return None


def odd_number(text: str) -> str | None:
    """What is wrong with a number that YAML 1.1 reads as another one than most people: 1:30 as 90, or 010 as 8."""
    if re.fullmatch(r"[-+]?([0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|0[0-7_]+)", text):
        return f"YAML reads {text} as {yaml.safe_load(text)}: write the number that you mean"
    return None


def _split_problem(split: Any) -> str | None:
    if split == "official":
        return None
    numbers = isinstance(split, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in split)
    if not numbers or len(split) != 3:
        return "give three shares such as [0.8, 0.1, 0.1], or official"
    if not all(0 < share < 1 for share in split):
        return "each share must lie between 0 and 1"
    if abs(sum(split) - 1) > 1e-6:
        return f"the shares sum to {sum(split):.6g}; they must sum to 1"
    return None


def _batch_problem(micro_batch: int, train: Any, processes: int) -> str | None:
    effective, share = train.effective_batch_size, micro_batch * processes
    if effective is None or share < 1:
        return None
    asked = f"train_config.effective_batch_size is {effective}"
    if effective % share:
        near = [size for size in (effective // share * share, (effective // share + 1) * share) if size > 0]
        return (f"{asked}: with data_config.batch_size={micro_batch} on {processes} process(es) it must be a "
                f"multiple of {share}, such as {' or '.join(map(str, near))}")
    steps = train.gradient_accumulation_steps
    if steps not in (1, effective // share):
        return f"{asked}, but train_config.gradient_accumulation_steps={steps} makes it {steps * share}: give only one"
    return None


def max_positions(model_name: str) -> int | None:
    """`position_limit` of the encoder in a local folder or in the Hub's cache; None if it is in neither."""
    path = Path(model_name) / "config.json"
    if not Path(model_name).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.utils import HFValidationError
        try:
            path = try_to_load_from_cache(model_name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(path, str):
            return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return position_limit(values.get("encoder", values))  # this suite's classifiers have their encoder's in theirs
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # loading the model will say what is wrong with the folder


def position_limit(encoder: dict[str, Any]) -> int | None:
    """The longest input, in tokens, that an encoder with this config.json takes.

    None if its architecture sets no limit: DeBERTa-v3, for example, has relative positions.
    """
    positions = encoder.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1 or encoder.get("position_biased_input") is False:
        return None
    # RoBERTa and its relatives number positions from pad_token_id + 1.
    if encoder.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl",
                                     "roberta-prelayernorm", "data2vec-text", "xmod"):
        positions -= encoder.get("pad_token_id", 1) + 1
    return positions
