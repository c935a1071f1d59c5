"""Labelled reviews from a Hub dataset, a dataset folder, or a .csv, .jsonl or .parquet file, as one pooled table."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS  # as a dataset, `csv` is what lies around

from suite.common.hub import explained, is_hub_name
from suite.reviews.caches import cached, digest_of
from suite.reviews.rows import Row, columns_of, read_rows
from utils import DataConfig, UserError

FILE_TYPES = (".csv", ".jsonl", ".parquet")


@dataclass
class Reviews:
    """All labelled reviews of a dataset. The id of a review is its row in `table`."""

    table: Dataset  # columns text (str) and label, memory-mapped
    labels: np.ndarray  # (rows,) int64: index into label_names
    label_names: list[str]
    split_names: np.ndarray  # (rows,) str: the dataset's own split of each row
    parts: list[Part]  # the tables that were pooled, in the order of their rows
    unlabelled: list[Part]  # for pretraining alone; their texts are not checked yet


@dataclass
class Part:
    """The reviews of one file or split. It is kept so that an error can name the row as its author counts it."""

    split: str
    place: str  # the file, or the dataset and its split
    table: Dataset


def locate(parts: list[Part], row: int) -> tuple[str, int]:
    """Where row `row` of the pooled table comes from: (place, row in that place, counted from 1)."""
    for part in parts:
        if row < len(part.table):
            return part.place, row + 1
        row -= len(part.table)
    raise IndexError(row)


def load_reviews(data_config: DataConfig, num_labels: int) -> Reviews:
    """Read and pool all labelled splits of a dataset.

    Raises UserError, with the row and the fix, for a missing column, a missing or empty text, a missing label, and
    classes that do not match `num_labels`.
    """
    name = data_config.dataset
    columns = (data_config.text_column, data_config.label_column)
    parts, unlabelled = [], []
    for part in _load_parts(name, columns):
        part.table = _select(part.table, columns, part.place)
        (unlabelled if _is_unlabelled(part) else parts).append(part)
    if not any(len(part.table) for part in parts):
        raise UserError(f"data_config.dataset: {name} holds no labelled rows: name a file or folder with some")
    refuse_no_texts(parts, data_config.text_column)
    table = concatenate_datasets([part.table for part in parts])
    labels, label_names = _encode_labels(table, name, parts, data_config.label_column, num_labels)
    split_names = np.repeat([part.split for part in parts], [len(part.table) for part in parts])
    return Reviews(table, labels, label_names, split_names, parts, unlabelled)


def misfit(row: Row, columns: tuple[str, ...]) -> str | None:
    """Why the values of a row in these columns cannot be read as texts; None if they can."""
    for column in columns:
        if column not in row.values:
            return (f"row {row.number} has no column {column!r}; found {', '.join(map(str, row.values))}: set "
                    + " and ".join(f"data_config.{key}" for key in ("text_column", "label_column")[:len(columns)]))
    for column in columns:
        if isinstance(row.values[column], bytes | list | dict):
            return (f"row {row.number} holds {type(row.values[column]).__name__} in the column {column!r}: convert it "
                    "to text, or set data_config.text_column and data_config.label_column")
    return None


def as_text(value: Any) -> str | None:
    """A value of a file as a .csv would show it: 1.0 as "1"; None for a missing one, which pandas writes as NaN."""
    if value is None or value != value:
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _load_parts(name: str, columns: tuple[str, str]) -> list[Part]:
    if os.path.isfile(name):  # unlike Path's own, these functions take names that no file can have
        if Path(name).suffix not in FILE_TYPES:
            raise UserError(f"data_config.dataset: {name}: a file must end in {', '.join(FILE_TYPES)}")
        return [Part("train", name, _load_file(name, columns))]
    if os.path.isdir(name):
        return _load_folder(name, columns)
    if os.path.exists(name):
        raise UserError(f"data_config.dataset: {name} is neither a file nor a folder: name one")
    if not is_hub_name(name) or name in READERS:
        raise UserError(f"data_config.dataset: no such file or folder: {name}")
    *owner, last = name.split("/")
    cache_name = "___".join([*owner, camelcase_to_snakecase(last)])  # the library's own, where people download ahead
    return _load_with_library(name, cache_name, lambda _: load_dataset(name), shared=True)


def _load_folder(name: str, columns: tuple[str, str]) -> list[Part]:
    """The parts of a dataset folder. The datasets library decides which file belongs to which split.

    It also reads parquet files. This module reads .csv and .jsonl files itself: it can name the row of an error, and it
    reads NA as a text, not as a missing value.
    """
    everything = [path for path in sorted(Path(name).rglob("*")) if path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(name).parts)]
    found = [path for path in everything if path.suffix in FILE_TYPES]
    if all(path.suffix in ("", ".md") for path in everything):
        raise UserError(f"data_config.dataset: {name} holds no .csv, .jsonl or .parquet files: name a folder with some")
    splits = _files_of_splits(name)
    kinds = sorted({path.suffix for path in (*found, *(file for files in splits.values() for file in files))})
    if len(kinds) > 1:
        raise UserError(f"data_config.dataset: {name} holds {' and '.join(kinds)} files, but all must be of one kind: "
                        "move the others elsewhere, or name one file")
    if kinds in ([".csv"], [".jsonl"]):
        return [Part(split, str(file), _load_file(str(file), columns)) for split, files in splits.items()
                for file in files]
    if kinds == [".parquet"]:
        for path in found:  # the library's error would not name the file
            next(read_rows(str(path)), None)
            _refuse_missing(columns, columns_of(str(path)), str(path))
    with explained("data_config.dataset", name):
        # The library would notice another name or time of a file, but not other content.
        key = digest_of([*everything, *Path(name).glob(".huggingface.yaml")])
    return _load_with_library(name, f"reviews-{key}", lambda folder: load_dataset(
        str(Path(name).resolve()), cache_dir=str(folder)))


def _files_of_splits(name: str) -> dict[str, list[Path]]:
    """Which files of a dataset folder belong to which split."""
    folder = Path(name).resolve()  # or the library would take a folder called `csv` for its own reader of this name
    with explained("data_config.dataset", _with_card(name), any_error=True):
        splits = load_dataset_builder(str(folder)).config.data_files
    for file in (file for files in splits.values() for file in files):
        if folder not in Path(os.path.normpath(file)).parents:
            raise UserError(f"{name}/README.md: names {file}, which lies outside the folder: name only files inside")
    return {str(split): [Path(file) for file in files] for split, files in splits.items()}


def _with_card(name: str) -> str:
    """A dataset's name for an error that may come from the files in which a folder declares what it holds."""
    declaring = [file for file in ("README.md", ".huggingface.yaml", "dataset_infos.json")
                 if os.path.isfile(os.path.join(name, file))]
    return f"{name} with its {' and '.join(declaring)}" if declaring else name


