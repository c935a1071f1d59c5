"""Fine-tune a Transformer encoder under Accelerate: large effective batches, mixed precision, several devices.

    python main_accumulation.py train_config.gradient_accumulation_steps=4   4 micro-batches of 64: batches of 256
    python main_accumulation.py train_config.effective_batch_size=1024       16 of them, asked for by their sum
    python main_accumulation.py --mode test                                  evaluate the best model of that run again
    accelerate launch --multi_gpu --num_processes 2 main_accumulation.py --mode predict --input FILE --output FILE
                                                                             label the rows of a file
    accelerate launch --multi_gpu --num_processes 2 main_accumulation.py     several devices, or machines
    torchrun --nproc_per_node 2 main_accumulation.py train_config.device=cpu     2 processes on a CPU

The loop is main.py's, line by line. `AcceleratedDevices` is all that differs: Accelerate wraps model and optimizer,
backpropagates, exchanges gradients only at the last micro-batch of an optimizer step, and gathers over the processes.
"""

from suite.common import cli

if __name__ == "__main__":
    cli.begin()
    COMMAND = cli.read_command(__doc__, accumulates=True)  # a wrong value is refused before torch's slow import

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.environment import get_cpu_distributed_information
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import unset_hf_deepspeed_config

from main import main
from suite.common.devices import Devices, FiniteGuard, pick_device, pick_precision
from suite.common.launcher import asked_sharding, is_true, refuse_other_settings
from suite.encoders.placement import layer_classes
from utils import Config, UserError, brief, num_processes


class AcceleratedDevices(Devices):
    """The devices that `accelerate launch` or torchrun gives to this run, one process each."""

    def __init__(self, config: Config):
        # What a launcher's environment says counts where the configuration leaves it open.
        name, precision = config.train_config.device, config.train_config.mixed_precision
        if name == "auto" and is_true("ACCELERATE_USE_CPU"):
            name = "cpu"
        if precision == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
            precision = os.environ["ACCELERATE_MIXED_PRECISION"]
        device = pick_device(name)
        self.precision, self.is_compiled = pick_precision(precision, device), config.train_config.compile
        # MPI counts its processes by other variables. Accelerate would join them, after the configuration counted one.
        if (found := get_cpu_distributed_information().world_size) != num_processes():
            raise UserError(f"Accelerate would join {found} processes, but the environment variable WORLD_SIZE stands "
                            f"for {num_processes()}: start them with torchrun")
        asked = asked_sharding()
        on_gpus_only = (f"{asked} is asked for, and Accelerate starts it on GPUs only: leave out the launcher's "
                        "--config_file, and DDP runs on CPUs")
        if asked == "DEEPSPEED" and config.train_config.ema_decay is not None:
            raise UserError(f"train_config.ema_decay is {config.train_config.ema_decay}, but DeepSpeed's engine keeps "
                            "the weights to itself: set it to null, or use DDP or launch/fsdp2.yaml")
        try:
            self.accelerator = Accelerator(mixed_precision=self.precision, cpu=device.type == "cpu")
        except (ValueError, ImportError, RuntimeError) as error:
            raise UserError(on_gpus_only if asked and device.type == "cpu" else
                            f"Accelerate cannot work as its environment variables say ({brief(error)}): correct them, "
                            "or start with accelerate launch") from error
        refuse_other_settings(self.accelerator, device)
        if asked and not self.is_sharded:
            raise UserError(on_gpus_only)
        self.device, self.scaler = self.accelerator.device, self.accelerator.scaler
        self.num_processes = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        # Flags travel over the network, not over the GPUs, which would first have to finish what they are doing.
        self.flags = torch.distributed.new_group(backend="gloo") if self.num_processes > 1 else None
        self.guard = FiniteGuard(self.device)
        if (plugin := getattr(self.accelerator.state, "fsdp_plugin", None)) is not None:
            # Accelerate's would round gradients, loss and logits to bf16: autocast alone lowers the precision, as in
            # DDP.
            plugin.mixed_precision_policy = None
        if (plugin := self.accelerator.state.deepspeed_plugin) is not None:
            plugin.deepspeed_config |= {  # its engine clips by itself, and asks for a micro-batch size that it ignores
                "gradient_clipping": config.train_config.max_grad_norm or 0.0,
                "train_micro_batch_size_per_gpu": config.data_config.batch_size}
            unset_hf_deepspeed_config()  # or, with ZeRO 3, transformers would build the model in shards

    def __str__(self) -> str:
        sharding = f", {self.accelerator.distributed_type.value}" if self.is_sharded else ""
        return f"{self.num_processes} x {self.kind}{sharding}"

    def main_process_first(self):
        return self.accelerator.local_main_process_first()  # of each machine: its caches may be on a disk of its own

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            # FSDP2 shards these classes. transformers names BERT's embeddings, too, which Accelerate shards by itself.
            model._no_split_modules = layer_classes(model)
        return self.accelerator.prepare(model, optimizer)

    def autocast(self):
        return self.accelerator.autocast()

    @contextmanager
    def accumulate(self, model: nn.Module, is_last: bool):
        self.accelerator.sync_gradients = is_last  # DeepSpeed's engine and the wrapped optimizer read it
        if is_last:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
                       ) -> torch.Tensor:
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return torch.as_tensor(0.0 if norm is None else norm)  # None: DeepSpeed's engine clips its own gradients

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        # In fp16 gradients may overflow, so the loss is looked at: that of all processes, for all must decide alike.
        self.guard.check(self.total(loss) if self.scaler else norm.to(self.device))
        scale = self.scaler.get_scale() if self.scaler else 1.0
        if self.scaler and self.guard.failed:
            self.scaler.update()  # ends the step that clip_gradients has begun
        elif self.scaler or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            optimizer.step()  # these look for overflows themselves
        else:
            self.guard.step(optimizer, fused=not self.is_sharded)  # the fused kernel takes no `found_inf` beside shards
        self.guard.count()
        if self.scaler:
            return self.scaler.get_scale() >= scale  # Accelerate does not see what a fused optimizer skips
        return not self.accelerator.optimizer_step_was_skipped

    def gather(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(column) for column in zip(*gather_object([arrays]), strict=True))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def any(self, flag: bool) -> bool:
        if self.flags is None:
            return flag
        raised = torch.tensor(int(flag))
        torch.distributed.all_reduce(raised, group=self.flags)
        return bool(raised > 0)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return self.accelerator.get_state_dict(model)

    def close(self) -> None:
        self.accelerator.end_training()

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only: then Accelerate saves and loads them."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def local_weights(self, model: nn.Module) -> list[torch.Tensor]:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation, the root would keep what it has gathered
        return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]

    def write_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.is_sharded:
            self.accelerator.save_state(str(folder / "accelerate"))
        else:
            super().write_state(folder, model, optimizer)

    def read_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.is_sharded:
            self.accelerator.load_state(str(folder / "accelerate"))
        else:
            super().read_state(folder, model, optimizer)


if __name__ == "__main__":
    cli.run_with_exit_code(lambda: main(COMMAND, AcceleratedDevices))
