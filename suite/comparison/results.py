"""Read finished runs from their folders, and group the runs that differ only in their seeds into settings."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.run_folder import (
    SAME_TEST,
    WITHOUT_ENCODER,
    how_to_write_again,
    is_encoder,
    read_history,
    read_metrics,
    read_mistakes,
    read_saved_config,
    shaping_values,
)
from suite.common.storage import read_json
from suite.training.evaluation import TEST_PREDICTIONS, VALID_PREDICTIONS, Predictions
from utils import Config, UserError, short_name

NAME, STEPS = "model_config.model_name", "train_config.gradient_accumulation_steps"
AUTO = "auto"
MOST_NAMED = 3  # keys that a setting's name has room for
TRAIN_AGAIN = "train the run again with train_config.resume=never train_config.overwrite=true"
SHORT_NAMES = {"train_config.effective_batch_size": "batch", "data_config.batch_size": "micro-batch",
               "data_config.max_len": "len"}


@dataclass
class Result:
    """A finished run, as it was measured on one split."""

    folder: Path
    config: Config
    metrics: dict[str, Any]
    label_names: list[str]
    predictions: Predictions  # logits: the logarithms of the saved probabilities
    predicted: np.ndarray  # (reviews,) int64; as saved, because two saved probabilities may have been rounded to a tie
    data_fingerprint: str | None  # of all reviews and their split; None if the model has been removed
    split: str = "test"  # or "valid"

    @property
    def seed(self) -> int:
        return self.config.train_config.seed

    @property
    def correct(self) -> np.ndarray:
        """(reviews,) bool."""
        return self.predicted == self.predictions.labels

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        return read_history(self.folder / "history.jsonl")

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """{dotted key: value} of the configuration that shape the result, without the seed and those of the log; of a
        bag of words or a stack, those that mean something to it. For `auto`, the device or precision that it was."""
        values, measured = shaping_values(self.config), self.metrics.get("environment", {})
        if not is_encoder(self.config):
            return {key: values[key] for key in values if key in WITHOUT_ENCODER}
        for key, name in (("train_config.device", "device"), ("train_config.mixed_precision", "precision")):
            if values[key] == AUTO:
                values[key] = measured.get(name, AUTO)
        return {key: value for key, value in values.items()
                if key != "train_config.seed" and not key.startswith("log_config.")}


@dataclass
class Setting:
    """Runs that differ only in their seeds."""

    label: str
    runs: list[Result]
    published: dict[str, float] = field(default_factory=dict)  # {source: accuracy} of others

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """(seeds, reviews) bool."""
        return np.stack([run.correct for run in self.runs])

    def figures(self, part: str, name: str) -> list[float]:
        """A figure from a part of each run's metrics.json; runs in which it is null or missing are skipped."""
        found = [run.metrics.get(part, {}).get(name) for run in self.runs]
        return [value for value in found if value is not None]


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The runs on the test split; on validation, if not all of them were tested. Raises UserError as `read_result`."""
    parts = [read_metrics(folder).keys() for folder in folders]
    untested = any("train" in found and "test" not in found for found in parts)
    return [read_result(folder, "valid" if untested else "test") for folder in folders]


def read_result(folder: Path, split: str = "test") -> Result:
    """Raises UserError if the folder holds no finished run, or files that do not belong together."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name run folders such as checkpoints/NAME")
    metrics = read_metrics(folder)
    if (saved := folder / "config.yaml").exists() and read_saved_config(saved).pretrains:
        raise UserError(f"{folder} holds a pretraining run, which has no classes: compare the runs that start from it")
    if split == "test" and "train" in metrics and "test" not in metrics:
        raise UserError(f"{folder} was not tested: test it with python main.py --mode test output_dir={folder.parent} "
                        f"run_name={folder.name}, or leave it out")
    if not {"train", split} <= metrics.keys():
        raise UserError(f"{folder} holds no finished run (metrics.json is missing or has no training in it): give the "
                        "run's command again to finish it, or leave the run out")
    config = read_saved_config(folder / "config.yaml")
    path, again = folder / TEST_PREDICTIONS, how_to_write_again(folder)
    if split == "valid":
        path, again = folder / VALID_PREDICTIONS, f"{TRAIN_AGAIN}, or leave it out"
    names, predictions, predicted = read_predictions(path, again)
    return Result(folder, config, metrics, names, predictions, predicted, _fingerprint(folder), split)


