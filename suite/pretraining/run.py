"""A pretraining run: the run of main.py's loop with masked words for labels, and windows of all texts for reviews."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from data import PreparedData
from suite.common.devices import Devices
from suite.common.pages import write_pretrained_card
from suite.encoders.loading import PRETRAINED_TEXTS
from suite.encoders.masked_lm import new_masked_lm
from suite.encoders.placement import to_device
from suite.pretraining.texts import prepare_texts
from suite.training.run import Run
from suite.training.tracking import watched
from utils import Config


def metrics_of(sums: np.ndarray) -> dict[str, Any]:
    """`sums`: what `evaluate_masked` returns."""
    loss, hits, count = sums
    return {"loss": loss / count, "perplexity": math.exp(min(loss / count, 700)), "accuracy": hits / count,
            "n": int(count)}


@torch.inference_mode()
def evaluate_masked(model: nn.Module, loader: DataLoader, devices: Devices, name: str) -> np.ndarray:
    """[summed loss, hits, number] of the masked tokens of a split, over all processes; float64.

    Raises StopRequested between batches.
    """
    model.eval()
    sums = []  # on the device, because reading them would wait for each batch
    for batch in watched(loader, devices, name):
        _, labels, inputs = to_device(batch, devices.device)
        with devices.autocast():
            output = model(**inputs, labels=labels, reduction="sum")
        hits = (output.logits.argmax(dim=1) == labels).sum()
        sums.append(torch.stack([output.loss, hits, torch.tensor(len(labels), device=devices.device)]))
    model.train()
    found, = devices.gather(torch.stack(sums).cpu().double().numpy())
    return found.sum(axis=0)


class PretrainingRun(Run):
    unit = "windows"
    prepare_data, metrics_of = staticmethod(prepare_texts), staticmethod(metrics_of)
    evaluate = staticmethod(evaluate_masked)

    @staticmethod
    def new_model(config: Config, encoder_config: PreTrainedConfig, data: PreparedData) -> nn.Module:
        return new_masked_lm(config.model_config, encoder_config)

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.devices.unwrap(self.model).save(folder, weights, self.data.tokenizer)
        np.save(folder / PRETRAINED_TEXTS, self.data.digests)
        write_pretrained_card(folder, self.config, self.progress.best_metrics, self.progress.step)

    def write_predictions(self, predictions: np.ndarray) -> None:
        pass  # there is no review to predict
