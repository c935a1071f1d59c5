"""Functions and modules that train by the kernels of suite/encoders/numba_kernels.py, on a CPU that computes in bf16.

Nothing but training in bf16 comes here: evaluation and prediction give the same bits with and without numba.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.bert.modeling_bert import BertOutput

from suite.encoders.cpu_kernels import blocks, cpu_attention, dropped_levels
from utils import PROJECT, UserError


def from_cache() -> ModuleType:
    """The kernels, as they lie in numba's cache. A process of its own has compiled them, where they were not there yet.

    The process that compiles a kernel runs code that rounds in other places than what it leaves in the cache (numba
    0.68.1). So a run that was stopped and goes on would end with other bits. Raises UserError if there is no cache.
    """
    child = subprocess.run([sys.executable, "-c", "import suite.encoders.numba_kernels"], cwd=PROJECT,
                           capture_output=True, text=True, check=False)
    if child.returncode == 0:
        from suite.encoders import numba_kernels

        if not any(kernel.stats.cache_misses for kernel in vars(numba_kernels).values() if hasattr(kernel, "stats")):
            return numba_kernels
    reason = (child.stderr.strip().splitlines() or ["they are not where they were written"])[-1]
    raise UserError(f"numba's compiled kernels cannot be kept ({reason}): set NUMBA_CACHE_DIR to a folder that can be "
                    "written, or train without numba (pip uninstall numba)")


kernels = from_cache()

# ---------------------------------------------------------------------------------------------------------------------
# Differentiable functions of tensors


def call(kernel: Callable, *arguments: Any) -> None:
    """A kernel of contiguous tensors and numbers, in as many threads as torch takes."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    kernel(*(bits(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments))


