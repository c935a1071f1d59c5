"""The texts to pretrain on: training reviews and unlabelled ones, never one that validates or tests."""

from __future__ import annotations

import sys

import numpy as np

from data import Encode, PreparedData, fingerprint, load_split, refuse_no_tokens, tokenize
from suite.encoders.loading import trained_texts
from suite.encoders.tokenizers import COMPARED_TEXTS, load_tokenizer
from suite.pretraining.masking import MaskedWindows
from suite.reviews.classes import refuse_no_texts
from suite.reviews.splitting import text_digests
from utils import Config, DataConfig, UserError, say

VALID_SHARE, MOST_VALID = 0.05, 1000  # of the texts. A thousand give the loss to within about 0.01 nats


def prepare_texts(config: Config) -> PreparedData:
    """Load the reviews, labelled or not, leave out those that validate or test, and cut the others into windows.

    The splits are `train` and `valid`, a row of them is a window, and `digests` are those of both.
    """
    from datasets import concatenate_datasets  # here, because most modes do not need it

    data_config, name = config.data_config, config.model_config.model_name
    split = load_split(config)
    reviews, labelled = split.reviews, split.digests
    refuse_no_texts(reviews.unlabelled)
    table = concatenate_datasets([part.table.select_columns("text") for part in (*reviews.parts, *reviews.unlabelled)])
    digests = np.concatenate([labelled, *(text_digests(part.table) for part in reviews.unlabelled)])
    train, valid = choose(split.ids_of["train"], np.arange(len(labelled), len(table)), digests, split.held_out,
                          data_config)
    seen = trained_texts(config.model_config, split.held_out)
    tokenizer = load_tokenizer(name, line_breaks=data_config.line_breaks, texts=table[:COMPARED_TEXTS]["text"])
    if tokenizer.mask_token is None:
        raise UserError(f"model_config.model_name: the tokenizer of {name} has no mask token: take a model that was "
                        "pretrained with one, such as bert-base-uncased")
    used = np.sort(np.concatenate([train, valid]))
    tokens, offsets, first_windows = tokenize(
        table.select(used), Encode(tokenizer, data_config.max_len, "windows", max_windows=sys.maxsize), digests[used])
    refuse_no_tokens(np.diff(offsets)[first_windows[:-1]], used, [*reviews.parts, *reviews.unlabelled])
    text_of = np.repeat(used, np.diff(first_windows))  # (windows,)
    splits = {}
    for name_of_split, ids, seed in (("train", train, None), ("valid", valid, data_config.split_seed)):
        windows = np.flatnonzero(np.isin(text_of, ids))
        splits[name_of_split] = MaskedWindows(tokens, offsets, windows, text_of[windows], tokenizer, seed)
    if not len(splits["valid"].batch(np.arange(len(splits["valid"])))["labels"]):
        raise UserError(f"{data_config.dataset}: {len(valid)} texts to validate on are too few, none of their words is "
                        "masked: raise data_config.limit or add texts")
    return PreparedData(splits, tokenizer, ["no class"], fingerprint(digests[used], train, valid), split.held_out,
                        np.union1d(digests[used], seen))


def choose(labelled: np.ndarray, unlabelled: np.ndarray, digests: np.ndarray, held_out: np.ndarray,
           data_config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows to validate on), both ascending, of the given rows; each text once, none in `held_out`.

    `digests`: of all rows; `held_out`: those of the valid and test reviews. Of the unlabelled rows, there are at most
    data_config.limit.
    """
    rows = np.concatenate([labelled, unlabelled])
    rows = rows[~np.isin(digests[rows], held_out)]
    rows = rows[np.unique(digests[rows], return_index=True)[1]]  # the first of each text
    rows = np.random.default_rng(data_config.split_seed).permutation(np.sort(rows))
    is_labelled = np.isin(rows, labelled)
    rows = rows[is_labelled | (np.cumsum(~is_labelled) <= (data_config.limit or len(rows)))]
    say(f"{data_config.dataset}: {is_labelled.sum():,} training reviews and {len(rows) - is_labelled.sum():,} "
        "unlabelled ones to pretrain on")
    valid = max(1, min(round(VALID_SHARE * len(rows)), MOST_VALID))
    return np.sort(rows[valid:]), np.sort(rows[:valid])
