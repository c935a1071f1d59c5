"""What training has done so far and how fast, counted without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from data import Step
from suite.common.devices import Devices
from suite.training.efficiency import peak_flops, peak_memory_mb, training_flops, work_of


class Meter:
    """Counts reviews, tokens, FLOPs and seconds of a run, and the loss and hits since the last reading."""

    def __init__(self, model: nn.Module, devices: Devices):
        self.devices = devices
        self.work, self.executed_work = work_of(model, executed=False), work_of(model, executed=True)
        self.sums = torch.zeros(2, device=devices.device)  # loss and correct reviews of this process since the reading
        self.reviews = self.tokens = 0
        self.flops = self.executed_flops = 0.0  # of the whole model; of what is computed of it. Padding not counted
        self.seconds = 0.0  # of training, without evaluation and saving
        self.predictions, self.total_weight = 0, 0.0  # since then, and their weight: see `Step`
        self._started: float | None = None  # None while the clock stands still

    def add(self, step: Step, loss: torch.Tensor, correct: torch.Tensor, lengths: np.ndarray) -> None:
        """Count an optimizer step: `loss` and `correct` are this process's sums; `lengths`: of all its windows, in
        tokens."""
        self.sums += torch.stack([loss, correct])
        self.total_weight += step.total_weight
        self.predictions += step.predictions
        self.reviews += len(step.rows)
        self.tokens += int(lengths.sum())
        self.flops += float(training_flops(self.work, lengths))
        self.executed_flops += float(training_flops(self.executed_work, lengths))

    def read(self) -> tuple[float, float, float]:
        """(mean loss and accuracy since the last reading, reviews a second so far). Waits for the device."""
        loss, correct = self.devices.total(self.sums).tolist()
        figures = loss / self.total_weight, correct / self.predictions, self.reviews / self.seconds
        self.sums.zero_()
        self.predictions, self.total_weight = 0, 0.0
        return figures

    def start_clock(self) -> None:
        """Count the seconds from now on, unless they are counted already."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop_clock(self) -> None:
        """Wait for the device and add the seconds since the start, if the clock is running."""
        if self._started is not None:
            self.devices.synchronize()
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def figures(self) -> dict[str, Any]:
        """What metrics.json says about the training."""
        peak = (peak_flops(self.devices.device) or 0) * self.devices.num_processes
        model_speed, executed_speed = self.flops / self.seconds, self.executed_flops / self.seconds
        return {
            "samples_per_second": self.reviews / self.seconds, "tokens_per_second": self.tokens / self.seconds,
            "seconds": self.seconds, "peak_memory_mb": peak_memory_mb(self.devices.device),
            "model_tflops_per_second": model_speed / 1e12, "executed_tflops_per_second": executed_speed / 1e12,
            "model_flops_utilization": model_speed / peak if peak else None,
            "executed_flops_utilization": executed_speed / peak if peak else None}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in SAVED:
            setattr(self, name, state[name])
        self.sums = self.sums.to(self.devices.device)


SAVED = ("sums", "reviews", "tokens", "flops", "executed_flops", "seconds", "predictions", "total_weight")
