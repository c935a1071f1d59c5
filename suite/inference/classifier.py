"""A trained model with its tokenizer, from texts to probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from data import Encode, IMDBDataset, eval_batch_size
from model import ClassifierConfig
from suite.common.checks import position_limit, too_long
from suite.common.protocols import Devices
from suite.encoders.loading import load_model, says_how_to_cut
from suite.encoders.placement import compute_logits, pass_tokens, place_model
from suite.encoders.refusals import refuse_foreign_tokens, refuse_unknown_words
from suite.encoders.tokenizers import COMPARED_TEXTS, compare_with_file, load_tokenizer
from suite.reviews.sampling import evaluation_batches
from utils import Config, UserError


class Labeller:
    """What labels texts, whatever kind of model it is."""

    folder: Path
    devices: Devices
    label_names: list[str]
    data_fingerprint: str | None  # of the reviews and the split that it was trained on; None if it does not say so
    logits: Callable[[list[str]], np.ndarray]  # (texts, classes) float64

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
        values = [self.label_names[probabilities.argmax()], *(float(f"{p:.9g}") for p in probabilities)]
        return dict(zip(self.added, values, strict=True))


class Classifier(Labeller):
    """A trained encoder. Raises UserError if the folder holds no trained classifier whose files belong together."""

    def __init__(self, folder: Path, config: Config, devices: Devices):
        self.folder, self.devices = folder, devices
        self.model, self.tokenizer = load_model(folder), load_tokenizer(str(folder), "--model")
        own = self.model.config
        encoder = own.encoder if isinstance(own, ClassifierConfig) else own
        cut_by = own if says_how_to_cut(own) else config.data_config  # a model of others does not say it
        max_len = cut_by.max_len or config.data_config.max_len
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
        return {**cut, "eval_batch_size": self.batch_size, "precision": self.devices.precision}

    def cast_weights(self) -> None:
        """Cast once what autocast would cast in each forward pass, with the same result to the last bit."""
        if (dtype := {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.devices.precision)) is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    def gives_tokens(self, text: str) -> bool:
        return bool(self.encode.prefix or self.encode.suffix or self.encode.windows([text])[0][0])

    def refuse_unknown_words(self, tokens: np.ndarray) -> None:
        """Raises UserError if these tokens, of several reviews, show that the tokenizer does not know their words."""
        refuse_unknown_words("--model", str(self.folder), self.tokenizer, tokens)
        self.knows_words = True

    def logits(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64. Reviews of similar lengths share a batch, so a batch depends on the texts alone."""
        of_texts = self.encode.windows(texts)
        windows = list(itertools.chain.from_iterable(of_texts))
        offsets, first_windows = (np.cumsum([0, *map(len, parts)]) for parts in (windows, of_texts))
        tokens = np.fromiter(itertools.chain.from_iterable(windows), np.int64, offsets[-1])
        if not self.knows_words:
            self.refuse_unknown_words(tokens)
            compare_with_file(self.tokenizer, str(self.folder), "--model", texts[:COMPARED_TEXTS])
        rows = np.arange(len(texts))
        reviews = IMDBDataset(tokens, offsets, rows, np.zeros_like(rows), rows, self.tokenizer.pad_token_id,
                              first_windows=first_windows)
        batches = evaluation_batches(reviews.lengths, self.batch_size, pass_tokens=self.pass_tokens,
                                     windows=reviews.windows)
        ids, _, logits = compute_logits(self.model, map(reviews.batch, batches), len(texts), self.devices)
        result = np.empty((len(texts), len(self.label_names)))
        result[ids] = logits
        return result
