"""Reads the rows of .csv, .jsonl, .parquet and .txt files one by one.

A row that cannot be used comes with its problem, and reading goes on after it: training stops at such a row, prediction
sets it aside. A file that cannot be read at all raises UserError.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from utils import UserError, brief

LONGEST_FIELD = 1 << 24  # characters of a .csv field: a quote that is never closed would swallow the rest of the file
DEEPEST = 100  # nested brackets in a .jsonl line; Python's own limit depends on how deep the calling code already is


@dataclass
class Row:
    number: int  # from 1; the header and blank lines do not count
    position: int  # how much of the file has been read after this row, in the unit of `size_of`
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None  # of a broken row: where it is, what is wrong and how to fix it
    content: str = ""  # of a broken row: what the file says there
    text: str = ""  # of a whole row: the review, once its reader has found it among the values
    source: tuple[pa.RecordBatch, int] | None = None  # of a row of a .parquet file: where Arrow has it, bit for bit


def read_rows(path: str, file: BinaryIO | None = None) -> Iterator[Row]:
    """The rows of a file, or of the open `file` as if it were called `path`."""
    kind = Path(path).suffix
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    with nullcontext(file) if file else _opened(path) as file:
        yield from _read_csv(path, file) if kind == ".csv" else _read_lines(file, PARSERS[kind])


def columns_of(path: str) -> list[str]:
    """The columns of a file, even if it has no rows; [] for .jsonl, where each row names its own."""
    kind = Path(path).suffix
    if kind == ".parquet":
        with _opened_parquet(path) as file:
            return file.schema_arrow.names
    if kind == ".csv":
        with _opened(path) as file:
            return _read_header(path, file)[2]
    return ["text"] if kind == ".txt" else []


def size_of(path: str) -> int:
    """The position after the last row: the file's bytes, or the number of rows of a .parquet file."""
    if Path(path).suffix != ".parquet":
        return os.path.getsize(path)
    with _opened_parquet(path) as file:
        return file.metadata.num_rows


class _Lines:
    """The lines of a text file. Those since the last `mark` make up a row, and can be given back."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.number, self.since_mark, self.characters, self.returned = 0, [], 0, deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.returned.popleft() if self.returned else next(self.text)
        self.number += 1
        self.since_mark.append(line)
        self.characters += len(line)
        if self.characters > LONGEST_FIELD and len(self.since_mark) > 1:
            raise csv.Error(f"a row of more than {LONGEST_FIELD:,} characters")
        return line

    def mark(self) -> None:
        self.since_mark, self.characters = [], 0

    def give_back(self, kept: int) -> None:
        """Give back the lines since the mark, except for the first `kept` of them."""
        self.returned.extendleft(reversed(self.since_mark[kept:]))
        self.number -= len(self.since_mark[kept:])
        del self.since_mark[kept:]

    def row(self, number: int, values: dict[str, Any], problem: str | None = None) -> Row:
        """The row that the lines since the mark make up: a broken one if it has a problem or is not UTF-8."""
        position = self.file.tell() if self.file.seekable() else 0
        if not (problem := self.encoding_problem() or problem):
            return Row(number, position, values)
        content = "".join(self.since_mark).rstrip("\r\n")
        content = content.encode(errors="surrogateescape").decode(errors="backslashreplace")
        return Row(number, position, problem=problem, content=content)

    def encoding_problem(self) -> str | None:
        """Names the first line since the mark that is not UTF-8."""
        for number, line in enumerate(self.since_mark, start=self.number - len(self.since_mark) + 1):
            if not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line):
                return f"line {number} is not UTF-8: save it as UTF-8"
        return None


def _read_header(path: str, file: BinaryIO) -> tuple[_Lines, Any, list[str]]:
    """(lines, the csv.reader of the rows after the header, the header) of a .csv file; an empty file's header is []."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    try:
        header = next((values for values in reader if values), [])  # a blank line gives []
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.number}: {error}: mend the quotes there") from None
    if problem := lines.encoding_problem():
        raise UserError(f"{path}: {problem}")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns have the same name in {', '.join(header)}: rename one")
    return lines, reader, header


