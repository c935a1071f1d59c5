"""Which kind of CPU the tests run on, as far as torch says: one that computes in bf16 without AMX, or in fp32 alone.

This folder stands in PYTHONPATH. So torch calls `pretend` at the end of its import, in the tests' own process and in
every process that they start: it finds the function by the folder's entry point of the group `torch.backends`.
"""

import os
from types import MappingProxyType


def pretend() -> None:
    import torch

    real = dict(torch.cpu.get_capabilities())

    def get_capabilities():
        computes = os.environ["CPU_OF_TESTS"] == "bf16"  # a test may change it
        return MappingProxyType(real | {"avx512_bf16": computes, "amx_bf16": False})

    torch.cpu.get_capabilities = get_capabilities
