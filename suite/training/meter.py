"""What training has done so far and how fast, counted without waiting for the device."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from data import Step
from suite.common.devices import Devices
from suite.encoders.placement import linear_layers
from utils import PROJECT


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
        self.predictions += step.num_predictions
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


# ---------------------------------------------------------------------------------------------------------------------
# How much arithmetic training needs, and which share of the device's peak it reached


# Dense bf16 (fp16 before Ampere) matrix throughput in FLOP/s, from the vendors' data sheets. Of the names that occur in
# the device's name as whole words, the longest one counts.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10": 125e12, "A10G": 70e12, "V100": 125e12, "V100-PCIE": 112e12, "T4": 65e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Work:
    """What a model multiplies for each token, and for a review's first token."""

    token_weights: int  # weights in matrix products with every token
    first_weights: int  # weights in matrix products with the first token alone
    width: int
    spans: list[float]  # of each layer that computes every token: how many tokens a token attends to
    first_layers: int  # layers that compute the first token's attention alone


def work_of(model: nn.Module, executed: bool) -> Work:
    """The work of an EncoderForClassification: of the whole encoder, or (`executed`) without what the first-token fast
    path of model.py saves. Embeddings and head are not counted."""
    config, layers = model.encoder.config, linear_layers(model)
    # ALBERT passes the same layers several times.
    passes = config.num_hidden_layers / getattr(config, "num_hidden_groups", config.num_hidden_layers)
    total = round(sum(layer.weight.numel() * (passes if "layer_group" in name else 1) for name, layer in layers))
    spans = _attention_spans(config)
    if not (executed and model.reads_first_token):
        return Work(total, 0, config.hidden_size, spans, 0)
    last = max(int(number) for name, _ in layers for number in re.findall(r"layers?\.(\d+)\.", name))
    of_last = sum(layer.weight.numel() for name, layer in layers if re.search(rf"layers?\.{last}\.", name))
    keys_and_values = 2 * config.hidden_size ** 2
    return Work(total - of_last + keys_and_values, of_last - keys_and_values, config.hidden_size, spans[:-1], 1)


def training_flops(work: Work, lengths: np.ndarray) -> float:
    """FLOPs of one forward and backward pass over reviews of these lengths in tokens, padding not counted.

    Kaplan et al. 2020 (arXiv 2001.08361, section 2.1): 6 for each weight and token. The products of queries with keys
    and of attention with values add 12 x width for each token and each key that it attends to.
    """
    lengths = lengths.astype(np.float64)
    keys = sum((lengths * np.minimum(lengths, span)).sum() for span in work.spans)
    keys += work.first_layers * lengths.sum()
    return 6.0 * (work.token_weights * lengths.sum() + work.first_weights * len(lengths)) + 12.0 * work.width * keys


def _attention_spans(config: PreTrainedConfig) -> list[float]:
    """How many tokens a token attends to, layer by layer."""
    local = getattr(config, "local_attention", None)  # ModernBERT: so many around the token, and the token itself
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [local + 1 if local and kind == "sliding_attention" else float("inf") for kind in layer_types]


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"Laptop|\b(MIG|NVL|Ti|D)\b", name):  # slower or faster than the card of the same number
        return None
    found = [known for known in PEAK_FLOPS if re.search(rf"\b{known}\b", name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory of the GPU that torch held, or of the process on a CPU, in MB (10^6 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1e6 if sys.platform == "darwin" else kilobytes * 1024 / 1e6  # macOS counts bytes


def environment(devices: Devices) -> dict[str, Any]:
    """What a result depends on besides its settings: versions, device, precision, and this project's git commit."""
    packages = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")
    device = devices.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.cpu.get_capabilities().get(
        "cpu_name", platform.machine())
    try:
        commit = subprocess.run(["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40"],
                                capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None  # not a checkout, or no git
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages},
            "platform": platform.platform(), "device": device.type, "device_name": name,
            "precision": devices.precision, "processes": devices.num_processes, "threads": torch.get_num_threads(),
            "numba": metadata.version("numba") if devices.has_numba_kernels else None, "git_commit": commit}
