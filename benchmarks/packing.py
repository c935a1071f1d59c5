"""Reviews packed one after the other, without padding: a variant of benchmarks/ablations.py, for ModernBERT.

torch's attention over packed reviews (`torch.nn.attention.varlen`) runs on CUDA in bf16 or fp16, and has no dropout, so
BERT, which drops attention weights, cannot use it. On a CPU each review attends in turn, which shows that the result is
right and says nothing about speed. The last layer is computed in full here, and at the first token alone in the suite.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_outputs import SequenceClassifierOutput

from data import IMDBDataset, Step
from model import EncoderForClassification


def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: None, dropout: float = 0.0, scaling: float | None = None,
                     sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None,
                     max_length_q: int = 0, **ignored: Any) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, size) of all reviews -> (1, tokens, heads, size). `cu_seq_lens_q`: (reviews + 1,) int32, where
    each review begins, and where the last one ends; `max_length_q`: no review is longer."""
    assert not dropout, "torch's attention over packed reviews has no dropout"
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, size)
    reach = -1 if sliding_window is None else sliding_window - 1  # -1: as far as the review reaches
    if query.is_cuda:
        return varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                           window_size=(reach, reach))[None], None
    contexts = []
    for start, stop in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        place = torch.arange(stop - start)
        near = None if reach < 0 else (place[:, None] - place).abs() <= reach
        own = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        contexts.append(F.scaled_dot_product_attention(*own, attn_mask=near, scale=scaling).transpose(0, 1))
    return torch.cat(contexts)[None], None


AttentionInterface.register("packed", packed_attention)


def packed_batch(reviews: IMDBDataset, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """`input_ids` and `position_ids`: (1, tokens); `starts`: (reviews + 1,) int32; `labels` and `id`: (reviews,)."""
    places = reviews.windows_of(rows)
    lengths = reviews.window_lengths(places)
    tokens = np.concatenate([reviews.tokens[reviews.offsets[place]:reviews.offsets[place + 1]] for place in places])
    return {"input_ids": torch.from_numpy(tokens.astype(np.int64))[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            "starts": torch.from_numpy(np.concatenate([[0], lengths.cumsum()])).int(),
            "labels": torch.from_numpy(reviews.labels[rows]), "id": torch.from_numpy(reviews.ids[rows])}


def packed_forward(model: EncoderForClassification, input_ids: torch.Tensor, position_ids: torch.Tensor,
                   starts: torch.Tensor, labels: torch.Tensor, reduction: str = "sum",
                   class_weights: torch.Tensor | None = None) -> SequenceClassifierOutput:
    """EncoderForClassification.forward for a batch of `packed_batch`, with pooling `cls`."""
    model.encoder.config._attn_implementation = "packed"
    hidden = model.encoder(input_ids=input_ids, position_ids=position_ids, cu_seq_lens_q=starts,
                           max_length_q=model.config.max_len,
                           attention_mask={"full_attention": None, "sliding_attention": None}).last_hidden_state
    logits = model.head(model.dropout(hidden[0, starts[:-1].long()])).float()
    return SequenceClassifierOutput(F.cross_entropy(logits, labels, class_weights, reduction=reduction), logits)


@contextmanager
def packed():
    """While it lasts, runs that are opened train on packed reviews, an effective batch in one forward pass."""
    own_forward = EncoderForClassification.forward

    def step(reviews: IMDBDataset, rows: np.ndarray, micro_batches: list[np.ndarray], seed: tuple[int, ...]) -> Step:
        return Step(rows, [packed_batch(reviews, part) for part in micro_batches], len(rows), len(rows))

    def forward(model: EncoderForClassification, **inputs: Any) -> SequenceClassifierOutput:
        return (packed_forward if "starts" in inputs else own_forward)(model, **inputs)

    with (mock.patch.object(IMDBDataset, "step", step), mock.patch("model.read_only_first_token"),
          mock.patch.object(EncoderForClassification, "forward", forward),
          mock.patch("suite.training.run.pass_tokens", return_value=math.inf)):
        yield
