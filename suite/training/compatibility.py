"""Whether an encoder and the reviews go together."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedConfig

from data import PreparedData
from suite.common.checks import position_limit, too_long
from suite.encoders.loading import TRAINED_TEXTS, own_classifier, trained_texts
from suite.encoders.refusals import refuse_foreign_tokens, refuse_unknown_words
from utils import Config, UserError, say


def refuse_incompatible(config: Config, encoder_config: PreTrainedConfig, data: PreparedData) -> None:
    """Raises UserError for reviews that the encoder or its tokenizer cannot read, or that it was trained on although
    they are validated or tested on here."""
    key, name, seen = "model_config.model_name", config.model_config.model_name, trained_texts(config.model_config)
    if count := np.isin(data.held_out, seen).sum():
        raise UserError(f"{key}: {name} was trained on {count:,} texts that are validated or tested on here: give "
                        "data_config the values of its training, or train it again with these")
    if config.model_config.pretrained and not len(seen):
        learned = getattr(own_classifier(name) or encoder_config, "data_fingerprint", None)
        if learned not in (None, data.fingerprint):  # of an earlier version, from the Hub, or exported
            say(f"{name} has no {TRAINED_TEXTS}, so nobody can tell whether it was trained on texts that are validated "
                "or tested on here: if it was, the accuracy is too high")
    if problem := too_long(config.data_config.max_len, name, position_limit(encoder_config.to_dict())):
        raise UserError(problem)
    refuse_foreign_tokens(key, name, data.tokenizer, encoder_config.vocab_size)
    refuse_unknown_words(key, name, data.tokenizer, data.splits["train"].tokens)  # the tokens of all splits
