"""What a launcher was asked for, and what its environment variables make of Accelerate."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import psutil

from utils import UserError, num_processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

# The words before the options of `accelerate launch`, in the command line of its process, divided by NUL
LAUNCH = re.compile(r"(^|[\0/])(accelerate\0launch|accelerate-launch|accelerate[.]commands[.]launch"
                    r"|accelerate[.]commands[.]accelerate_cli\0launch)\0")


def refuse_lost_processes() -> None:
    """Raises UserError if `accelerate launch` has started another number of processes than it was asked for.

    Accelerate 1.15 starts one, without a word, where it sees no second GPU or its file names one device or CPUs.
    """
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # no parent, or one that nobody may look at
        return
    asked, started = asked_processes(words), num_processes()
    if asked not in (None, started):
        raise UserError(f"accelerate launch was asked for {asked} processes and has started {started}: give it "
                        "--multi_gpu, which starts them on CPUs, too (leave out --cpu); --num_processes counts those "
                        "of all machines")


def asked_processes(words: list[str]) -> int | None:
    """The number of processes that a command line of `accelerate launch`, or else its file, asks for.

    None if it leaves the number to the machine, or is another program's.
    """
    line = "\0".join(words)
    if (found := LAUNCH.search(line)) is None:
        return None
    from accelerate.commands.config import config_args  # these import torch
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(line[found.end():].split("\0"))
    has_file = given.config_file or os.path.isfile(config_args.default_config_file) and not given.cpu
    if given.num_processes is not None or not has_file:
        return given.num_processes
    return getattr(config_args.load_config_from_file(given.config_file), "num_processes", None)


def is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "t", "y")  # as Accelerate reads it


def asked_sharding() -> str | None:
    """What the launcher asks for, FSDP or DeepSpeed; None if neither."""
    return next((name for name in ("FSDP", "DEEPSPEED") if is_true(f"ACCELERATE_USE_{name}")), None)


def refuse_other_settings(accelerator: Accelerator, device: torch.device) -> None:
    """Raises UserError if environment variables have made of `accelerator` what the training loop does not rely on.

    docs/accumulation.md says of every variable that Accelerate 1.15 reads what it means here. They are read when an
    `Accelerator` is made: those that `accelerate launch` sets from its options and its file, and those that stand in
    the environment anyway.
    """
    from accelerate.utils import DistributedType, DynamoBackend  # these import torch
    from torch.distributed.fsdp import StateDictType

    state = accelerator.state
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), state.deepspeed_plugin
    wrapping = "use DDP, launch/fsdp2.yaml or launch/deepspeed.yaml instead"
    settings = {  # the variable: what has become of it, what the loop relies on, what to do instead
        # Accelerate's `backward` would divide by it; train_step has already divided by the effective batch.
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (accelerator.gradient_accumulation_steps, 1,
                                                   "use train_config.gradient_accumulation_steps instead"),
        "ACCELERATE_DYNAMO_BACKEND": (state.dynamo_plugin.backend, DynamoBackend.NO,
                                      "use train_config.compile=true instead"),
        "ACCELERATE_FP8_BACKEND": (accelerator.fp8_backend, "NO", "use train_config.mixed_precision=bf16 instead"),
        "ACCELERATE_TORCH_DEVICE": (os.environ.get("ACCELERATE_TORCH_DEVICE"), None, "use train_config.device instead"),
        "ACCELERATE_USE_CPU": (is_true("ACCELERATE_USE_CPU") and device.type != "cpu", False,
                               "use train_config.device=cpu"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": (accelerator.parallelism_config, None, wrapping),
        "ACCELERATE_USE_MEGATRON_LM": (accelerator.distributed_type == DistributedType.MEGATRON_LM, False, wrapping),
    }
    if fsdp is not None:
        settings |= {
            "FSDP_VERSION": (fsdp.fsdp_version, 2, "use 2, as launch/fsdp2.yaml does"),
            "FSDP_ACTIVATION_CHECKPOINTING": (fsdp.activation_checkpointing, False,
                                              "use train_config.gradient_checkpointing=true instead"),
            "FSDP_IGNORED_MODULES": (fsdp.ignored_modules, None, "unset it, or their gradients are not exchanged"),
            "FSDP_STATE_DICT_TYPE": (fsdp.state_dict_type, StateDictType.SHARDED_STATE_DICT,
                                     "use SHARDED_STATE_DICT, or a run with SGD cannot be continued"),
        }
    if deepspeed is not None:
        lacks_weights = deepspeed.zero_stage == 3 and not deepspeed.zero3_save_16bit_model
        settings |= {
            # It may hold anything: other steps, another precision, another optimizer.
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": (os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"), None,
                                                 "use launch/deepspeed.yaml instead"),
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (lacks_weights, False,
                                                            "use true, or ZeRO 3 cannot save the best model"),
        }
    wrong = [f"{variable}={os.environ.get(variable, '')}: {fix}"
             for variable, (found, right, fix) in settings.items() if found != right]
    if wrong:
        raise UserError("this suite does not train with these settings of Accelerate, which come from the environment, "
                        f"the options of accelerate launch, or its file: {'; '.join(wrong)}")
