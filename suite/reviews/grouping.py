"""data_config.group_column: rows of one group, such as a film, stay in one part of the split.

Groups that share a text count as one, a unit, unless its copies are dropped. Units are drawn whole, largest first, each
into a part that still has room for its rows of every class. The draw depends on the texts, on which rows belong
together and on split_seed alone: neither the names of classes and groups nor the order of rows change it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from utils import DataConfig, UserError, say

if TYPE_CHECKING:
    from datasets import Dataset

FAR = 2  # a part that holds less than a FAR-th, or more than FAR times, of what was asked for is refused
DRAWS, FEW = 10, 500  # the best of so many draws is taken where there are so few units; more fill the parts anyway


def group_digests(table: Dataset) -> np.ndarray:
    """(rows,) of 16 bytes each: equal for equal groups, and never those of a text. Blanks around a group's name do not
    count, and 7.0 is 7: pandas writes so where a row had none."""
    encoded = pc.utf8_trim_whitespace(table.data.column("group")).combine_chunks().dictionary_encode()
    names = [re.sub(r"^([+-]?\d+)\.0+$", r"\1", group) for group in encoded.dictionary.to_pylist()]
    digests = [hashlib.blake2b(name.encode(), digest_size=16, person=b"group").digest() for name in names]
    return np.array(digests, "V16")[encoded.indices]


def units_of(digests: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(rows,) the number of each row's unit, from 0, in the order of their smallest digests of a text.

    `digests`, `groups`: (rows,) those of the texts and of the groups.
    """
    from scipy.sparse import coo_array  # here, because labelling does not need it
    from scipy.sparse.csgraph import connected_components

    texts, names = (np.unique(values, return_inverse=True)[1] for values in (digests, groups))
    nodes = len(texts) + len(names)  # texts first, in the order of their digests; a row joins its text and its group
    joined = coo_array((np.ones(len(texts), bool), (texts, len(texts) + names)), shape=(nodes, nodes))
    return connected_components(joined, directed=False)[1][texts]  # numbered by their first nodes


