"""The layers of a BERT-like encoder without gradients, on a CPU that computes in bf16.

Under autocast, each pass casts every weight, and a product reads it as it is stored. Here both are done once for all
batches of an evaluation: weights are cast and packed into the blocks that oneDNN reads. Query, key and value are one
product, and GELU is computed within the product before it. As under autocast, products and attention are in bf16, layer
norms and the hidden states between layers in float32. Other encoders and devices keep the layers of transformers, and
so does a torch without the two private operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from model import BERT_LIKE
from suite.common.devices import Devices
from suite.encoders.cpu_kernels import OWN_ATTENTION, blocks, has_fast_fused_attention

VECTOR = 32  # values of bf16 that AVX512 computes together: torch's softmax takes those left over one by one
VERSION = 1  # raised when an evaluation in bf16 on a CPU rounds in another way: no labelling is continued then


def arithmetic(devices: Devices) -> dict[str, int]:
    """What logits depend on besides model, settings, device and precision."""
    return {"evaluation_pass": VERSION} if (devices.device.type, devices.precision) == ("cpu", "bf16") else {}


def has_operators() -> bool:
    """Whether torch has its operators for packed weights here, and oneDNN computes in bf16 on this CPU."""
    mkldnn = torch.ops.mkldnn
    return (torch.backends.mkldnn.is_available() and mkldnn._is_mkldnn_bf16_supported()
            and hasattr(mkldnn, "_linear_pointwise") and hasattr(mkldnn, "_reorder_linear_weight"))


@contextmanager
def packed_layers(model: nn.Module, devices: Devices) -> Iterator[None]:
    """Let the layers of `model.encoder` be `PackedLayers` made of its weights as they are now, where that can be."""
    encoder = getattr(model, "encoder", None)
    if (type(encoder).__name__ in BERT_LIKE and encoder.config._attn_implementation in OWN_ATTENTION
            and devices.precision == "bf16" and not devices.is_sharded and has_operators()):
        encoder.encoder.forward = PackedLayers(encoder, model.reads_first_token)
        try:
            yield
        finally:
            del encoder.encoder.forward  # its class has transformers' own
    else:
        yield


class PackedLayers:
    """BertEncoder.forward: (batch, tokens, width) -> the same, float32; or (batch, 1, width) if only the first token of
    the last layer is read."""

    def __init__(self, encoder: nn.Module, reads_first_token: bool):
        *layers, last = encoder.encoder.layer
        self.layers = [*map(PackedLayer, layers), PackedLayer(last, reads_first_token)]

    def __call__(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **ignored: Any
                 ) -> BaseModelOutputWithPastAndCrossAttentions:
        """`attention_mask`: what `attention_masks` in model.py makes, the same for all queries of a review."""
        padding = None if attention_mask is None else ~attention_mask[:, 0, 0]  # (batch, tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, padding)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


class PackedLayer:
    """BertLayer.forward; for the first token alone, if `first_token_only`."""

    def __init__(self, layer: nn.Module, first_token_only: bool = False):
        attention, output, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
        self.heads, self.first_token_only = attention.num_attention_heads, first_token_only
        self.query = PackedLinear(attention.query) if first_token_only else None
        self.projection = PackedLinear(*([] if first_token_only else [attention.query]), attention.key, attention.value)
        self.output, self.output_norm = PackedLinear(output.dense), output.LayerNorm
        self.up, self.down, self.down_norm = PackedLinear(up.dense), PackedLinear(down.dense), down.LayerNorm
        self.activation = up.intermediate_act_fn

    def __call__(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, width) float32 -> (batch, tokens or 1, width) float32; `padding`: (batch, tokens)."""
        rounded = hidden.bfloat16()
        parts = self.projection(rounded).chunk(2 if self.first_token_only else 3, dim=-1)
        if self.first_token_only:
            parts, hidden = (self.query(rounded[:, :1].contiguous()), *parts), hidden[:, :1]
        context = attend(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts), padding)
        hidden = self.output_norm(hidden + self.output(context))
        rounded = hidden.bfloat16()
        if isinstance(self.activation, GELUActivation):
            inner = self.up(rounded, gelu=True)
        else:
            inner = self.activation(self.up(rounded))
        return self.down_norm(hidden + self.down(inner))


class PackedLinear:
    """The product of some layers with the same input, side by side: (..., inputs) -> (..., sum of outputs), bf16."""

    def __init__(self, *layers: nn.Linear):
        weight = torch.cat([layer.weight for layer in layers]).bfloat16()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = torch.cat([layer.bias for layer in layers]).bfloat16()

    def __call__(self, inputs: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """GELU, if asked for, is the exact one, by the error function."""
        activation = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *activation)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Scaled dot-product attention in bf16, (batch, heads, tokens, size) -> (batch, tokens, heads * size).

    A block's scores are (keys, queries), with queries of zeros up to whole vectors: there torch's softmax needs two
    thirds of the time or less. The keys that are padding in any review are rows side by side, and only they get a mask.
    """
    batch, heads, tokens, size = query.shape
    keys = key.shape[2]
    bias, first_padded = None, keys
    if padding is not None:
        bias = torch.zeros(batch, 1, keys, 1, dtype=query.dtype).masked_fill_(padding[:, None, :, None], -torch.inf)
        first_padded = int(padding.any(dim=0).int().argmax())
    if has_fast_fused_attention():
        mask = None if bias is None else bias.mT.expand(batch, 1, tokens, keys)
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    context = query.new_empty(batch, tokens, heads, size)
    query = F.pad(query, (0, 0, 0, -tokens % VECTOR))
    for rows, scores, _ in blocks((batch, heads, keys, query.shape[2]), query.dtype):
        q, k, v = (tensor[rows].flatten(0, 1) for tensor in (query, key, value))
        torch.baddbmm(scores, k, q.mT, beta=0, alpha=size ** -0.5, out=scores)  # beta=0: what was there is not read
        if bias is not None:
            scores.unflatten(0, (-1, heads))[:, :, first_padded:] += bias[rows, :, first_padded:]
        torch.softmax(scores, dim=1, out=scores)
        context[rows] = torch.bmm(scores[..., :tokens].mT, v).unflatten(0, (-1, heads)).transpose(1, 2)
    return context.flatten(2)
