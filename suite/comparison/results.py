"""Read finished runs from their folders, and group the runs that differ only in their seeds into settings."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.run_folder import (
    BAG_OF_WORDS_KEYS,
    SAME_TEST,
    how_to_write_again,
    is_encoder,
    read_history,
    read_metrics,
    read_mistakes,
    read_saved_config,
    shaping_values,
    without_seed,
)
from suite.common.storage import read_json
from suite.training.evaluation import SPLITS, TEST_PREDICTIONS, VALID_PREDICTIONS, Predictions
from utils import INPUTS, Config, UserError, short_name

NAME, STEPS = "model_config.model_name", "train_config.gradient_accumulation_steps"
EFFECTIVE = "train_config.effective_batch_size"
TEACHER_KEY = "train_config.teacher"
PREDICTIONS = {"valid": VALID_PREDICTIONS, "test": TEST_PREDICTIONS}
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
    data_fingerprint: str | None  # of all reviews and their split; None if the model has been removed
    split: str = "test"  # or "valid"
    members: Sequence[dict[str, Any]] = ()  # of a stack: the `values` of the runs in it

    @property
    def train_limit(self) -> int | None:
        return self.config.data_config.train_limit

    @property
    def seed(self) -> int:
        return self.config.train_config.seed

    @property
    def predicted(self) -> np.ndarray:
        """(reviews,) int64."""
        return self.predictions.predicted

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
        bag of words, those that mean something to it, and of a stack, those of its members. For `auto`, the device or
        precision that it was. A teacher is named without its seed."""
        values, measured = shaping_values(self.config), self.metrics.get("environment", {})
        if not is_encoder(self.config):
            own = {key: values[key] for key in values if key in BAG_OF_WORDS_KEYS}
            return own | _joined(self.members) | {NAME: values[NAME]}
        if values[TEACHER_KEY]:
            values[TEACHER_KEY] = without_seed(values[TEACHER_KEY])
        for key, name in (("train_config.device", "device"), ("train_config.mixed_precision", "precision")):
            if values[key] == "auto":
                values[key] = measured.get(name, "auto")
        return {key: value for key, value in values.items()
                if key != "train_config.seed" and not key.startswith("log_config.")}


