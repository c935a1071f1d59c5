"""Dropout, attention and memory that cost less on a CPU than torch's own, at the same result within rounding.

torch draws one random number for each element of a dropout mask, from a slow generator. Here four elements share one
64-bit number of a fast generator, 16 bits each, whose seed comes from torch's. The rate is rounded to 1/65,536 and the
kept values are scaled by exactly that rate, so the expectation is the input; in bf16, the factor is rounded, as torch's
own is.
torch's fused attention has no dropout on a CPU, and its backward pass in bf16 is slow for short inputs; in both cases
`BlockAttention` takes its place. On a GPU and under torch.compile nothing is replaced, because fused kernels do both
there.
glibc gives the pages of large freed blocks back to the kernel, which fills them with zeros for the next block: that
takes time in every pass. Here the pages are kept. But tensors of many sizes leave holes between them, and the heap
grows, whether pages are kept or not. Between two passes most of it is free. So where the process has become larger by
half than it was after its first passes, all free pages are given back. No result depends on it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

LEVELS = 1 << 16  # values that 16 random bits take: in so many levels a dropout rate is rounded
OWN_ATTENTION = ("sdpa_cpu", "sdpa_numba")  # this file's, and that of suite/encoders/numba_layers.py
SHORT = 256  # tokens up to which `BlockAttention` in bf16 beats the fused kernel, measured in benchmarks/README.md,
SHORT_FORWARD = 2048  # and without a backward pass, on a CPU without AMX; one review's scores must fit into memory
BLOCK = 1 << 21  # scores computed at a time, 8 MB in fp32, so that they stay in the caches; one review's if it has more
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PASSES = 64  # forward passes after which memory has its usual size, and the least from one giving back to the next
GROWTH = 1.5  # of that size, more than which is given back

# ---------------------------------------------------------------------------------------------------------------------
# Dropout and attention


def new_generator() -> np.random.SFC64:
    return np.random.SFC64(torch.empty(1, dtype=torch.int64).random_().numpy())


def dropped_levels(rate: float) -> tuple[int, float]:
    """(how many of the LEVELS values of 16 bits are dropped at `rate`, 0 <= rate < 1; the factor that preserves the
    expectation)"""
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    return dropped, LEVELS / (LEVELS - dropped)


def draw(generator: np.random.SFC64, rate: float, kept: torch.Tensor) -> float:
    """Fill `kept` with 1, or with 0 at `rate`, 0 <= rate < 1. Returns the factor that preserves the expectation."""
    dropped, factor = dropped_levels(rate)
    count = kept.numel()
    bits = torch.from_numpy(generator.random_raw((count + 3) // 4).view(np.int16)[:count]).view(kept.shape)
    torch.ge(bits, dropped - LEVELS // 2, out=kept)  # a comparison into booleans takes three times as long
    return factor


def drop(tensor: torch.Tensor, rate: float) -> torch.Tensor:
    """`tensor` with its values zeroed at `rate`, 0 <= rate < 1, and the others scaled up; same shape and dtype."""
    kept = torch.empty(tensor.shape, dtype=tensor.dtype)
    factor = draw(new_generator(), rate, kept)
    return tensor * kept.mul_(factor)


class CPUDropout(nn.Dropout):
    """nn.Dropout by `drop`."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return drop(tensor, self.p) if self.training and self.p else tensor


