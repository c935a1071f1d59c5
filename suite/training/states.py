"""Saved states, from which an interrupted run continues as if it had never stopped.

    last/0003-step-00000120/    files of the state, and manifest.json with their sizes and SHA-256 sums, written last
    last/0002-step-00000100/    the state before it, which is removed only when a third one is safe
    best/                       the best model, sealed by such a manifest as well
    best.sha256                 the sum of that manifest, so that the run knows its own best model

A folder is a state if its manifest is there and true. Anything else in `last/` was left by a killed process.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from suite.common.locks import confirm, lock
from suite.common.run_folder import REPLACED, differences, read_metrics, save_config
from suite.common.storage import (
    MANIFEST,
    PARTIAL,
    RECORD,
    damage,
    read_json,
    refuse_foreign,
    remove,
    restore,
    seal,
    sync_folder,
    write_json,
    write_text,
)
from utils import Config, UserError, process_rank, say

KEPT_STATES = 2


@dataclass
class Progress:
    """Where a run is, apart from weights, optimizer, random generators and the meter."""

    data_fingerprint: str  # of the reviews and their split
    device: str  # and precision that the run trains in: cpu (bf16)
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    steps_in_epoch: int = 0  # optimizer steps done in the current epoch
    best_epoch: int | None = None
    best_metrics: dict = field(default_factory=dict)  # its validation metrics
    epochs_without_improvement: int = 0
    micro_batch: int | None = None  # None: data_config.batch_size; smaller after an out-of-memory error
    history_lines: int = 0
    wandb_id: str | None = None
    version: int = 3  # raised when a state's values mean something else, or the same seed draws other numbers


def claim_run_folder(folder: Path) -> None:
    """Lock the run folder for this process, and mend what a kill may have left of replacing the best model.

    Raises UserError if another process uses it, if it cannot be written, or if it lies in a saved model.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written: give yourself the right to, or copy it and set output_dir")
    for parent in folder.absolute().parents:
        if (parent / MANIFEST).exists() and damage(parent) is None:  # one file more, and it would count as damaged
            raise UserError(f"{folder} lies in {parent}, a model or a state that a run has saved: set output_dir to "
                            "a folder outside")
    lock(folder)
    if process_rank() == 0:
        restore(folder / "best")


def lock_within(folder: Path) -> None:
    """A second lock, in the folder: through a bind mount, such as a container's, the one beside it is not visible."""
    lock(folder, inside=".lock")


def finished_metrics(config: Config) -> dict[str, Any] | None:
    """The metrics of the finished run in the run folder; None if there is none, if it is to be replaced, or if it lacks
    the test that this run ends with.

    Raises UserError if the user has not asked plainly to replace it, or if the run has another configuration.
    """
    metrics = read_metrics(config.run_folder)
    if "train" not in metrics or config.train_config.test and "test" not in metrics:
        return None
    if config.train_config.resume == "never":
        if config.train_config.overwrite:
            return None
        raise UserError(f"{config.run_folder} holds a finished run: choose another run_name, or replace it with "
                        "train_config.overwrite=true")
    refuse_differences(config)
    return metrics


def find_state(config: Config) -> Path | None:
    """The saved state to continue from, as train_config.resume says; None to start from the beginning.

    Raises UserError if the folder holds a run with another configuration, no state although resume=must, or a run whose
    states have been removed.
    """
    folder = config.run_folder
    if config.train_config.resume == "never":
        return None
    refuse_differences(config)
    best, last = folder / "best", folder / "last"
    if not last.exists() and (best.exists() or (folder / ("best" + RECORD)).exists()):  # a run begins with an empty one
        raise UserError(f"{last} is missing, and this run is not finished: put it back, or start the run again from "
                        "the beginning with train_config.resume=never")
    state = newest_good_state(last)
    if state is None and config.train_config.resume == "must":
        raise UserError(f"{folder}: no saved state to go on from; train_config.resume=auto starts one")
    if state is None and best.exists():
        refuse_foreign(best)
        say(f"{last} holds no saved state: the run starts again from the beginning")
    return state


