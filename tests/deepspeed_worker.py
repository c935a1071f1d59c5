"""main_accumulation.py under DeepSpeed on CPU processes, which Accelerate itself only starts on GPUs.

    accelerate launch --config_file launch/deepspeed.yaml --num_processes 2 tests/deepspeed_worker.py [its arguments]

The engine, its optimizer, its exchange over gloo and its saved states are DeepSpeed's own.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from deepspeed import comm

import main
import main_accumulation
from suite.common import cli


def engine_accelerator(mixed_precision: str, cpu: bool) -> Accelerator:
    return Accelerator(mixed_precision=mixed_precision)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = cli.read_command(__doc__, accumulates=True)
    PartialState(cpu=True)  # gloo on CPUs; what follows lets the engine in
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    main_accumulation.Accelerator = engine_accelerator
    cli.run_with_exit_code(lambda: main.main(command, main_accumulation.AcceleratedDevices))
