"""Dropout and attention that take less time on a CPU than torch's own, at the same result within rounding.

torch draws one random number for each element of a dropout mask, from a slow
generator. Here four elements share one 64-bit number of a fast generator, 16 bits each, whose seed comes from torch's.
The rate is rounded to 1/65,536 and the kept values are scaled by exactly that rate, so the expectation is the input.
torch's fused attention has no dropout on a CPU, and its backward pass in bf16 is slow for short inputs; in both cases
the matrix products are written out here. On a GPU and under torch.compile nothing is replaced, because fused
kernels do both there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

STEPS = 1 << 16
SHORT = 256  # tokens up to which written-out attention in bf16 beats the fused kernel, measured in benchmarks/README.md


def drop(tensor: torch.Tensor, rate: float) -> torch.Tensor:
    """`tensor` with its values zeroed at `rate`, 0 <= rate < 1, and the others scaled up; same shape and dtype."""
    dropped = min(round(rate * STEPS), STEPS - 1)  # of the STEPS values that 16 bits take
    count = tensor.numel()
    generator = np.random.SFC64(torch.empty(1, dtype=torch.int64).random_().numpy())
    bits = torch.from_numpy(generator.random_raw((count + 3) // 4).view(np.int16)[:count]).view(tensor.shape)
    kept = torch.empty(tensor.shape, dtype=tensor.dtype)  # 1 or 0; a comparison into booleans takes three times as long
    torch.ge(bits, dropped - STEPS // 2, out=kept)
    return tensor * kept.mul_(STEPS / (STEPS - dropped))


class CPUDropout(nn.Dropout):
    """nn.Dropout by `drop`."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return drop(tensor, self.p) if self.training and 0 < self.p < 1 else super().forward(tensor)


def cpu_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs
                  ) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, (batch, heads, tokens, size) -> (batch, tokens, heads, size)."""
    drops = 0 < dropout < 1
    is_slow_fused = query.dtype == torch.bfloat16 and key.shape[2] <= SHORT
    if not (drops or is_slow_fused) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)  # (batch, heads, tokens, tokens)
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=scores.dtype)  # shared by all heads, and not part of backward
        scores = scores + bias.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    attention = scores.softmax(dim=-1).to(value.dtype)
    context = (drop(attention, dropout) if drops else attention) @ value
    return context.transpose(1, 2).contiguous(), None


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
