"""The memory of freed tensors, kept for the next tensors, on a CPU with glibc.

glibc gives the pages of large freed blocks back to the kernel, which fills them with zeros for the next block: that
takes time in every pass. Here the pages are kept. But tensors of many sizes leave holes between them, and the heap
grows, whether pages are kept or not. Between two passes most of it is free. So where the process has become larger by
half than it was after its first passes, all free pages are given back. No result depends on it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from torch import nn

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PASSES = 64  # forward passes after which memory has its usual size, and the least from one giving back to the next
GROWTH = 1.5  # of that size, more than which is given back


class FreedMemory:
    """Called before each forward pass of a model."""

    def __init__(self):
        self.passes, self.limit = 0, None

    def __call__(self, *_) -> None:
        self.passes += 1
        if self.passes < PASSES or (pages := own_pages()) is None:
            return
        if self.limit is None:
            self.limit = GROWTH * pages
        elif pages > self.limit:
            ctypes.CDLL(None).malloc_trim(0)
            self.passes = 0


def own_pages() -> int | None:
    """The pages of memory that this process shares with no other; None where nobody can tell."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no /proc, or no descriptor left
        return None
    return int(resident) - int(shared)


def keep_freed_memory(model: nn.Module) -> None:
    """For the passes of `model`. Nothing is changed without glibc, or where the environment says how to allocate."""
    is_told = "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_told and own_pages() is not None:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks by itself,
        libc.mallopt(M_MMAP_MAX, 0)  # and large tensors lie in it, too
        model.register_forward_pre_hook(FreedMemory())
