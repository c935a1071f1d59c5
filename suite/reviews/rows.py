"""Reads the rows of files one by one, whatever their kind: KINDS is the table that training and prediction share.

A row that cannot be used comes with its problem, and reading goes on after it: training counts such rows and stops,
prediction sets them aside. A file that cannot be read at all raises UserError. Every value is what the file says: no
text becomes a number, a date or a missing value.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from suite.reviews.text_rows import Row, other_encoding, read_header, read_lines, read_table
from utils import UserError, brief, file_kind

MOST_NAMED = 3  # rows that a message names
COLUMN_KEYS = ("text_column", "label_column", "group_column")  # of the data_config, in the order of every `columns`


def read_rows(path: str, columns: Sequence[str] = (), only: bool = False, file: BinaryIO | None = None
              ) -> Iterator[Row]:
    """The rows of a file, of a folder with a .txt file for each text, or of the open `file` as if it were `path`.

    `columns`: the ones that are asked for; if the columns of a .csv or .tsv file are not separated as its name says,
    they are found by these. `only`: whether other columns may be left out.
    """
    if os.path.isdir(path):
        for file, row in zip(files := text_files(path), read_texts(files), strict=True):
            yield replace(row, values={"file": file.relative_to(path).as_posix(), **row.values})
    elif (kind := file_kind(path)) == ".parquet":
        yield from _read_parquet(path, columns if only else None)
    else:
        with nullcontext(file) if file else _opened(path) as file, _broken_gzip_is_said(path):
            yield from KINDS[kind](path, file, columns)


def columns_of(path: str, columns: Sequence[str] = ()) -> list[str]:
    """The columns of a file, even if it has no rows; [] for JSON, where each row names its own. `columns`: as above."""
    if os.path.isdir(path):
        return ["file", "text"]
    if (kind := file_kind(path)) == ".parquet":
        with opened_parquet(path) as file:
            return file.schema_arrow.names
    if kind in (".csv", ".tsv"):
        with _opened(path) as file, _broken_gzip_is_said(path):
            return read_header(path, file, columns)[2]
    return ["text"] if kind == ".txt" else []


def size_of(path: str) -> int:
    """The position after the last row: the file's bytes, the rows of a .parquet file, or the files of a folder."""
    if os.path.isdir(path):
        return len(text_files(path))
    if file_kind(path) != ".parquet":
        return os.path.getsize(path)
    with opened_parquet(path) as file:
        return file.metadata.num_rows


def text_files(folder: str | Path) -> list[Path]:
    """All .txt files below a folder, hidden ones left out, sorted by their paths."""
    return [path for path in visible_files(folder) if path.suffix.lower() == ".txt"]


def visible_files(folder: str | Path) -> list[Path]:
    """All files below a folder, hidden ones left out, sorted by their paths."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_texts(files: Sequence[Path]) -> Iterator[Row]:
    """A row for each file, whose whole content is its text."""
    for number, file in enumerate(files, start=1):
        content = file.read_bytes()
        try:
            yield Row(number, number, {"text": content.decode("utf-8-sig")})
        except UnicodeDecodeError:
            yield Row(number, number, problem=f"{file} is {other_encoding(content)}",
                      content=content.decode(errors="backslashreplace"))


def as_text(value: Any) -> str | None:
    """A value of a file as a .csv would show it: 1.0 as "1"; None for a missing one, which pandas writes as NaN."""
    if value is None or value != value:
        return None
    return str(int(value) if isinstance(value, float | Decimal) and value % 1 == 0 else value)


def listed(names: Sequence[Any]) -> str:
    """The first of some names, as a message shows them."""
    return ", ".join(str(name)[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")


def column_problem(row: Row, columns: tuple[str, ...]) -> str | None:
    """Why the values of a row in these columns cannot be read as texts; None if they can."""
    keys = " and ".join(f"data_config.{key}" for key in COLUMN_KEYS[:len(columns)])
    for column in columns:
        if column not in row.values:
            return f"row {row.number} has no column {column!r}; found {listed(list(row.values))}: set {keys}"
        if isinstance(row.values[column], bytes | list | dict):
            return (f"row {row.number} holds {type(row.values[column]).__name__} in the column {column!r}: convert it "
                    f"to text, or set {keys}")
    return None


def _read_json(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    """An array of objects; or an object in each line, which many people call .json, too."""
    if not file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        for row in read_lines(path, file, columns, _parse_object):
            if row.number == 1 and row.problem:
                raise UserError(f"{path}: holds neither an array of objects nor an object in each line "
                                f"({row.problem}): write one of them")
            yield row
        return
    try:
        records = _parse_json(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is {other_encoding(error.object)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}: correct it, or write one object a line into a .jsonl file") from None
    size = os.path.getsize(path)
    for number, values in enumerate(records, start=1):
        row = Row(number, size * number // len(records), values)
        try:
            _refuse_other_values(values)
        except ValueError as problem:
            row = replace(row, values={}, problem=f"row {number} {problem}", content=json.dumps(values))
        yield row


def _parse_object(line: str) -> dict[str, Any]:
    _refuse_other_values(values := _parse_json(line))
    return values


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. One key twice is what two rows look like when the end of the first is lost."""
    keys = [key for key, _ in pairs]
    if twins := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key {twins[0]!r} comes twice: keep one of them")
    return dict(pairs)


def _refuse_other_values(values: Any) -> None:
    """Raises ValueError if the JSON value of a row is no object, or holds half of a character, which JSON can name as
    \\ud..., and no file can hold."""
    if not isinstance(values, dict):
        raise ValueError('is not a JSON object such as {"text": ..., "label": ...}')
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a \\ud... pair: write the character itself") from None


# What reads the rows of each kind of file but .parquet
KINDS: dict[str, Callable[[str, BinaryIO, Sequence[str]], Iterator[Row]]] = {
    ".csv": read_table, ".tsv": read_table, ".json": _read_json,
    ".jsonl": functools.partial(read_lines, parse=_parse_object),
    ".ndjson": functools.partial(read_lines, parse=_parse_object),
    ".txt": functools.partial(read_lines, parse=lambda line: {"text": line.rstrip("\r\n")})}

# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def _read_parquet(path: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """`columns`: those that are read; None: all."""
    with opened_parquet(path) as file:
        if len(set(names := file.schema_arrow.names)) < len(names):
            raise UserError(f"{path}: two columns have the same name in {', '.join(names)}: rename one")
        number = 0
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            for place, values in enumerate(batch.to_pylist()):
                number += 1
                yield Row(number, number, values, source=(batch, place))


@contextmanager
def opened_parquet(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file: {brief(error)}") from None


def _opened(path: str) -> BinaryIO:
    try:
        return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def _broken_gzip_is_said(path: str):
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .gz file: {brief(error)}") from None