def refuse_differences(config: Config, ignored: tuple[str, ...] = ()) -> None:
    """Raises UserError if the run in the run folder differs from `config` in other keys than the `ignored` ones."""
    path = config.run_folder / "config.yaml"
    if not path.exists():
        if any((path.parent / name).exists() for name in ("last", "best", "metrics.json")):
            raise UserError(f"{path} is missing, and with it the settings of this run: choose another run_name, or "
                            "start it afresh with train_config.resume=never")
    elif found := differences(path, config, ignored):
        fix = ("leave these settings out, or choose another run_name" if ignored else "choose another run_name, give "
               "the settings of that run, or start afresh in its place with train_config.resume=never")
        raise UserError(f"{config.run_folder} holds a run with other settings ({'; '.join(found)}): {fix}")


def refuse_other_data(config: Config, then: str, now: str) -> None:
    """Raises UserError if the reviews or their split have changed: the test split could hold what was trained on."""
    if then != now:
        raise UserError(f"{config.data_config.dataset} has changed since the run in {config.run_folder} began, and so "
                        "has its split: choose another run_name")


def refuse_other_device(state: Path, then: str, now: str) -> None:
    """Raises UserError if `auto` means another device or precision here: the run would be neither of the two."""
    if then != now:
        raise UserError(f"{state} was trained on {then}, and would go on with {now} here: finish the run where and as "
                        "it began, or start it afresh with train_config.resume=never")


def begin_run(config: Config) -> None:
    """Remove what an earlier run has written into the run folder, and write what a run begins with.

    metrics.json goes first, because it says that the run is finished. config.yaml comes before `last/` and the record
    of the best model, because a folder with these and without it is refused: nobody would know what run it holds.
    """
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    lock_within(folder)
    confirm(folder)
    for name in ("metrics.json", "valid_predictions.csv", "test_predictions.csv", "misclassified.csv",
                 "misclassified.html"):
        (folder / name).unlink(missing_ok=True)
    last, record = folder / "last", folder / ("best" + RECORD)
    replaced = [folder / name for name in REPLACED]
    for path in (*saved_states(last), *last.glob("*" + PARTIAL), *replaced):  # what else is in `last/` is not a run's
        remove(path)
    record.unlink(missing_ok=True)
    save_config(config, folder / "config.yaml")
    last.mkdir(exist_ok=True)
    write_text(record, "")


def save_state(folder: Path, progress: Progress, write: Callable[[Path], None], barrier: Callable[[], None]) -> None:
    """Save one more state; the oldest goes once this one is safe.

    `write` puts this process's files into the folder that it is given; `barrier` waits for the other processes.
    """
    states = saved_states(folder)
    number = _number(states[0]) + 1 if states else 1
    target = folder / f"{number:04d}-step-{progress.step:08d}"
    partial = target.with_name(target.name + PARTIAL)
    barrier()  # every process has counted the states
    if process_rank() == 0:
        confirm(folder)
        for leftover in folder.glob("*" + PARTIAL):
            remove(leftover)
        partial.mkdir()  # if somebody has moved or removed the run folder, the run must not go on in a new one
    barrier()
    try:
        write(partial)
        barrier()
        if process_rank() == 0:
            write_json(partial / "progress.json", asdict(progress))
            seal(partial)
            confirm(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk, it would only fill it
        raise
    if process_rank() == 0:
        os.replace(partial, target)
        sync_folder(folder)
        for old in saved_states(folder)[KEPT_STATES:]:
            remove(old)
    barrier()


def saved_states(folder: Path) -> list[Path]:
    """The states in `last/`, newest first; complete by their names, not yet verified."""
    states = [path for path in folder.glob("*-step-*") if re.fullmatch(r"\d{4,}-step-\d+", path.name) and path.is_dir()]
    return sorted(states, key=_number, reverse=True)


def _number(state: Path) -> int:
    return int(state.name.partition("-")[0])


def newest_good_state(folder: Path) -> Path | None:
    """The newest state whose files are what was written; None if there never was one.

    Raises UserError if there are states and all are damaged.
    """
    states = saved_states(folder)
    for state in states:
        problem = damage(state)
        if problem is None:
            return state
        say(f"{problem}: going back to the state before it")
    if states:
        raise UserError(f"{folder}: every saved state is damaged ({problem}): put back what was saved, or start afresh "
                        "with train_config.resume=never")
    return None


def load_progress(state: Path) -> Progress:
    """Raises UserError if another version of this project has saved the state."""
    values = read_json(state / "progress.json")
    if values.get("version") != Progress.version:
        raise UserError(f"{state} was saved by another version of this project: finish the run with that version, or "
                        "start it afresh with train_config.resume=never")
    return Progress(**values)


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy and torch, as tensors and plain values that `weights_only` loading takes."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
