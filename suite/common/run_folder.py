"""Reads and writes those files of a run folder that need no torch: configuration, metrics, history, mistakes."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.common.storage import atomic_write, read_json
from utils import Config, UserError, brief, config_fields, leaves


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of metrics.json; {} if there is no such file. Raises UserError if it is damaged."""
    path = folder / "metrics.json"
    try:
        metrics = read_json(path) if path.exists() else {}
        if metrics and not {"accuracy", "accuracy_ci95", "loss", "f1", "n"} <= set(metrics["test"]):
            raise ValueError("values are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from None
    return metrics


def read_history(path: Path, lines: int | None = None) -> list[dict[str, Any]]:
    """The records in history.jsonl, or its first `lines`. Raises a UserError that names a damaged line."""
    records: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().splitlines()[:lines] if path.exists() else []:
            records.append(json.loads(line))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: line {len(records) + 1} is damaged: put back a copy of the file, or start the run "
                        "afresh with train_config.resume=never") from None
    return records


def shaping_values(config: Config) -> dict[str, Any]:
    """{dotted key: value} of everything that shapes a run's result. Runs that agree in it are the same run."""
    shaping = {key for key, entry in config_fields() if entry.metadata["shapes_result"]}
    values = leaves(OmegaConf.to_container(OmegaConf.structured(config)))
    return {key: value for key, value in values if key in shaping}


def read_saved_config(path: Path) -> Config:
    """The configuration that a run has saved. Raises UserError if the file is damaged."""
    try:
        saved = OmegaConf.load(path)
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
            if not key.startswith(ignored) and saved[key] != current[key]]


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
        with open(path, newline="", encoding="utf-8") as file:
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
