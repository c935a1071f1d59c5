"""Which reviews train, validate and test. No text stands in two splits; with a group column, no group does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from suite.reviews.classes import Reviews, load_reviews, name_rows
from suite.reviews.grouping import FAR, draw_groups, group_digests, is_chosen_copy, say_groups, units_of
from utils import Config, DataConfig, UserError, say

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Split:
    reviews: Reviews
    digests: np.ndarray  # (rows,) of 16 bytes, see `text_digests`
    ids_of: dict[str, np.ndarray]  # {"train", "valid", "test": rows of `reviews`, ascending}
    fingerprint: str  # of the reviews, their labels and the split
    groups: np.ndarray | None = None  # (rows,) of 16 bytes, see `group_digests`; None without a group column
    # (labelled rows,) equal for those that intervals count as one: of a group, and of a text whose copies are kept
    units: np.ndarray | None = None

    def digests_of(self, *names: str) -> np.ndarray:
        """(reviews,) the digests of the texts in these splits, and with a group column then those of their groups."""
        rows = np.concatenate([self.ids_of[name] for name in names])
        groups = self.digests[:0] if self.groups is None else np.unique(self.groups[rows])
        return np.concatenate([self.digests[rows], groups])

    @property
    def held_out(self) -> np.ndarray:
        """What nothing may be trained on: `digests_of` the valid and test reviews."""
        return self.digests_of("valid", "test")

    @property
    def held_out_anywhere(self) -> np.ndarray:
        """`held_out`, and the texts of held-out groups that are in no part of this split. Another run, without the
        groups, may have been trained on them."""
        if self.groups is None:
            return self.held_out
        texts = self.digests[np.isin(self.groups, self.held_out)]
        return np.union1d(self.held_out, np.setdiff1d(texts, self.digests[self.ids_of["train"]]))

    @property
    def label_names(self) -> list[str]:
        return self.reviews.label_names

    @property
    def record(self) -> dict[str, Any]:
        """See `data_record`."""
        return data_record(len(self.ids_of["train"]), self.held_out)

    def text(self, review_id: int) -> str:
        """The review whose `id` this is."""
        return self.reviews.table[int(review_id)]["text"]

    def texts_and_labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The reviews of one of the three splits, in the order of their ids."""
        ids = self.ids_of[name]
        return list(self.reviews.table.select(ids)["text"]), self.reviews.labels[ids]


def load_split(config: Config) -> Split:
    """Load, clean and split the reviews. No tokenizer is needed."""
    data_config = config.data_config
    reviews = load_reviews(data_config, config.model_config.num_labels)
    digests = text_digests(reviews.table)
    refuse_contradictions(digests, reviews)
    groups = None if data_config.group_column is None else group_digests(reviews.table)
    ids_of = split_reviews(digests, reviews.labels, reviews.split_names, data_config, reviews.label_names, groups)
    units = groups
    if not data_config.drop_duplicates and len(np.unique(digests)) < len(digests):
        units = units_of(digests, digests if groups is None else groups)
    return Split(reviews, digests, ids_of, fingerprint(digests, reviews.labels, *ids_of.values()), groups, units)


def text_digests(table: Dataset) -> np.ndarray:
    """(rows,) of 16 bytes each: equal for equal texts. They stay in memory in place of the texts."""
    return np.frombuffer(b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest()
                                  for batch in table.select_columns("text").iter(batch_size=1000)
                                  for text in batch["text"]), "V16")


def fingerprint(*parts: np.ndarray) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).hexdigest()


def data_record(trained_on: int, held_out: np.ndarray) -> dict[str, Any]:
    """What metrics.json says about a run's data: the number of training rows, and a fingerprint of the digests of what
    validates and tests. Runs of different data_config.train_limit share the second alone."""
    return {"train": trained_on, "held_out": fingerprint(held_out)}


def refuse_contradictions(digests: np.ndarray, reviews: Reviews) -> None:
    """Raises UserError, which counts them and names the first pairs, if equal texts carry different labels."""
    originals = _first_rows(digests)
    rows = np.flatnonzero(reviews.labels != reviews.labels[originals])
    if len(rows):
        first = name_rows(reviews.parts, originals[rows[:1]])
        raise UserError(name_rows(
            reviews.parts, rows, f"has the same text as {first}, and another label: correct or remove one of them",
            f"have the same texts as earlier rows, the first as {first}, and other labels: correct or remove them"))


