"""EncoderForClassification: a pretrained Transformer encoder, pooling, dropout, a linear head, and cross-entropy.

    model = EncoderForClassification.from_encoder(config.model_config)              # a new head on a pretrained encoder
    loss, logits = model(input_ids, attention_mask, labels=labels)
    model.save_pretrained("checkpoints/my-run/best")
    model = EncoderForClassification.from_pretrained("checkpoints/my-run/best")     # the trained model

Weights are read and written as safetensors only: no pickle is loaded, and no code from the Hub is run.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from encoders import attention_masks, is_known, read_only_first_token
from hub import explained, is_hub_name
from storage import MANIFEST, refuse_damage
from utils import UserError, atomic_write, write_json

WEIGHTS = "model.safetensors"


class EncoderForClassification(nn.Module):
    """`encoder_config` describes the encoder; its `id2label`, `pooling` and `head_dropout` describe the head."""

    def __init__(self, encoder_config: PretrainedConfig, encoder: nn.Module | None = None):
        super().__init__()
        self.config = encoder_config
        self.encoder = encoder if encoder is not None else AutoModel.from_config(encoder_config)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # BERT's pooler is not read here; unused weights would stall DDP
        self.pooling = encoder_config.pooling
        self.dropout = nn.Dropout(encoder_config.head_dropout)
        self.head = nn.Linear(encoder_config.hidden_size, len(encoder_config.id2label))
        # As BERT's own classification head: normal(0, initializer_range), zero bias.
        nn.init.normal_(self.head.weight, std=getattr(encoder_config, "initializer_range", 0.02))
        nn.init.zeros_(self.head.bias)
        self.is_known = is_known(self.encoder)
        self.reads_first_token = self.is_known and self.pooling == "cls"
        if self.reads_first_token:
            read_only_first_token(self.encoder)
        self.takes_token_types = "token_type_ids" in inspect.signature(self.encoder.forward).parameters

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                token_type_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                reduction: str = "mean") -> tuple[torch.Tensor | None, torch.Tensor]:
        """Returns (loss, logits).

        `input_ids`, `attention_mask` (1 for real tokens, None if all are) and `token_type_ids`: (batch, tokens) int64;
        `labels`: (batch,) int64, -100 is skipped. `loss`: cross-entropy in float32, the mean over the batch or, with
        reduction="sum", the sum; None without labels. `logits`: (batch, num_labels) float32, or float64
        in a model of float64.
        """
        if attention_mask is not None and self.is_known:
            masks = attention_masks(self.encoder, attention_mask)
        else:
            masks = attention_mask
        token_types = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        hidden = self.encoder(input_ids=input_ids, attention_mask=masks, **token_types).last_hidden_state
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_over_tokens(hidden, attention_mask)
        logits = self.head(self.dropout(pooled))  # hidden: (batch, tokens or 1, width), pooled: (batch, width)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's half precision ends here
        loss = None if labels is None else F.cross_entropy(logits, labels, reduction=reduction)
        return loss, logits

    @classmethod
    def from_encoder(cls, model_config: Any, label_names: list[str] | None = None) -> EncoderForClassification:
        """A new head on the encoder `model_config.model_name`; fresh weights everywhere if not `pretrained`.

        Raises UserError if the encoder cannot be loaded or lacks weights.
        """
        name = model_config.model_name
        with explained("model_config.model_name", name):
            encoder_config = load_encoder_config(model_config)
            if model_config.pretrained:
                # float32, whatever the checkpoint was stored in: Adam's small updates vanish in half precision.
                encoder, report = AutoModel.from_pretrained(
                    name, config=encoder_config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                    ignore_mismatched_sizes=True, output_loading_info=True)
                if mismatched := sorted(report["mismatched_keys"]):
                    key, stored, expected = mismatched[0]
                    raise UserError(f"model_config.model_name: the weights in {name} are not of the model in its "
                                    f"config.json ({key} is {list(stored)} instead of {list(expected)}): take a model "
                                    "whose files belong together")
                # A missing weight would be drawn at random and train to a number that nobody can explain.
                if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
                    raise UserError(f"model_config.model_name: {name} lacks {len(missing)} weights of its architecture "
                                    f"({missing[0]}, ...): take a complete model, or model_config.pretrained=false")
            else:
                encoder = AutoModel.from_config(encoder_config, dtype=torch.float32)
        names = label_names or [str(label) for label in range(model_config.num_labels)]
        encoder_config.id2label = dict(enumerate(names))
        encoder_config.label2id = {label: index for index, label in enumerate(names)}
        encoder_config.pooling = model_config.pooling
        encoder_config.head_dropout = model_config.dropout_rate
        return cls(encoder_config, encoder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_pretrained(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EncoderForClassification:
        """The model that `save_pretrained` wrote. Raises UserError naming the file that is missing or does not fit.

        A sealed folder, such as a run's, is verified to the last bit before anything is read from it.
        """
        folder = Path(folder)
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name}; train this run first, or name one that has a model by run_name=")
        if (folder / MANIFEST).exists():
            refuse_damage(folder)
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            encoder_config = AutoConfig.for_model(**settings)
            model = cls(encoder_config)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder / 'config.json'}: not a model of this suite: {reason}") from error
        try:
            model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except (RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder / WEIGHTS}: damaged, or not of the model in config.json: {reason}") from error
        return model


def load_encoder_config(model_config: Any) -> PretrainedConfig:
    """The configuration of the encoder `model_config.model_name`, before any weight is loaded.

    Raises UserError if it describes no text encoder, or one that cannot be built.
    """
    name = model_config.model_name
    if not is_hub_name(name) and not Path(name).is_dir():
        raise UserError(f"model_config.model_name: no such folder: {name}")
    with explained("model_config.model_name", name):
        encoder_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = encoder_config.model_type
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encoder_config.is_encoder_decoder or is_decoder or not hasattr(encoder_config, "vocab_size"):
        raise UserError(f"model_config.model_name: {name} is a {kind} model, not a text encoder: take one such as "
                        "bert-base-uncased or answerdotai/ModernBERT-base")
    if model_config.encoder_dropout is not None:
        set_encoder_dropout(encoder_config, model_config.encoder_dropout)
    try:
        with torch.device("meta"):  # shapes without memory
            encoder = AutoModel.from_config(encoder_config)
        if empty := [key for key, weights in encoder.named_parameters() if weights.numel() == 0]:
            raise ValueError(f"{empty[0]} would be empty")
    except Exception as error:  # of whatever kind: each architecture trips over nonsense in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"model_config.model_name: no encoder can be built from the config.json of {name} ({reason}): "
                        "correct it or take another model") from error
    return encoder_config


def save_pretrained(folder: str | Path, encoder_config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> None:
    """A model folder from a model's configuration and weights, the weights last and each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", encoder_config.to_dict() | {"architectures": ["EncoderForClassification"]})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens, width) -> (batch, width): the mean over real tokens, never over padding."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, tokens, 1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def set_encoder_dropout(encoder_config: PretrainedConfig, rate: float) -> None:
    """Set every dropout rate of an encoder's configuration, whatever its architecture calls them."""
    for name, value in encoder_config.to_dict().items():
        if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(encoder_config, name, rate)
