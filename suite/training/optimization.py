"""The optimizer, the schedule of its learning rate, and the weights of classes in the loss."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import get_scheduler

from data import PreparedData
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


def weigh_classes(data: PreparedData, train_config: TrainConfig, device: torch.device
                  ) -> tuple[torch.Tensor | None, np.ndarray]:
    """(class weights (num_labels,) for the loss, or None; the weight of each training review in it (reviews,))."""
    labels = data.splits["train"].labels
    if train_config.class_weights is None:
        return None, np.ones(len(labels))
    class_weights = compute_class_weight("balanced", classes=np.arange(len(data.label_names)), y=labels)
    return torch.tensor(class_weights, dtype=torch.float32, device=device), class_weights[labels]