def bits(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def dropout_numbers(rate: float) -> tuple[float, int, int]:
    """(factor, dropped, seed) of a kernel, for 0 <= rate < 1."""
    dropped, factor = dropped_levels(rate)
    return factor, dropped, int(torch.empty((), dtype=torch.int64).random_())


class Attention(torch.autograd.Function):
    """`BlockAttention` in bf16, of (batch, heads, tokens, size) -> (batch, tokens, heads, size)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor,
                scaling: float, rate: float) -> torch.Tensor:
        """`mask`: (1 or batch, 1 or tokens, keys) of booleans; `rate`: of dropout, 0 <= rate < 1."""
        batch, heads, tokens, _ = query.shape
        signed = query.new_empty(batch, heads, tokens, key.shape[2])
        context = query.new_empty(batch, tokens, heads, value.shape[3])
        for rows, kept, _ in blocks(signed.shape, query.dtype):
            q, k, v, scores = (tensor[rows].flatten(0, 1) for tensor in (query, key, value, signed))
            factor, *numbers = dropout_numbers(rate)
            torch.bmm(q, k.mT, out=scores)
            call(kernels.softmax_dropout, scores.flatten(0, 1), kept.flatten(0, 1),
                 mask[rows] if len(mask) > 1 else mask, scaling, factor, *numbers)
            context[rows] = (kept @ v).unflatten(0, (-1, heads)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, signed)
        ctx.scaling, ctx.factor = scaling, factor
        return context

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        gradient = gradient.transpose(1, 2)
        for rows, kept, of_scores in blocks(signed.shape, query.dtype):
            q, k, v, g = (tensor[rows].flatten(0, 1) for tensor in (query, key, value, gradient))
            torch.bmm(g, v.mT, out=of_scores)
            call(kernels.softmax_dropout_backward, of_scores.flatten(0, 1), signed[rows].flatten(0, 2),
                 kept.flatten(0, 1), ctx.scaling, ctx.factor)
            of_value[rows] = (kept.mT @ g).view_as(of_value[rows])
            of_query[rows] = (of_scores @ k).view_as(of_query[rows])
            of_key[rows] = (of_scores.mT @ q).view_as(of_key[rows])
        return of_query, of_key, of_value, None, None, None


class DropoutAddNorm(torch.autograd.Function):
    """LayerNorm(residual + dropout(hidden)) in float32 and in bf16; `hidden` (..., width) bf16, all else float32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
                eps: float, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = hidden.contiguous(), residual.contiguous()
        total, normed, narrowed = (torch.empty_like(tensor) for tensor in (residual, residual, hidden))
        mean, scale = residual.new_empty(2, residual[..., 0].numel())
        ctx.numbers = dropout_numbers(rate)
        call(kernels.dropout_add_norm, hidden.flatten(0, -2), residual.flatten(0, -2), weight, bias, eps, *ctx.numbers,
             total.flatten(0, -2), mean, scale, normed.flatten(0, -2), narrowed.flatten(0, -2))
        ctx.save_for_backward(total, mean, scale, weight)
        return normed, narrowed

    @staticmethod
    def backward(ctx: Any, of_normed: torch.Tensor, of_narrowed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, mean, scale, weight = ctx.saved_tensors
        of_residual, of_hidden = torch.empty_like(total), torch.empty_like(total, dtype=torch.bfloat16)
        sums = total.new_zeros(kernels.BLOCKS, 2, total.shape[-1])
        call(kernels.dropout_add_norm_backward, of_normed.contiguous().flatten(0, -2),
             of_narrowed.contiguous().flatten(0, -2), total.flatten(0, -2), mean, scale, weight, *ctx.numbers,
             of_residual.flatten(0, -2), of_hidden.flatten(0, -2), sums)
        return of_hidden, of_residual, *sums.sum(dim=0), None, None


class GELU(torch.autograd.Function):
    """torch's GELU forwards, of a contiguous tensor in bf16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        x, = ctx.saved_tensors
        result = torch.empty_like(x)
        call(kernels.gelu_backward, gradient.contiguous().flatten(), x.flatten(), result.flatten())
        return result


# ---------------------------------------------------------------------------------------------------------------------
# A model that trains by them


def numba_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs
                    ) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, (batch, heads, tokens, size) -> (batch, tokens, heads, size)."""
    is_plain = (kwargs.get("position_bias") is None and key.shape[:2] == query.shape[:2]
                and (attention_mask is None or attention_mask.shape[1] == 1))
    if not (module.training and value.dtype == torch.bfloat16 and is_plain):
        return cpu_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:
        mask = torch.ones(1, 1, key.shape[2], dtype=torch.bool)
    else:  # transformers repeats a row for all tokens, where it can, without copying it
        mask = attention_mask[:, 0, :1 if attention_mask.stride(2) == 0 else None].contiguous()
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast may have left them in fp32
    return Attention.apply(query, key, value, mask, scaling or query.shape[-1] ** -0.5, dropout), None


AttentionInterface.register("sdpa_numba", numba_attention)
AttentionMaskInterface.register("sdpa_numba", sdpa_mask)


def output_forward(self: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    """BertOutput.forward, (..., width) -> (..., width). The result carries its copy in bf16, for `take_bf16`."""
    hidden, norm = self.dense(hidden_states), self.LayerNorm
    if not (self.training and hidden.dtype == torch.bfloat16 and input_tensor.dtype == torch.float32):
        return norm(self.dropout(hidden) + input_tensor)
    normed, normed.in_bf16 = DropoutAddNorm.apply(hidden, input_tensor, norm.weight, norm.bias, norm.eps,
                                                  self.dropout.p)
    return normed


def take_bf16(linear: nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Called before a matrix product, which autocast would begin with a cast of its input."""
    return (getattr(inputs[0], "in_bf16", inputs[0]),)


def gelu_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    is_ours = self.training and x.dtype == torch.bfloat16 and x.is_contiguous()
    return GELU.apply(x) if is_ours else nn.functional.gelu(x)


def use_numba_kernels(model: nn.Module) -> None:
    """Let `model.encoder`, which `use_cpu_kernels` has changed, train by these kernels where it computes in bf16."""
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(take_bf16)
        elif type(module) is GELUActivation and module.act is nn.functional.gelu:
            module.forward = functools.partial(gelu_forward, module)
        elif does_as(module, BertOutput):
            module.forward = functools.partial(output_forward, module)
    if model.encoder.config._attn_implementation == "sdpa_cpu":
        model.encoder.config._attn_implementation = "sdpa_numba"


def does_as(module: nn.Module, other: type[nn.Module]) -> bool:
    """Whether a module's class, as transformers copies them from family to family, has the `forward` of `other`."""
    own, its = type(module).forward.__code__, other.forward.__code__
    return (own.co_code, own.co_names, own.co_consts) == (its.co_code, its.co_names, its.co_consts)
