"""Where the arithmetic happens: one device in plain PyTorch.

The training loop asks for nothing but the methods of `SingleDevice`. main_accumulation.py puts Accelerate behind the
same methods, and that is all in which the two scripts differ.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils import Config, UserError


class SingleDevice:
    """One device in plain PyTorch."""

    num_processes = 1
    is_main = True

    def __init__(self, config: Config):
        self.device = pick_device(config.train_config.device)
        self.precision = pick_precision(config.train_config.mixed_precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self.watch()

    def __str__(self) -> str:
        return f"{self.device.type} ({self.precision if self.precision != 'no' else 'fp32'})"

    def main_process_first(self):
        """The main process does the work inside and fills the caches, the others follow."""
        return nullcontext()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return model, optimizer

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def accumulate(self, model: nn.Module, is_last: bool):
        """Around each micro-batch of a window: gradients need no exchange on one device."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def watch(self) -> None:
        """Look for numbers that are not finite from now on."""
        self.failed = torch.zeros((), device=self.device)  # 1 once a gradient was not finite
        self.good_steps = torch.zeros((), device=self.device)  # before that

    def clip_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
                       ) -> torch.Tensor:
        """Scale the gradients down to `max_norm` if it is given; returns their L2 norm before that, on the device."""
        if self.scaler:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Update the weights; False if fp16's loss scaler skipped the update because of an overflow."""
        self.look_at(loss if self.scaler else norm)  # fp16's scaler skips overflowing gradients, which is no failure
        if self.scaler is None:
            if self.may_step(optimizer):
                optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def look_at(self, number: torch.Tensor) -> None:
        """Remember on the device whether a number was not finite: asking here would wait for it in each step."""
        self.failed = torch.maximum(self.failed, (~number.isfinite()).float())
        self.good_steps += 1 - self.failed

    def may_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether to call optimizer.step(): never if this or an earlier step has failed."""
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self.failed  # the fused kernel reads it on the device, and then leaves all as it is
            return True
        return not self.failed

    def gather(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows of all processes, one process after the other."""
        return arrays

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def barrier(self) -> None:
        """Wait for the other processes."""

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """All weights, as the unwrapped model names them."""
        return model.state_dict()

    def close(self) -> None:
        """Part from the other processes."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model as it was before `prepare`."""
        return model

    def write_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save what `read_state` needs for going on; every process calls it."""
        if self.is_main:
            with open(folder / "state.pt", "wb") as file:  # a path would hide why a write failed
                torch.save({"model": self.unwrap(model).state_dict(), "optimizer": optimizer.state_dict(),
                            "scaler": self.scaler.state_dict() if self.scaler else {}}, file)

    def read_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.unwrap(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])


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
    """no, bf16 or fp16; `auto` takes bf16 where the device computes in it rather than emulating it."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("train_config.mixed_precision is 'fp16', which a CPU cannot train in: use auto, bf16 or no")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"
    return "no"


def make_deterministic() -> None:
    """The same bits from the same command: on CUDA, some kernels are only deterministic when asked to be."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it only helps debugging, and costs time
