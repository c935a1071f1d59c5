"""From the tables of a dataset to pooled reviews with their classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from suite.reviews.rows import MOST_NAMED, listed
from utils import DataConfig, UserError, say

if TYPE_CHECKING:
    from datasets import Dataset

    from suite.reviews.sources import Part

SPLIT_NAMES = {  # other names of the three splits
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}


@dataclass
class Reviews:
    """All labelled reviews of a dataset. The id of a review is its row in `table`."""

    table: Dataset  # columns text (str) and label (str), and group (str) if data_config names one; memory-mapped
    labels: np.ndarray  # (rows,) int64: index into label_names
    label_names: list[str]
    split_names: np.ndarray  # (rows,) str: train, validation, test, or another split of the dataset, of each row
    parts: list[Part]  # the tables that were pooled, in the order of their rows
    unlabelled: list[Part]  # for pretraining alone; their texts are not checked yet


def name_rows(parts: list[Part], rows: Sequence[int], one: str = "", many: str = "") -> str:
    """The first of these rows of the pooled table, as their author counts them, and how many more there are.

    `one` or `many` follows, whichever fits: `a.csv: row 2 has no text`, or `a.csv: rows 2, 5, 6 and 40 more have no
    text`.
    """
    starts = np.cumsum([0, *(len(part.table) for part in parts)])  # of each part in the pooled table
    places: dict[str, list[str]] = {}  # {where: rows there, counted from 1; none for a file that is one row}
    for row in rows[:MOST_NAMED]:
        number = np.searchsorted(starts, row, side="right") - 1
        part, row = parts[number], row - starts[number]
        if part.files:
            places[str(part.files[row])] = []
        else:
            places.setdefault(part.place, []).append(str(row + 1))
    more = [f"and {len(rows) - MOST_NAMED:,} more"] if len(rows) > MOST_NAMED else []
    named = [f"{place}: row{'s' if more or len(numbers) > 1 else ''} {', '.join(numbers)}" if numbers else place
             for place, numbers in places.items()]
    return " ".join(["; ".join(named), *more, one if len(rows) == 1 else many]).rstrip()


def load_reviews(data_config: DataConfig, num_labels: int) -> Reviews:
    """Read and pool all labelled splits of a dataset.

    Raises UserError, with the rows and the fix, for a missing column, missing or empty texts, labels and groups, and
    classes that do not match `num_labels`.
    """
    from datasets import concatenate_datasets  # here, because labelling needs neither, and both take a second

    from suite.reviews.sources import load_parts

    name, column = data_config.dataset, data_config.label_column
    parts, unlabelled, found = [], [], load_parts(data_config)
    for part in found:
        part.split = next((split for split, names in SPLIT_NAMES.items() if part.split in names), part.split)
    without_labels = _unlabelled_splits(found)
    for part in found:
        if part.split in without_labels:
            unlabelled.append(part)
        elif data_config.split == "official" and part.split not in SPLIT_NAMES:
            say(f"{part.place}: the split {part.split} is none of {', '.join(SPLIT_NAMES)}: it is not used with "
                f"data_config.split=official ({len(part.table):,} rows)")
        else:
            parts.append(part)
    if not any(len(part.table) for part in parts):
        raise UserError(f"data_config.dataset: {name} holds no labelled rows: name a file or folder with some")
    refuse_empty(parts)
    table = concatenate_datasets([part.table for part in parts])
    labels, label_names = _encode_labels(table, name, parts, column, num_labels)
    split_names = np.repeat([part.split for part in parts], [len(part.table) for part in parts])
    return Reviews(table, labels, label_names, split_names, parts, unlabelled)


def _unlabelled_splits(parts: list[Part]) -> set[str]:
    """The splits that hold no label, or none but a negative number that stands nowhere else, as in secret tests."""
    found: dict[str, set[str]] = {}
    for part in parts:
        values = pc.unique(pc.utf8_trim_whitespace(part.table.data.column("label")))
        found.setdefault(part.split, set()).update(value for value in values.to_pylist() if value)

    def has_labels(split: str) -> bool:
        others = set().union(*(values for other, values in found.items() if other != split))
        return split != "unsupervised" and (split == "train" or bool(found[split] & others) or any(
            not re.fullmatch("-[0-9]+", value) for value in found[split]))

    return {split for split in found if not has_labels(split)}


def refuse_empty(parts: list[Part]) -> None:
    """Raises UserError, which counts them, for rows without a text, or without a group where there is such a column: a
    film that nobody named may be any film."""
    for column in ("text", "group"):
        rows, start = [], 0
        for values in (chunk for part in parts if column in part.table.column_names
                       for chunk in part.table.data.column(column).chunks):
            # chunk by chunk, because trimming copies the texts
            empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), True)
            rows += (start + np.flatnonzero(empty.to_numpy(zero_copy_only=False))).tolist()
            start += len(values)
        _refuse_missing(parts, rows, column)


def _refuse_missing(parts: list[Part], rows: Sequence[int], what: str) -> None:
    if len(rows):
        raise UserError(name_rows(parts, rows, f"has no {what}: fill it or remove the row",
                                  f"have no {what}: fill them or remove these rows"))


def _encode_labels(table: Dataset, name: str, parts: list[Part], column: str, num_labels: int
                   ) -> tuple[np.ndarray, list[str]]:
    """The labels as indices (rows,) int64, and the names of the classes.

    The names are the dataset's own if it declares them, less those without rows. Otherwise they are the values that
    are found: numbers in their order, or texts sorted by Unicode code point (so `Z` comes before `a`, and `z` before
    `ä`).
    """
    values = pc.utf8_trim_whitespace(table.data.column("label")).combine_chunks()
    _refuse_missing(parts, np.flatnonzero(pc.fill_null(pc.equal(values, ""), True)), "label")
    encoded = values.dictionary_encode()
    named = encoded.dictionary.to_pylist()  # the class of each distinct value
    if order := _declared_classes(parts):
        named = _by_name_or_number(named, order, name)
    elif all(re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", value) for value in named):
        longest_first = sorted(named, key=lambda value: (len(value), value), reverse=True)
        written = {Decimal(value): value for value in longest_first}  # 1, 1.0 and 01 are one number, written as 1
        named, order = [written[Decimal(value)] for value in named], [written[number] for number in sorted(written)]
    else:
        order = sorted(set(named))
    present = set(named)
    if unknown := sorted(present - set(order)):
        rows = np.flatnonzero(np.array([label in unknown for label in named])[encoded.indices])
        raise UserError(f"{name_rows(parts, rows, 'has', 'have')} labels such as {unknown[0]!r}, and the dataset "
                        f"declares the classes {listed(order)}: correct them or remove these rows")
    if lacking := [label for label in order if label not in present]:
        say(f"{name}: no row has the class {listed(lacking)}, which the dataset declares: it is left out")
    names = [label for label in order if label in present]
    place = {label: index for index, label in enumerate(names)}
    labels = np.array([place[label] for label in named], np.int64)[encoded.indices]
    if len(names) == 1:
        raise UserError(f"{name}: all rows have the label {names[0]!r} in the column {column!r}: add rows of another "
                        "class, or set data_config.label_column")
    if len(names) != num_labels:
        counts = np.bincount(labels)
        rare = len(counts) - 1 - counts[::-1].argmin()  # the last of several
        rows = np.flatnonzero(labels == rare)
        alike = "some differ in capitals alone; " if len({label.casefold() for label in names}) < len(names) else ""
        raise UserError(f"{name}: the column {column!r} has {len(names)} classes ({listed(names)}), but "
                        f"model_config.num_labels is {num_labels}: set model_config.num_labels={len(names)}, or "
                        f"correct the data; {alike}the rarest class is {names[rare]!r} ({name_rows(parts, rows)})")
    return labels, names


def _by_name_or_number(values: list[str], order: list[str], name: str) -> list[str]:
    """The names of these classes, which stand in a file as their names or as their numbers in `order`. Where all are
    names, they are names; where all are numbers, they are numbers. Raises UserError where one may be either."""
    numbers = {str(number): label for number, label in enumerate(order)}
    if set(values) <= set(order):
        return values
    if set(values) <= numbers.keys():
        return [numbers[value] for value in values]
    known = set(order) | numbers.keys()
    if set(values) <= known and (either := [value for value in values if value in order
                                            and numbers.get(value, value) != value]):
        raise UserError(f"{name}: the label {either[0]!r} is the name of one of the classes {listed(order)} and the "
                        "number of another, and the labels are neither all names nor all numbers: write names")
    return [value if value in order else numbers.get(value, value) for value in values]


def _declared_classes(parts: list[Part]) -> list[str] | None:
    """The names of the classes 0, 1, ... that the dataset declares; None if it declares none."""
    declaring = [part for part in parts if part.class_names]
    for part in declaring:
        if part.class_names != declaring[0].class_names:
            raise UserError(f"{declaring[0].place} declares the classes {listed(declaring[0].class_names)}, and "
                            f"{part.place} {listed(part.class_names)}: one number would mean two classes; write names "
                            "in place of the numbers")
    return declaring[0].class_names if declaring else None
