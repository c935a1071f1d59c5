"""Refuses an encoder that does not go with the reviews."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedConfig

from data import PreparedData
from suite.common.checks import position_limit, too_long
from suite.common.hub import explained
from suite.encoders.loading import TRAINED_TEXTS, own_classifier, trained_texts
from suite.encoders.refusals import largest_token, refuse_unknown_words
from utils import Config, UserError, say


def refuse_misfit(config: Config, encoder_config: PreTrainedConfig, data: PreparedData) -> None:
    """Raises UserError for reviews that the encoder or its tokenizer cannot read, or that it was trained on although
    they are validated or tested on here."""
    name, seen = config.model_config.model_name, trained_texts(config.model_config)
    if count := np.isin(data.held_out, seen).sum():
        raise UserError(f"model_config.model_name: {name} was trained on {count:,} texts that are validated or tested "
                        "on here: give data_config the values of its training, or train it again with these")
    if config.model_config.pretrained and not len(seen):
        learned = getattr(own_classifier(name) or encoder_config, "data_fingerprint", None)
        if learned not in (None, data.fingerprint):  # of an earlier version, from the Hub, or exported
            say(f"{name} has no {TRAINED_TEXTS}, so nobody can tell whether it was trained on texts that are validated "
                "or tested on here: if it was, the accuracy is too high")
    tokens = data.splits["train"].tokens  # those of all splits
    if problem := too_long(config.data_config.max_len, name, position_limit(encoder_config.to_dict())):
        raise UserError(problem)
    if (largest := largest_token(data.tokenizer, tokens)) >= encoder_config.vocab_size:
        raise UserError(f"model_config.model_name: the tokenizer of {name} gives token {largest}, but its encoder only "
                        f"knows {encoder_config.vocab_size}: they do not belong together")
    with explained("model_config.model_name", name):
        refuse_unknown_words(data.tokenizer, tokens)
