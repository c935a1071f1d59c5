"""What mixed_precision=auto decides: fp32 or bf16 by the CPU, in each process, and for a whole run.

These tests hold two promises: the same command ends with the same bits after a stop, and an optimizer step is the mean
over its effective batch, on either kind of CPU.
"""

import subprocess
import sys

import torch

from suite.training.devices import pick_precision

PICKED = {"fp32": "no", "bf16": "bf16"}
READER = """
import torch
from suite.training.devices import pick_precision
print(pick_precision("auto", torch.device("cpu")))
"""


def test_the_tests_and_their_children_believe_in_the_same_cpu(cpu):
    """Or tests in automatic precision would prove one kind of CPU alone, that of the machine."""
    child = subprocess.run([sys.executable, "-c", READER], capture_output=True, text=True, check=True)
    assert (pick_precision("auto", torch.device("cpu")), child.stdout.strip()) == (PICKED[cpu], PICKED[cpu])