def split_reviews(digests: np.ndarray, labels: np.ndarray, split_names: np.ndarray, data_config: DataConfig,
                  label_names: Sequence[str] | None = None, groups: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{"train", "valid", "test": the rows of each, ascending}. Rows of equal digests never stand in two of them, nor do
    rows of one group.

    `label_names`: None numbers the classes; `groups` (rows,): None if rows belong together by their texts alone.

    Raises UserError if a class is too rare to be split, or whole groups come too far from the shares.
    """
    name, official = data_config.dataset, data_config.split == "official"
    is_test, keep_copies = (split_names == "test") & official, not data_config.drop_duplicates
    if official and not is_test.any():
        raise UserError(f"data_config.split is official, but {name} has no labelled test split (found "
                        f"{', '.join(sorted(set(split_names)))}): give shares such as [0.8, 0.1, 0.1]")
    originals = _first_rows(digests)
    # The official test split stays whole, so that its figures compare with those of others. What repeats one of its
    # texts or groups is not trained on. The official validation split keeps its groups in the same way.
    rank = np.where(is_test, 2, official and groups is not None and split_names == "validation")
    is_dropped = _is_outranked(rank, originals)
    if groups is not None:
        is_dropped |= _is_outranked(rank, _first_rows(groups))
    kept = np.flatnonzero(~is_dropped)
    stays = kept == kept[_first_rows(digests[kept])] if groups is None else is_chosen_copy(digests[kept], groups[kept])
    is_copy = np.zeros(len(rank), bool)
    is_copy[kept] = ~is_test[kept] & ~stays
    pool = np.flatnonzero(~is_dropped & (keep_copies | ~is_copy))
    units = originals.copy()
    if groups is not None:
        units[pool] = units_of(digests[pool], groups[pool])
    label_names = label_names or range(labels.max() + 1)
    counts = np.bincount(labels[pool], minlength=len(label_names))
    if not official and (few := counts.min()) < 3:
        raise UserError(f"{name}: the class {label_names[counts.argmin()]!r} has too few different texts ({few}): each "
                        "of the three splits needs one: add rows of this class, or remove it")
    if data_config.limit is not None and data_config.limit < len(pool):
        if groups is None:
            pool, _ = draw_stratified(pool, labels, data_config.limit, data_config, "limit")
        else:
            share = data_config.limit / len(pool)
            pool, _ = draw_groups(pool, units, labels, (share, 1 - share), data_config, "limit")

    test, pool = pool[is_test[pool]], pool[~is_test[pool]]
    follow = keep_copies and groups is None  # copies of a text are in one unit, which is drawn whole
    if follow:  # only the first row of each text is split, and its copies follow it
        pool = np.sort(pool)
        together, pool = pool, np.sort(pool[np.unique(originals[pool], return_index=True)[1]])
    splits = _draw_splits(pool, test, labels, split_names, data_config, label_names,
                          None if groups is None else units)
    if follow:
        copies = np.setdiff1d(together, pool)
        splits = {split: np.concatenate([rows, copies[np.isin(originals[copies], originals[rows])]])
                  for split, rows in splits.items()}
    splits["train"] = draw_nested(splits["train"], digests, units, labels, data_config, label_names)
    _say_repeats(is_dropped.sum(), is_copy.sum(), data_config)
    if groups is not None:
        say_groups(splits, units, labels, label_names, data_config)
    _say_lacking(splits, labels, label_names, name)
    return {split: np.sort(rows) for split, rows in splits.items()}


def _first_rows(digests: np.ndarray) -> np.ndarray:
    """(rows,) the first row that has the same digest as each row."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def _is_outranked(rank: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether a row of the same text, or group, has a higher rank. `firsts`: see `_first_rows`."""
    highest = np.zeros(len(rank), np.int64)
    np.maximum.at(highest, firsts, rank)
    return rank < highest[firsts]


def _draw_splits(pool: np.ndarray, test: np.ndarray, labels: np.ndarray, split_names: np.ndarray,
                 data_config: DataConfig, label_names: Sequence[str], units: np.ndarray | None
                 ) -> dict[str, np.ndarray]:
    """Divide the rows of `pool` into train, valid and test; with an official split, `test` stays as it is.

    `units`: what is drawn whole, see `units_of`; None: single rows.

    Raises UserError if a split is empty, or a class is not trained on.
    """
    if data_config.split == "official":
        is_valid = split_names[pool] == "validation"
        train, valid = (
            (pool[~is_valid], pool[is_valid]) if is_valid.any() else
            draw_stratified(pool, labels, len(pool) - round(0.1 * len(pool)), data_config) if units is None else
            draw_groups(pool, units, labels, (0.9, 0.1), data_config))
    elif units is not None:
        train, valid, test = draw_groups(pool, units, labels, data_config.split, data_config)
    else:
        _, valid_share, test_share = data_config.split
        held_out = round(len(pool) * (valid_share + test_share))
        train, rest = draw_stratified(pool, labels, len(pool) - held_out, data_config)
        valid, test = draw_stratified(rest, labels, round(held_out * valid_share / (valid_share + test_share)),
                                      data_config)
    splits, name = {"train": train, "valid": valid, "test": test}, data_config.dataset
    if empty := [split for split, rows in splits.items() if len(rows) == 0]:
        raise UserError(f"{name}: no rows are left for {' and '.join(empty)}: raise data_config.limit or add rows")
    if lacking := set(range(len(label_names))) - set(labels[train].tolist()):  # hardly ever: draws are stratified
        raise UserError(f"{name}: no row to train on has the class {label_names[min(lacking)]}: add some, or give "
                        "shares such as data_config.split=[0.8,0.1,0.1]")
    return splits


def draw_stratified(rows: np.ndarray, labels: np.ndarray, count: int, data_config: DataConfig, key: str = "split"
                    ) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the rows drawn at random, stratified by label, and the other rows.

    `key` of the data_config asks for the draw. Raises UserError if a class has too few rows.
    """
    from sklearn.model_selection import train_test_split  # here, because labelling does not need it

    if key == "limit" and len(rows) - count < len(np.unique(labels[rows])):
        # scikit-learn wants a row of each class on both sides. So few rows are dropped that strata do not matter.
        order = np.random.default_rng(data_config.split_seed).permutation(rows)
        return order[:count], order[count:]
    try:
        return train_test_split(rows, train_size=count, stratify=labels[rows], random_state=data_config.split_seed)
    except ValueError:
        counts = np.unique(labels[rows], return_counts=True)[1]
        raised = "add rows" if data_config.limit is None else f"raise data_config.limit={data_config.limit}"
        raise UserError(f"{data_config.dataset}: of the {len(rows)} rows that are to be divided, "
                        f"{min(counts, default=0)} of the rarest class are too few for each of the {len(counts)} "
                        "classes to be in every part of "
                        f"data_config.{key}={getattr(data_config, key)}: {raised}, or change data_config.{key}"
                        ) from None


def draw_nested(rows: np.ndarray, digests: np.ndarray, units: np.ndarray, labels: np.ndarray, data_config: DataConfig,
                label_names: Sequence[str]) -> np.ndarray:
    """About data_config.train_limit of the rows, drawn at random, each class by its share; without a limit, or with a
    larger one, all. Units are drawn whole, see `units_of`; where each is a single row, the number is exact. What a
    smaller limit draws, a larger one draws, too.

    `digests`, `units`, `labels`: of all rows. Raises UserError if a class has none of the rows drawn, or if whole units
    come to less than half of the limit, or more than twice.
    """
    limit, classes = data_config.train_limit, len(label_names)
    if limit is None or limit >= len(rows):
        return rows
    rows = rows[np.argsort(digests[rows], kind="stable")]  # so that the order of the rows changes nothing
    unit, labels = np.unique(_first_rows(units[rows]), return_inverse=True)[1], labels[rows]
    # A unit counts as of its most frequent class; of several, as of that of its smallest digest.
    cells, first, counts = np.unique(unit * classes + labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts, cells // classes))
    label_of = (cells % classes)[order][np.unique(cells[order] // classes, return_index=True)[1]]  # (units,)
    # A unit's place is the share of its class's rows that come before it in a random order. Places ascend as one list.
    sizes = np.bincount(unit)
    shuffled = np.random.default_rng(data_config.split_seed).permutation(len(label_of))
    by_class = shuffled[np.argsort(label_of[shuffled], kind="stable")]
    totals = np.bincount(label_of, sizes, classes)
    before = np.cumsum(sizes[by_class]) - sizes[by_class] - (np.cumsum(totals) - totals)[label_of[by_class]]
    places = np.empty(len(sizes))
    places[by_class] = before / totals[label_of[by_class]]
    order = shuffled[np.argsort(places[shuffled], kind="stable")]
    drawn = order[:1 + np.abs(np.cumsum(sizes[order]) - limit).argmin()]
    is_drawn = np.isin(unit, drawn)
    key, count = f"{data_config.dataset}: data_config.train_limit={limit}", is_drawn.sum()
    if not limit / FAR <= count <= limit * FAR:
        raise UserError(f"{key} comes to {count:,} training rows, because groups and copies of a text stay together: "
                        "raise it")
    if lacking := set(range(classes)) - set(labels[is_drawn].tolist()):
        raise UserError(f"{key} is too few for {classes} classes: no row to train on has the class "
                        f"{label_names[min(lacking)]!r}: raise it")
    return rows[is_drawn]


def _say_repeats(dropped: int, copies: int, data_config: DataConfig) -> None:
    if dropped:
        what = "a text of the official test split" if data_config.group_column is None else (
            f"a text or {data_config.group_column} of the official test or validation split")
        say(f"{data_config.dataset}: {dropped:,} rows repeat {what} and are dropped")
    if copies:
        say(f"{data_config.dataset}: {copies:,} exact duplicates "
            + ("dropped" if data_config.drop_duplicates else "kept in the same split as their first occurrence"))


def _say_lacking(splits: dict[str, np.ndarray], labels: np.ndarray, label_names: Sequence[str], dataset: str) -> None:
    for split, rows in splits.items():
        counts = np.bincount(labels[rows], minlength=len(label_names))
        if lacking := [str(label_names[label]) for label in np.flatnonzero(counts == 0)]:
            say(f"{dataset}: no row of {split} has the class {' or '.join(lacking)}: its figures, and means over the "
                "classes, count it as 0")
