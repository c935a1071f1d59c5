"""main_accumulation.py under FSDP2 on CPU processes, which Accelerate itself only starts on GPUs.

    torchrun --nproc_per_node 2 tests/fsdp_worker.py [main_accumulation.py's arguments]

The weights are sharded by the same `fully_shard`, gathered over gloo, and saved and loaded by Accelerate.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["ACCELERATE_USE_FSDP"] = "true"

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType

import main
import main_accumulation
from suite.common import cli


def sharding_accelerator(mixed_precision: str, cpu: bool) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        state_dict_type="SHARDED_STATE_DICT", reshard_after_forward=True)
    return Accelerator(mixed_precision=mixed_precision, fsdp_plugin=plugin)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = cli.read_command(__doc__, accumulates=True)
    PartialState(cpu=True)  # gloo on CPUs; what follows lets the plugin in
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    main_accumulation.Accelerator = sharding_accelerator
    cli.run(lambda: main.main(command, main_accumulation.AcceleratedDevices))
