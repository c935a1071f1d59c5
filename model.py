"""EncoderForClassification: a pretrained Transformer encoder, pooling, dropout, a linear head, and cross-entropy.

    model = new_model(config)                                                       # suite/encoders/loading.py
    output = model(input_ids, attention_mask, labels=labels)                        # output.loss, output.logits
    model = EncoderForClassification.from_pretrained("checkpoints/my-run/best")     # a trained one

This file is copied into every trained model's folder, where transformers finds it: it imports nothing of this project.
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb


class ClassifierConfig(PreTrainedConfig):
    """`encoder`: the configuration of the encoder. `pooling`, `head_dropout` and `id2label` describe the head.

    `max_len` (tokens, special tokens included), `truncation` and `max_windows` say how the model's reviews were cut in
    training, `data_fingerprint` which reviews and which split these were.
    """

    # A type of its own: under the encoder's type, transformers would load its own classifier with a random head.
    model_type = "encoder-for-classification"

    def __init__(self, encoder: Any = None, pooling: str = "cls", head_dropout: float = 0.1, max_len: int | None = None,
                 truncation: str = "head", max_windows: int = 1, data_fingerprint: str | None = None, **kwargs):
        self.encoder = AutoConfig.for_model(**encoder) if isinstance(encoder, dict) else encoder
        if self.encoder is not None:
            self.encoder.dtype = None  # that of the whole classifier counts, not that of the encoder's checkpoint
        self.pooling, self.head_dropout = pooling, head_dropout
        self.max_len, self.truncation, self.max_windows = max_len, truncation, max_windows
        self.data_fingerprint = data_fingerprint
        super().__init__(**kwargs)


class EncoderForClassification(PreTrainedModel):
    """An encoder, given or built with fresh weights, and the head on it."""

    config_class = ClassifierConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: ClassifierConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        self.encoder = encoder if encoder is not None else AutoModel.from_config(config.encoder)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # BERT's pooler is not read here; unused weights would stall DDP
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(config.id2label))
        self.has_fast_path = has_fast_path(self.encoder)
        self.reads_first_token = self.has_fast_path and config.pooling == "cls"
        if self.reads_first_token:
            read_only_first_token(self.encoder)
        self.takes_token_types = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the head like that of BERT's own classifier: normal(0, initializer_range), zero bias. The encoder draws
        its own weights."""
        if module is self.head:
            nn.init.normal_(module.weight, std=getattr(self.encoder.config, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *arguments, **kwargs):
        """PreTrainedModel's, with the weights copied into memory. Left in the mapped file, they would change with the
        file, and lie at addresses for which kernels may round differently."""
        loaded = super().from_pretrained(*arguments, **kwargs)
        for weights in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            weights.data = weights.data.clone()
        return loaded

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                token_type_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                reduction: str = "mean", class_weights: torch.Tensor | None = None,
                windows: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """`loss` and `logits` of a batch of reviews.

        `input_ids`, `attention_mask` (1 for real tokens, None if all are) and `token_type_ids`: (batch, tokens) int64.
        `windows`: (batch,) int64, how many windows each review was cut into; the inputs then have one row for each of
        them, (windows, tokens), in the order of the reviews. None: each review is one window.
        `labels`: (batch,) int64, -100 is skipped; or the probability of each class, (batch, num_labels) float.
        `loss`: cross-entropy in float32, the mean over the batch or, with reduction="sum", the sum, each review times
        the weight of its class if `class_weights` (num_labels,) are given; None without labels. `logits`: (batch,
        num_labels) float32, or float64 in a model of float64.
        """
        masks = attention_masks(self.encoder, attention_mask) if self.has_fast_path else attention_mask
        token_types = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        hidden = self.encoder(input_ids=input_ids, attention_mask=masks, **token_types).last_hidden_state
        pooled = hidden[:, 0] if self.config.pooling == "cls" else mean_over_tokens(hidden, attention_mask)
        logits = self.head(self.dropout(pooled))  # hidden: (batch, tokens or 1, width), pooled: (batch, width)
        logits = mean_over_windows(logits, windows)
        loss = None if labels is None else F.cross_entropy(logits, labels, class_weights, reduction=reduction)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean_over_windows(logits: torch.Tensor, windows: torch.Tensor | None) -> torch.Tensor:
    """(windows, num_labels) -> (batch, num_labels), float32 or float64: the mean over the windows of each review.

    `windows`: (batch,) int64, how many each review has; None: one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's half precision ends here
    if windows is None:
        return logits
    review = torch.arange(len(windows), device=logits.device).repeat_interleave(windows, output_size=len(logits))
    return logits.new_zeros(len(windows), logits.shape[1]).index_add(0, review, logits) / windows[:, None]


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens, width) -> (batch, width): the mean over real tokens, never over padding."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, tokens, 1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The first-token fast path: less work at the same result, for BERT-like encoders and ModernBERT
#
# With pooling `cls`, nothing but the first token of the last layer's output is read, so the last layer is computed for
# that token alone. This is exact: other tokens reach the first one only through the last layer's keys and values, which
# are computed in full. What is saved are their queries, attention and feed-forward: 6.9 % of BERT-base's FLOPs at 128
# tokens, 3.5 % of ModernBERT-base's, 14 % of a 6-layer encoder's. Other architectures take their own plain path.

BERT_LIKE = ("BertModel", "RobertaModel", "XLMRobertaModel", "ElectraModel")


def has_fast_path(encoder: nn.Module) -> bool:
    """Whether the functions below are written for this encoder, and its attention takes boolean masks."""
    names = (*BERT_LIKE, "ModernBertModel")
    return type(encoder).__name__ in names and encoder.config._attn_implementation.startswith("sdpa")


def attention_masks(encoder: nn.Module, attention_mask: torch.Tensor | None) -> Any:
    """The masks that an encoder with a fast path makes of one (batch, tokens) of 1 and 0: (batch, 1, tokens, tokens) of
    booleans, True where a token may be read. None if all may.

    transformers itself checks whether the whole mask is 1, and so waits for the device in each forward pass.
    """
    if attention_mask is None:
        return None
    batch, tokens = attention_mask.shape
    full = attention_mask.bool()[:, None, None, :].expand(batch, 1, tokens, tokens)
    if type(encoder).__name__ in BERT_LIKE:
        return full
    place = torch.arange(tokens, device=attention_mask.device)
    near = (place[:, None] - place).abs() <= encoder.config.sliding_window
    return {"full_attention": full, "sliding_attention": full & near}


def read_only_first_token(encoder: nn.Module) -> None:
    """Make an encoder with a fast path return the hidden state of the first token alone: (batch, 1, width)."""
    is_bert = type(encoder).__name__ in BERT_LIKE
    last = (encoder.encoder.layer if is_bert else encoder.layers)[-1]
    last.forward = functools.partial(_bert_layer if is_bert else _modernbert_layer, last)  # which can be pickled


def _bert_layer(layer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
                *unused, **ignored) -> torch.Tensor:
    """BertLayer.forward, (batch, tokens, width) -> (batch, 1, width)."""
    attention, first = layer.attention.self, hidden_states[:, :1]
    query, key, value = (_heads(projection(hidden), attention.attention_head_size) for projection, hidden in
                         ((attention.query, first), (attention.key, hidden_states), (attention.value, hidden_states)))
    context = _attend(attention, query, key, value, attention_mask, attention.dropout.p)
    return layer.feed_forward_chunk(layer.attention.output(context, first))


def _modernbert_layer(layer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
                      position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None, **ignored) -> torch.Tensor:
    """ModernBertEncoderLayer.forward, (batch, tokens, width) -> (batch, 1, width)."""
    attention, normed = layer.attn, layer.attn_norm(hidden_states)
    weight, bias = attention.Wqkv.weight, attention.Wqkv.bias
    width = weight.shape[1]
    of_query, of_key_value = (None, None) if bias is None else (bias[:width], bias[width:])
    query = _heads(F.linear(normed[:, :1], weight[:width], of_query), attention.head_dim)
    key, value = (_heads(part, attention.head_dim) for part in
                  F.linear(normed, weight[width:], of_key_value).chunk(2, dim=-1))
    cos, sin = position_embeddings
    key = apply_rotary_pos_emb(key, key, cos, sin)[1]  # at position 0 there is no rotation: the query stays as it is
    context = _attend(attention, query, key, value, attention_mask, attention.attention_dropout)
    hidden = hidden_states[:, :1] + attention.out_drop(attention.Wo(context))
    return hidden + layer.mlp(layer.mlp_norm(hidden))


def _heads(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, tokens, heads * size) -> (batch, heads, tokens, size)"""
    return tensor.unflatten(-1, (-1, size)).transpose(1, 2)


def _attend(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """The first token's attention over all tokens; `mask`: (batch, 1, tokens, tokens). Returns (batch, 1, width)."""
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    mask = None if mask is None else mask[:, :, :1]
    context, _ = attend(attention, query, key, value, mask, dropout=dropout if attention.training else 0.0)
    return context.flatten(2)
