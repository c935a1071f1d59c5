"""Elementwise passes of a training step in bf16 on a CPU, each once over the memory, compiled by numba.

What stands between two matrix products takes torch many passes: scores, softmax, random bits, mask and product; or
dropout, sum, layer norm and the casts between float32 and bf16. Here each is one loop over rows. This module needs
the packages of requirements-fast.txt; without them a run takes the path of suite/encoders/cpu_kernels.py. Importing it
compiles the kernels, or loads them from numba's cache.

numba knows no bf16, so its kernels work on int16 arrays of the same bits and compute in float32. Dropout draws 16
random bits for each element from splitmix64 (Steele, Lea and Flood, 2014) of a counter, so that a backward pass can
draw the same mask again; the seed comes from torch's generator. Rows are cut into `BLOCKS` blocks, however many threads
share them, so no result depends on the number of threads.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

LEVELS = 1 << 16  # as in suite/encoders/cpu_kernels.py
BLOCKS = 64
I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
f32, i16, u64 = np.float32, np.int16, np.uint64
SIGN = i16(-32768)  # the sign bit of a bf16 value

# ---------------------------------------------------------------------------------------------------------------------
# What the kernels are made of

kernel = functools.partial(njit, parallel=True, fastmath=True, cache=True, error_model="numpy")
inline = njit(fastmath=True, error_model="numpy")


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
# The kernels. `dropped`: of the LEVELS values that 16 random bits take; `factor`: LEVELS / (LEVELS - dropped)


@kernel("void(i2[:, ::1], i2[:, ::1], b1[:, :, ::1], f8, f8, i8, i8)")
def softmax_dropout(scores, kept, mask, scaling, factor, dropped, seed):
    """scores (reviews x heads x tokens, keys) bf16 become probabilities, with a minus sign where they are dropped;
    `kept`: probabilities x factor, or 0. `mask`: (1 or reviews, 1 or tokens, keys), which keys a token may read."""
    rows, keys = scores.shape
    reviews, tokens = mask.shape[0], mask.shape[1]
    limit, scaling, factor = i16(dropped - LEVELS // 2), f32(scaling), f32(factor)
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


@kernel("void(i2[:, ::1], i2[:, ::1], i2[:, ::1], f8, f8)")
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


@kernel("void(i2[:, ::1], f4[:, ::1], f4[::1], f4[::1], f8, f8, i8, i8, f4[:, ::1], f4[::1], f4[::1], "
        "f4[:, ::1], i2[:, ::1])")
def dropout_add_norm(hidden, residual, weight, bias, eps, factor, dropped, seed, total, mean, scale, normed, narrowed):
    """total = residual + dropout(hidden), and its layer norm in float32 and in bf16, `normed` and `narrowed`.

    (rows, width), bf16 the first and the last, else float32; `mean` and `scale`, 1 / standard deviation: (rows,)."""
    rows, width = residual.shape
    limit, factor, eps, share = i16(dropped - LEVELS // 2), f32(factor), f32(eps), f32(1) / f32(width)
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


@kernel("void(f4[:, ::1], i2[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4[::1], f8, i8, i8, f4[:, ::1], i2[:, ::1], "
        "f4[:, :, ::1])")
def dropout_add_norm_backward(of_normed, of_narrowed, total, mean, scale, weight, factor, dropped, seed, of_residual,
                              of_hidden, sums):
    """Gradients of `dropout_add_norm`; `sums`: (BLOCKS, 2, width), each block's part of those of weight and bias."""
    rows, width = total.shape
    limit, factor, share = i16(dropped - LEVELS // 2), f32(factor), f32(1) / f32(width)
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


@kernel("void(i2[::1], i2[::1], i2[::1])")
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
