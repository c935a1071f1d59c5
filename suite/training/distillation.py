"""Distillation: the run of main.py's loop with what a teacher says about the unlabelled reviews for labels, too.

A review's target is a probability for each class: the teacher's, at temperature 1, or 1 for its label if it has one.
The loss is the cross-entropy with the targets (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). The
teacher labels the reviews once, before the first step, and CHUNK_ROWS at a time, so a killed run goes on labelling:

    teacher/labels.json     what the labels depend on
    teacher/00000003.npy    (rows, classes) float32: the probabilities for the reviews of chunk 3
    teacher/manifest.json   the sums of these files, written last: from here on, the teacher is not needed
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import PreparedData, prepare_data
from suite.common.devices import random_state, set_random_state
from suite.common.run_folder import TEACHER
from suite.common.stopping import SIGNALS, StopRequested, stop_if_asked
from suite.common.storage import MANIFEST, atomic_write, read_json, refuse_damage, remove, seal, sha256_of, write_json
from suite.encoders.evaluation_pass import arithmetic
from suite.inference.classifier import open_classifier
from suite.reviews.sampling import CHUNK_ROWS
from suite.reviews.splitting import Split, fingerprint, load_split, text_digests
from suite.reviews.unlabelled import each_text_once, with_unlabelled
from suite.training.run import Run
from suite.training.tracking import ProgressBar
from utils import Config, UserError, process_rank, say

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = "labels.json"


# ---------------------------------------------------------------------------------------------------------------------
# The reviews and their targets


def prepare_student_data(config: Config) -> PreparedData:
    """What `prepare_data` gives, with the unlabelled reviews behind the training ones, and their targets.

    No text, and no group, that validates or tests is among them. The targets of unlabelled reviews are NaN until the
    teacher has labelled these. Raises UserError if there are none, or if the teacher was not trained on this split.
    """
    is_labelled = (config.run_folder / TEACHER / MANIFEST).exists() and config.train_config.resume != "never"
    teacher = None if is_labelled else teacher_model(config)
    split = load_split(config)
    if teacher is not None:
        refuse_other_split(teacher, split)
    train, first, data_config = split.ids_of["train"], len(split.digests), config.data_config
    split = with_unlabelled(split)
    rows, _ = each_text_once(train, np.arange(first, len(split.digests)), split.digests, split.held_out, data_config,
                             split.groups)
    unlabelled = np.sort(rows[rows >= first])
    if not len(unlabelled):
        raise UserError(f"{data_config.dataset}: it has no unlabelled review, besides copies of others, that a teacher "
                        "could label: add them as docs/distillation.md says, or train with --mode train")
    say(f"{data_config.dataset}: {len(train):,} training reviews and {len(unlabelled):,} unlabelled ones to learn from"
        + (f", whose labels are in {config.run_folder / TEACHER}" if is_labelled else ""))
    split.ids_of = split.ids_of | {"train": np.concatenate([train, unlabelled])}
    data = prepare_data(config, split=split)
    labels = data.splits["train"].labels[:, None]
    data.splits["train"].targets = np.where(
        labels < 0, np.float32(np.nan), (labels == np.arange(len(data.label_names))).astype(np.float32))
    return data


def teacher_folder(config: Config) -> Path:
    """Where the teacher's model is, if it is there."""
    given = Path(config.train_config.teacher)
    return given if (given / MANIFEST).is_file() else given / "best"


def teacher_model(config: Config) -> Path:
    """The folder of the teacher's model. Raises UserError if there is none, or it is damaged."""
    given, folder = config.train_config.teacher, teacher_folder(config)
    if not folder.is_dir():
        raise UserError(f"--teacher: there is no trained model in {given}: name the folder of a run, such as "
                        "checkpoints/stack")
    if folder.resolve() == config.run_folder.resolve() / "best":
        raise UserError(f"--teacher: {given} is the folder that the new run would write: choose another run_name")
    refuse_damage(folder)
    return folder


def refuse_other_split(teacher: Path, split: Split) -> None:
    """Raises UserError if the model may have been trained on what is validated or tested on, or has other classes."""
    values = read_json(teacher / "config.json")
    if values.get("data_fingerprint") != split.fingerprint:
        raise UserError(f"--teacher: {teacher} was trained on other reviews or another split than data_config "
                        "describes, perhaps on what is tested on here: give data_config the values of its training")
    names = [values["id2label"][str(label)] for label in range(len(values["id2label"]))]
    if names != split.label_names:
        raise UserError(f"--teacher: {teacher} has the classes {', '.join(names)}, and the reviews have "
                        f"{', '.join(split.label_names)}: train it on these reviews")


