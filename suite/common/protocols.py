"""What the training loop and a trained model ask of the devices that they run on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


class Devices(Protocol):
    """One device in plain PyTorch, or all those of Accelerate: `SingleDevice`, or main_accumulation.py's
    `AcceleratedDevices`."""

    device: torch.device  # of this process
    precision: str  # no, bf16 or fp16
    num_processes: int
    is_main: bool  # whether this process writes the files

    def main_process_first(self) -> AbstractContextManager:
        """The main process of each machine does the work inside and fills the caches, the others follow."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and optimizer to train with."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model as it was before `prepare`."""

    def autocast(self) -> AbstractContextManager:
        """Around a forward pass: computes in `precision`."""

    def accumulate(self, model: nn.Module, is_last: bool) -> AbstractContextManager:
        """Around a micro-batch: processes exchange their gradients only at the last one of an optimizer step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to those that are there."""

    def clip_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
                       ) -> torch.Tensor:
        """Scale the gradients down to `max_norm` if it is given; returns their L2 norm before that, on the device."""

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Update the weights, unless a number is not finite; False if fp16's loss scaler skipped the update."""

    def steps_before_failure(self) -> int | None:
        """How many optimizer steps were good before one that was not finite; None if all were. Waits for the device."""

    def gather(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows of all processes, one process after the other."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""

    def barrier(self) -> None:
        """Wait for the other processes."""

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""

    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """All weights, as the unwrapped model names them."""

    def write_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save what `read_state` needs to continue; every process calls it."""

    def read_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load what `write_state` has saved."""

    def close(self) -> None:
        """Part from the other processes."""