def _load_with_library(name: str, cache_name: str, load: Callable[[Path], DatasetDict], shared: bool = False
                       ) -> list[Part]:
    with explained("data_config.dataset", _with_card(name), any_error=True):
        splits = cached(cache_name, load, shared)
    return [Part(str(split), f"{name}, split {split}" if len(splits) > 1 else name, table)
            for split, table in splits.items()]


def _load_file(path: str, columns: tuple[str, str]) -> Dataset:
    """The two columns of a file, every value as text, from the cache if a file of the same content was read before."""
    features = Features(dict.fromkeys(columns, Value("string")))
    with explained("data_config.dataset", path):
        key = hashlib.sha256(repr((digest_of([Path(path)]), Path(path).resolve(), columns)).encode()).hexdigest()
        return cached(f"reviews-{key}", lambda folder: Dataset.from_generator(
            _read_texts, features=features, cache_dir=str(folder), fingerprint=key,
            gen_kwargs={"path": path, "columns": columns}))


def _read_texts(path: str, columns: tuple[str, str]) -> Iterator[dict[str, str | None]]:
    row = None
    for row in read_rows(path):
        if problem := row.problem or misfit(row, columns):
            raise UserError(f"{path}: {problem}")
        yield {column: as_text(row.values[column]) for column in columns}
    if row is None:
        raise UserError(f"{path}: holds no labelled rows: add some, or name another file")


