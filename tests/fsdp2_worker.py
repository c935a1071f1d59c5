"""main_accumulation.py under FSDP2 on CPU processes, which Accelerate itself only starts on GPUs.

    accelerate launch --config_file launch/fsdp2.yaml --num_processes 2 tests/fsdp2_worker.py [its arguments]

The weights are sharded by the same `fully_shard`, gathered over gloo, and saved and loaded by Accelerate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

import main
import main_accumulation
from suite.common import cli


def sharding_accelerator(mixed_precision: str, cpu: bool) -> Accelerator:
    return Accelerator(mixed_precision=mixed_precision)  # the launcher's environment says how to shard


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = cli.read_command(__doc__, accumulates=True)
    PartialState(cpu=True)  # gloo on CPUs; what follows lets the plugin in
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    main_accumulation.Accelerator = sharding_accelerator
    cli.run_with_exit_code(lambda: main.main(command, main_accumulation.AcceleratedDevices))