def _joined(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a stack's members: for each key the value, or a list of those that they have."""
    joined: dict[str, list[Any]] = {}
    for settings in members:
        for key, value in settings.items():
            if value not in joined.setdefault(key, []):
                joined[key].append(value)
    return {key: found[0] if len(found) == 1 else found for key, found in joined.items()}


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


def read_results(folders: Sequence[Path], on_validation: bool = False) -> list[Result]:
    """The runs on the test split; on validation, if that is asked for or not all of them were tested. Raises UserError
    as `read_result`."""
    parts = [read_metrics(folder).keys() for folder in folders]
    untested = any("train" in found and "test" not in found for found in parts)
    return [read_result(folder, "valid" if untested or on_validation else "test") for folder in folders]


def read_result(folder: Path, split: str = "test") -> Result:
    """Raises UserError if the folder holds no finished run, or one that was not measured on this split."""
    metrics = read_metrics(folder)
    if "train" not in metrics:
        raise UserError(f"{folder} holds no finished run: name folders such as checkpoints/NAME, and give the command "
                        "of an interrupted run again to finish it")
    config = read_saved_config(folder / "config.yaml")
    if config.pretrains:
        raise UserError(f"{folder} holds a pretraining run, which has no classes: compare the runs that start from it")
    fix = TRAIN_AGAIN if split == "valid" else (
        f"test the run with python main.py --mode test output_dir={folder.parent} run_name={folder.name}")
    if split not in metrics:
        raise UserError(f"{folder} was not measured on its {SPLITS[split]} reviews: {fix}, or leave it out")
    path = folder / "best" / "config.json"
    model = read_json(path) if path.exists() else {}
    # of a stack that an earlier version has made, only the members' names are known
    members = [member["settings"] for member in model.get("members", ()) if "settings" in member]
    return Result(folder, config, metrics, *read_predictions(folder / PREDICTIONS[split], fix),
                  model.get("data_fingerprint"), split, members)


def read_predictions(path: Path, fix: str) -> tuple[list[str], Predictions]:
    """The classes, and the predictions that a run has saved for a split.

    Raises UserError if the file is missing; `fix`: how to write it.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {fix}") from None
    first = 3 + (header[3] == "group")  # column of the probabilities
    names = [column.removeprefix("probability_") for column in header[first:]]
    ids, labels = np.array([[int(row[0]), names.index(row[1])] for row in rows], np.int64).T
    groups = np.array([row[3] for row in rows], np.int64) if first == 4 else None
    with np.errstate(divide="ignore"):  # some probabilities were rounded to 0
        return names, Predictions(ids, labels, np.log(np.array([row[first:] for row in rows], np.float64)), groups)


def groups_of(results: Sequence[Result]) -> np.ndarray | None:
    """(reviews,) the groups of the reviews that all runs share, of the first run that knows them."""
    return next((run.predictions.groups for run in results if run.predictions.groups is not None), None)


def refuse_different_tests(results: Sequence[Result]) -> None:
    """Raises UserError unless all runs were tested on the same reviews, from the same split of the same data. Where
    data_config.train_limit differs, they were trained on different parts of it."""
    first, one_size = results[0], len({run.train_limit for run in results}) == 1
    fingerprints = [run.data_fingerprint if one_size else _held_out(run) for run in results]
    then = fingerprints[0]
    for other, now in zip(results[1:], fingerprints[1:], strict=True):
        reasons = [f"{key}: {first.values[key]} and {other.values[key]}" for key in SAME_TEST
                   if first.values[key] != other.values[key]]
        # Not by the dataset's name: the same data may lie in two places, and other data may have taken over a name.
        same = [then == now or None in (then, now), first.label_names == other.label_names,
                np.array_equal(first.predictions.ids, other.predictions.ids),
                np.array_equal(first.predictions.labels, other.predictions.labels)]
        if not reasons and not all(same):
            names = dict.fromkeys(run.config.data_config.dataset for run in (first, other))
            reasons = [f"data_config.dataset: {' and '.join(names)}, with different contents"]
        if reasons:
            raise UserError(f"{first.folder} and {other.folder} were not tested on the same reviews "
                            f"({'; '.join(reasons)}): name runs of one split")


def _held_out(run: Result) -> str:
    """The fingerprint of what validates and tests. Raises UserError if an earlier version has measured the run."""
    if "data" not in run.metrics:
        raise UserError(f"{run.folder / 'metrics.json'} does not say which texts were held out, which tells "
                        f"whether runs of another data_config.train_limit compare: {how_to_write_again(run.folder)}")
    return run.metrics["data"]["held_out"]


def group_by_setting(results: Sequence[Result]) -> list[Setting]:
    """The settings in the order of their first runs, each named by the values in which it differs from the others.

    Raises UserError if two runs have the same setting and the same seed.
    """
    grouped: dict[str, dict[int, Result]] = {}
    for result in results:
        twin = grouped.setdefault(repr(result.values), {}).setdefault(result.seed, result)
        if twin is not result:
            raise UserError(f"{twin.folder} and {result.folder} are the same setting with the same seed {result.seed}: "
                            "leave one out")
    runs_of = [[runs[seed] for seed in sorted(runs)] for runs in grouped.values()]
    labels = _labels([runs[0].values for runs in runs_of])
    return [Setting(label, runs) for label, runs in zip(labels, runs_of, strict=True)]


def group_by_kind(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """{name: the settings that differ in data_config.train_limit alone}, in the order of their first ones."""
    found: dict[str, list[Setting]] = {}
    values_of = []
    for setting in settings:
        values = {key: value for key, value in setting.runs[0].values.items() if key != "data_config.train_limit"}
        if (of_kind := found.setdefault(repr(values), [])) == []:
            values_of.append(values)
        of_kind.append(setting)
    return dict(zip(_labels(values_of), found.values(), strict=True))


def _labels(settings: list[dict[str, Any]]) -> list[str]:
    """A name for each setting, such as `bert-base-uncased, batch 64`: the values in which the settings differ.

    Where more than MOST_NAMED keys differ, a setting is named by what it has in place of the usual value, which most
    settings have.
    """
    # The steps follow from the micro-batch and the effective batch, which are equal without accumulation; the objective
    # follows from the teacher.
    implied = {STEPS, "train_config.objective"}
    if all(values.get(STEPS, 1) == 1 and values.get("data_config.batch_size") == values.get(EFFECTIVE)
           for values in settings):
        implied.add("data_config.batch_size")
    labels = []
    for values in settings:
        alike = [other for other in settings if other.keys() == values.keys()]  # encoders, or models that are none
        varying = [key for key in values if key not in implied and len({repr(other[key]) for other in alike}) > 1]
        if STEPS not in values or len(alike) < len(settings) or not varying:
            varying = list(dict.fromkeys([NAME, *varying]))
        if len(varying) > MOST_NAMED:
            usual = {key: Counter(repr(other[key]) for other in alike).most_common(1)[0][0] for key in varying}
            varying = [key for key in varying if repr(values[key]) != usual[key]]
        # The folders of a path mean nothing on another machine.
        said = {key: _without_folders(values[key]) if key in INPUTS else values[key] for key in varying}
        labels.append(", ".join(value if key in (NAME, "data_config.dataset") else
                                f"{'no ' * (value is None)}{SHORT_NAMES.get(key, key.rpartition('.')[2])}"
                                + f" {value}" * (value is not None)
                                for key, value in said.items()) or "base")
    if len(set(labels)) < len(labels):  # two paths end in the same name
        labels = [f"{label} ({number})" for number, label in enumerate(labels, start=1)]
    return labels


def _without_folders(path: str | list | None) -> str | list | None:
    """The path's last part; of a list, as the members of a stack may have, that of each."""
    return [*map(_without_folders, path)] if isinstance(path, list) else path and short_name(path)


def wrong_texts(results: Sequence[Result]) -> dict[int, str]:
    """{id: text} of every test review that at least one run gets wrong, read from the runs' misclassified.csv."""
    return {int(row["id"]): row["text"] for result in results if result.split == "test"
            for row in read_mistakes(result.folder)}
