"""The unlabelled reviews of a dataset: beside the labelled ones, and which of them may be trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from suite.reviews.classes import refuse_empty
from suite.reviews.grouping import draw_groups, group_digests, units_of
from suite.reviews.splitting import Split, text_digests
from utils import DataConfig


def with_unlabelled(split: Split) -> Split:
    """The split with the dataset's unlabelled reviews behind the labelled ones, in none of its three parts.

    Their label is -1, and of the table's columns, the text is left. Raises UserError, which counts them, for unlabelled
    rows without a text, or without a group where there is such a column.
    """
    from datasets import concatenate_datasets  # here, because most modes do not need it

    more = split.reviews.unlabelled
    refuse_empty(more)
    parts, added = [*split.reviews.parts, *more], sum(len(part.table) for part in more)
    reviews = replace(
        split.reviews, table=concatenate_datasets([part.table.select_columns("text") for part in parts]),
        labels=np.concatenate([split.reviews.labels, np.full(added, -1)]),
        split_names=np.repeat([part.split for part in parts], [len(part.table) for part in parts]),
        parts=parts, unlabelled=[])
    digests = np.concatenate([split.digests, *(text_digests(part.table) for part in more)])
    groups = None if split.groups is None else np.concatenate(
        [split.groups, *(group_digests(part.table) for part in more)])
    return replace(split, reviews=reviews, digests=digests, groups=groups)


def each_text_once(labelled: np.ndarray, unlabelled: np.ndarray, digests: np.ndarray, held_out: np.ndarray,
                   data_config: DataConfig, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(the given rows in random order, each text once, none in `held_out`; the unit of each row of the table).

    `labelled`, `unlabelled`: rows of the table, the labelled ones first; `digests`: of all its rows; `held_out`: those
    of the valid and test reviews. Of the unlabelled rows, there are at most data_config.limit. With `groups` (rows,),
    the digests of the groups, none is held out; then the limit is that of whole groups, and there are units, see
    `units_of`.
    """
    rows = np.concatenate([labelled, unlabelled])
    rows, units = rows[~np.isin(digests[rows], held_out)], None
    if groups is not None:
        rows = rows[~np.isin(groups[rows], held_out)]
    rows = rows[np.unique(digests[rows], return_index=True)[1]]  # the first of each text
    if groups is not None:
        units = np.zeros(len(digests), np.int64)
        units[rows] = units_of(digests[rows], groups[rows])
    rows = np.random.default_rng(data_config.split_seed).permutation(np.sort(rows))
    is_labelled = np.isin(rows, labelled)
    limit = data_config.limit or len(rows)
    if groups is None:
        rows = rows[is_labelled | (np.cumsum(~is_labelled) <= limit)]
    elif limit < (~is_labelled).sum():
        share = limit / (~is_labelled).sum()
        some, _ = draw_groups(rows[~is_labelled], units, np.zeros_like(units), (share, 1 - share), data_config, "limit")
        rows = np.concatenate([rows[is_labelled], some])
    return rows, units
