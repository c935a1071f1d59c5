"""Texts and labels from a file, a dataset folder, or a dataset on the Hub, as they stand there.

The datasets library says which files of a folder belong to which split. Their rows are read by suite/reviews/rows.py,
so that a folder takes what a file takes, an error can name the row, and every text is the one in the file. A dataset on
the Hub is such a folder once it is downloaded. The library reads what it has written itself, as with `save_to_disk`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetBuilder, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS  # as a dataset, `csv` is what lies around
from huggingface_hub import is_offline_mode, snapshot_download

from suite.common.hub import cached, explained, is_hub_name
from suite.common.storage import read_json, sha256_of, write_json
from suite.reviews import rows
from suite.reviews.rows import COLUMN_KEYS, as_text, columns_of, listed, text_files, visible_files
from utils import ROW_FILES, DataConfig, UserError, file_kind, say

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
if not sys.stderr.isatty():
    datasets.disable_progress_bars()  # they would fill a log file

FILE_TYPES = tuple(kind for kind in ROW_FILES if kind != ".txt")  # whose rows have a column for the label
READ = ("text", "label", "group")  # what the columns that data_config names are called once they are read
READER = 3  # the version of what reads rows: it is part of the name under which they are cached


@dataclass
class Part:
    """The reviews of one file or split. It is kept so that an error can name the row as its author counts it."""

    split: str
    place: str  # the file, or the dataset and its split
    # Columns text, label (the name of the class if it is declared), and group if the configuration names one; each is
    # str, and None where a value is missing.
    table: Dataset
    class_names: list[str] | None = None  # of the classes 0, 1, ..., if the dataset declares them
    files: Sequence[Path] = ()  # of a folder with a file for each text: that of each row


def load_parts(data_config: DataConfig) -> list[Part]:
    """The tables of the dataset that the configuration names. Raises UserError for what cannot be read."""
    name, columns = data_config.dataset, tuple(
        column for column in (getattr(data_config, key) for key in COLUMN_KEYS) if column is not None)
    if os.path.isfile(name):
        if file_kind(name) in FILE_TYPES:
            return [_load_file("train", name, columns)]
        raise UserError(f"data_config.dataset: {name}: a file must end in {', '.join(FILE_TYPES)}, or one of them and "
                        ".gz")
    if os.path.isdir(name):
        return _load_folder(name, data_config.subset, columns)
    if not is_hub_name(name) or name in READERS:
        raise UserError(f"data_config.dataset: no such file or folder: {name}")
    return _load_from_hub(name, data_config.subset, columns)


def _load_file(split: str, path: str, columns: tuple[str, ...], class_names: list[str] | None = None) -> Part:
    """The columns of a file, every value as text."""
    _refuse_missing(columns, columns_of(path, columns), path)
    if class_names is None and file_kind(path) == ".parquet":
        class_names = _class_names(Features.from_arrow_schema(pyarrow.parquet.read_schema(path)), columns[1])
    return Part(split, path, _cached_table(path, [Path(path)], columns, class_names), class_names)


def _cached_table(place: str, files: list[Path], columns: tuple[str, ...], class_names: list[str] | None = None
                  ) -> Dataset:
    """What `_labelled_rows` gives, from the cache if files of the same content were read before."""
    features = Features({name: Value("string") for name in READ[:len(columns)]})
    content = [(os.path.abspath(file), sha256_of(file)) for file in files]
    key = hashlib.sha256(repr((READER, content, columns, class_names)).encode()).hexdigest()
    try:
        return cached(f"reviews-{key}", lambda folder: Dataset.from_generator(
            _labelled_rows, features=features, cache_dir=str(folder), fingerprint=key,
            gen_kwargs={"place": place, "files": tuple(files), "columns": columns,  # the library cuts lists into shards
                        "class_names": class_names and tuple(class_names)}))
    except DatasetGenerationError as error:  # around whatever `_labelled_rows` raises
        raise error.__cause__ from None


def _labelled_rows(place: str, files: Sequence[Path], columns: tuple[str, ...], class_names: Sequence[str] | None
                   ) -> Iterator[dict[str, str | None]]:
    """The text, label and group of each row of the file `place`; if `files` hold a text each, its folder is the label.

    Raises UserError, which counts them, for rows that cannot be read.
    """
    number, broken, first_problem, known = 0, [], "", {}
    of_texts = file_kind(files[0]) == ".txt"
    for row in rows.read_texts(files) if of_texts else rows.read_rows(place, columns, only=True):
        number = row.number
        if of_texts:
            row.values["label"] = files[number - 1].parent.name
        known |= row.values  # a row of JSON may leave out what it has no value for
        row.values = dict.fromkeys(columns) | row.values
        if problem := row.problem or rows.column_problem(row, columns):
            first_problem = first_problem or problem
            broken.append(number)
        elif not broken:
            values = zip(READ, (row.values[column] for column in columns), strict=False)
            yield {name: _label(value, class_names) if name == "label" else as_text(value) for name, value in values}
    if number > len(broken):
        _refuse_missing(columns, list(known), place)
    if broken:
        others = ", ".join(map(str, broken[1:rows.MOST_NAMED + 1]))
        raise UserError(f"{place}: {first_problem}" + (
            f"; {len(broken) - 1:,} more cannot be read, such as row {others}" if others else ""))
    if not number:
        raise UserError(f"{place}: holds no labelled rows: add some, or leave this file out")


def _label(value: Any, class_names: Sequence[str] | None) -> str | None:
    """A label as text: the name of its class if it is a number of a declared one. The number of none must not be taken
    for a name, such as 3 where the classes 0, 1 and 2 are called 1, 2 and 3."""
    text = as_text(value)
    if class_names is None or not isinstance(value, int) or isinstance(value, bool):
        return text
    if 0 <= value < len(class_names):
        return class_names[value]
    return f"number {value}" if text in class_names else text


def _load_folder(name: str, subset: str | None, columns: tuple[str, ...]) -> list[Part]:
    """The parts of a dataset folder: of `save_to_disk`, of texts in a folder for each class, or of files of rows."""
    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # the library's own
        with explained("data_config.dataset", name):  # other files there are caches of `map`
            saved = datasets.load_from_disk(str(Path(name).resolve()))
        return _library_parts(name, saved if isinstance(saved, DatasetDict) else {"train": saved}, columns)
    everything = visible_files(name)
    if all(path.suffix in ("", ".md") for path in everything):
        raise UserError(f"data_config.dataset: {name} holds no {', '.join(FILE_TYPES)} files: name a folder with some")
    if not any(file_kind(path) in FILE_TYPES for path in everything) and text_files(name):
        return _load_texts(name, columns)
    builder, files = _builder(name, subset)
    # The library takes files of one kind and leaves out the others without a word.
    there = {file_kind(path) for path in everything} & set(FILE_TYPES) - {".json"}  # .json: what describes the data
    kinds = sorted(there | {file_kind(file) or Path(file).suffix for of_split in files.values() for file in of_split})
    if len(kinds) > 1 or kinds[0] not in FILE_TYPES:
        raise UserError(f"data_config.dataset: {name} holds {' and '.join(kinds)} files: give files of one kind of "
                        f"{', '.join(FILE_TYPES)}, each also as .gz, or folders of .txt files")
    used = {Path(file) for of_split in files.values() for file in of_split}
    unread = [path for path in everything  # the library's names lead to the folder, and then may be links
              if file_kind(path) == kinds[0] and Path(name).resolve() / path.relative_to(name) not in used]
    if unread and subset is None:
        say(f"{name}: {len(unread):,} file(s) not read, such as {unread[0]}, because their names tell none of the "
            f"splits {', '.join(files)}")
    return _load_files(files, columns, _class_names(builder.info.features, columns[1]))


def _load_files(files: dict[str, list[str]], columns: tuple[str, ...], class_names: list[str] | None) -> list[Part]:
    """`files`: those of each split. Raises UserError if only some of them have labels, as in a competition with a
    secret test."""
    everything = [file for of_split in files.values() for file in of_split]
    found = {file: columns_of(file, columns) for file in everything}
    labelled = [file for file, names in found.items() if set(columns[:2]) <= set(names)]
    for file, names in found.items():
        if labelled and columns[0] in names and columns[1] not in names:
            raise UserError(f"{file}: no column {columns[1]!r}, so its rows have no labels; found {listed(names)}: "
                            f"name the file that has some, data_config.dataset={labelled[0]}")
    return [_load_file(split, file, columns, class_names) for split, of_split in files.items() for file in of_split]


def _load_texts(name: str, columns: tuple[str, ...]) -> list[Part]:
    """A folder with a .txt file for each text, in a folder for each class: train/pos/1.txt, test/neg/2.txt, ..."""
    if columns != ("text", "label"):
        raise UserError(f"data_config.dataset: {name} holds .txt files, which have no columns: leave out "
                        "data_config.text_column, data_config.label_column and data_config.group_column")
    places = {path: path.relative_to(name).parts for path in text_files(name)}
    deepest = max(map(len, places.values()))
    if deepest == 1:
        raise UserError(f"data_config.dataset: {name} holds .txt files, which have no labels: put the texts of each "
                        f"class into a folder of its own, such as {name}/pos and {name}/neg")
    if others := [path for path, place in places.items() if len(place) < deepest]:
        say(f"{name}: {len(others):,} .txt files that lie in no class's folder are not read, such as {others[0]}")
    splits: dict[str, list[Path]] = {}
    for path, place in places.items():
        if len(place) == deepest:
            split = "unsupervised" if place[-2] == "unsup" else place[-3] if deepest > 2 else "train"
            splits.setdefault(split, []).append(path)
    return [Part(split, place := f"{name}, split {split}", _cached_table(place, files, columns), files=files)
            for split, files in splits.items()]


def _load_from_hub(name: str, subset: str | None, columns: tuple[str, ...]) -> list[Part]:
    """The files of a dataset on the Hub are read like a folder's. Which ones they are is kept for when the Hub is gone.

    Other kinds of files, and what somebody has prepared with the library for a machine without the Hub, are read by it.
    """
    place = hashlib.sha256(repr((name, subset, columns[1])).encode()).hexdigest()
    listing, tables = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"files-{place}.json", None
    with explained("data_config.dataset", name):
        if not is_offline_mode():
            builder, urls = _builder(name, subset)
            parsed = {url: re.fullmatch("hf://[^@]*@([^/]*)/(.*)", url)
                      for of_split in urls.values() for url in of_split}
            if all(found and file_kind(found[2]) in FILE_TYPES for found in parsed.values()):
                listing.parent.mkdir(parents=True, exist_ok=True)
                write_json(listing, {
                    "revision": next(iter(parsed.values()))[1],
                    "files": {split: [parsed[url][2] for url in of_split] for split, of_split in urls.items()},
                    "class_names": _class_names(builder.info.features, columns[1])})
        if listing.is_file():
            known = read_json(listing)
            patterns = [glob.escape(file) for of_split in known["files"].values() for file in of_split]
            folder = snapshot_download(name, repo_type="dataset", revision=known["revision"], allow_patterns=patterns)
        else:
            tables = datasets.load_dataset(name, subset)
    if tables is not None:
        return _library_parts(name, tables, columns)
    return _load_files({split: [os.path.join(folder, file) for file in of_split]
                        for split, of_split in known["files"].items()}, columns, known["class_names"])


def _library_parts(name: str, tables: DatasetDict | dict[str, Dataset], columns: tuple[str, ...]) -> list[Part]:
    """The parts of tables that the datasets library has read."""
    parts = []
    for split, table in tables.items():
        place = f"{name}, split {split}" if len(tables) > 1 else name
        _refuse_missing(columns, table.column_names, place)
        text, label, *group = columns
        kind = table.data.column(text).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f"{place}: the column {text!r} holds {kind}, not text: set data_config.text_column")
        class_names = _class_names(table.features, label)
        labels = [_label(value, class_names) for value in table.data.column(label).to_pylist()]
        texts = table.select_columns([text]).rename_columns({text: "text"}).cast_column("text", Value("string"))
        rows = texts.add_column("label", labels, feature=Value("string"))
        for column in group:
            names = list(map(as_text, table.data.column(column).to_pylist()))
            rows = rows.add_column("group", names, feature=Value("string"))
        parts.append(Part(str(split), place, rows, class_names))
    return parts


def _builder(name: str, subset: str | None) -> tuple[DatasetBuilder, dict[str, list[str]]]:
    """What the datasets library knows of a dataset before it reads it: its declared columns, and each split's files."""
    path = str(Path(name).resolve()) if os.path.isdir(name) else name  # else a folder called `csv` would be its reader
    card = " with its README.md" if os.path.isfile(os.path.join(name, "README.md")) else ""  # it may be what is wrong
    with explained("data_config.dataset", name + card):
        try:
            builder = datasets.load_dataset_builder(path, subset)
            return builder, {str(split): list(files) for split, files in builder.config.data_files.items()}
        except ValueError:
            names = datasets.get_dataset_config_names(path)
            if len(names) < 2 or subset in names:
                raise
            raise UserError(f"data_config.dataset: {name} has several configurations: set data_config.subset to one of "
                            f"{', '.join(names)}") from None


def _class_names(features: Features | None, column: str) -> list[str] | None:
    """The names of the classes, if a dataset declares them."""
    feature = (features or {}).get(column)
    return list(map(str, feature.names)) if isinstance(feature, ClassLabel) else None


def _refuse_missing(columns: tuple[str, ...], found: list[str], name: str) -> None:
    """`found`: the columns of `name`; [] if each row names its own."""
    for key, column in zip(COLUMN_KEYS, columns, strict=False):
        if found and column not in found:
            header = ", if its first line names the columns" if file_kind(name) in (".csv", ".tsv") else ""
            raise UserError(f"{name}: no column {column!r}; found {listed(found)}: set data_config.{key}{header}")