def _select(table: Dataset, columns: tuple[str, str], name: str) -> Dataset:
    """The table with only the columns text and label, under these names."""
    _refuse_missing(columns, table.column_names, name)
    text, label = columns
    return table.select_columns([text, label]).rename_columns({text: "text", label: "label"})


def _refuse_missing(columns: tuple[str, str], found: list[str], name: str) -> None:
    for key, column in zip(("text_column", "label_column"), columns, strict=True):
        if column not in found:
            raise UserError(f"{name}: no column {column!r}; found {', '.join(found)}: set data_config.{key}")


def _is_unlabelled(part: Part) -> bool:
    if part.split == "unsupervised":
        return True
    labels = part.table.data.column("label")
    if _is_text(labels.type):  # those of a .csv or .jsonl file are texts, too
        without = pc.match_substring_regex(labels, r"^\s*(-[0-9]+)?\s*$")
    elif pa.types.is_integer(labels.type):
        without = pc.less(labels, 0)
    else:
        return labels.null_count == len(labels)
    return pc.all(pc.fill_null(without, True)).as_py()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def refuse_no_texts(parts: list[Part], column: str) -> None:
    for part in parts:
        if not _is_text(kind := part.table.data.column("text").type):
            raise UserError(f"{part.place}: the column {column!r} holds {kind}, not text: set data_config.text_column")
        start = 0
        for texts in part.table.data.column("text").chunks:  # chunk by chunk, because trimming copies the texts
            empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)
            if (row := pc.index(empty, True).as_py()) >= 0:
                raise UserError(f"{part.place}: row {start + row + 1} has no text: fill it or remove the row")
            start += len(texts)


def _encode_labels(table: Dataset, name: str, parts: list[Part], column: str, num_labels: int
                   ) -> tuple[np.ndarray, list[str]]:
    """The labels as indices (rows,) int64, and the names of the classes.

    The names are the dataset's own if it declares them. Otherwise, they are the names found, sorted by Unicode code
    point (so `Z` comes before `a`, and `z` before `ä`), or the numbers.
    """
    values, feature = table.data.column("label"), table.features["label"]
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type) or _is_text(values.type)):
        raise UserError(f"{name}: the column {column!r} holds {values.type}; labels are integers from 0, or names")
    values = pc.utf8_trim_whitespace(pc.cast(values, pa.string()))
    missing = pc.fill_null(pc.equal(values, ""), True)
    if (row := pc.index(missing, True).as_py()) >= 0:
        place, row = locate(parts, row)
        raise UserError(f"{place}: row {row} has no label: fill it or remove the row")
    distinct = sorted(pc.unique(values).to_pylist())
    if all(re.fullmatch(r"-?[0-9]{1,18}", value) for value in distinct):
        labels = pc.cast(values, pa.int64()).to_numpy()
        names = list(map(str, feature.names if isinstance(feature, ClassLabel) else range(num_labels)))
        first = labels.min()
        if not isinstance(feature, ClassLabel) and first > 0 and set(labels) == set(range(first, first + num_labels)):
            labels, names = labels - first, [str(i) for i in range(first, first + num_labels)]  # stars from 1 to 5
        outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(outside):
            place, row = locate(parts, outside[0])
            raise UserError(f"{place}: row {row} has the label {labels[outside[0]]}, but model_config.num_labels="
                            f"{num_labels} allows 0 to {len(names) - 1}: correct the row or model_config.num_labels")
    else:
        names = distinct
        labels = pc.index_in(values, pa.array(names)).to_numpy().astype(np.int64)
    if len(names) != num_labels:
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise UserError(f"{name}: the column {column!r} has {len(names)} classes ({shown}), but "
                        f"model_config.num_labels is {num_labels}: set model_config.num_labels={len(names)}")
    counts = np.bincount(labels, minlength=len(names))
    rare = counts.argmin()
    if counts[rare] == 0:
        raise UserError(f"{name}: no row has the class {names[rare]!r}: set model_config.num_labels to the number of "
                        f"classes in the data ({(counts > 0).sum()}), or add rows of this class")
    if counts[rare] < 3:
        raise UserError(f"{name}: the class {names[rare]!r} has {counts[rare]} rows, but each of the three splits "
                        "needs one: add rows of this class or remove it")
    return labels, names