class BlockAttention(torch.autograd.Function):
    """Scaled dot-product attention with dropout, (batch, heads, tokens, size) -> (batch, tokens, heads, size).

    Some reviews are computed at a time. Of all scores one tensor is kept for the backward pass, where autograd would
    keep three: half of each probability, with a minus sign where it was dropped.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None,
                scaling: float, rate: float) -> torch.Tensor:
        """`bias`, (batch, 1 or heads, 1 or tokens, keys), is added to the scores; `rate`: of dropout, 0 <= rate < 1."""
        batch, heads, tokens, _ = query.shape
        shape = batch, heads, tokens, key.shape[2]
        context = query.new_empty(batch, tokens, heads, value.shape[3])
        halves = query.new_empty(shape) if any(ctx.needs_input_grad) else None
        generator, factor = new_generator() if rate else None, 1.0
        for rows, probabilities, kept in blocks(shape, query.dtype):
            q, k, v = (tensor[rows].flatten(0, 1) for tensor in (query, key, value))
            torch.bmm(q * scaling, k.mT, out=probabilities)
            if bias is not None:
                probabilities.unflatten(0, (-1, heads)).add_(bias[rows])
            torch.softmax(probabilities, dim=-1, out=probabilities)
            if rate:
                factor = draw(generator, rate, kept)
                kept.mul_(probabilities)
            else:
                kept = probabilities
            if halves is not None:
                torch.sub(kept, probabilities, alpha=0.5, out=halves[rows].flatten(0, 1))
            context[rows] = (kept @ v).mul_(factor).unflatten(0, (-1, heads)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, halves, context)
        ctx.scaling, ctx.factor = scaling, factor
        return context

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, halves, context = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        sums = (gradient * context).sum(dim=-1, keepdim=True).transpose(1, 2)  # of probability x its gradient
        gradient = gradient.transpose(1, 2) * (2 * ctx.factor)  # twice, for `halves`
        for rows, kept, of_scores in blocks(halves.shape, query.dtype):
            q, k, v, g, half = (tensor[rows].flatten(0, 1) for tensor in (query, key, value, gradient, halves))
            torch.clamp_min(half, 0, out=kept)
            of_value[rows] = (kept.mT @ g).view_as(of_value[rows])
            torch.bmm(g, v.mT, out=of_scores).mul_(kept)
            of_scores.addcmul_(torch.abs(half, out=kept), sums[rows].flatten(0, 1), value=-2)
            of_query[rows] = (of_scores @ k).mul_(ctx.scaling).view_as(of_query[rows])
            of_key[rows] = (of_scores.mT @ q).mul_(ctx.scaling).view_as(of_key[rows])
        return of_query, of_key, of_value, None, None, None


def blocks(shape: tuple[int, int, int, int], dtype: torch.dtype
           ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Reviews whose scores make up one block, and two tensors (reviews x heads, tokens, keys) that are used again."""
    batch, heads, tokens, keys = shape
    reviews = min(batch, max(1, BLOCK // (heads * tokens * keys)))
    buffers = torch.empty(2, reviews * heads, tokens, keys, dtype=dtype)
    for start in range(0, batch, reviews):
        stop = min(start + reviews, batch)
        yield slice(start, stop), *buffers[:, :(stop - start) * heads]


def cpu_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs
                  ) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, (batch, heads, tokens, size) -> (batch, tokens, heads, size)."""
    short = SHORT if torch.is_grad_enabled() else 0 if has_fast_fused_attention() else SHORT_FORWARD
    is_slow_fused = query.dtype == torch.bfloat16 and key.shape[2] <= short
    is_plain = kwargs.get("position_bias") is None and key.shape[:2] == query.shape[:2]
    if not (dropout or is_slow_fused) or not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=value.dtype)  # shared by all heads
        bias = bias.masked_fill_(~attention_mask, torch.finfo(bias.dtype).min).expand(len(query), -1, -1, -1)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast may have left them in fp32
    return BlockAttention.apply(query, key, value, bias, scaling or query.shape[-1] ** -0.5, dropout), None


def has_fast_fused_attention() -> bool:
    """Whether torch's fused attention multiplies in bf16 by AMX. Without a backward pass, it is the fastest then."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


AttentionInterface.register("sdpa_cpu", cpu_attention)
AttentionMaskInterface.register("sdpa_cpu", sdpa_mask)  # of booleans: True where a token may be read


def use_cpu_kernels(model: nn.Module) -> None:
    """Let every dropout of `model`, those inside of the attention of `model.encoder` included, use `drop`."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CPUDropout(child.p).train(child.training))
    if model.encoder.config._attn_implementation == "sdpa":
        model.encoder.config._attn_implementation = "sdpa_cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Freed memory


class FreedMemory:
    """Called before each forward pass of a model: gives free pages back where the process has grown."""

    def __init__(self):
        self.passes, self.limit = 0, None

    def __call__(self, *_) -> None:
        self.passes += 1
        if self.passes < PASSES:
            return
        pages = own_pages()
        if self.limit is None:
            self.limit = GROWTH * pages
        elif pages > self.limit:
            ctypes.CDLL(None).malloc_trim(0)
            self.passes = 0


def own_pages() -> int:
    """The pages of memory that this process shares with no other, on Linux."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(resident) - int(shared)


def keep_freed_memory(model: nn.Module) -> None:
    """For the passes of `model`. Nothing is changed without glibc, or where the environment says how to allocate."""
    is_told = "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_told:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks by itself,
        libc.mallopt(M_MMAP_MAX, 0)  # and large tensors lie in it, too
        model.register_forward_pre_hook(FreedMemory())
