"""Elementwise passes of a training step in bf16 on a CPU, each once over the memory, compiled by numba.

What stands between two matrix products takes torch many passes: scores, softmax, random bits, mask and product; or
dropout, sum, layer norm and the casts between float32 and bf16. Here each is one loop over rows. This module needs
the packages of requirements-fast.txt; without them a run takes the path of suite/encoders/cpu_kernels.py. Nothing but
training in bf16 comes here: evaluation and prediction give the same bits with and without numba.

numba knows no bf16, so its kernels work on int16 arrays of the same bits and compute in float32. Dropout draws 16
random bits for each element from splitmix64 (Steele, Lea and Flood, 2014) of a counter, so that a backward pass can
draw the same mask again; the seed comes from torch's generator. Rows are cut into `BLOCKS` blocks, however many threads
share them, so no result depends on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import nn
from transformers import AttentionInterface
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.bert.modeling_bert import BertOutput

from suite.encoders.cpu_kernels import STEPS, blocks, cpu_attention

BLOCKS = 64
I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
f32, i16, u64 = np.float32, np.int16, np.uint64
SIGN = i16(-32768)  # the sign bit of a bf16 value

# ---------------------------------------------------------------------------------------------------------------------
# What the kernels are made of

kernel = njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
inline = njit(fastmath=True, cache=True, error_model="numpy")


@intrinsic
def widen(context, bits):
    """bf16 -> float32"""
    return types.float32(types.int16), lambda c, b, s, a: b.bitcast(b.shl(b.zext(a[0], I32), I32(16)), F32)


@intrinsic
def narrow(context, x):
    """float32 -> bf16, to the nearest, ties to even, as torch rounds"""
    def code(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, I32(16)), I16)
    return types.int16(types.float32), code


@intrinsic
def power_of_two(context, n):
    """2 ** n as float32, for an int32 n from -126 to 127; 0 for n = -127"""
    return types.float32(types.int32), lambda c, b, s, a: b.bitcast(b.shl(b.add(a[0], I32(127)), I32(23)), F32)


@intrinsic
def larger(context, x, y):
    """Unlike a loop with max(), one with this is vectorized."""
    def code(context, builder, signature, arguments):
        function = builder.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return builder.call(function, arguments, fastmath=("fast",))
    return types.float32(types.float32, types.float32), code


@inline
def exp(x):
    """For x <= 0, with a relative error below 1e-6. Below -87 it is 0, never a denormal number, which would be slow."""
    t = larger(x * f32(1.44269504), f32(-127))
    n = np.int32(t - f32(0.5))
    f, p = t - f32(n), f32(1.3333558e-3)
    for c in (f32(9.6181291e-3), f32(5.5504109e-2), f32(2.4022651e-1), f32(6.9314718e-1), f32(1)):
        p = p * f + c
    return p * power_of_two(n)


@inline
def draw(words, seed, row):
    """Random bits of a row, 4 x 16 in each of the uint64 `words`."""
    for i in range(len(words)):
        z = (u64(seed) + u64(row * len(words) + i)) * u64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
        words[i] = z ^ (z >> u64(31))


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. `dropped`: of the STEPS values that 16 random bits take; `factor`: STEPS / (STEPS - dropped)


@kernel
def softmax_dropout(scores, kept, mask, scaling, factor, dropped, seed):
    """scores (reviews x heads x tokens, keys) bf16 become probabilities, with a minus sign where they are dropped;
    `kept`: probabilities x factor, or 0. `mask`: (1 or reviews, 1 or tokens, keys), which keys a token may read."""
    rows, keys = scores.shape
    reviews, tokens = mask.shape[0], mask.shape[1]
    limit, scaling, factor = i16(dropped - STEPS // 2), f32(scaling), f32(factor)
    for block in prange(BLOCKS):
        x, words = np.empty(keys, f32), np.empty((keys + 3) // 4, u64)
        bits = words.view(i16)
        for row in range(rows * block // BLOCKS, rows * (block + 1) // BLOCKS):
            p, k, readable = scores[row], kept[row], mask[row * reviews // rows, row % tokens]
            draw(words, seed, row)
            top = f32(-3.4e38)
            for i in range(keys):
                score = widen(p[i]) * scaling if readable[i] else f32(-3.4e38)
                x[i] = score
                top = larger(top, score)
            total = f32(0)
            for i in range(keys):
                e = exp(x[i] - top)
                x[i] = e
                total += e
            total = f32(1) / total
            for i in range(keys):
                probability = x[i] * total
                is_dropped = i16(-1) if bits[i] < limit else i16(0)
                p[i] = narrow(probability) | (is_dropped & SIGN)
                k[i] = narrow(probability * factor) & ~is_dropped


@kernel
def softmax_dropout_backward(gradient, signed, kept, scaling, factor):
    """The gradient of `kept` becomes that of the scores, and `kept` what it was in the forward pass."""
    rows, keys = signed.shape
    scaling, factor = f32(scaling), f32(factor)
    for block in prange(BLOCKS):
        for row in range(rows * block // BLOCKS, rows * (block + 1) // BLOCKS):
            g, s, k, total = gradient[row], signed[row], kept[row], f32(0)
            for i in range(keys):
                y = larger(widen(s[i]), f32(0)) * factor
                k[i] = narrow(y)
                total += y * widen(g[i])
            for i in range(keys):
                x = widen(s[i])
                g[i] = narrow((larger(x, f32(0)) * factor * widen(g[i]) - abs(x) * total) * scaling)


@kernel
def dropout_add_norm(hidden, residual, weight, bias, eps, factor, dropped, seed, total, mean, scale, normed, narrowed):
    """total = residual + dropout(hidden), and its layer norm in float32 and in bf16, `normed` and `narrowed`.

    (rows, width), bf16 the first and the last, else float32; `mean` and `scale`, 1 / standard deviation: (rows,)."""
    rows, width = residual.shape
    limit, factor, eps, share = i16(dropped - STEPS // 2), f32(factor), f32(eps), f32(1) / f32(width)
    for block in prange(BLOCKS):
        words = np.empty((width + 3) // 4, u64)
        bits = words.view(i16)
        for row in range(rows * block // BLOCKS, rows * (block + 1) // BLOCKS):
            h, r, t, x, b = hidden[row], residual[row], total[row], normed[row], narrowed[row]
            draw(words, seed, row)
            m, variance = f32(0), f32(0)
            for i in range(width):
                y = r[i] + (f32(0) if bits[i] < limit else widen(h[i]) * factor)
                t[i] = y
                m += y
            m *= share
            for i in range(width):
                variance += (t[i] - m) * (t[i] - m)
            s = f32(1) / np.sqrt(variance * share + eps)
            mean[row], scale[row] = m, s
            for i in range(width):
                y = (t[i] - m) * s * weight[i] + bias[i]
                x[i] = y
                b[i] = narrow(y)


@kernel
def dropout_add_norm_backward(of_normed, of_narrowed, total, mean, scale, weight, factor, dropped, seed, of_residual,
                              of_hidden, sums):
    """Gradients of `dropout_add_norm`; `sums`: (BLOCKS, 2, width), each block's part of those of weight and bias."""
    rows, width = total.shape
    limit, factor, share = i16(dropped - STEPS // 2), f32(factor), f32(1) / f32(width)
    for block in prange(BLOCKS):
        words, w, z = np.empty((width + 3) // 4, u64), np.empty(width, f32), np.empty(width, f32)
        bits, of_weight, of_bias = words.view(i16), sums[block, 0], sums[block, 1]
        for row in range(rows * block // BLOCKS, rows * (block + 1) // BLOCKS):
            g, g16, t, d, h = of_normed[row], of_narrowed[row], total[row], of_residual[row], of_hidden[row]
            draw(words, seed, row)
            m, s, a, b = mean[row], scale[row], f32(0), f32(0)
            for i in range(width):
                y, x = g[i] + widen(g16[i]), (t[i] - m) * s
                of_bias[i] += y
                of_weight[i] += y * x
                y *= weight[i]
                w[i], z[i] = y, x
                a += y
                b += y * x
            a, b = a * share, b * share
            for i in range(width):
                y = (w[i] - a - z[i] * b) * s
                d[i] = y
                h[i] = narrow(f32(0) if bits[i] < limit else y * factor)


@kernel
def gelu_backward(gradient, x, result):
    """gradient x (cdf(x) + x pdf(x)) of the normal distribution, all of one dimension; its cdf by formula 7.1.26 of
    Abramowitz and Stegun, with an error below 1e-6."""
    count = len(x)
    for block in prange(BLOCKS):
        own = slice(count * block // BLOCKS, count * (block + 1) // BLOCKS)
        g, u, out = gradient[own], x[own], result[own]
        for i in range(len(u)):
            v = widen(u[i])
            e = exp(f32(-0.5) * v * v)
            t, p = f32(1) / (abs(v) * f32(0.3275911 * 0.70710678) + f32(1)), f32(1.061405429)
            for c in (f32(-1.453152027), f32(1.421413741), f32(-0.284496736), f32(0.254829592)):
                p = p * t + c
            tail = f32(0.5) * p * t * e
            cdf = f32(1) - tail if v >= f32(0) else tail
            out[i] = narrow(widen(g[i]) * (cdf + f32(0.39894228) * v * e))


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
    dropped = min(round(rate * STEPS), STEPS - 1)
    return STEPS / (STEPS - dropped), dropped, int(torch.empty((), dtype=torch.int64).random_())


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
            call(softmax_dropout, scores.flatten(0, 1), kept.flatten(0, 1), mask[rows] if len(mask) > 1 else mask,
                 scaling, factor, *numbers)
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
            call(softmax_dropout_backward, of_scores.flatten(0, 1), signed[rows].flatten(0, 2), kept.flatten(0, 1),
                 ctx.scaling, ctx.factor)
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
        call(dropout_add_norm, hidden.flatten(0, -2), residual.flatten(0, -2), weight, bias, eps, *ctx.numbers,
             total.flatten(0, -2), mean, scale, normed.flatten(0, -2), narrowed.flatten(0, -2))
        ctx.save_for_backward(total, mean, scale, weight)
        return normed, narrowed

    @staticmethod
    def backward(ctx: Any, of_normed: torch.Tensor, of_narrowed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, mean, scale, weight = ctx.saved_tensors
        of_residual, of_hidden = torch.empty_like(total), torch.empty_like(total, dtype=torch.bfloat16)
        sums = total.new_zeros(BLOCKS, 2, total.shape[-1])
        call(dropout_add_norm_backward, of_normed.contiguous().flatten(0, -2), of_narrowed.contiguous().flatten(0, -2),
             total.flatten(0, -2), mean, scale, weight, *ctx.numbers, of_residual.flatten(0, -2),
             of_hidden.flatten(0, -2), sums)
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
        call(gelu_backward, gradient.contiguous().flatten(), x.flatten(), result.flatten())
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
