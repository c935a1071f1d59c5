"""Reads the rows of files one by one, whatever their kind: KINDS is the table that training and prediction share.

A row that cannot be used comes with its problem, and reading goes on after it: training counts such rows and stops,
prediction sets them aside. A file that cannot be read at all raises UserError. Every value is what the file says: no
text becomes a number, a date or a missing value.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from utils import UserError, brief, file_kind

LONGEST_FIELD = 1 << 24  # characters of a .csv field: a quote that is never closed would swallow the rest of the file
MOST_NAMED = 3  # rows that a message names
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of columns, and what they are called


@dataclass
class Row:
    number: int  # from 1; the header and blank lines do not count
    position: int  # how much of the file has been read after this row, in the unit of `size_of`
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None  # of a broken row: where it is, what is wrong and how to fix it
    content: str = ""  # of a broken row: what the file says there
    text: str = ""  # of a whole row: the review, once its reader has found it among the values
    source: tuple[pa.RecordBatch, int] | None = None  # of a row of a .parquet file: where Arrow has it, bit for bit


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
        with nullcontext(file) if file else _opened(path) as file:
            try:
                yield from KINDS[kind](path, file, columns)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path}: not a readable .gz file: {brief(error)}") from None


def columns_of(path: str, columns: Sequence[str] = ()) -> list[str]:
    """The columns of a file, even if it has no rows; [] for JSON, where each row names its own. `columns`: as above."""
    kind = file_kind(path)
    if os.path.isdir(path):
        return ["file", "text"]
    if kind == ".parquet":
        with _opened_parquet(path) as file:
            return file.schema_arrow.names
    if kind in (".csv", ".tsv"):
        with _opened(path) as file:
            return _read_header(path, file, columns)[2]
    return ["text"] if kind == ".txt" else []


def size_of(path: str) -> int:
    """The position after the last row: the file's bytes, the rows of a .parquet file, or the files of a folder."""
    if os.path.isdir(path):
        return len(text_files(path))
    if file_kind(path) != ".parquet":
        return os.path.getsize(path)
    with _opened_parquet(path) as file:
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
            yield Row(number, number, problem=f"{file} is {_other_encoding(content)}",
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
    keys = " and ".join(f"data_config.{key}" for key in ("text_column", "label_column")[:len(columns)])
    for column in columns:
        if column not in row.values:
            return (f"row {row.number} has no column {column!r}; found {listed(list(row.values))}: set {keys}")
        if isinstance(row.values[column], bytes | list | dict):
            return (f"row {row.number} holds {type(row.values[column]).__name__} in the column {column!r}: convert it "
                    f"to text, or set {keys}")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Text files, line by line


class _Lines:
    """The lines of a text file. It keeps those of the row that is being read, and takes back the ones that turn out to
    belong to other rows. Bytes that are not UTF-8 stay in them as surrogates."""

    def __init__(self, file: BinaryIO):
        self.text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.on_disk = getattr(file, "fileobj", file)  # of a compressed file, the bytes that are there
        self.number, self.of_row, self.returned = 0, [], deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.returned.popleft() if self.returned else next(self.text)
        self.number += 1
        self.of_row.append(line)
        return line

    def give_back(self, kept: int) -> None:
        """Give back the lines of this row, except for the first `kept` of them."""
        self.returned.extendleft(reversed(self.of_row[kept:]))
        self.number -= len(self.of_row[kept:])
        del self.of_row[kept:]

    def row(self, number: int, values: dict[str, Any], problem: str | None = None) -> Row:
        """The row that the lines make up, a broken one if it has a problem or is not UTF-8; the next row begins."""
        position = self.on_disk.tell() if self.on_disk.seekable() else 0
        if problem := self.encoding_problem() or problem:
            content = "".join(self.of_row).rstrip("\r\n").encode(errors="surrogateescape")
            row = Row(number, position, problem=problem, content=content.decode(errors="backslashreplace"))
        else:
            row = Row(number, position, values)
        self.of_row = []
        return row

    def encoding_problem(self) -> str | None:
        """Names the first line of this row that is not UTF-8."""
        for number, line in enumerate(self.of_row, start=self.number - len(self.of_row) + 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                return f"line {number} is {_other_encoding(line.encode(errors='surrogateescape'))}"
        return None


def _other_encoding(content: bytes) -> str:
    """What is said of bytes that are not UTF-8: the encoding that they probably have, and how to convert them."""
    # WINDOWS-1252 is the usual one of older files, and has all letters of ISO-8859-1, too.
    encoding = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    return (f"not UTF-8: it is probably {encoding}; convert the file with "
            f"iconv -f {encoding} -t UTF-8 FILE > NEW_FILE")


def _read_header(path: str, file: BinaryIO, columns: Sequence[str]) -> tuple[_Lines, Any, list[str]]:
    """(lines, the csv.reader of the rows after the header, the header) of a .csv or .tsv file; an empty file's header
    is []. A column without a name gets one, such as `column 3`, counted from 1, and so does one whose name is taken.

    The separator is the one under which the header has the `columns`; if there is none, the one of the file's kind, or
    of a first line such as `sep=;`, which Excel reads and writes.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines, own = _Lines(file), "\t" if file_kind(path) == ".tsv" else ","
    if stated := re.fullmatch(r"sep=(.)\s*", next(lines, "")):
        own, lines.of_row = stated[1], []
    for separator in (own, *(mark for mark in SEPARATORS if mark != own), own):
        lines.give_back(0)
        try:
            problem, found = None, next((row for row in csv.reader(lines, delimiter=separator, strict=True) if row), [])
        except csv.Error as error:
            problem, found = f"line {lines.number}: {error}: mend the quotes there", []
        header = [name.strip() or f"column {place}" for place, name in enumerate(found, start=1)]
        if problem is None and set(columns) <= set(header):
            break
    if problem := lines.encoding_problem() or problem:
        raise UserError(f"{path}: {problem}")
    if twins := [name for name in columns if header.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {twins[0]!r}: rename one")
    header = [f"{name} (column {place})" if name in header[:place - 1] else name
              for place, name in enumerate(header, start=1)]
    spaced = len(found) > 1 and all(name.startswith(" ") for name in found[1:])  # `text, label`: so do the rows, too
    lines.of_row = []
    return lines, csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True), header


def _read_table(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    lines, reader, header = _read_header(path, file, columns)
    number, separator = 0, reader.dialect.delimiter
    while True:
        try:
            problem, values = None, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back(1)  # the quote that is wrong here may have swallowed good rows
            problem, values = f"line {lines.number}: {error}: mend the quotes there", []
        if not values and not problem:  # a blank line
            lines.of_row = []
            continue
        # A text of several lines may hold commas, but hardly one tab in each line. These are rows, of a program that
        # writes no quotes around texts: a text begins with a quote, and a later one ends with one.
        swallowed = len(lines.of_row) - 1
        if swallowed and separator != "," and len(header) > 1 and all(
                line.count(separator) == len(header) - 1 for line in lines.of_row):
            lines.give_back(1)
            problem = (f"line {lines.number}: the quotes would make one text of this row and the {swallowed} below "
                       "it: double the quotes in a text, and put quotes around it")
        number += 1
        if problem is None and len(values) != len(header):
            problem = (f"row {number} (line {lines.number}) has {len(values)} fields, the header has {len(header)}: "
                       "give each row as many, with quotes around a text that holds "
                       f"{SEPARATORS.get(separator, separator)}")
        yield lines.row(number, dict(zip(header, values, strict=False)), problem)


def _read_lines(file: BinaryIO, parse: Callable[[str], dict[str, Any]]) -> Iterator[Row]:
    """The rows of a file with one row a line; `parse` gives a line's values, or raises ValueError with the problem."""
    lines, number = _Lines(file), 0
    for line in lines:
        if not line.strip():
            lines.of_row = []
            continue
        number += 1
        try:
            values, problem = parse(line), None
        except ValueError as error:
            values, problem = {}, f"line {lines.number} {error}"
        yield lines.row(number, values, problem)


def _read_json_lines(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    return _read_lines(file, _parse_object)


def _read_plain_lines(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    return _read_lines(file, lambda line: {"text": line.rstrip("\r\n")})


def _read_json(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    """An array of objects; or an object in each line, which many people call .json, too."""
    if not file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        for row in _read_lines(file, _parse_object):
            if row.number == 1 and row.problem:
                raise UserError(f"{path}: holds neither an array of objects nor an object in each line "
                                f"({row.problem}): write one of them")
            yield row
        return
    content = file.read()
    try:
        records = _parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is {_other_encoding(content)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}: mend it, or write one object a line into a .jsonl file") from None
    size, may_hold_halves = os.path.getsize(path), b"\\ud" in content.lower()
    for number, values in enumerate(records, start=1):
        problem = _object_problem(values, may_hold_halves)
        yield Row(number, size * number // len(records), {} if problem else values,
                  problem and f"row {number} {problem}", json.dumps(values) if problem else "")


def _parse_object(line: str) -> dict[str, Any]:
    values = _parse_json(line)
    if problem := _object_problem(values, "\\ud" in line.lower()):
        raise ValueError(problem)
    return values


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. One key twice is what two rows look like when the end of the first is lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice: keep one of them")
    return values


def _object_problem(values: Any, may_hold_halves: bool) -> str | None:
    """What is wrong with the JSON value of a row; None if nothing. JSON can name half of a character as \\ud..., and no
    file can hold that."""
    if not isinstance(values, dict):
        return 'is not a JSON object such as {"text": ..., "label": ...}'
    try:
        if may_hold_halves:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds half of a \\ud... pair: write the character itself"
    return None


# What reads the rows of each kind of file but .parquet
KINDS: dict[str, Callable[[str, BinaryIO, Sequence[str]], Iterator[Row]]] = {
    ".csv": _read_table, ".tsv": _read_table, ".json": _read_json, ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines, ".txt": _read_plain_lines}

# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def _read_parquet(path: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """`columns`: those that are read; None: all."""
    with _opened_parquet(path) as file:
        if len(set(names := file.schema_arrow.names)) < len(names):
            raise UserError(f"{path}: two columns have the same name in {', '.join(names)}: rename one")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for place, values in enumerate(batch.to_pylist()):
                    number += 1
                    yield Row(number, number, values, source=(batch, place))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last: Python has no such date
            raise _unreadable(path, error) from None


def _opened(path: str) -> BinaryIO:
    try:
        return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _opened_parquet(path: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable parquet file: {brief(error)}")
