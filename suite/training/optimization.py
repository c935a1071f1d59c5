"""What moves the weights: the optimizer, the schedule of its learning rate, and the average of the weights."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import get_scheduler

from suite.common.devices import Devices
from utils import TrainConfig, process_rank


def build_optimizer(model: nn.Module, train_config: TrainConfig) -> torch.optim.Optimizer:
    """With weight decay, if any, on matrices only: not on biases and norms, as in BERT's own training."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": train_config.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    fused = train_config.optimizer != "sgd"  # one kernel for all weights; SGD's does not know FSDP2's sharded ones
    return kinds[train_config.optimizer](groups, lr=train_config.learning_rate, fused=fused)


def build_scheduler(optimizer: torch.optim.Optimizer, train_config: TrainConfig, total_steps: int
                    ) -> torch.optim.lr_scheduler.LRScheduler:
    name = train_config.scheduler
    if name == "constant" and train_config.warmup_ratio > 0:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=round(train_config.warmup_ratio * total_steps),
                         num_training_steps=total_steps)


class AveragedWeights:
    """An exponential moving average of a model's weights, in float32 as they are. With decay None, it does nothing.

    The n-th update makes it d * average + (1 - d) * weights with d = min(decay, (1 + n) / (10 + n)). This warm-up is
    that of TensorFlow's ExponentialMovingAverage: without it, much of a short run's average would be the weights that
    the run started from. Each process averages the weights that it holds: all of them, or its shards.
    """

    def __init__(self, model: nn.Module, devices: Devices, decay: float | None):
        self.model, self.devices, self.decay = model, devices, decay
        self.updates = 0
        self.averages = [weight.detach().clone() for weight in self._weights()]

    def _weights(self) -> list[torch.Tensor]:
        return [] if self.decay is None else self.devices.local_weights(self.model)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step. A share on the device lets FiniteGuard hold back the average as it does the weights,
        without waiting; on a GPU that costs a small kernel for each weight, where a plain number would take one."""
        if self.decay is None:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        share = (1 - decay) * (1 - self.devices.guard.failed)  # () on the device
        torch._foreach_lerp_(self.averages, self._weights(), [share] * len(self.averages))

    @contextmanager
    def in_model(self):
        """Inside, the model has the average for its weights: their contents change places."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Weight by weight, so that no third copy of all is made."""
        for weight, average in zip(self._weights(), self.averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def save(self, folder: Path) -> None:
        if self.decay is not None and (self.devices.is_main or self.devices.is_sharded):
            with open(folder / f"average_{process_rank()}.pt", "wb") as file:  # as in `Devices.write_state`
                torch.save({"updates": self.updates, "averages": self.averages}, file)

    def load(self, folder: Path) -> None:
        if self.decay is not None:
            writer = process_rank() if self.devices.is_sharded else 0
            state = torch.load(folder / f"average_{writer}.pt", map_location="cpu", weights_only=True)
            self.updates = state["updates"]
            for average, saved in zip(self.averages, state["averages"], strict=True):
                average.copy_(saved)
