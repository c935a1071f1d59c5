"""How much arithmetic training needs, and which share of the device's peak it reached."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from utils import PROJECT

# Dense bf16 (fp16 before Ampere) matrix throughput in FLOP/s, from the vendors' data sheets; the longest name that the
# device's name contains counts.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10": 125e12, "A10G": 70e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Work:
    """What a model multiplies for a token, and for a review's first token."""

    token_weights: int  # weights that are factors of matrix products for every token
    first_weights: int  # those that only the first token meets
    width: int
    windows: list[float]  # how many tokens each layer lets a token attend to, for layers that compute every token
    first_layers: int  # layers that compute the first token's attention only


def work_of(model: nn.Module, executed: bool) -> Work:
    """The work of an EncoderForClassification: the whole encoder's, or what is executed with the last layer read at the
    first token alone. Embeddings and head are not counted."""
    config = model.encoder.config
    linear = [(name, module) for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)]
    total, windows = sum(module.weight.numel() for _, module in linear), _attention_windows(config)
    if not (executed and model.reads_first_token):
        return Work(total, 0, config.hidden_size, windows, 0)
    last = max(int(number) for name, _ in linear for number in re.findall(r"layers?\.(\d+)\.", name))
    of_last = sum(module.weight.numel() for name, module in linear if re.search(rf"layers?\.{last}\.", name))
    keys_and_values = 2 * config.hidden_size ** 2
    return Work(total - of_last + keys_and_values, of_last - keys_and_values, config.hidden_size, windows[:-1], 1)


def training_flops(work: Work, lengths: np.ndarray) -> float:
    """FLOPs of one forward and backward pass over reviews of these lengths in tokens, padding not counted.

    Kaplan et al. 2020 (arXiv 2001.08361, section 2.1): 6 a matrix weight and token; and, for queries x keys and weights
    x values, 12 x width a token and key that it attends to, of which a local layer has at most its window.
    """
    lengths = lengths.astype(np.float64)
    keys = sum((lengths * np.minimum(lengths, window)).sum() for window in work.windows)
    keys += work.first_layers * lengths.sum()
    return 6.0 * (work.token_weights * lengths.sum() + work.first_weights * len(lengths)) + 12.0 * work.width * keys


def _attention_windows(config: PretrainedConfig) -> list[float]:
    """How many tokens each layer lets a token attend to."""
    local = getattr(config, "local_attention", None)  # ModernBERT: this many around the token, and the token
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [local + 1 if local and kind == "sliding_attention" else float("inf") for kind in layer_types]


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return max(((len(known), peak) for known, peak in PEAK_FLOPS.items() if known in name), default=(0, None))[1]


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


def environment(devices: Any) -> dict[str, Any]:
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
            "git_commit": commit}
