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
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, set_seed

from data import PreparedData, Step, evaluation_loader, new_sampler, prepare_data, train_loader
from suite.common.devices import Devices, random_state, set_random_state
from suite.common.run_folder import best_folder, contents_of
from suite.common.stopping import SIGNALS, StopRequested, stop_if_asked
from suite.common.storage import room_for
from suite.encoders.loading import (
    TRAINED_TEXTS,
    load_encoder_config,
    load_model,
    new_model,
    refuse_incompatible,
    save_model,
)
from suite.encoders.placement import checkpoint_gradients, pass_tokens, place_model
from suite.training.calibration import at_temperature, fit_temperature
from suite.training.evaluation import VALID_PREDICTIONS, Predictions, compute_metrics, quality, write_predictions
from suite.training.meter import Meter
from suite.training.optimization import AveragedWeights, build_optimizer, build_scheduler
from suite.training.states import KEPT_STATES, Progress, RunFolder, load_progress, saved_states
from suite.training.tracking import ProgressBar, Tracker
from utils import Config, process_rank, say


class Run:
    """What the loop in main.py works on. A PretrainingRun or a DistillationRun differs in the methods down to
    `write_predictions`."""

    unit = "reviews"  # what a row of the data is
    evaluate = None  # how it is validated, if not by main.py's `evaluate`
    temperature = 1.0  # of the best model, see suite/training/calibration.py
    prepare_data, metrics_of = staticmethod(prepare_data), staticmethod(compute_metrics)

    @staticmethod
    def new_model(config: Config, encoder_config: PreTrainedConfig, data: PreparedData) -> nn.Module:
        model, data_config = new_model(config.model_config, data.label_names, encoder_config), config.data_config
        model.config.update({name: getattr(data_config, name) for name in ("max_len", "truncation", "max_windows")}
                            | {"data_fingerprint": data.fingerprint})
        return model

    def complete_data(self) -> None:
        """Add to the data what takes long, when nothing else can be wrong any more. Every process calls it."""

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        head = {name: weights[name] / self.temperature for name in ("head.weight", "head.bias")}
        save_model(folder, self.model_config, weights | head, self.data.tokenizer)
        np.save(folder / TRAINED_TEXTS, self.data.digests)

    def write_predictions(self, predictions: Predictions) -> None:
        write_predictions(self.folder.path / VALID_PREDICTIONS, predictions, self.data.label_names)

    @classmethod
    def open(cls, config: Config, devices: Devices) -> Run:
        """A new run, or the one in the run folder where it stopped.

        Raises UserError, before anything is replaced, if data, encoder and run folder do not go together.
        """
        folder = RunFolder(config)
        folder.lock()
        state = folder.state_to_continue()
        encoder_config = load_encoder_config(config.model_config)  # refuses other models before reviews are read
        with devices.main_process_first():
            data = cls.prepare_data(config)
        set_seed(config.train_config.seed)  # after the caches, whose libraries draw random names when they fill them
        refuse_incompatible(config, encoder_config, data.tokenizer, data.splits["train"].tokens, data.fingerprint)
        model = cls.new_model(config, encoder_config, data)
        if config.train_config.gradient_checkpointing:
            checkpoint_gradients(model, config.model_config.model_name)
        devices.barrier()
        run = cls(config, devices, data, model, folder)
        run.ensure_room()
        if state is None:
            if devices.is_main:  # an earlier run's files are removed only now, after data and model have loaded
                folder.begin()
        else:
            run.resume(state)
        run.complete_data()
        run.open_records()
        run.model.train()
        say(f"{config.run_name}: {len(data.splits['train']):,} {cls.unit} to train on, "
            f"{len(data.splits['valid']):,} to validate; {run.total_steps:,} optimizer steps of "
            f"{run.sampler.effective_batch} {cls.unit} on {devices}")
        return run

    def __init__(self, config: Config, devices: Devices, data: PreparedData, model: nn.Module, folder: RunFolder):
        self.config, self.devices, self.data, self.folder = config, devices, data, folder
        train_config = config.train_config
        place_model(model, devices.device, train_config.compile, devices.has_numba_kernels)
        self.model_config, self.meter = model.config, Meter(model, devices)
        self.model_bytes = sum(weights.nbytes for weights in model.state_dict().values())
        self.sampler = new_sampler(data, config, pass_tokens(model, devices.device))
        self.valid_loader = evaluation_loader(data, "valid", config, devices.device, pass_tokens(model, devices.device))
        self.steps_per_epoch = len(self.sampler)
        self.total_steps = min(self.steps_per_epoch * train_config.epochs, train_config.max_steps or math.inf)
        weights = data.splits["train"].class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float32,
                                                                       device=devices.device)
        if train_config.compile:
            model.encoder.compile(dynamic=True)
        self.model, self.optimizer = devices.prepare(model, build_optimizer(model, train_config))
        self.scheduler = build_scheduler(self.optimizer, train_config, self.total_steps)
        self.average = AveragedWeights(self.model, devices, train_config.ema_decay)
        if process_rank() > 0:
            torch.manual_seed(train_config.seed + process_rank())  # no two processes draw the same dropout
        self.progress = Progress(data.fingerprint, devices.kind, contents=contents_of(config))
        self.start_step, self.saved_at = 0, time.monotonic()  # where this process began, and when it last saved

    @property
    def state_bytes(self) -> int:
        """The size of a saved state: the weights, with Adam two moments of each, and their average if there is one."""
        train_config = self.config.train_config
        copies = (1 if train_config.optimizer == "sgd" else 3) + (train_config.ema_decay is not None)
        return self.model_bytes * copies

    def ensure_room(self) -> None:
        """Raises UserError if the disk has no room for what the run folder will hold at its largest: the kept states
        and a new one, the best model and its replacement."""
        most = (KEPT_STATES + 1) * self.state_bytes + 2 * self.model_bytes
        there = sum(path.stat().st_size for path in self.folder.path.rglob("*") if path.is_file())
        with room_for(self.folder.path, max(most - there, self.state_bytes)):
            pass

    def resume(self, state: Path) -> None:
        """Continue from a saved state."""
        self.progress = load_progress(state, self.devices.kind)
        models = {key: content for key, content in self.progress.contents.items() if key != "data_config.dataset"}
        self.folder.refuse_changed_inputs({"contents": models})  # the reviews are compared by the next line
        self.folder.refuse_other_data(self.progress.data_fingerprint, self.data.fingerprint)
        if self.progress.best_epoch:
            best_folder(self.folder.path)  # raises UserError if it is lost or damaged
        self.devices.read_state(state, self.model, self.optimizer)
        self.average.load(state)
        loop = torch.load(state / f"process_{process_rank()}.pt", map_location="cpu", weights_only=True)
        self.scheduler.load_state_dict(loop["scheduler"])
        self.meter.load_state_dict(loop["meter"])
        set_random_state(loop["random"])
        self.sampler.micro_batch = self.progress.micro_batch or self.sampler.micro_batch
        self.start_step = self.progress.step
        say(f"continuing from {state}: epoch {self.progress.epoch + 1}, optimizer step {self.progress.step}")

    def open_records(self) -> None:
        """Open the history and the tracker."""
        if self.devices.is_main:
            self.folder.open_history(self.progress.history_lines)
        self.tracker = Tracker(self.config, self.progress.wandb_id, step=self.progress.step)
        self.progress.wandb_id = self.tracker.run_id

    def train_loader(self, epoch: int, first_step: int = 0) -> DataLoader:
        """Yields each `Step` of the epoch from `first_step` on."""
        return train_loader(self.data, self.sampler, epoch, self.config, self.devices.device, first_step)

    def epochs_left(self) -> Iterator[int]:
        """The epochs that are left, counted from 0. They end with max_steps or early_stopping_patience, too."""
        progress, train_config = self.progress, self.config.train_config
        patience = train_config.early_stopping_patience or math.inf
        while progress.steps_in_epoch > 0 or (  # an epoch was interrupted, or its validation: finish it
                progress.epoch < train_config.epochs and progress.step < self.total_steps
                and progress.epochs_without_improvement < patience):
            yield progress.epoch

    def steps_left(self, epoch: int) -> Iterator[Step]:
        """The optimizer steps that are left of this epoch. A step that was not counted, because the device ran out of
        memory, comes again in smaller micro-batches."""
        progress = self.progress
        name = f"epoch {epoch + 1}/{self.config.train_config.epochs}"
        self.bar = ProgressBar(name, self.steps_per_epoch, progress.steps_in_epoch)
        while progress.steps_in_epoch < self.steps_per_epoch and progress.step < self.total_steps:
            self.meter.start_clock()
            for step in self.train_loader(epoch, progress.steps_in_epoch):
                before = progress.step
                yield step
                if progress.step == before:
                    self._halve_micro_batch()
                    break
                if progress.step == self.total_steps:
                    break
                self.meter.start_clock()  # saving stops it
        self.wait_and_check()
        self.bar.close()

    @contextmanager
    def may_run_out_of_memory(self):
        """Around an optimizer step. With train_config.auto_micro_batch, an out-of-memory error ends here: the step is
        not counted, and `steps_left` gives it again when the error, which keeps the tensors, is gone."""
        before = self.progress.step
        try:
            yield
        except torch.OutOfMemoryError:
            is_counted = self.progress.step > before
            if is_counted or not self.config.train_config.auto_micro_batch or self.sampler.micro_batch == 1:
                raise

    def _halve_micro_batch(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.wait_and_check()
        self.sampler.micro_batch = self.progress.micro_batch = -(-self.sampler.micro_batch // 2)
        if self.devices.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"out of memory at optimizer step {self.progress.step + 1}: continuing with micro-batches of "
            f"{self.sampler.micro_batch} {self.unit}, at the same {self.sampler.effective_batch} {self.unit} an "
            "optimizer step")

    def after_step(self, step: Step, loss: torch.Tensor, correct: torch.Tensor) -> None:
        """Count an optimizer step, and record, stop and save where that is due. `loss` and `correct`: this process's
        sums over the effective batch, which stay on the device, so that nothing waits for them."""
        progress, dataset = self.progress, self.data.splits["train"]
        self.meter.add(step, loss, correct, dataset.window_lengths(dataset.windows_of(step.rows)))
        progress.step += 1
        progress.steps_in_epoch += 1
        self.bar.update()
        is_last = progress.steps_in_epoch == self.steps_per_epoch or progress.step == self.total_steps
        if is_last or progress.step % self.config.log_config.log_every_steps == 0:
            self.log()
        stop_if_asked(self.devices)
        if self._is_time_to_save():
            self.save()

    def log(self) -> None:
        """Record the means since the last record. Waits for the device, as `save` does."""
        self.wait_and_check()
        loss, accuracy, speed = self.meter.read()
        self.record({"train/loss": loss, "train/accuracy": accuracy,
                     "train/learning_rate": self.scheduler.get_last_lr()[0]}, {"train/samples_per_second": speed})
        self.bar.show(loss, accuracy, f"{speed:.1f} {self.unit}/s")

    def record(self, values: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """To history.jsonl and the tracker; the speed, which no two runs share, to the tracker alone."""
        if self.devices.is_main:
            epoch = self.progress.epoch + self.progress.steps_in_epoch / self.steps_per_epoch
            record = {"step": self.progress.step, "epoch": round(epoch, 6), **values}
            self.folder.record(record)
            self.tracker.log(record | (speed or {}))
            self.progress.history_lines = self.folder.history_lines

    def wait_and_check(self) -> None:
        """Wait for the device and stop the clock.

        Raises FloatingPointError, naming step and reviews, if a step was not finite. Neither that step nor any later
        one has changed the weights: see FiniteGuard.
        """
        self.meter.stop_clock()
        good_steps = self.devices.guard.steps_before_failure()
        if good_steps is None:
            return
        step = self.start_step + good_steps + 1
        place = self.progress.steps_in_epoch - (self.progress.step - step)  # of that step in this epoch, from 1
        rows = self.sampler.effective_batches(self.progress.epoch)[place - 1]
        ids = self.data.splits["train"].ids[np.sort(rows)].tolist()
        kept = next((str(state) for state in saved_states(self.folder.last)), "none yet")
        raise FloatingPointError(
            f"optimizer step {step}: loss or gradient is not finite, so the weights were left as they were; reviews "
            f"{', '.join(map(str, ids))}. Lower train_config.learning_rate, set train_config.max_grad_norm, or look "
            f"at these reviews (last saved state: {kept})")

    def after_epoch(self, predictions: Any) -> None:
        """Record the metrics on validation, keep the model if it is the best so far, save the state."""
        progress, best_metric = self.progress, self.config.train_config.best_metric
        calibration = {}
        if not self.config.pretrains:
            predictions = predictions.in_groups(self.data.units)
            if self.config.train_config.calibrate:
                calibration["temperature"] = self.temperature = fit_temperature(predictions)
                predictions = at_temperature(predictions, self.temperature)
        metrics = self.metrics_of(predictions) | calibration
        self.record({f"valid/{name}": value for name, value in metrics.items() if isinstance(value, float)})
        progress.epoch, progress.steps_in_epoch = progress.epoch + 1, 0
        is_best = progress.best_epoch is None or (
            quality(metrics, best_metric) > quality(progress.best_metrics, best_metric))
        say(f"epoch {progress.epoch}: validation loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.4f}"
            + (", the best so far" if is_best else ""))
        if is_best:
            progress.best_metrics, progress.best_epoch, progress.epochs_without_improvement = metrics, progress.epoch, 0
            if self.devices.is_main:  # after a kill between the two, resuming ends this epoch again
                self.write_predictions(predictions)
            self.save_best()
        else:
            progress.epochs_without_improvement += 1
        self.save()

    def _is_time_to_save(self) -> bool:
        """Whether it is time for all processes to save a state."""
        steps, minutes = self.config.train_config.save_every_steps, self.config.train_config.save_every_minutes
        is_step = steps is not None and self.progress.step % steps == 0
        return is_step or self.devices.any(time.monotonic() - self.saved_at >= 60 * minutes)

    def save(self) -> None:
        """Save all that `resume` needs."""
        self.wait_and_check()

        def write(folder: Path) -> None:
            self.devices.write_state(folder, self.model, self.optimizer)
            self.average.save(folder)
            with open(folder / f"process_{process_rank()}.pt", "wb") as file:  # given a path, torch.save hides errors
                torch.save({"scheduler": self.scheduler.state_dict(), "meter": self.meter.state_dict(),
                            "random": random_state()}, file)

        with room_for(self.folder.path, self.state_bytes):
            if self.devices.is_main:
                self.folder.sync_history()
            self.folder.save_state(self.progress, write, self.devices.barrier)
        self.saved_at = time.monotonic()

    def save_best(self) -> None:
        """Replace the best model by the present one, with averaged weights if train_config.ema_decay asks for them."""
        with self.average.in_model():
            weights = self.devices.state_dict(self.model)
            if self.devices.is_main:
                with room_for(self.folder.path, self.model_bytes):
                    self.folder.save_best(lambda folder: self.write_model(folder, weights))

    def best_model(self) -> nn.Module:
        """The best model so far, as it was saved."""
        return load_model(best_folder(self.folder.path))

    @contextmanager
    def saved_when_stopped(self):
        """Around the loop: a signal lets the optimizer step end, saves the state and leaves."""
        with SIGNALS.deferred():
            try:
                yield
            except StopRequested:
                self.save()
                say(f"{SIGNALS.name}: saved at optimizer step {self.progress.step}; the same command continues from "
                    "there")
                raise SystemExit(SIGNALS.exit_code) from None

    @property
    def contents(self) -> dict[str, str | None]:
        return self.progress.contents

    @property
    def figures(self) -> dict[str, Any]:
        """What metrics.json says about training and validation."""
        return {"train": self.meter.figures() | {"optimizer_steps": self.progress.step},
                "valid": self.progress.best_metrics | {"epoch": self.progress.best_epoch}}
