"""A training run: its data, model, optimizer and schedule, where it is, and its records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from data import PreparedData, get_dataloader, prepare_data
from suite.common.hub import say_what_was_cached
from suite.common.protocols import Devices
from suite.common.stopping import SIGNALS, StopRequested
from suite.common.storage import replace_folder, room_for
from suite.encoders.loading import TRAINED_TEXTS, best_model, load_encoder_config, new_model, save_model
from suite.encoders.placement import Batch, checkpoint_gradients, pass_tokens, place_model
from suite.training.compatibility import refuse_incompatible
from suite.training.evaluation import VALID_PREDICTIONS, Predictions, compute_metrics, quality, write_predictions
from suite.training.meter import Meter
from suite.training.optimization import build_optimizer, build_scheduler, weigh_classes
from suite.training.states import (
    KEPT_STATES,
    Progress,
    begin_run,
    claim_run_folder,
    find_state,
    load_progress,
    lock_within,
    random_state,
    refuse_other_data,
    refuse_other_device,
    save_state,
    saved_states,
    set_random_state,
    set_seed,
)
from suite.training.tracking import History, ProgressBar, Tracker
from utils import Config, UserError, process_rank, say


class Run:
    """What the loop in main.py works on. A PretrainingRun differs in the methods down to `judged`, and in `steps`."""

    unit = "reviews"  # what a row of the data is
    prepare_data, metrics_of = staticmethod(prepare_data), staticmethod(compute_metrics)

    @staticmethod
    def new_model(config: Config, encoder_config: PreTrainedConfig, data: PreparedData) -> nn.Module:
        model, read = new_model(config.model_config, data.label_names, encoder_config), config.data_config
        model.config.update({"max_len": read.max_len, "truncation": read.truncation, "max_windows": read.max_windows,
                             "data_fingerprint": data.fingerprint})
        return model

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        save_model(folder, self.model_config, weights, self.data.tokenizer)
        np.save(folder / TRAINED_TEXTS, self.data.digests)

    def write_predictions(self, predictions: Predictions) -> None:
        write_predictions(self.folder / VALID_PREDICTIONS, predictions, self.data.label_names)

    def total_weight(self, rows: np.ndarray) -> float:
        """What the loss of these reviews is divided by: their number or, with class weights, the sum of theirs."""
        return float(self.review_weights[rows].sum())

    def judged(self, rows: np.ndarray) -> int:
        """How many predictions these rows ask for."""
        return len(rows)

    @classmethod
    def open(cls, config: Config, devices: Devices) -> Run:
        """A new run, or the one in the run folder where it stopped.

        Raises UserError, before anything is replaced, if data, encoder and run folder do not go together.
        """
        if is_there := config.run_folder.exists():
            claim_run_folder(config.run_folder)
        state = find_state(config)
        set_seed(config.train_config.seed)
        encoder_config = load_encoder_config(config.model_config)  # refuses what is no encoder before reviews are read
        with devices.main_process_first():
            data = cls.prepare_data(config)
        refuse_incompatible(config, encoder_config, data)
        model = cls.new_model(config, encoder_config, data)
        if config.train_config.gradient_checkpointing:
            checkpoint_gradients(model, config.model_config.model_name)
        say_what_was_cached()
        if not is_there:  # only now, so that wrong input leaves nothing behind, not even a lock
            claim_run_folder(config.run_folder)
            state = find_state(config)  # another process may have begun the run meanwhile
        devices.barrier()
        run = cls(config, devices, data, model)
        run.ensure_room()
        if state is None:
            run.begin()
        else:
            run.resume(state)
        return run

    def __init__(self, config: Config, devices: Devices, data: PreparedData, model: nn.Module):
        self.config, self.devices, self.data, self.folder = config, devices, data, config.run_folder
        train_config = config.train_config
        place_model(model, devices.device, compiled=train_config.compile)
        self.model_config, self.meter = model.config, Meter(model, devices)
        self.model_bytes = sum(weights.nbytes for weights in model.state_dict().values())
        self.train_loader, self.valid_loader = (
            get_dataloader(data, split, config, devices.device, pass_tokens(model, devices.device))
            for split in ("train", "valid"))
        self.sampler = self.train_loader.sampler
        self.steps_per_epoch = len(self.sampler)
        self.total_steps = min(self.steps_per_epoch * train_config.epochs, train_config.max_steps or math.inf)
        self.class_weights, self.review_weights = weigh_classes(data, train_config, devices.device)
        if train_config.compile:
            model.encoder.compile(dynamic=True)
        self.model, self.optimizer = devices.prepare(model, build_optimizer(model, train_config))
        self.scheduler = build_scheduler(self.optimizer, train_config, self.total_steps)
        if process_rank() > 0:
            torch.manual_seed(train_config.seed + process_rank())  # no two processes draw the same dropout
        self.progress = Progress(data.fingerprint, devices.kind)
        self.start_step, self.saved_at = 0, time.monotonic()  # where this process began, and when it last saved
        self._out_of_memory = False

    @property
    def state_bytes(self) -> int:
        """The size of a saved state: the weights and, with Adam, two moments of each."""
        return self.model_bytes * (1 if self.config.train_config.optimizer == "sgd" else 3)

    def ensure_room(self) -> None:
        """Raises UserError if the disk has no room for what the run folder will hold at its largest: the kept states
        and a new one, the best model and its replacement."""
        most = (KEPT_STATES + 1) * self.state_bytes + 2 * self.model_bytes
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        with room_for(self.folder, max(most - there, self.state_bytes)):
            pass

    def begin(self) -> None:
        """Start from the beginning. An earlier run's files are removed only now, after data and model have loaded."""
        if self.devices.is_main:
            try:
                begin_run(self.config)
            except OSError as error:
                raise UserError(f"{self.folder} cannot be written ({error.strerror}): set output_dir") from None
        self._open_records()

    def resume(self, state: Path) -> None:
        """Continue from a saved state."""
        self.progress = load_progress(state)
        refuse_other_data(self.config, self.progress.data_fingerprint, self.data.fingerprint)
        refuse_other_device(state, self.progress.device, self.devices.kind)
        if self.progress.best_epoch:
            best_model(self.folder)  # raises UserError if it is lost or damaged
        own = state / f"process_{process_rank()}.pt"
        if not own.exists():
            raise UserError(f"{state} was saved by fewer processes than are running now: start as many as before")
        self.devices.read_state(state, self.model, self.optimizer)
        loop = torch.load(own, map_location="cpu", weights_only=True)
        self.scheduler.load_state_dict(loop["scheduler"])
        self.meter.load_state_dict(loop["meter"])
        set_random_state(loop["random"])
        self.sampler.micro_batch = self.progress.micro_batch or self.sampler.micro_batch
        lock_within(self.folder)
        say(f"continuing from {state}: epoch {self.progress.epoch + 1}, optimizer step {self.progress.step}")
        self._open_records()

    def _open_records(self) -> None:
        if self.devices.is_main:
            self.history = History(self.folder / "history.jsonl", self.progress.history_lines)
        self.tracker = Tracker(self.config, self.progress.wandb_id)
        self.progress.wandb_id = self.tracker.run_id
        self.start_step = self.progress.step
        self.model.train()

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 0. They end with max_steps or early_stopping_patience, too."""
        progress, train_config = self.progress, self.config.train_config
        patience = train_config.early_stopping_patience or math.inf
        while progress.steps_in_epoch > 0 or (  # an epoch was interrupted, or its validation: finish it
                progress.epoch < train_config.epochs and progress.step < self.total_steps
                and progress.epochs_without_improvement < patience):
            yield progress.epoch

    def steps(self) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        """The optimizer steps that are left of this epoch: the rows of the effective batch (reviews,), over all
        processes, and this process's micro-batches of them.

        After an out-of-memory error, the same step comes again in smaller micro-batches.
        """
        progress, sampler = self.progress, self.sampler
        name = f"epoch {progress.epoch + 1}/{self.config.train_config.epochs}"
        self.bar = ProgressBar(name, self.steps_per_epoch, progress.steps_in_epoch)
        sampler.epoch = progress.epoch
        while progress.steps_in_epoch < self.steps_per_epoch and progress.step < self.total_steps:
            sampler.first_step = progress.steps_in_epoch
            self.meter.start_clock()
            for rows, micro_batches in zip(sampler.effective_batches()[sampler.first_step:], self.train_loader,
                                           strict=True):
                yield rows, micro_batches
                if self._out_of_memory:
                    self._halve_micro_batch()
                    break
                if progress.step == self.total_steps:
                    break
                self.meter.start_clock()  # saving stops it
        self.wait_and_check()
        self.bar.close()

    @contextmanager
    def smaller_if_out_of_memory(self):
        """Around an optimizer step. If the device runs out of memory and train_config.auto_micro_batch is set, `steps`
        gives the same step again, in micro-batches of half the size."""
        try:
            yield
        except torch.OutOfMemoryError:
            if not self.config.train_config.auto_micro_batch or self.sampler.micro_batch == 1:
                raise
            self._out_of_memory = True  # `steps` acts on it when this error is gone, which keeps the tensors

    def _halve_micro_batch(self) -> None:
        self._out_of_memory = False
        self.model.zero_grad(set_to_none=True)
        self.wait_and_check()
        self.sampler.micro_batch = self.progress.micro_batch = -(-self.sampler.micro_batch // 2)
        if self.devices.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"out of memory at optimizer step {self.progress.step + 1}: continuing with micro-batches of "
            f"{self.sampler.micro_batch} {self.unit}, at the same {self.sampler.effective_batch} {self.unit} an "
            "optimizer step")

    def count(self, rows: np.ndarray, loss: torch.Tensor, correct: torch.Tensor) -> None:
        """An optimizer step is done: `loss` and `correct` are this process's sums over the reviews `rows`."""
        reviews = self.data.splits["train"]
        self.meter.add(loss, correct, self.total_weight(rows), self.judged(rows), len(rows),
                       reviews.window_lengths(reviews.windows_of(rows)))
        self.progress.step += 1
        self.progress.steps_in_epoch += 1
        self.bar.update()

    def log_due(self) -> bool:
        progress = self.progress
        is_last = progress.steps_in_epoch == self.steps_per_epoch or progress.step == self.total_steps
        return is_last or progress.step % self.config.log_config.log_every_steps == 0

    def log(self) -> None:
        """Record the means since the last record. Waits for the device, as `save` does."""
        self.wait_and_check()
        loss, accuracy, speed = self.meter.read()
        self.record({"train/loss": loss, "train/accuracy": accuracy,
                     "train/learning_rate": self.scheduler.get_last_lr()[0]}, {"train/samples_per_second": speed})
        self.bar.show(loss, accuracy, f"{speed:.1f} {self.unit}/s")

    def record(self, values: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """To history.jsonl and wandb; the speed, which no two runs share, to wandb alone."""
        if self.devices.is_main:
            epoch = self.progress.epoch + self.progress.steps_in_epoch / self.steps_per_epoch
            record = {"step": self.progress.step, "epoch": round(epoch, 6), **values}
            self.history.log(record)
            self.tracker.log(record | (speed or {}))
            self.progress.history_lines = self.history.lines

    def wait_and_check(self) -> None:
        """Wait for the device and stop the clock.

        Raises FloatingPointError, naming step and reviews, if a step was not finite. Neither that step nor any later
        one has changed the weights: see FiniteGuard.
        """
        self.meter.stop_clock()
        good_steps = self.devices.steps_before_failure()
        if good_steps is None:
            return
        step = self.start_step + good_steps + 1
        place = self.progress.steps_in_epoch - (self.progress.step - step)  # of that step in this epoch, from 1
        rows = self.sampler.effective_batches()[place - 1]
        ids = self.data.splits["train"].ids[np.sort(rows)].tolist()
        kept = next((str(state) for state in saved_states(self.folder / "last")), "none yet")
        raise FloatingPointError(
            f"optimizer step {step}: loss or gradient is not finite, so the weights were left as they were; reviews "
            f"{', '.join(map(str, ids))}. Lower train_config.learning_rate, set train_config.max_grad_norm, or look "
            f"at these reviews (last saved state: {kept})")

    def end_epoch(self, predictions: Any) -> None:
        """Record the metrics on validation, keep the model if it is the best so far, save the state."""
        progress, best_metric = self.progress, self.config.train_config.best_metric
        metrics = self.metrics_of(predictions)
        self.record({f"valid/{name}": value for name, value in metrics.items() if isinstance(value, float)})
        progress.epoch, progress.steps_in_epoch = progress.epoch + 1, 0
        is_best = progress.best_epoch is None or (
            quality(metrics, best_metric) > quality(progress.best_metrics, best_metric))
        say(f"epoch {progress.epoch}: validation loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.4f}"
            + (", the best so far" if is_best else ""))
        if is_best:
            progress.best_metrics, progress.best_epoch, progress.epochs_without_improvement = metrics, progress.epoch, 0
            if self.devices.is_main:  # a kill between the two is mended on resuming, which ends this epoch again
                self.write_predictions(predictions)
            self.save_best()
        else:
            progress.epochs_without_improvement += 1
        self.save()

    def save_due(self) -> bool:
        """Whether all processes shall save a state now."""
        steps, minutes = self.config.train_config.save_every_steps, self.config.train_config.save_every_minutes
        is_step = steps is not None and self.progress.step % steps == 0
        return is_step or self.devices.any(time.monotonic() - self.saved_at >= 60 * minutes)

    def save(self) -> None:
        """Save all that `resume` needs."""
        self.wait_and_check()

        def write(folder: Path) -> None:
            self.devices.write_state(folder, self.model, self.optimizer)
            with open(folder / f"process_{process_rank()}.pt", "wb") as file:  # given a path, torch.save hides errors
                torch.save({"scheduler": self.scheduler.state_dict(), "meter": self.meter.state_dict(),
                            "random": random_state()}, file)

        with room_for(self.folder, self.state_bytes):
            if self.devices.is_main:
                self.history.sync()
            save_state(self.folder / "last", self.progress, write, self.devices.barrier)
        self.saved_at = time.monotonic()

    def save_best(self) -> None:
        """Replace the best model by the present one."""
        weights = self.devices.state_dict(self.model)
        if self.devices.is_main:
            with room_for(self.folder, self.model_bytes):
                replace_folder(self.folder / "best", lambda folder: self.write_model(folder, weights), recorded=True)

    @contextmanager
    def saved_when_stopped(self):
        """Around the loop: SIGINT and SIGTERM let the optimizer step end, save the state and leave."""
        with SIGNALS.deferred():
            try:
                yield
            except StopRequested:
                self.save()
                say(f"{SIGNALS.name}: saved at optimizer step {self.progress.step}; the same command continues from "
                    "there")
                raise SystemExit(SIGNALS.exit_code) from None

    def figures(self) -> dict[str, Any]:
        """What metrics.json says about training and validation."""
        return {"train": self.meter.figures() | {"optimizer_steps": self.progress.step},
                "valid": self.progress.best_metrics | {"epoch": self.progress.best_epoch}}
