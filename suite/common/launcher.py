"""How many processes `accelerate launch` was asked for, where it has started this one."""

from __future__ import annotations

import os
import re

import psutil

from utils import UserError, num_processes

# On the command line of the launcher's process, its words divided by NUL: what stands before its options
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
                        "--multi_gpu, which starts them on CPUs, too (leave out --cpu), or start them with torchrun "
                        "--nproc_per_node; --num_processes counts those of all machines, as many on each")


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
