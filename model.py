"""EncoderForClassification: a pretrained Transformer encoder, pooling, dropout, a linear head, and cross-entropy.

    model = new_model(config)                                                       # loading.py
    output = model(input_ids, attention_mask, labels=labels)                        # output.loss, output.logits
    model = EncoderForClassification.from_pretrained("checkpoints/my-run/best")     # a trained one

This file and encoders.py are copied into every trained model's folder, where transformers finds them: they import
nothing else of this project.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from encoders import attention_masks, is_known, read_only_first_token


class ClassifierConfig(PreTrainedConfig):
    """`encoder`: the configuration of the encoder. `pooling`, `head_dropout` and `id2label` describe the head.

    `max_len` (tokens, special tokens included) and `truncation` say how the model's reviews were cut in training,
    `data_fingerprint` which reviews and which split these were.
    """

    # A type of its own: under the encoder's, transformers would load its own classifier and draw its head at random.
    model_type = "encoder-for-classification"

    def __init__(self, encoder: Any = None, pooling: str = "cls", head_dropout: float = 0.1, max_len: int | None = None,
                 truncation: str = "head", data_fingerprint: str | None = None, **settings):
        self.encoder = AutoConfig.for_model(**encoder) if isinstance(encoder, dict) else encoder
        self.pooling, self.head_dropout = pooling, head_dropout
        self.max_len, self.truncation, self.data_fingerprint = max_len, truncation, data_fingerprint
        super().__init__(**settings)


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
        self.is_known = is_known(self.encoder)
        self.reads_first_token = self.is_known and config.pooling == "cls"
        if self.reads_first_token:
            read_only_first_token(self.encoder)
        self.takes_token_types = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The head as BERT's own classification head: normal(0, initializer_range), zero bias. The encoder has its own
        way."""
        if module is self.head:
            nn.init.normal_(module.weight, std=getattr(self.encoder.config, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *arguments, **settings):
        """PreTrainedModel's, with the weights in memory of their own: left in the mapped file, they lie at addresses
        for which kernels may round otherwise, and change with the file."""
        loaded = super().from_pretrained(*arguments, **settings)
        for weights in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            weights.data = weights.data.clone()
        return loaded

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                token_type_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                reduction: str = "mean", class_weights: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """`loss` and `logits` of a batch.

        `input_ids`, `attention_mask` (1 for real tokens, None if all are) and `token_type_ids`: (batch, tokens) int64;
        `labels`: (batch,) int64, -100 is skipped. `loss`: cross-entropy in float32, the mean over the batch or, with
        reduction="sum", the sum, each review times the weight of its class if `class_weights` (num_labels,) are given;
        None without labels. `logits`: (batch, num_labels) float32, or float64 in a model of float64.
        """
        if attention_mask is not None and self.is_known:
            masks = attention_masks(self.encoder, attention_mask)
        else:
            masks = attention_mask
        token_types = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        hidden = self.encoder(input_ids=input_ids, attention_mask=masks, **token_types).last_hidden_state
        pooled = hidden[:, 0] if self.config.pooling == "cls" else mean_over_tokens(hidden, attention_mask)
        logits = self.head(self.dropout(pooled))  # hidden: (batch, tokens or 1, width), pooled: (batch, width)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's half precision ends here
        loss = None if labels is None else F.cross_entropy(logits, labels, class_weights, reduction=reduction)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens, width) -> (batch, width): the mean over real tokens, never over padding."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, tokens, 1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)
