"""Reads and writes those files of a run folder that need no torch: configuration, metrics, history, mistakes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.common.checks import INPUTS, deep_yaml
from suite.common.storage import OLD, PARTIAL, RECORD, atomic_write, read_json, regular, sha256_of
from utils import BAG_OF_WORDS, Config, DataConfig, ModelConfig, TrainConfig, UserError, brief, config_fields, leaves

FILES = ("config.yaml", "metrics.json", "history.jsonl", "valid_predictions.csv", "test_predictions.csv",
         "misclassified.csv", "misclassified.html", "best" + RECORD)
FOLDERS = ("best", "best" + PARTIAL, "best" + OLD, "last", "plots", "export",
           "onnx")  # what earlier versions have exported
FIGURES = {"train": ("seconds", "samples_per_second", "optimizer_steps"), "valid": (),  # what each part must have
           "test": ("accuracy", "accuracy_ci95", "loss", "f1", "n")}

REVIEWS = ("dataset", "subset", "text_column", "label_column", "split", "split_seed", "drop_duplicates", "limit",
           "line_breaks")
WITHOUT_ENCODER = ("model_config.model_name", "model_config.num_labels",  # what shapes a bag of words, or a stack
                   *(f"data_config.{key}" for key in REVIEWS))
SAME_TEST = tuple(f"data_config.{key}" for key in REVIEWS if key not in ("dataset", "line_breaks"))  # to be compared
STACK_OF = "stack of "  # how the model_name of runs that were combined begins


def refuse_wrong_kinds(folder: Path) -> None:
    """Raises UserError if a file of a run is a folder, a pipe or a link to nowhere, or a folder of it is no folder."""
    for name in ("", *FILES, *FOLDERS):
        path = folder / name
        is_link = path.is_symlink() and name not in ("", "last", *FILES)  # what it leads to is somebody else's
        if is_link or os.path.lexists(path) and not (path.is_file() if name in FILES else path.is_dir()):
            raise UserError(f"{path} is no {'file' if name in FILES else 'folder'}, so this run has not written it: "
                            "move it elsewhere, or choose another run_name")


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of metrics.json; {} if there is no such file. Raises UserError if it is damaged."""
    path = folder / "metrics.json"
    if not os.path.lexists(path):
        return {}
    try:
        metrics = read_json(path)
        if metrics != {} and (wrong := _wrong_figure(metrics)):
            raise ValueError(wrong)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): remove it") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({brief(error)}): remove it") from None
    return metrics


def _wrong_figure(metrics: Any) -> str | None:
    """Names the first value of metrics.json that is missing or that no run writes; None if there is none."""
    if not isinstance(metrics, dict) or not metrics.keys() <= {*FIGURES, "environment"}:
        return "other parts than a run's"
    for name, needed in FIGURES.items():
        if name not in metrics and (name != "test" or "train" in metrics):  # not all runs are trained, or tested
            continue
        part = metrics.get(name)
        if not isinstance(part, dict):
            return f"{name}: no figures"
        for key in (*needed, *part):
            value = part.get(key)
            is_pair = key == "accuracy_ci95" and isinstance(value, list) and len(value) == 2
            numbers = value if is_pair else [value]
            if is_pair != (key == "accuracy_ci95") or not all(map(_is_number, numbers)) and (
                    value is not None or key in needed):
                return f"{name}: {key} is {brief(repr(value))}"
    found = metrics.get("environment", {})
    if not isinstance(found, dict) or any(isinstance(value, dict | list) for value in found.values()):
        return "environment"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # and no NaN


def read_history(path: Path, lines: int | None = None) -> list[dict[str, Any]]:
    """The records in history.jsonl, or its first `lines`. Raises a UserError that names a damaged line."""
    records: list[dict[str, Any]] = []
    try:
        for line in regular(path).read_bytes().splitlines()[:lines] if os.path.lexists(path) else []:
            record = json.loads(line)
            if not isinstance(record, dict) or not all(map(_is_number, (record["step"], *record.values()))):
                raise ValueError
            records.append(record)
    except (ValueError, KeyError, RecursionError):
        raise UserError(f"{path}: line {len(records) + 1} is damaged: put back a copy of the file, or start the run "
                        "afresh with train_config.resume=never") from None
    return records


