"""An encoder with its family's own head for masked words: loaded, made to compute masked places only, and saved."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from model import attention_masks, has_fast_path
from suite.common.hub import explained
from suite.encoders.checkpoints import WEIGHTS, own_classifier, try_forward_pass
from suite.encoders.loading import load_checkpoint
from utils import ModelConfig, UserError, say


class MaskedLanguageModel(nn.Module):
    """A `...ForMaskedLM` of transformers whose head computes the logits of masked places alone.

    A vocabulary has tens of thousands of words, so the head's work and memory at each of the other places, 85 % of
    all, would be for nothing.
    """

    reads_first_token = False  # every token of the last layer may be asked for

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.config = model, model.config
        self.takes_token_types = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self.has_fast_path = has_fast_path(self.encoder)
        self._masked: torch.Tensor | None = None
        self.encoder.register_forward_hook(self._keep_masked)  # so that no family's head needs to be known here

    @property
    def encoder(self) -> PreTrainedModel:
        return self.model.base_model

    def _keep_masked(self, encoder: nn.Module, inputs: tuple, output: BaseModelOutput) -> BaseModelOutput:
        hidden = output.last_hidden_state.flatten(0, 1)[self._masked]
        return BaseModelOutput(last_hidden_state=hidden[None])  # (1, masked tokens, width)

    def forward(self, input_ids: torch.Tensor, masked: torch.Tensor, attention_mask: torch.Tensor | None = None,
                token_type_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                reduction: str = "mean", class_weights: None = None) -> MaskedLMOutput:
        """`loss` and `logits` of the masked tokens of a batch.

        `input_ids`, `attention_mask` (1 for real tokens, None if all are) and `token_type_ids`: (batch, tokens) int64;
        `masked`: (masked tokens,) int64, their places in the flattened batch; `labels`: (masked tokens,) int64, the
        words that stood there. `loss`: cross-entropy in float32, the mean or, with reduction="sum", the sum; None
        without labels. `logits`: (masked tokens, vocabulary).
        """
        if self.has_fast_path:
            attention_mask = attention_masks(self.encoder, attention_mask)
        token_types = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        self._masked = masked
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **token_types).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's half precision ends here
        loss = None if labels is None else F.cross_entropy(logits, labels, reduction=reduction)
        return MaskedLMOutput(loss=loss, logits=logits)

    def save(self, folder: Path, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
        """A plain folder of transformers. `weights`: this model's state_dict."""
        tokenizer.save_pretrained(folder)
        self.model.save_pretrained(folder, state_dict={name.removeprefix("model."): tensor.cpu()
                                                       for name, tensor in weights.items()})
        shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors makes it readable to its owner alone


def new_masked_lm(model_config: ModelConfig, config: PreTrainedConfig) -> MaskedLanguageModel:
    """The encoder `model_config.model_name` with its head for masked words; a fresh head, and a line that says so,
    where the checkpoint has none. `config`: what `load_encoder_config` gave.

    Raises UserError if the architecture has no such head, or the encoder cannot be loaded or lacks weights.
    """
    name = model_config.model_name
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(f"model_config.model_name: transformers has no head for masked words for {name}, which is a "
                        f"{config.model_type} model: take one such as bert-base-uncased or answerdotai/ModernBERT-base")
    with explained("model_config.model_name", name):
        if model_config.pretrained:
            if own_classifier(name):
                raise UserError(f"model_config.model_name: {name} is a trained classifier: pretrain first, then "
                                "fine-tune; name the encoder that it was made of")
            model, missing = load_checkpoint(AutoModelForMaskedLM, name, config)
            if missing:
                say(f"{name} has no head for masked words: a fresh one is trained")
        else:
            model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
        config.name_or_path = ""  # a path of this machine, which must not be saved
        masked_lm = MaskedLanguageModel(model)
        try_forward_pass(masked_lm, (2, config.vocab_size), masked=torch.arange(2))
    return masked_lm