def is_chosen_copy(digests: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether a row is the only one of its text, or the one that stays of several. That is the first in
    its group; where the text stands in several groups, what else they hold decides, not their names or order."""
    names = np.unique(groups, return_inverse=True)[1]
    order = np.argsort(names, kind="stable")
    sums = [hashlib.blake2b(np.unique(digests[rows]).tobytes(), digest_size=16).digest()
            for rows in np.split(order, np.cumsum(np.bincount(names))[:-1])]
    place = np.unique(np.array(sums, "V16"), return_inverse=True)[1]  # (groups,)
    rows = np.lexsort((names, place[names]))
    chosen = np.zeros(len(rows), bool)
    chosen[rows[np.unique(digests[rows], return_index=True)[1]]] = True
    return chosen


def draw_units(units: np.ndarray, labels: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """(rows,) the part, 0 for the first of `shares`, into which each row is drawn; all rows of a unit into one.

    A unit goes at random into a part with room for it, with the chance that the part's room gives it; where none has
    room, into the part that lacks its rows most. No part is left empty. The best of several draws is taken
    where there are few units. Raises UserError if there are fewer units than parts.
    """
    units = np.unique(units, return_inverse=True)[1]
    sizes, classes = np.bincount(units), labels.max(initial=0) + 1
    if len(sizes) < len(shares):
        raise UserError(f"data_config.group_column: {len(sizes)} group(s) cannot be divided into {len(shares)} parts: "
                        "add rows of other groups, or leave data_config.group_column out")
    # A unit's rows of each class that it has, and at last those of all classes together
    kinds = np.concatenate([labels, np.full(len(labels), classes)])
    cells, counts = np.unique(np.tile(units, 2) * (classes + 1) + kinds, return_counts=True)
    owners, kind = np.divmod(cells, classes + 1)
    bounds = np.searchsorted(owners, np.arange(len(sizes) + 1))
    rows_of = [(kind[start:stop], counts[start:stop]) for start, stop in itertools.pairwise(bounds)]
    asked, generator, best = np.outer(shares, np.bincount(kinds)), np.random.default_rng(seed), (np.inf, None)
    for _ in range(DRAWS if len(sizes) <= FEW else 1):
        order = generator.permutation(len(sizes))
        parts, room = _place(order[np.argsort(-sizes[order], kind="stable")], rows_of, asked.copy(), generator)
        error = np.sort(room[asked > 0]**2 / asked[asked > 0]).sum()  # sorted: no order of classes moves the last bit
        best = min(best, (error, parts), key=lambda found: found[0])
    return best[1][units]


def _place(order: np.ndarray, rows_of: Sequence[tuple[np.ndarray, np.ndarray]], room: np.ndarray,
           generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """((units,) the part of each unit, what is left of the room), the units placed in this order.

    `rows_of`: for each unit, its classes and how many rows it has of each; `room` (parts, classes): how many rows each
    part should hold.
    """
    parts, is_empty = np.empty(len(order), np.int64), np.ones(len(room), bool)
    for placed, unit in enumerate(order):
        kinds, rows = rows_of[unit]
        space = room[:, kinds]
        allowed = is_empty if len(order) - placed <= is_empty.sum() else np.ones(len(room), bool)
        need = np.sort(space * rows, axis=1).sum(axis=1)  # sorted, for the same reason
        fits = allowed & (space >= rows - 1e-6).all(axis=1)
        if fits.any():
            chances = np.where(fits, need, 0).cumsum()
            part = np.searchsorted(chances, generator.random() * chances[-1], side="right")
        else:  # the largest need gives the smallest sum of squared differences from what was asked for
            part = np.where(allowed, need, -np.inf).argmax()
        parts[unit], is_empty[part] = part, False
        room[part, kinds] -= rows
    return parts, room


def draw_groups(rows: np.ndarray, units: np.ndarray, labels: np.ndarray, shares: Sequence[float],
                data_config: DataConfig, key: str = "split") -> list[np.ndarray]:
    """The rows of each part. `units`, `labels`: of all rows, not of `rows` alone; `key` of the data_config asks for it.

    Raises UserError if what comes out is far from the shares, see FAR.
    """
    parts = draw_units(units[rows], labels[rows], shares, data_config.split_seed)
    drawn = [rows[parts == part] for part in range(len(shares))]
    asked = shares[:1] if key == "limit" else shares
    if any(not share / FAR <= len(part) / len(rows) <= share * FAR for share, part in zip(asked, drawn, strict=False)):
        sizes = np.bincount(units[rows])
        found, wanted = (" : ".join(f"{len(rows) * share:,.0f}" for share in of_parts) for of_parts in (
            [len(part) / len(rows) for part in drawn], shares))
        raise UserError(
            f"{data_config.dataset}: data_config.{key}={getattr(data_config, key)} asks for {wanted} rows, and whole "
            f"groups of data_config.group_column={data_config.group_column} come to {found}, one of them less than "
            f"half or more than twice what was asked for: there are {np.count_nonzero(sizes):,} groups (those that "
            f"share a text count as one), the largest of {sizes.max():,} rows: change data_config.{key}, add groups, "
            "or remove texts that stand in several")
    return drawn


def say_groups(splits: dict[str, np.ndarray], units: np.ndarray, labels: np.ndarray, label_names: Sequence[str],
               data_config: DataConfig) -> None:
    """Print the shares that came out, in rows and classes."""
    counts = np.stack([np.bincount(labels[rows], minlength=len(label_names)) for rows in splits.values()])
    of_class = counts / counts.sum(axis=1, keepdims=True)  # (splits, classes): the share of the class in the split
    whole, names = counts.sum(axis=0) / counts.sum(), list(splits)
    split, label = np.unravel_index(np.abs(of_class - whole).argmax(), counts.shape)
    shown = [f"{name} {len(rows):,} rows ({len(rows) / counts.sum():.1%}) of {len(np.unique(units[rows])):,} groups"
             for name, rows in splits.items()]
    text = f"{data_config.dataset}: each {data_config.group_column} stands in one part: {', '.join(shown)}"
    here, of_all = f"{of_class[split, label]:.1%}", f"{whole[label]:.1%}"
    if here != of_all:
        text += (f"; the class whose share differs most is {label_names[label]}, {here} of {names[split]} and {of_all} "
                 "of all")
    say(text)