def shaping_values(config: Config) -> dict[str, Any]:
    """{dotted key: value} of everything that shapes a run's result. Runs that agree in it are the same run."""
    shaping = {key for key, entry in config_fields() if entry.metadata["shapes_result"]}
    values = leaves(OmegaConf.to_container(OmegaConf.structured(config)))
    return {key: value for key, value in values if key in shaping}


def is_encoder(config: Config) -> bool:
    """Whether the run's model is an encoder, and no bag of words or stack."""
    name = config.model_config.model_name
    return name != BAG_OF_WORDS and not name.startswith(STACK_OF)


def without_encoder(config: Config, model_name: str) -> Config:
    """The configuration of a run of `model_name`, which is no encoder, on the reviews of `config`.

    What does not shape such a model has its default, so that two commands that differ only there mean the same run.
    """
    data, train = config.data_config, config.train_config
    return Config(
        config.run_name, config.output_dir, ModelConfig(model_name, num_labels=config.model_config.num_labels),
        DataConfig(**{key: getattr(data, key) for key in REVIEWS}),
        TrainConfig(train.seed, effective_batch_size=DataConfig.batch_size, device="cpu", mixed_precision="no",
                    test=train.test, resume=train.resume, overwrite=train.overwrite), config.log_config)


def run_of(folder: Path) -> Path | None:
    """The run whose model or export the folder is; None if it lies elsewhere."""
    parent = folder.resolve().parent
    return parent if (parent / "config.yaml").is_file() and (parent / "best").is_dir() else None


def identity(run_folder: Path) -> str:
    """What tells a run's files from those of other runs: the SHA-256 sum of its config.yaml, which is written once."""
    return sha256_of(run_folder / "config.yaml")


def read_saved_config(path: Path) -> Config:
    """The configuration that a run has saved. Raises UserError if the file is damaged."""
    try:
        text = regular(path).read_text(encoding="utf-8")
        if problem := deep_yaml(text):
            raise ValueError(problem)
        saved = OmegaConf.load(io.StringIO(text))
        if missing := Config.__dataclass_fields__.keys() - dict(saved).keys():
            raise ValueError(f"{min(missing)} is missing")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    except (OSError, ValueError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: damaged, or of another version: {brief(error)}") from None


def differences(path: Path, config: Config, ignored: tuple[str, ...] = ()) -> list[str]:
    """`key: old -> new` for every key that shapes the result and whose saved value is not the one in `config`.

    `ignored`: keys or sections that may differ.
    """
    saved, current = shaping_values(read_saved_config(path)), shaping_values(config)
    return [f"{key}: {saved[key]} -> {current[key]}" for key in current
            if not key.startswith(ignored) and saved[key] != current[key]
            and not (key in INPUTS and is_same_place(saved[key], current[key]))]


def is_same_place(path: str, other: str) -> bool:
    """Whether two paths lead to the same file or folder, from here or, for a relative one, from where it was given."""
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return not os.path.isabs(path) and os.path.exists(other) and Path(other).as_posix().endswith(f"/{path}")


def save_config(config: Config, path: str | Path) -> None:
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)))


def how_to_write_again(run_folder: Path) -> str:
    """What to do about a file of the run folder that a test of the run writes."""
    return (f"write it again with python main.py --mode test output_dir={run_folder.parent} "
            f"run_name={run_folder.name}")


def read_mistakes(run_folder: Path, most: int | None = None) -> list[dict[str, str]]:
    """The first `most` rows of misclassified.csv (None: all): id, text, label, predicted and confidence.

    Raises UserError if the file is missing or damaged.
    """
    path = run_folder / "misclassified.csv"
    again = how_to_write_again(run_folder)
    csv.field_size_limit(2**31 - 1)  # the csv module's own limit is 131,072 characters, less than some reviews have
    try:
        with open(regular(path), newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(itertools.islice(reader, most))
            if not {"id", "text", "label"} <= set(reader.fieldnames or ()):
                raise ValueError("columns are missing")
            if any(None in row or None in row.values() or not row["id"].isdecimal() or not row["text"].strip()
                   for row in rows):
                raise ValueError("fields are missing")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {again}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({brief(error)}): {again}") from None
    return rows
