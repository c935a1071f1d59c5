"""A training run: what changes from step to step, what is saved of it, and how it goes on from there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import get_scheduler

from data import get_dataloader, prepare_data
from suite.common.checks import position_limit, too_long
from suite.common.run_folder import save_config
from suite.common.storage import replace_folder, room_for
from suite.encoders.cpu_kernels import place_model
from suite.encoders.loading import best_model, load_encoder_config, new_model, save_model
from suite.reviews.sampling import PASS_FLOPS
from suite.training.efficiency import work_of
from suite.training.states import (
    KEPT_STATES,
    Progress,
    load_progress,
    random_state,
    refuse_other_data,
    remove_run,
    save_state,
    set_random_state,
)
from suite.training.tracking import History, Wandb
from utils import Config, UserError, process_rank, say, set_seed


class Run:
    """Model, optimizer, schedule, data and progress of one training run, and its records."""

    def __init__(self, config: Config, devices: Any):
        set_seed(config.train_config.seed)
        self.config, self.devices, self.folder = config, devices, config.run_folder
        load_encoder_config(config.model_config)  # what is no encoder is refused before the reviews are read
        with devices.main_process_first():
            self.data = prepare_data(config)
        self.train_loader, self.valid_loader = get_dataloader(config, "train"), get_dataloader(config, "valid")
        self.sampler = self.train_loader.batch_sampler
        self.steps_per_epoch = len(self.sampler.windows())
        self.total_steps = self.steps_per_epoch * config.train_config.epochs
        if config.train_config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train_config.max_steps)

        model = new_model(config.model_config, self.data.label_names)
        place_model(model, config, devices)
        self.model_config = model.config
        self.model_config.update({"max_len": config.data_config.max_len, "truncation": config.data_config.truncation,
                                  "data_fingerprint": self.data.fingerprint})
        self.work, self.executed_work = work_of(model, executed=False), work_of(model, executed=True)
        self.sampler.pass_tokens = PASS_FLOPS[devices.device.type] / (6 * self.work.token_weights)
        self.model_bytes = sum(weights.nbytes for weights in model.state_dict().values())
        refuse_misfit(config, model.config.encoder, self.train_loader.dataset.tokens)
        labels = self.train_loader.dataset.labels
        self.class_weights, self.weights = None, np.ones(len(labels))  # of each class, of each training review
        if config.train_config.class_weights == "balanced":
            weights = compute_class_weight("balanced", classes=np.arange(len(self.data.label_names)), y=labels)
            self.class_weights = torch.tensor(weights, dtype=torch.float32, device=devices.device)
            self.weights = weights[labels]
        if config.train_config.compile:
            model.encoder.compile(dynamic=True)
        self.model, self.optimizer = devices.prepare(model, build_optimizer(model, config.train_config))
        self.scheduler = build_scheduler(self.optimizer, config.train_config, self.total_steps)
        if process_rank() > 0:
            torch.manual_seed(config.train_config.seed + process_rank())  # no two processes draw the same dropout

        self.progress = Progress(data_fingerprint=self.data.fingerprint)
        self.sums = torch.zeros(2, device=devices.device)  # loss and correct reviews since the last record
        self.clock = time.perf_counter()

    @property
    def state_bytes(self) -> int:
        """What a saved state takes: the weights and, with Adam, its two moments of each."""
        return self.model_bytes * (1 if self.config.train_config.optimizer == "sgd" else 3)

    def start(self, state: Path | None) -> None:
        """From the beginning, or from a saved state."""
        # At its largest, a run folder holds the kept states and the new one, the best model and its replacement.
        most = (KEPT_STATES + 1) * self.state_bytes + 2 * self.model_bytes
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        with room_for(self.folder, max(most - there, self.state_bytes)):
            pass
        if state is not None:
            self.progress = load_progress(state)
            refuse_other_data(self.config, self.progress.data_fingerprint, self.data.fingerprint)
            if self.progress.best_epoch:
                best_model(self.folder)
            self.devices.read_state(state, self.model, self.optimizer)
            own = state / f"process_{process_rank()}.pt"
            if not own.exists():
                raise UserError(f"{state} was saved by fewer processes than are running now: start as many as before")
            loop = torch.load(own, map_location="cpu", weights_only=True)
            self.scheduler.load_state_dict(loop["scheduler"])
            self.sums.copy_(loop["sums"])
            set_random_state(loop["random"])
            self.sampler.micro_batch = self.progress.micro_batch or self.sampler.micro_batch
            say(f"going on from {state}: epoch {self.progress.epoch + 1}, optimizer step {self.progress.step}")
        elif self.devices.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_run(self.folder)  # nothing goes before data and model are ready to take its place
                save_config(self.config, self.folder / "config.yaml")
            except OSError as error:
                raise UserError(f"{self.folder} cannot be written ({error.strerror}): set output_dir") from None
        if self.devices.is_main:
            self.history = History(self.folder / "history.jsonl", self.progress.history_lines)
        self.wandb = Wandb(self.config, self.progress.wandb_id)
        self.progress.wandb_id = self.wandb.run_id
        self.start_step = self.progress.step
        self.model.train()

    def save(self) -> None:
        def write(folder: Path) -> None:
            self.devices.write_state(folder, self.model, self.optimizer)
            with open(folder / f"process_{process_rank()}.pt", "wb") as file:  # a path would hide why a write failed
                torch.save({"scheduler": self.scheduler.state_dict(), "sums": self.sums, "random": random_state()},
                           file)

        with room_for(self.folder, self.state_bytes):
            if self.devices.is_main:
                self.history.sync()
            save_state(self.folder / "last", self.progress, write, self.devices.barrier)

    def save_best(self) -> None:
        """Replace the best model by the present one."""
        weights = self.devices.weights(self.model)

        def write(folder: Path) -> None:
            save_model(folder, self.model_config, weights, self.data.tokenizer)

        if self.devices.is_main:
            with room_for(self.folder, self.model_bytes):
                replace_folder(self.folder / "best", write)

    def record(self, values: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """To history.jsonl and wandb; the speed, which no two runs share, to wandb alone."""
        if self.devices.is_main:
            epoch = self.progress.epoch + self.progress.windows / self.steps_per_epoch
            record = {"step": self.progress.step, "epoch": round(epoch, 6), **values}
            self.history.log(record)
            self.wandb.log(record | (speed or {}))
            self.progress.history_lines = self.history.lines

    def is_over(self) -> bool:
        if self.progress.windows > 0:
            return False  # stopped within an epoch, or before its validation: that is still to do
        patience = self.config.train_config.early_stopping_patience
        return (self.progress.epoch >= self.config.train_config.epochs or self.progress.step >= self.total_steps
                or patience is not None and self.progress.epochs_without_improvement >= patience)


def refuse_misfit(config: Config, encoder_config: Any, tokens: np.ndarray) -> None:
    """Raises UserError for reviews that the encoder cannot read, before a kernel fails on them."""
    name = config.model_config.model_name
    if problem := too_long(config.data_config.max_len, name, position_limit(encoder_config.to_dict())):
        raise UserError(problem)
    if (largest := int(tokens.max())) >= encoder_config.vocab_size:
        raise UserError(f"model_config.model_name: the tokenizer of {name} gives token {largest}, but its encoder only "
                        f"knows {encoder_config.vocab_size}: they do not belong together")


def build_optimizer(model: nn.Module, train_config: Any) -> torch.optim.Optimizer:
    """Weight decay, if any, goes to matrices only: not to biases and norms, as in BERT's own training."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": train_config.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    fused = train_config.optimizer != "sgd"  # one kernel for all weights; SGD's does not know FSDP2's sharded ones
    return kinds[train_config.optimizer](groups, lr=train_config.learning_rate, fused=fused)


def build_scheduler(optimizer: torch.optim.Optimizer, train_config: Any, total_steps: int) -> Any:
    name = train_config.scheduler
    if name == "constant" and train_config.warmup_ratio > 0:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=round(train_config.warmup_ratio * total_steps),
                         num_training_steps=total_steps)
