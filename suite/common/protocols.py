"""What the training loop and a trained model ask of the devices that they run on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from torch.optim import Optimizer


class Devices(Protocol):
    """`SingleDevice`, one device in plain PyTorch, or main_accumulation.py's `AcceleratedDevices`."""

    device: torch.device  # of this process
    precision: str  # no, bf16 or fp16
    kind: str  # device and precision: cpu (bf16)
    num_processes: int
    is_main: bool  # whether this process writes the files

    # Returns the model and the optimizer to train with.
    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]: ...
    # Returns the model as it was before `prepare`.
    def unwrap(self, model: nn.Module) -> nn.Module: ...

    # Around a forward pass: computes in `precision`.
    def autocast(self) -> AbstractContextManager: ...
    # Around a micro-batch: processes exchange their gradients only at the last one of an optimizer step.
    def accumulate(self, model: nn.Module, is_last: bool) -> AbstractContextManager: ...
    # Adds the loss's gradients to those that are there.
    def backward(self, loss: torch.Tensor) -> None: ...
    # Returns the gradients' L2 norm () on the device, and then scales them down to `max_norm`, if it is given.
    def clip_gradients(self, model: nn.Module, optimizer: Optimizer, max_norm: float | None) -> torch.Tensor: ...
    # Updates the weights, unless norm or loss is not finite. Returns False if fp16's loss scaler skipped the update.
    def step(self, optimizer: Optimizer, norm: torch.Tensor, loss: torch.Tensor) -> bool: ...
    # Returns how many optimizer steps were finite before one was not; None if all were. Waits for the device.
    def steps_before_failure(self) -> int | None: ...
    # Waits for the device, before a clock is read.
    def synchronize(self) -> None: ...

    # Returns the rows of all processes, one process after the other.
    def gather(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]: ...
    # Returns the sum over processes.
    def total(self, tensor: torch.Tensor) -> torch.Tensor: ...
    # Returns whether any process has the flag set.
    def any(self, flag: bool) -> bool: ...
    # Waits for the other processes.
    def barrier(self) -> None: ...
    # Around filling a cache: one process of each machine goes first.
    def main_process_first(self) -> AbstractContextManager: ...
    # Parts from the other processes.
    def close(self) -> None: ...

    # Returns all weights, as the unwrapped model names them.
    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]: ...
    # Saves what `read_state` needs to continue. Every process calls both.
    def write_state(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None: ...
    def read_state(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None: ...
