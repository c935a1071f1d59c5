"""A run's folder: who may write there, whether the run in it is new, finished or to go on, and what it has saved.

    config.yaml            the settings of the run
    best/                  the best model, replaced whole, with its list of sums
    last/0003-step-00000120/    a saved state, from which the run continues as if it had never stopped
    last/0002-step-00000100/    the state before it, which is removed only when a third one is safe
    teacher/               of a distillation: the teacher's labels, see suite/training/distillation.py
    history.jsonl          one record a line
    metrics.json           written last: it says that the run is finished
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.common.run_folder import (
    REPLACED,
    TEACHER,
    changed_input,
    contents_of,
    differences,
    inputs_of,
    read_metrics,
    save_config,
)
from suite.common.storage import (
    PARTIAL,
    atomic_write,
    damage,
    lock,
    read_json,
    remove,
    replace_folder,
    restore,
    seal,
    sync_folder,
    write_json,
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
    contents: dict = field(default_factory=dict)  # of its inputs when it began, see `contents_of`
    wandb_id: str | None = None  # of the run in the tracker, whichever it is
    version: int = 6  # raised when a state's values mean something else, or the same seed draws other numbers


class RunFolder:
    """The folder of the run that `config` describes. One process at a time owns it, from `lock` on."""

    def __init__(self, config: Config):
        self.config, self.path = config, config.run_folder
        self.best, self.last = self.path / "best", self.path / "last"
        self.history_lines = 0

    def lock(self) -> None:
        """Keep other processes out, and put the best model back if a kill stopped its replacement.

        Raises UserError if another process uses the folder.
        """
        lock(self.path)
        if process_rank() == 0:
            restore(self.best)

    # -----------------------------------------------------------------------------------------------------------------
    # New, finished, or to go on

    def finished_metrics(self) -> dict[str, Any] | None:
        """The metrics of a finished run; None if the run is not finished, is to be replaced, or lacks its test.

        Raises UserError if the user has not asked plainly to replace it, or if the run has another configuration.
        """
        metrics, train_config = read_metrics(self.path), self.config.train_config
        if "train" not in metrics:
            return None
        lacks_its_test = train_config.test and "test" not in metrics
        if train_config.resume == "never":
            if train_config.overwrite or lacks_its_test:
                return None
            raise UserError(f"{self.path} holds a finished run: choose another run_name, or replace it with "
                            "train_config.overwrite=true")
        self.refuse_differences()
        self.refuse_changed_inputs(metrics.get("data", {}))
        return None if lacks_its_test else metrics

    def refuse_changed_inputs(self, data: dict[str, Any]) -> None:
        """Raises UserError if the dataset, the encoder or the teacher is not that with which the run began."""
        if key := changed_input(data, contents_of(self.config)):
            other = "other reviews" if key == "data_config.dataset" else "another model"
            raise UserError(f"{inputs_of(self.config)[key]} holds {other} than when the run in {self.path} began "
                            f"({key}): choose another run_name, or replace the run with "
                            "train_config.resume=never train_config.overwrite=true")

    def state_to_continue(self) -> Path | None:
        """The saved state to continue from, as train_config.resume says; None to start from the beginning.

        Raises UserError if the folder holds a run with another configuration, or no state although resume=must.
        """
        if self.config.train_config.resume == "never":
            return None
        self.refuse_differences()
        state = newest_good_state(self.last)
        if state is None and self.config.train_config.resume == "must":
            raise UserError(f"{self.path}: no saved state to continue from; train_config.resume=auto starts the run")
        return state

    def refuse_differences(self, ignored: tuple[str, ...] = ()) -> None:
        """Raises UserError if the run in the folder differs from the configuration in other keys than `ignored`."""
        saved = self.path / "config.yaml"
        if not saved.exists():
            if any((self.path / name).exists() for name in (*REPLACED, "last", "metrics.json")):
                raise UserError(f"{saved} is missing, and with it the settings of this run: choose another run_name, "
                                "or start it afresh with train_config.resume=never")
        elif found := differences(saved, self.config, ignored):
            fix = ("leave these settings out, or choose another run_name" if ignored else "choose another run_name, "
                   "give the settings of that run, or start afresh in its place with train_config.resume=never "
                   "train_config.overwrite=true")
            raise UserError(f"{self.path} holds a run with other settings ({'; '.join(found)}): {fix}")

    def refuse_other_data(self, then: str, now: str) -> None:
        """Raises UserError if the reviews or their split have changed: the test could hold what was trained on."""
        if then != now:
            raise UserError(f"{self.config.data_config.dataset} has changed since the run in {self.path} began, and so "
                            "has its split: choose another run_name, or remove that folder")

    def begin(self) -> None:
        """Remove what an earlier run has left, and write the configuration of this one.

        metrics.json goes first, because it says that the run is finished.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.json", "valid_predictions.csv", "test_predictions.csv", "misclassified.csv",
                         "misclassified.html", "last", *REPLACED):
                remove(self.path / name)
            if self.config.train_config.resume == "never":  # else this very run was killed before its first state
                remove(self.path / TEACHER)
            save_config(self.config, self.path / "config.yaml")
            self.last.mkdir()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): set output_dir") from None

    # -----------------------------------------------------------------------------------------------------------------
    # What the run saves

    def save_state(self, progress: Progress, write: Callable[[Path], None], barrier: Callable[[], None]) -> None:
        """Save one more state; the oldest goes once this one is safe.

        `write` puts this process's files into the folder that it is given; `barrier` waits for the other processes.
        """
        states = saved_states(self.last)
        number = _number(states[0]) + 1 if states else 1
        target = self.last / f"{number:04d}-step-{progress.step:08d}"
        partial = target.with_name(target.name + PARTIAL)
        barrier()  # every process has counted the states
        if process_rank() == 0:
            for leftover in self.last.glob("*" + PARTIAL):
                remove(leftover)
            partial.mkdir()
        barrier()
        try:
            write(partial)
            barrier()
            if process_rank() == 0:
                write_json(partial / "progress.json", asdict(progress))
                seal(partial)
        except BaseException:
            remove(partial)  # on a full disk, it would only fill it
            raise
        if process_rank() == 0:
            os.replace(partial, target)
            sync_folder(self.last)
            for old in saved_states(self.last)[KEPT_STATES:]:
                remove(old)
        barrier()

    def save_best(self, write: Callable[[Path], None]) -> None:
        """Replace the best model by what `write(path)` writes, completely or not at all."""
        replace_folder(self.best, write)

    def open_history(self, lines: int = 0) -> None:
        """Keep the first `lines` lines of history.jsonl. What an interrupted run wrote after its last saved state is
        removed: the run writes it again, and a kill may have cut it."""
        path = self.path / "history.jsonl"
        kept = path.read_bytes().splitlines(keepends=True)[:lines] if lines else []
        with atomic_write(path, "wb") as file:
            file.writelines(kept)
        self.history_lines, self._history = lines, path.open("a", encoding="utf-8")

    def record(self, values: dict[str, Any]) -> None:
        """Add a line to history.jsonl."""
        self._history.write(json.dumps(values) + "\n")
        self._history.flush()
        self.history_lines += 1

    def sync_history(self) -> None:
        os.fsync(self._history.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Saved states


def saved_states(folder: Path) -> list[Path]:
    """The states in `last/`, newest first; complete by their names, not yet verified."""
    states = [path for path in folder.glob("*-step-*") if re.fullmatch(r"\d{4,}-step-\d+", path.name)]
    return sorted(states, key=_number, reverse=True)


def _number(state: Path) -> int:
    return int(state.name.partition("-")[0])


def newest_good_state(folder: Path) -> Path | None:
    """The newest state in `last/` whose files are what was written; None if there never was one.

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


def load_progress(state: Path, device: str) -> Progress:
    """Raises UserError if the run was on another device or precision than `device`, which would make a mixture of the
    two, or if another version of this project has saved the state."""
    values = read_json(state / "progress.json")
    if values.get("version") != Progress.version:
        raise UserError(f"{state} was saved by another version of this project: finish the run with that version, or "
                        "start it afresh with train_config.resume=never")
    if values["device"] != device:
        raise UserError(f"{state} was trained on {values['device']}, and would go on with {device} here: finish the "
                        "run where and as it began, or start it afresh with train_config.resume=never")
    return Progress(**values)
