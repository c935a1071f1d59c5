"""A trained model with its tokenizer, from texts to probabilities."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from data import Encode, IMDBDataset, eval_batch_size
from suite.common.checks import position_limit, too_long
from suite.encoders.cpu_kernels import place_model
from suite.encoders.loading import load_model, load_tokenizer
from suite.reviews.sampling import PASS_FLOPS, cut_window
from utils import Config, UserError


class Classifier:
    """Raises UserError if the folder holds no trained classifier whose files belong together."""

    def __init__(self, folder: Path, config: Config, devices: Any):
        self.folder = folder
        self.model, self.tokenizer = load_model(folder), load_tokenizer(str(folder), "--model")
        self.devices, self.batch_size = devices, eval_batch_size(config)
        own = self.model.config  # a model of this suite says how its reviews were cut, others follow the settings
        max_len = getattr(own, "max_len", None) or config.data_config.max_len
        encoder = getattr(own, "encoder", own)
        if problem := too_long(max_len, str(folder), position_limit(encoder.to_dict())):
            raise UserError(problem)
        if len(self.tokenizer) > encoder.vocab_size:
            raise UserError(f"{folder}: its tokenizer has {len(self.tokenizer)} tokens, its encoder knows only "
                            f"{encoder.vocab_size}: they do not belong together")
        self.encode = Encode(self.tokenizer, max_len, getattr(own, "truncation", config.data_config.truncation))
        self.label_names = [str(own.id2label[label]) for label in range(len(own.id2label))]
        weights = sum(p.numel() for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name)
        self.pass_tokens = PASS_FLOPS[devices.device.type] / (6 * weights)
        place_model(self.model, config, devices)
        self.model.eval()

    def cast_weights(self) -> None:
        """Cast once what autocast would cast in each forward pass: the same bits."""
        if (dtype := {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.devices.precision)) is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    @property
    def added(self) -> list[str]:
        """The names of the columns that are added to a row."""
        return ["predicted", *(f"probability_{name}" for name in self.label_names)]

    @torch.inference_mode()
    def probabilities(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64. Reviews of similar lengths share a batch; which ones depends on the texts alone."""
        encoded = self.encode({"text": texts})["input_ids"]
        offsets = np.cumsum([0, *map(len, encoded)])
        rows = np.arange(len(texts))
        reviews = IMDBDataset(np.fromiter(itertools.chain.from_iterable(encoded), np.int64, offsets[-1]), offsets, rows,
                              np.zeros_like(rows), rows, texts=None, tokenizer=self.tokenizer)
        pieces = [piece for piece, in cut_window(rows, reviews.lengths, self.batch_size, 1, self.pass_tokens)]
        logits = []
        for piece in pieces:
            batch = reviews.__getitems__(piece)
            inputs = {name: batch[name].to(self.devices.device) for name in ("input_ids", "attention_mask")
                      if name in batch}
            with self.devices.autocast():
                logits.append(self.model(**inputs).logits)
        result = np.empty((len(texts), len(self.label_names)))
        result[np.concatenate(pieces)] = torch.cat(logits).float().cpu().numpy()
        return softmax(result, axis=1)

    def columns(self, probabilities: np.ndarray) -> dict[str, Any]:
        """What is added to a row whose probabilities (classes,) these are."""
        values = [self.label_names[probabilities.argmax()], *(float(f"{p:.9g}") for p in probabilities)]
        return dict(zip(self.added, values, strict=True))