# ---------------------------------------------------------------------------------------------------------------------
# The run


class DistillationRun(Run):
    prepare_data = staticmethod(prepare_student_data)

    def complete_data(self) -> None:
        train, state = self.data.splits["train"], random_state()
        rows = np.flatnonzero(np.isnan(train.targets[:, 0]))
        train.targets[rows] = self.teacher_labels(train.texts.select(train.ids[rows]))
        set_random_state(state)  # the run goes on in the same way, whether it had to open the teacher or not

    def teacher_labels(self, texts: Dataset) -> np.ndarray:
        """(texts, classes) float32: the teacher's probabilities, from the run folder. They are written there first, as
        far as they are missing.

        Raises UserError if they are damaged, or of other reviews, another split or another teacher.
        """
        folder, devices = self.folder.path / TEACHER, self.devices
        conditions = {"texts": fingerprint(text_digests(texts)), "split": self.data.fingerprint,
                      "classes": self.data.label_names}
        if devices.is_main and not (folder / MANIFEST).exists():
            self.take_folder(folder, conditions)
        devices.barrier()
        is_done = (folder / MANIFEST).exists()
        chunks = [folder / f"{number:08}.npy" for number in range(1, -(-len(texts) // CHUNK_ROWS) + 1)]
        missing = [number for number, chunk in enumerate(chunks, start=1) if not chunk.exists()]
        devices.barrier()  # every process has to see what was done before any of them does more
        if not is_done:
            self.label(texts, chunks, missing)
            devices.barrier()
            if devices.is_main:
                seal(folder)
            devices.barrier()
        refuse_damage(folder)
        described, teacher = read_json(folder / LABELS), teacher_folder(self.config) / MANIFEST
        if teacher.is_file():
            conditions["teacher"] = sha256_of(teacher)
        if any(described.get(name) != value for name, value in conditions.items()):  # they may have been copied
            raise UserError(f"{folder} holds labels of another teacher, for other reviews or for another split than "
                            "data_config describes: remove this folder, and the teacher labels again")
        return np.concatenate([np.load(chunk) for chunk in chunks])

    def take_folder(self, folder: Path, conditions: dict[str, Any]) -> None:
        """Write down what the labels depend on; what was labelled under other conditions is removed."""
        described = {"teacher": sha256_of(teacher_model(self.config) / MANIFEST), **conditions,
                     "device": self.devices.kind, "chunk_rows": CHUNK_ROWS, **arithmetic(self.devices)}
        if folder.exists() and not ((folder / LABELS).exists() and read_json(folder / LABELS) == described):
            say(f"{folder}: the teacher, the reviews, their split or the device are others than those of the labels "
                "that are there: labelling begins again")
            remove(folder)
        folder.mkdir(exist_ok=True)
        write_json(folder / LABELS, described)

    def label(self, texts: Dataset, chunks: list[Path], missing: list[int]) -> None:
        """Write the labels of the `missing` chunks, numbers from 1, in which the processes take turns. A signal lets
        them end their chunks. `chunks`: the files of all."""
        devices, count = self.devices, len(chunks)
        teacher = open_classifier(teacher_model(self.config), self.config, devices)
        teacher.cast_weights()
        say(f"{teacher.folder} labels {len(texts):,} reviews"
            + (f"; going on after {count - len(missing)} of {count} chunks" if len(missing) < count else ""))
        bar = ProgressBar("teacher", count, count - len(missing), unit="chunk")
        with SIGNALS.deferred():
            try:
                for start in range(0, len(missing), devices.num_processes):
                    turn = missing[start:start + devices.num_processes]
                    for number in turn[process_rank():process_rank() + 1]:
                        rows = texts[(number - 1) * CHUNK_ROWS:number * CHUNK_ROWS]
                        labels = teacher.probabilities(list(rows["text"])).astype(np.float32)
                        with atomic_write(chunks[number - 1], "wb") as file:
                            np.save(file, labels)
                    for _ in turn:
                        bar.update()
                    stop_if_asked(devices)
            except StopRequested:
                say(f"{SIGNALS.name}: the same command goes on labelling from {chunks[0].parent}")
                raise SystemExit(SIGNALS.exit_code) from None
        bar.close()
