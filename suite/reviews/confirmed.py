"""What people said of some labels: a .csv file with the columns split, row and label, such as the one that --mode audit
writes.

`row` counts the rows of the dataset's split from 1, over all of its files. `label` is the class on which people agree:
the given one, which confirms it, or another, which corrects it. It is empty where they agree on none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from suite.reviews.classes import Reviews
from suite.reviews.rows import columns_of, listed, read_rows
from utils import UserError

COLUMNS = ("split", "row", "label")
NO_CLASS = -1  # people agree on none


@dataclass
class Confirmed:
    labels: np.ndarray  # (rows,) int64: the class that people agree on, or NO_CLASS; the given one of all other rows
    splits: list[str]  # of the dataset, of which the file names rows


def rows_in_split(reviews: Reviews) -> np.ndarray:
    """(rows,) int64: the number of each row in its split of the dataset, from 1."""
    numbers = np.zeros(len(reviews.labels), np.int64)
    for split in np.unique(reviews.split_names):
        is_there = reviews.split_names == split
        numbers[is_there] = np.arange(1, is_there.sum() + 1)
    return numbers


def read_confirmed(path: str, reviews: Reviews) -> Confirmed:
    """Raises UserError, which counts them, for rows that name no label of the reviews or no class of theirs."""
    if missing := [column for column in COLUMNS if column not in (found := columns_of(path, COLUMNS))]:
        raise UserError(f"--confirmed: {path}: no column {missing[0]!r}; found {listed(found)}: give it the columns "
                        "split, row and label, as the file has that --mode audit writes")
    ids = {split: np.flatnonzero(reviews.split_names == split) for split in np.unique(reviews.split_names).tolist()}
    classes = {"": NO_CLASS} | {name: label for label, name in enumerate(reviews.label_names)}
    labels, named, problems = reviews.labels.copy(), {}, []
    for row in read_rows(path, COLUMNS):
        split, number, label = (row.values.get(column, "").strip() for column in COLUMNS)
        if row.problem:
            problems.append(row.problem)
        elif split not in ids:
            problems.append(f"row {row.number}: no split {split!r}; found {listed(list(ids))}")
        elif not (number.isdecimal() and 1 <= int(number) <= len(ids[split])):
            problems.append(f"row {row.number}: no row {number!r} in the split {split}: they are 1 to "
                            f"{len(ids[split])}")
        elif label not in classes:
            problems.append(f"row {row.number}: no class {label!r}: give one of {listed(reviews.label_names)}, or none "
                            "where people agree on none")
        elif (review := ids[split][int(number) - 1]) in named:
            problems.append(f"row {row.number}: the same label as in row {named[review]}: remove one of them")
        else:
            named[review], labels[review] = row.number, classes[label]
    if not named and not problems:
        problems.append("it has no rows: give it those whose labels people have looked at")
    if problems:
        more = f"; {len(problems) - 1:,} more rows are wrong" if len(problems) > 1 else ""
        raise UserError(f"--confirmed: {path}: {problems[0]}{more}")
    return Confirmed(labels, sorted({str(reviews.split_names[review]) for review in named}))