def read_predictions(path: Path, again: str) -> tuple[list[str], Predictions, np.ndarray]:
    """The classes, the predictions and the predicted class of each review, as a run has saved them for a split.

    `again`: how the file can be written again. Raises UserError if it is missing.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {again}") from None
    names = [column.removeprefix("probability_") for column in header[3:]]
    index = {name: place for place, name in enumerate(names)}
    ids = np.array([int(row[0]) for row in rows], np.int64)
    labels, predicted = (np.array([index[row[place]] for row in rows], np.int64) for place in (1, 2))
    probabilities = np.array([[float(value) for value in row[3:]] for row in rows], np.float64)
    order = np.argsort(ids)
    with np.errstate(divide="ignore"):  # some probabilities were rounded to 0
        predictions = Predictions(ids, labels, np.log(probabilities))
    return names, predictions, predicted[order]


def _fingerprint(folder: Path) -> str | None:
    try:
        return read_json(folder / "best" / "config.json").get("data_fingerprint")
    except FileNotFoundError:
        return None


def refuse_different_tests(results: Sequence[Result]) -> None:
    """Raises UserError unless all runs were tested on the same reviews, from the same split of the same data."""
    first = results[0]
    for other in results[1:]:
        reasons = [f"{key}: {first.values[key]} and {other.values[key]}" for key in SAME_TEST
                   if first.values[key] != other.values[key]]
        datasets = [run.config.data_config.dataset for run in (first, other)]
        # Names alone can mislead: the same data may lie in two places, and other data may have taken over a name.
        if first.data_fingerprint and other.data_fingerprint:
            if first.data_fingerprint != other.data_fingerprint and not reasons:
                reasons.append(f"data_config.dataset: {' and '.join(dict.fromkeys(datasets))}, with different contents")
        elif datasets[0] != datasets[1]:
            reasons.append(f"data_config.dataset: {datasets[0]} and {datasets[1]}")
        if first.label_names != other.label_names:
            reasons.append(f"classes: {first.label_names} and {other.label_names}")
        elif not (np.array_equal(first.predictions.ids, other.predictions.ids)
                  and np.array_equal(first.predictions.labels, other.predictions.labels)) and not reasons:
            reasons.append(f"{first.split}_predictions.csv: {len(first.predictions.ids):,} and "
                           f"{len(other.predictions.ids):,} reviews, not the same ids with the same labels")
        if reasons:
            raise UserError(f"{first.folder} and {other.folder} were not tested on the same reviews "
                            f"({'; '.join(reasons)}): name runs of one split")


def group(results: Sequence[Result], base: Config | None = None) -> list[Setting]:
    """The settings in the order of their first runs, each named by the values in which it differs from the others.

    `base`: see `_labels`. Raises UserError if two runs have the same setting and the same seed.
    """
    grouped: dict[str, list[Result]] = {}
    for result in results:
        runs = grouped.setdefault(repr(result.values), [])
        if twin := next((run for run in runs if run.seed == result.seed), None):
            raise UserError(f"{twin.folder} and {result.folder} are the same setting with the same seed {result.seed}: "
                            "leave one out")
        runs.append(result)
    labels = _labels([runs[0].values for runs in grouped.values()], shaping_values(base) if base else {})
    return [Setting(label, sorted(runs, key=lambda run: run.seed))
            for label, runs in zip(labels, grouped.values(), strict=True)]


def _labels(settings: list[dict[str, Any]], base: dict[str, Any]) -> list[str]:
    """A name for each setting, of the values in which the settings differ.

    Where more than MOST_NAMED keys differ, a setting is named by what it has in place of the values of `base`, the
    first setting of an experiment, whose run may not be finished yet. If `base` is {}, the first of `settings` is it.
    """
    implied = {STEPS}  # it follows from the micro-batch and the effective batch; without accumulation, these are equal
    if all(values.get(STEPS, 1) == 1 for values in settings):
        implied.add("data_config.batch_size")
    labels = []
    for values in settings:
        alike = [other for other in settings if other.keys() == values.keys()]  # encoders, or models that are none
        varying = [key for key in values if key not in implied and len({repr(other[key]) for other in alike}) > 1]
        if STEPS not in values or not varying:
            varying = list(dict.fromkeys([NAME, *varying]))
        if len(varying) > MOST_NAMED:
            first = alike[0] | {key: value for key, value in base.items() if value != AUTO}
            varying = [key for key in values if key not in implied and values[key] != first[key]]
        labels.append(_label(values, varying) or "base")
    if len(set(labels)) < len(labels):  # two paths end in the same name
        labels = [f"{label} ({number})" for number, label in enumerate(labels, start=1)]
    return labels


def _label(values: dict[str, Any], keys: list[str]) -> str:
    """The setting's name, such as `bert-base-uncased, batch 64`."""
    parts = []
    for key in keys:
        if key in (NAME, "data_config.dataset"):
            parts.append(short_name(values[key]))  # the rest of a path means nothing on another machine
        else:
            parts.append(f"{SHORT_NAMES.get(key, key.rpartition('.')[2])} {values[key]}")
    return ", ".join(parts)


def texts(results: Sequence[Result]) -> dict[int, str]:
    """{id: text} of every test review that at least one run gets wrong, read from the runs' misclassified.csv."""
    return {int(row["id"]): row["text"] for result in results if result.split == "test"
            for row in read_mistakes(result.folder)}
