"""Where the arithmetic happens: one device in plain PyTorch.

The training loop asks for nothing but the methods of `Devices`. main_accumulation.py puts Accelerate and several
processes behind the same methods. The scripts differ in nothing else.
"""

from __future__ import annotations

import functools
import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils import Config, UserError, say


class FiniteGuard:
    """Keeps numbers that are not finite away from the weights, without waiting for the device in each step.

    From the first optimizer step whose number is not finite, no step changes the weights any more.
    """

    def __init__(self, device: torch.device):
        self.failed = torch.zeros((), device=device)  # 1 from the first step whose number was not finite
        self.good_steps = torch.zeros((), device=device)  # optimizer steps before that one

    def check(self, norm_or_loss: torch.Tensor) -> None:
        """Look at an optimizer step's gradient norm or loss, on the device."""
        self.failed = torch.maximum(self.failed, (~norm_or_loss.isfinite()).float())

    def count(self) -> None:
        """An optimizer step is done. One that ran out of memory does not get here, and is checked again later."""
        self.good_steps += 1 - self.failed

    def step(self, optimizer: torch.optim.Optimizer, fused: bool = True) -> None:
        """optimizer.step(), unless a check has failed. Waits for the device where the optimizer is not `fused`."""
        plain = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        if fused and plain.defaults.get("fused"):
            plain.found_inf = self.failed  # the fused kernel reads it on the device, and then changes nothing
            optimizer.step()
        elif not self.failed:
            optimizer.step()

    def steps_before_failure(self) -> int | None:
        """How many optimizer steps were good before one failed; None if none has. Waits for the device."""
        return int(self.good_steps) if self.failed else None


class Devices:
    """One device in plain PyTorch, and what its methods mean on several, too."""

    num_processes = 1
    is_main = True  # whether this process writes the files
    is_sharded = False  # whether each process holds a part of the weights only

    def __init__(self, config: Config):
        self.device = pick_device(config.train_config.device)  # of this process
        self.precision = pick_precision(config.train_config.mixed_precision, self.device)
        self.is_compiled = config.train_config.compile
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self.guard = FiniteGuard(self.device)

    @property
    def kind(self) -> str:
        """What `auto` may have picked: `cpu (bf16)`, or `cpu (bf16, numba kernels)` with requirements-fast.txt."""
        kernels = ", numba kernels" if self.has_numba_kernels else ""
        return f"{self.device.type} ({self.precision if self.precision != 'no' else 'fp32'}{kernels})"

    @property
    def has_numba_kernels(self) -> bool:
        """Whether training here uses suite/encoders/numba_layers.py."""
        return (self.device.type == "cpu" and self.precision == "bf16" and not self.is_compiled
                and not self.is_sharded and numba_works())

    def __str__(self) -> str:
        return self.kind

    def main_process_first(self):
        """Around filling a cache: one process of each machine goes first."""
        return nullcontext()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimizer to train with."""
        return model, optimizer

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model as it was before `prepare`."""
        return model

    def autocast(self):
        """Around a forward pass: computes in `precision`."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def accumulate(self, model: nn.Module, is_last: bool):
        """Around a micro-batch: processes exchange their gradients only at the last one of an optimizer step."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to those that are there."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def clip_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
                       ) -> torch.Tensor:
        """The gradients' L2 norm () on the device; they are then scaled down to `max_norm`, if it is given."""
        if self.scaler:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Update the weights, unless norm or loss is not finite. False if fp16's loss scaler skipped the update."""
        if self.scaler is None:
            self.guard.check(norm)
            self.guard.step(optimizer)
            self.guard.count()
            return True
        self.guard.check(loss)  # gradients may overflow in fp16: the scaler skips that step and lowers its scale
        scale = self.scaler.get_scale()
        if not self.guard.failed:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.guard.count()
        return self.scaler.get_scale() >= scale  # the scale falls only when the step was skipped

    def gather(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows of all processes, one process after the other."""
        return arrays

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process has the flag set."""
        return flag

    def barrier(self) -> None:
        """Wait for the other processes."""

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """All weights, as the unwrapped model names them."""
        return model.state_dict()

    def local_weights(self, model: nn.Module) -> list[torch.Tensor]:
        """The weights, or this process's shards of them, which may be changed in place."""
        return list(model.parameters())

    def write_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save what `read_state` needs to continue. Every process calls both."""
        if self.is_main:
            with open(folder / "state.pt", "wb") as file:  # given a path, torch.save would hide why a write failed
                torch.save({"model": self.unwrap(model).state_dict(), "optimizer": optimizer.state_dict(),
                            "scaler": self.scaler.state_dict() if self.scaler else {}}, file)

    def read_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.unwrap(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Leave the process group, if there is one."""


def pick_device(name: str) -> torch.device:
    """The device that train_config.device names. Raises UserError if it is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, here in available.items() if here)
    if not available[name]:
        raise UserError(f"train_config.device is {name!r}, but torch {torch.__version__} finds no such device here: "
                        "use auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """no, bf16 or fp16; `auto` takes bf16 where the hardware supports it."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("train_config.mixed_precision (or, where that is auto, ACCELERATE_MIXED_PRECISION) is 'fp16', "
                        "which a CPU cannot train in: set train_config.mixed_precision to bf16 or no")
    if name in ("no", "bf16", "fp16"):
        return name
    if name != "auto":  # the configuration allows no such value, but a launcher may ask for one
        raise UserError(f"ACCELERATE_MIXED_PRECISION is {name!r}: choose one of no, bf16, fp16")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"
    return "no"


@functools.cache
def numba_works() -> bool:
    """Whether numba is here and shares the threads of torch, those of OpenMP. Others would wait for torch's, which stay
    busy for a while after their work: most of what the kernels gain would be lost."""
    try:
        import numba
    except ImportError:
        return False
    numba.config.THREADING_LAYER = "omp"
    threads = torch.get_num_threads()
    try:
        numba.set_num_threads(1)  # starts the threads
    except ValueError:
        say("numba is installed, but finds no OpenMP: training without its kernels (on Debian, apt install libgomp1)")
        return False
    torch.set_num_threads(threads)  # numba's start has changed their number
    return numba.threading_layer() == "omp"


def make_deterministic() -> None:
    """The same bits from the same command: on CUDA, some kernels are only deterministic when asked to be."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it only helps debugging, and costs time


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy and torch, as tensors and plain values that `weights_only` loading takes."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
