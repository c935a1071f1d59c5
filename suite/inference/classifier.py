"""Opens a trained model, whatever kind it is, and takes texts to probabilities: an encoder with its tokenizer, a bag of
words, or finished runs stacked.

A stack's folder holds its members' folders, `member-1/`, `member-2/`, ..., and in config.json the weights by which a
logistic regression combines them: of each member's log-odds against class 0, clipped as `log_odds` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from data import Encode, IMDBDataset, eval_batch_size
from model import ClassifierConfig
from suite.common.checks import position_limit, too_long
from suite.common.cli import Command
from suite.common.devices import Devices
from suite.common.run_folder import best_folder
from suite.common.storage import MANIFEST, THRESHOLD, read_json, refuse_damage
from suite.encoders.bag_of_words import class_logits, load_bag_of_words
from suite.encoders.checkpoints import remark
from suite.encoders.evaluation_pass import arithmetic
from suite.encoders.loading import STACK, kind_of, load_model
from suite.encoders.placement import compute_logits, needs_fp32, pass_tokens, place_model
from suite.encoders.tokenizers import (
    COMPARED_TEXTS,
    compare_with_file,
    load_tokenizer,
    refuse_foreign_tokens,
    refuse_unknown_words,
)
from suite.reviews.sampling import evaluation_batches
from utils import BAG_OF_WORDS, Config, UserError

LEAST = 1e-9  # a probability below it counts as this: the logarithm of 0 is no number, and no model is that certain


def chosen_model(command: Command) -> Path:
    """The folder of the model that a command names, itself or by its run, or of the best one of the configured run."""
    folder = Path(command.model or command.config.run_folder)
    return folder if command.model and not (folder / "config.yaml").is_file() else best_folder(folder)


def open_classifier(folder: Path, config: Config, devices: Devices) -> Labeller:
    """Raises UserError if the folder holds no trained model whose files belong together."""
    kinds = {BAG_OF_WORDS: BagOfWordsLabeller, STACK: Stack}
    classifier = kinds.get(kind_of(folder), Classifier)(folder, config, devices)
    if (folder / THRESHOLD).exists():
        classifier.threshold = read_json(folder / THRESHOLD)["threshold"]
    return classifier


class Labeller:
    """What labels texts, whatever kind of model it is."""

    folder: Path
    devices: Devices
    label_names: list[str]
    data_fingerprint: str | None  # of the reviews and the split that it was trained on; None if it does not say so
    logits: Callable[[list[str]], np.ndarray]  # (texts, classes) float64
    threshold: float | None = None  # of two classes: from this probability of class 1 on, a text gets it
    min_confidence: float | None = None  # a text gets no class whose probability is below it

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which its probabilities depend, besides the files in its folder."""
        return {}

    def cast_weights(self) -> None:
        """Make the model ready for many texts."""

    def gives_tokens(self, text: str) -> bool:
        """Whether the model can read anything of a text."""
        return True

    def probabilities(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64."""
        return softmax(self.logits(texts), axis=1)

    @property
    def added(self) -> list[str]:
        """The names of the columns that are added to a row."""
        return ["predicted", *(f"probability_{name}" for name in self.label_names)]

    def columns(self, probabilities: np.ndarray) -> dict[str, Any]:
        """What is added to a row whose probabilities (classes,) these are."""
        label = probabilities.argmax() if self.threshold is None else int(probabilities[1] >= self.threshold)
        predicted = self.label_names[label] if probabilities[label] >= (self.min_confidence or 0) else None
        return dict(zip(self.added, [predicted, *(float(f"{p:.9g}") for p in probabilities)], strict=True))


class Classifier(Labeller):
    """A trained encoder. Raises UserError if the folder holds no trained classifier whose files belong together."""

    def __init__(self, folder: Path, config: Config, devices: Devices):
        self.folder, self.devices = folder, devices
        self.model, self.tokenizer = load_model(folder), load_tokenizer(str(folder), "--model")
        own = self.model.config
        encoder = own.encoder if isinstance(own, ClassifierConfig) else own
        says_how_to_cut = {"max_len", "truncation", "max_windows"} <= vars(own).keys()  # a model of others does not
        cut_by = own if says_how_to_cut else config.data_config
        max_len = cut_by.max_len or config.data_config.max_len
        if not says_how_to_cut:
            remark("--model", f"{folder} does not say how a long review is cut: data_config.max_len={max_len} and "
                              f"data_config.truncation={cut_by.truncation} are used")
        if problem := too_long(max_len, str(folder), position_limit(encoder.to_dict())):
            raise UserError(problem)
        self.encode = Encode(self.tokenizer, max_len, cut_by.truncation, cut_by.max_windows)
        refuse_foreign_tokens("--model", str(folder), self.tokenizer, encoder.vocab_size)
        self.knows_words = False  # until the first reviews have shown it
        self.label_names = [str(own.id2label[label]) for label in range(len(own.id2label))]
        self.data_fingerprint = getattr(own, "data_fingerprint", None)
        self.batch_size = eval_batch_size(config.data_config, devices.device, max_len)
        self.pass_tokens = pass_tokens(self.model, devices.device)
        place_model(self.model, devices.device, compiled=config.train_config.compile)
        self.model.eval()

    @property
    def settings(self) -> dict[str, Any]:
        cut = {"max_len": self.encode.max_len, "truncation": self.encode.truncation}
        if self.encode.truncation == "windows":
            cut["max_windows"] = self.encode.max_windows
        return {**cut, "eval_batch_size": self.batch_size, "precision": self.devices.precision,
                **arithmetic(self.devices)}

    def cast_weights(self) -> None:
        """Cast once what autocast would cast in each forward pass, with the same result to the last bit."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.devices.precision)
        if dtype is not None and not needs_fp32(self.model):
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    def gives_tokens(self, text: str) -> bool:
        return bool(self.encode.prefix or self.encode.suffix or self.encode.windows([text])[0][0])

    def logits(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64. Reviews of similar lengths share a batch, so a batch depends on the texts alone."""
        of_texts = self.encode.windows(texts)
        windows = list(itertools.chain.from_iterable(of_texts))
        offsets, window_bounds = (np.cumsum([0, *map(len, parts)]) for parts in (windows, of_texts))
        tokens = np.fromiter(itertools.chain.from_iterable(windows), np.int64, offsets[-1])
        if not self.knows_words:
            refuse_unknown_words("--model", str(self.folder), self.tokenizer, tokens)
            compare_with_file(self.tokenizer, str(self.folder), "--model", texts[:COMPARED_TEXTS])
            self.knows_words = True
        rows = np.arange(len(texts))
        reviews = IMDBDataset(tokens, offsets, rows, np.zeros_like(rows), rows, self.tokenizer.pad_token_id,
                              window_bounds=window_bounds)
        batches = evaluation_batches(reviews.lengths, self.batch_size, pass_tokens=self.pass_tokens,
                                     windows=reviews.windows)
        ids, _, logits = compute_logits(self.model, map(reviews.batch, batches), len(texts), self.devices)
        result = np.empty((len(texts), len(self.label_names)))
        result[ids] = logits
        return result


class BagOfWordsLabeller(Labeller):
    """A bag of words."""

    def __init__(self, folder: Path, config: Config, devices: Devices):
        self.folder, self.devices, words = folder, devices, load_bag_of_words(folder)
        self.label_names, self.data_fingerprint = words.label_names, words.data_fingerprint
        self.logits = words.logits


class Stack(Labeller):
    """Finished runs of one split, combined by a logistic regression on their log-odds."""

    def __init__(self, folder: Path, config: Config, devices: Devices):
        self.folder, self.devices = folder, devices
        if (folder / MANIFEST).exists():
            refuse_damage(folder)
        values = read_json(folder / "config.json")
        self.label_names = [values["id2label"][str(label)] for label in range(len(values["id2label"]))]
        self.data_fingerprint = values["data_fingerprint"]
        self.weights, self.intercept = (np.array(values[key], np.float64) for key in ("weights", "intercept"))
        self.members = [open_classifier(folder / member_name(number), config, devices)
                        for number in range(len(values["members"]))]

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
