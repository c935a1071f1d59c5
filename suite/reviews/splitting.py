"""Which reviews train, validate and test: no text stands in two splits."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.model_selection import train_test_split

from suite.reviews.sources import Reviews, locate
from utils import UserError, say


def text_digests(table: Dataset) -> np.ndarray:
    """(rows,) of 16 bytes each: equal for equal texts, and all of a text that stays in memory."""
    digests = np.empty(len(table), dtype="V16")
    row = 0
    for batch in table.select_columns("text").iter(batch_size=1000):
        for text in batch["text"]:
            digests[row] = hashlib.blake2b(text.encode(), digest_size=16).digest()
            row += 1
    return digests


def split_reviews(digests: np.ndarray, labels: np.ndarray, split_names: np.ndarray, data_config: Any
                  ) -> dict[str, np.ndarray]:
    """{"train", "valid", "test": the rows of each, ascending}. No text, of which `digests` tell, stands in two of them.

    Raises UserError if a class is too rare to be split.
    """
    name, official = data_config.dataset, data_config.split == "official"
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    originals = first[inverse]  # (rows,) the row at which each row's text stands first
    # The official test split stays whole, for figures that compare with others'; what stands in it is not trained on.
    fixed = split_names == "test" if official else np.zeros(len(labels), dtype=bool)
    if official and not fixed.any():
        raise UserError(f"data_config.split is official, but {name} has no labelled test split (found "
                        f"{', '.join(sorted(set(split_names)))}): give shares such as [0.8, 0.1, 0.1]")
    usable = ~fixed & ~np.isin(originals, originals[fixed])
    is_copy = usable & (originals != np.arange(len(originals)))
    kept_on_one_side = not data_config.drop_duplicates
    pool = np.flatnonzero(fixed | usable & (~is_copy | kept_on_one_side))
    if data_config.limit is not None and data_config.limit < len(pool):
        pool, _ = _draw(pool, labels, data_config.limit, data_config, "limit")
    if kept_on_one_side:  # of the rows left, the first of each text is split, and its copies follow it below
        free = np.sort(pool[~fixed[pool]])
        heads = free[np.unique(originals[free], return_index=True)[1]]
        copies = np.setdiff1d(free, heads)
        pool = np.concatenate([pool[fixed[pool]], np.sort(heads)])

    test, pool = pool[fixed[pool]], pool[~fixed[pool]]
    if official:
        marked = np.isin(split_names[pool], ("validation", "valid", "dev"))
        train, valid = (pool[~marked], pool[marked]) if marked.any() else _draw(
            pool, labels, len(pool) - round(0.1 * len(pool)), data_config)
    else:
        _, valid_share, test_share = data_config.split
        held_out = round(len(pool) * (valid_share + test_share))
        train, rest = _draw(pool, labels, len(pool) - held_out, data_config)
        valid, test = _draw(rest, labels, round(held_out * valid_share / (valid_share + test_share)), data_config)
    splits = {"train": train, "valid": valid, "test": test}
    if empty := [split for split, rows in splits.items() if len(rows) == 0]:
        raise UserError(f"{name}: no rows are left for {' and '.join(empty)}: raise data_config.limit or add rows")
    other = set(labels[np.concatenate([valid, test])].tolist())
    if lacking := other - set(labels[train].tolist()):  # only an official split can
        raise UserError(f"{name}: no row to train on has the class {min(lacking)}, counted from 0: add some, or give "
                        "shares such as data_config.split=[0.8,0.1,0.1]")

    if kept_on_one_side:
        splits = {split: np.concatenate([rows, copies[np.isin(originals[copies], originals[rows])]])
                  for split, rows in splits.items()}
    if repeated := int((~fixed & ~usable).sum()):
        say(f"{name}: {repeated:,} rows repeat a text of the official test split and are dropped")
    if is_copy.any():
        say(f"{name}: {is_copy.sum():,} exact duplicates "
            + ("kept on the side of their first occurrence" if kept_on_one_side else "dropped"))
    return {split: np.sort(rows) for split, rows in splits.items()}


def refuse_contradictions(digests: np.ndarray, reviews: Reviews) -> None:
    """Raises UserError, naming both rows, if equal texts carry different labels."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    contradicting = np.flatnonzero(reviews.labels != reviews.labels[first[inverse]])
    if len(contradicting):
        row = contradicting[0]
        (place, number), (other, other_number) = (locate(reviews.parts, i) for i in (first[inverse[row]], row))
        both = (f"{place}: rows {number} and {other_number}" if place == other else
                f"{place}: row {number} and {other}: row {other_number}")
        raise UserError(f"{both} are the same text with different labels: correct one of them")


def _draw(rows: np.ndarray, labels: np.ndarray, count: int, data_config: Any, key: str = "split"
          ) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the rows at random, stratified by label, and the others."""
    if key == "limit" and len(rows) - count < len(np.unique(labels[rows])):  # too few go for each class to lose one
        order = np.random.default_rng(data_config.split_seed).permutation(rows)
        return order[:count], order[count:]
    try:
        return train_test_split(rows, train_size=count, stratify=labels[rows], random_state=data_config.split_seed)
    except ValueError:
        counts = np.unique(labels[rows], return_counts=True)[1]
        raise UserError(f"{data_config.dataset}: {len(rows)} rows, {min(counts, default=0)} of them of the rarest "
                        f"class, are too few for each of the {len(counts)} classes to be in every part of "
                        f"data_config.{key}={getattr(data_config, key)}: add rows, or change data_config.{key}"
                        ) from None
