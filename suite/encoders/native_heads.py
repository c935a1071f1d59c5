"""A trained head, written as the head of a classifier that transformers itself contains.

No classifier of transformers is one linear layer, logits = W h + b. Each family puts a dense layer and an activation
before the last layer. Their weights can be chosen so that both together are that one linear layer:

    tanh        tanh(x) is x for a small x: dense 2^-13 I, classifier 2^13 W. BERT, RoBERTa and others.
    gated       relu(z) - relu(-z) = z, and the same holds for gelu: dense rows W, -W and zeros, classifier I, -I.
                It needs two rows for each class. DistilBERT, ELECTRA, DeBERTa.
    modernbert  the same with gelu; then comes a LayerNorm, which divides by sqrt(variance + eps). The rows are so small
                that only eps is left of that: it is linear.

What is left is rounding. `suite/inference/export.py` measures it on texts before an export gets its name.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from model import EncoderForClassification

HEADS = {  # {model_type: (kind, dense layer, last layer)}
    "bert": ("tanh", "bert.pooler.dense", "classifier"),
    "albert": ("tanh", "albert.pooler", "classifier"),
    "roberta": ("tanh", "classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("tanh", "classifier.dense", "classifier.out_proj"),
    "mpnet": ("tanh", "classifier.dense", "classifier.out_proj"),
    "distilbert": ("gated", "pre_classifier", "classifier"),
    "electra": ("gated", "classifier.dense", "classifier.out_proj"),
    "deberta": ("gated", "pooler.dense", "classifier"),
    "deberta-v2": ("gated", "pooler.dense", "classifier"),
    "modernbert": ("modernbert", "head.dense", "classifier"),
}
# Powers of 2, so that scaling a weight rounds nothing
TANH = 2.0 ** -13  # larger ones bend: 2^-8 is off by 2e-2. ALBERT, whose hidden values reach 34, needs no smaller one
FINAL_NORM = 2.0 ** -7  # ModernBERT's small rows are shared between two layers, for the sake of fp16's smallest numbers


def problem_of(model: nn.Module) -> str | None:
    """Why no classifier of transformers can compute this model's logits; None if one can."""
    if not isinstance(model, EncoderForClassification):
        return None  # it is one of transformers already
    kind, width, classes = model.encoder.config.model_type, model.head.in_features, model.head.out_features
    if kind not in HEADS:
        return f"transformers has no classifier for {kind} whose head could compute this one's logits"
    if model.config.pooling == "mean" and kind != "modernbert":
        return (f"transformers' own classifier for {kind} reads the first token, and this model the mean over all of "
                "them: train it with model_config.pooling=cls")
    if HEADS[kind][0] != "tanh" and 2 * classes > width:
        return (f"transformers' own classifier for {kind} has room for {width // 2} classes, and this model has "
                f"{classes}")
    return None


def native_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the family's own classifier; of a classifier of transformers, its own."""
    if not isinstance(model, EncoderForClassification):
        return model.config
    own, encoder = model.config, model.config.encoder
    kind = encoder.model_type
    values = encoder.to_dict() | {"id2label": own.id2label, "label2id": own.label2id, "dtype": "float32",
                                  "problem_type": "single_label_classification"}
    if kind == "modernbert":
        values |= {"classifier_pooling": own.pooling, "classifier_activation": "gelu", "classifier_bias": False,
                   "final_norm_scale": FINAL_NORM}  # for `undo_scale`; transformers does not read it
    elif kind.startswith("deberta"):
        values |= {"pooler_hidden_act": "gelu", "pooler_hidden_size": encoder.hidden_size}
    config = type(encoder).from_dict(values)
    if classifier := MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(kind):
        config.architectures = [classifier]
    return config


@torch.no_grad()
def native_model(model: nn.Module) -> PreTrainedModel:
    """The same classifier in float32, as one of the family's own class. `problem_of` must have found nothing."""
    if not isinstance(model, EncoderForClassification):
        return model
    native = AutoModelForSequenceClassification.from_config(native_config(model), dtype=torch.float32).eval()
    native.base_model.load_state_dict(model.encoder.state_dict(), strict=False)  # not the pooler, which is set below
    kind, dense, last = HEADS[model.encoder.config.model_type]
    set_head = {"tanh": _set_tanh, "gated": _set_gated, "modernbert": _set_modernbert}[kind]
    set_head(native, native.get_submodule(dense), native.get_submodule(last), model.head)
    return native


def _set_tanh(native: nn.Module, dense: nn.Linear, last: nn.Linear, head: nn.Linear) -> None:
    dense.weight.copy_(TANH * torch.eye(head.in_features))
    dense.bias.zero_()
    last.weight.copy_(head.weight / TANH)
    last.bias.copy_(head.bias)


def _set_gated(native: nn.Module, dense: nn.Linear, last: nn.Linear, head: nn.Linear) -> None:
    dense.weight.copy_(_rows(head.weight, head.in_features))
    dense.bias.copy_(_rows(head.bias, head.in_features))
    _subtract(last, 1.0)
    last.bias.zero_()


def _set_modernbert(native: nn.Module, dense: nn.Linear, last: nn.Linear, head: nn.Linear) -> None:
    norm, width = native.head.norm, head.in_features
    # With rows d W, the variance is d^2 sum(z^2) / (2 width): so d is small for many classes and few rows. Two classes
    # and ModernBERT-base's 768 rows need 2^-8 sqrt(eps); a smaller one would cost fp16 digits.
    exponent = 8 + max(0, math.ceil(math.log(head.out_features / 2 * 768 / width, 4)))
    scale = math.sqrt(norm.eps) * 2.0 ** -exponent
    native.model.final_norm.weight.mul_(FINAL_NORM)
    if native.model.final_norm.bias is not None:
        native.model.final_norm.bias.mul_(FINAL_NORM)
    dense.weight.copy_(_rows(head.weight, width) * (scale / FINAL_NORM))
    norm.weight.fill_(1.0)
    if norm.bias is not None:
        norm.bias.zero_()
    _subtract(last, 2.0 ** exponent)
    last.bias.copy_(head.bias)


@torch.no_grad()
def undo_scale(encoder: nn.Module, config: PreTrainedConfig) -> None:
    """Make of the encoder of an exported model, and of its configuration, those that were trained: the exported head
    makes up for the small norm."""
    scale = getattr(config, "final_norm_scale", 1.0)
    for each in (config, encoder.config):
        vars(each).pop("final_norm_scale", None)
    if scale != 1.0:
        for values in encoder.final_norm.parameters():
            values.div_(scale)


def _rows(values: torch.Tensor, width: int) -> torch.Tensor:
    """(classes, ...) -> (width, ...): the values, the same negated, and zeros."""
    zeros = values.new_zeros(width - 2 * len(values), *values.shape[1:])
    return torch.cat([values, -values, zeros])


def _subtract(last: nn.Linear, scale: float) -> None:
    """Let the last layer (classes, width) subtract each negated row's activation from that of the row itself."""
    identity = scale * torch.eye(last.out_features)
    last.weight.zero_()
    last.weight[:, :2 * last.out_features] = torch.cat([identity, -identity], dim=1)