def _read_csv(path: str, file: BinaryIO) -> Iterator[Row]:
    lines, reader, header = _read_header(path, file)
    number = 0
    while True:
        lines.mark()
        problem, values = None, []
        try:
            values = next(reader)
            if not values:
                continue  # a blank line
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back(1)  # the quote that is wrong here may have swallowed good rows
            problem = f"line {lines.number}: {error}: mend the quotes there"
        number += 1
        if problem is None and len(values) != len(header):
            problem = (f"row {number} (line {lines.number}) has {len(values)} fields, the header has {len(header)}: "
                       "put quotes around a text with commas")
        yield lines.row(number, dict(zip(header, values, strict=False)), problem)


def _read_lines(file: BinaryIO, parse: Callable[[str], tuple[dict[str, Any], str | None]]) -> Iterator[Row]:
    """The rows of a file with one row a line; `parse` gives a line's values and its problem, if it has one."""
    lines, number = _Lines(file), 0
    for line in lines:
        if line.strip():
            number += 1
            values, problem = parse(line)
            yield lines.row(number, values, problem and f"line {lines.number} {problem}")
        lines.mark()


def _parse_json(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        values = json.loads(line, object_pairs_hook=_without_twins)
        if "\\ud" in line.lower():  # JSON can name half of a character, which no file can hold
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return {}, "holds half of a \\ud... pair: write the character itself"
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON: {error}"
    if not isinstance(values, dict):
        return {}, 'is no JSON object such as {"text": ..., "label": ...}'
    if _is_deep(values, line):
        return {}, f"nests more than {DEEPEST} brackets: flatten it"
    return values, None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. One key twice is what two rows look like when the end of the first is lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice: keep one of them")
    return values


def _is_deep(values: dict[str, Any], line: str) -> bool:
    """Whether more than DEEPEST brackets are nested."""
    if line.count("[") + line.count("{") <= DEEPEST:  # nearly every line
        return False
    level: list[Any] = [values]
    for _ in range(DEEPEST):
        level = [value for each in level for value in (each.values() if isinstance(each, dict) else each)
                 if isinstance(value, dict | list)]
    return bool(level)


PARSERS = {".jsonl": _parse_json, ".txt": lambda line: ({"text": line.rstrip("\r\n")}, None)}


def _read_parquet(path: str) -> Iterator[Row]:
    with _opened_parquet(path) as file:
        if len(set(names := file.schema_arrow.names)) < len(names):
            raise UserError(f"{path}: two columns have the same name in {', '.join(names)}: rename one")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1000):
                columns = dict(zip(names, map(_python_values, batch.columns), strict=True))
                for place in range(batch.num_rows):
                    number += 1
                    values = {name: column[place] for name, column in columns.items()}
                    yield Row(number, number, values, source=(batch, place))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise _unreadable(path, error) from None


def _python_values(column: pa.Array) -> list[Any]:
    """A column's values. Python's times of a day have no nanoseconds, so these come as texts; its dates end with the
    year 9999, so a column with later ones comes as Arrow's own numbers (days or fractions of a second since 1970)."""
    column = column.cast(_with_leaves(column.type, lambda kind: pa.string() if kind == pa.time64("ns") else kind))
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return column.cast(_with_leaves(column.type, lambda kind: (pa.int32() if kind.bit_width == 32 else pa.int64())
                                        if pa.types.is_temporal(kind) else kind)).to_pylist()


def _with_leaves(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf(type)` in the place of every type within it that is not nested."""
    def within(field: pa.Field) -> pa.Field:
        return field.with_type(_with_leaves(field.type, leaf))

    if pa.types.is_struct(kind):
        return pa.struct(list(map(within, kind)))
    if pa.types.is_map(kind):
        return pa.map_(_with_leaves(kind.key_type, leaf), _with_leaves(kind.item_type, leaf))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(within(kind.value_field), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(within(kind.value_field))
    if pa.types.is_dictionary(kind) and (value := _with_leaves(kind.value_type, leaf)) != kind.value_type:
        return value
    return leaf(kind)


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _opened_parquet(path: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeError) as error:  # the file's name may not be UTF-8 either
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable parquet file: {brief(error)}")
