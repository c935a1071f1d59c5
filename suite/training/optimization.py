"""The optimizer, and the schedule of its learning rate."""

from __future__ import annotations

import torch
from torch import nn
from transformers import get_scheduler

from utils import TrainConfig


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
