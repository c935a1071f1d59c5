"""Opens the folder of a trained model, whatever kind it is: an encoder, a bag of words, or finished runs stacked.

A stack's folder holds its members' folders, `member-1/`, `member-2/`, ..., and in config.json the weights by which a
logistic regression combines them: of each member's log-odds against class 0, clipped as `log_odds` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.protocols import Devices
from suite.common.storage import MANIFEST, read_json, refuse_damage
from suite.encoders.bag_of_words import class_logits, load_bag_of_words
from suite.encoders.checkpoints import kind_of
from suite.encoders.loading import STACK
from suite.inference.classifier import Classifier, Labeller
from utils import BAG_OF_WORDS, Config, UserError, brief

LEAST = 1e-9  # a probability below it counts as this: the logarithm of 0 is no number, and no model is that certain


def open_classifier(folder: Path, config: Config, devices: Devices) -> Labeller:
    """Raises UserError if the folder holds no trained model whose files belong together."""
    kinds = {BAG_OF_WORDS: Words, STACK: Stack}
    return kinds.get(kind_of(folder), Classifier)(folder, config, devices)


class Words(Labeller):
    """A bag of words."""

    def __init__(self, folder: Path, config: Config, devices: Devices):
        self.folder, self.devices, self.words = folder, devices, load_bag_of_words(folder)
        self.label_names, self.data_fingerprint = self.words.label_names, self.words.data_fingerprint
        self.logits = self.words.logits


class Stack(Labeller):
    """Finished runs of one split, combined by a logistic regression on their log-odds."""

    def __init__(self, folder: Path, config: Config, devices: Devices):
        self.folder, self.devices = folder, devices
        if (folder / MANIFEST).exists():
            refuse_damage(folder)
        try:
            values = read_json(folder / "config.json")
            names = values["id2label"]
            self.label_names = [str(names[str(label)]) for label in range(len(names))]
            self.data_fingerprint = values["data_fingerprint"]
            self.weights, self.intercept = (np.array(values[key], np.float64) for key in ("weights", "intercept"))
            rows, columns = 1 if len(names) == 2 else len(names), len(values["members"]) * (len(names) - 1)
            if (self.weights.shape, self.intercept.shape) != ((rows, columns), (rows,)):
                raise ValueError(f"weights and intercept have the shapes {self.weights.shape}, {self.intercept.shape}")
            if not (np.isfinite(self.weights).all() and np.isfinite(self.intercept).all()):
                raise ValueError("a weight is no finite number")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / 'config.json'}: damaged, or of another version: no stack can be read from it "
                            f"({brief(error)}): make it again with ensemble.py") from error
        self.members = [open_classifier(folder / member_name(number), config, devices)
                        for number in range(len(values["members"]))]
        if other := next((member for member in self.members if member.label_names != self.label_names), None):
            raise UserError(f"{other.folder} has the classes {other.label_names}, its stack {self.label_names}: make "
                            "the stack again with ensemble.py")

    @property
    def settings(self) -> dict[str, Any]:
        return {"members": [member.settings for member in self.members]}

    def cast_weights(self) -> None:
        for member in self.members:
            member.cast_weights()

    def gives_tokens(self, text: str) -> bool:
        return all(member.gives_tokens(text) for member in self.members)

    def logits(self, texts: list[str]) -> np.ndarray:
        features = log_odds([member.probabilities(texts) for member in self.members])
        return class_logits(features @ self.weights.T + self.intercept)


def member_name(number: int) -> str:
    """The folder of a member, counted from 0, in the stack's folder."""
    return f"member-{number + 1}"


def log_odds(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """(n, members x (classes - 1)): the log-odds of classes 1, 2, ... against class 0, member by member.

    `probabilities`: (n, classes) of each member; one below LEAST counts as LEAST.
    """
    logs = [np.log(np.maximum(values, LEAST)) for values in probabilities]
    return np.hstack([values[:, 1:] - values[:, :1] for values in logs])
