"""What is wrong with a configuration, in words: unknown keys, values of a wrong type or beyond their bounds, and
settings that contradict each other or the encoder.

`utils.load_config` calls this module, which lies below it and imports nothing of the project, and no torch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo


def in_plain_words(message: str) -> str:
    """What pydantic says of a value, as the end of a sentence that begins with `key is value: `."""
    message = message.removeprefix("Value error, ").partition(", unable to")[0]
    for of_pydantic, ours in {"Input should": "it must", "String should": "it must", "List should": "it must",
                              "a valid boolean": "true or false", "a valid string": "a text",
                              "greater than or equal to": "at least", "less than or equal to": "at most",
                              "greater than": "above", "less than": "below"}.items():
        message = message.replace(of_pydantic, ours)
    return message


def problems_of(error: ValidationError, known: Mapping[str, FieldInfo]) -> dict[str, str]:
    """{dotted key: what is wrong with its value} of all that pydantic has found. `known`: the field of every key."""
    problems = {}
    for found in error.errors():
        key = ".".join(map(str, found["loc"]))
        words = in_plain_words(found["msg"])
        if near := key in known and difflib.get_close_matches(str(found["input"]), choices(known[key]), n=1):
            words += f"; did you mean {near[0]}?"
        problems[key] = f"{key} is {shown(found['input'])}: {words}"
    return problems


def suggestion(key: str, known: Mapping[str, FieldInfo]) -> str:
    """What to say after an unknown key: the nearest valid name, or where all of them stand."""
    if inside := next((name for name in known if name.startswith(f"{key}.")), None):
        return f"; it is a section: set one of its keys, such as {inside}"
    # If the section is missing or misspelt, the last part still finds the key: `epochs` -> train_config.epochs.
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if (not near or leaf in by_leaf) and (leaves := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)):
        near = [by_leaf[leaves[0]]]
    return f"; did you mean {near[0]}?" if near else "; docs/settings.md lists all keys"


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values that a key can have, apart from null, if it is one of a few words."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def contradictions(config: Any, processes: int) -> dict[str, str]:
    """{dotted key: what is wrong} for every value of a `utils.Config` that cannot work together with others.

    `processes`: the number of processes that were launched.
    """
    data, model, train = config.data_config, config.model_config, config.train_config
    problems = {  # or something false, where nothing is wrong
        "data_config.label_column": data.text_column == data.label_column and (
            f"data_config.text_column and data_config.label_column are both {data.text_column!r}: name two columns"),
        "data_config.group_column": data.group_column in (data.text_column, data.label_column) and (
            f"data_config.group_column is {data.group_column!r}, the column of the texts or the classes: name another"),
        "train_config.mixed_precision": train.mixed_precision == "fp16" and train.device == "cpu" and (
            "train_config.mixed_precision is 'fp16', which a CPU cannot train in: use auto, bf16 or no"),
        "train_config.gradient_checkpointing": train.gradient_checkpointing and train.compile and (
            "train_config.gradient_checkpointing and train_config.compile are both true, but compiled layers would not "
            "give the same bits: set one of them to false"),
        "train_config.class_weights": train.class_weights and train.objective == "distillation" and (
            "train_config.class_weights is 'balanced', but a teacher spreads a review over all classes, and a weight "
            "belongs to one: leave it out"),
        "train_config.effective_batch_size": _batch_problem(data.batch_size, train, processes),
        "train_config.best_metric": config.pretrains and train.best_metric not in ("accuracy", "loss") and (
            f"train_config.best_metric is {train.best_metric}, which masked words do not have: use loss or accuracy"),
        "train_config.auto_micro_batch": train.auto_micro_batch and processes > 1 and (
            f"train_config.auto_micro_batch is true, but {processes} processes cannot agree on a new micro-batch "
            "in the middle of a step: set a smaller data_config.batch_size"),
        "data_config.max_len": too_long(data.max_len, model.model_name, max_positions(model.model_name)),
    }
    return {key: problem for key, problem in problems.items() if problem}


def too_long(max_len: int, model_name: str, longest: int | None) -> str | None:
    """What is wrong with max_len if the encoder takes at most `longest` tokens (None: any number); None if nothing."""
    if longest is None or max_len <= longest:
        return None
    return (f"data_config.max_len is {max_len}: {model_name} takes at most {longest} tokens: set "
            f"data_config.max_len={longest}")


def shown(value: Any) -> str:
    """A value as a message shows it: a word as it was given, other texts in quotes."""
    text = "null" if value is None else str(value) if re.fullmatch(r"[!-~]+", str(value)) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _batch_problem(micro_batch: int, train: Any, processes: int) -> str | None:
    effective, share = train.effective_batch_size, micro_batch * processes
    if effective is None:
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
    from huggingface_hub import try_to_load_from_cache
    try:
        path = Path(model_name, "config.json")
        if not path.parent.is_dir():
            path = Path(try_to_load_from_cache(model_name, "config.json"))
        values = json.loads(path.read_text(encoding="utf-8"))
        return position_limit(values.get("encoder", values))  # this suite's classifiers have their encoder's in theirs
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # loading the model will say what is wrong


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
