"""The rows of .csv, .jsonl, .parquet and .txt files, one by one, whole ones and broken ones.

A broken row says what is wrong with it, and reading goes on behind it: whoever trains stops there, whoever predicts
puts it aside. What makes a whole file unreadable is a UserError.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from utils import UserError, brief

LONGEST_FIELD = 1 << 24  # characters of a .csv: a quote that is never closed would swallow the rest of the file
DEEPEST = 100  # brackets within brackets in a line of .jsonl: Python's own limit depends on who asks


@dataclass
class Row:
    number: int  # from 1, without a header or blank lines
    position: int  # how far its file is read with it, in the unit of `size_of`
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None  # of a broken row: where and what it is, and the fix
    content: str = ""  # of a broken row, as it stands in the file
    text: str = ""  # of a whole row, where its reader looks for one


def read_rows(path: str, file: BinaryIO | None = None) -> Iterator[Row]:
    """The rows of a file, or of the open `file` as if it were called `path`."""
    kind = Path(path).suffix
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    with nullcontext(file) if file else _opened(path) as file:
        yield from {".csv": _read_csv, ".jsonl": _read_jsonl, ".txt": _read_txt}[kind](path, file)


def columns_of(path: str) -> list[str]:
    """The columns of a file, also where it holds no rows; [] for .jsonl, whose rows bring their own."""
    kind = Path(path).suffix
    if kind == ".parquet":
        with _opened_parquet(path) as file:
            return file.schema_arrow.names
    if kind == ".csv":
        with _opened(path) as file:
            return _read_header(path, file)[2]
    return ["text"] if kind == ".txt" else []


def size_of(path: str) -> int:
    """What the position of the last row will be: bytes, or the rows of a .parquet file."""
    if Path(path).suffix != ".parquet":
        return os.path.getsize(path)
    with _opened_parquet(path) as file:
        return file.metadata.num_rows


class _Lines:
    """The lines of a text file; those since `mark` can be given back."""

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
        """Give back the lines since the mark but for the first `kept` of them."""
        self.returned.extendleft(reversed(self.since_mark[kept:]))
        self.number -= len(self.since_mark[kept:])
        del self.since_mark[kept:]

    @property
    def content(self) -> str:
        content = "".join(self.since_mark).rstrip("\r\n")
        return content.encode(errors="surrogateescape").decode(errors="backslashreplace")

    def first_not_utf8(self) -> int | None:
        """The number of the first line since the mark that is not UTF-8."""
        for number, line in enumerate(self.since_mark, start=self.number - len(self.since_mark) + 1):
            if not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line):
                return number
        return None

    def position(self) -> int:
        return self.file.tell() if self.file.seekable() else 0


def _read_header(path: str, file: BinaryIO) -> tuple[_Lines, Any, list[str]]:
    """The lines of a .csv file, their csv.reader behind the header, and the header; [] of an empty file."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    try:
        header = next((values for values in reader if values), [])  # a blank line is none
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.number}: {error}: mend the quotes there") from None
    if line := lines.first_not_utf8():
        raise UserError(f"{path}: line {line} is not UTF-8: save it as UTF-8")
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
                continue  # a blank line is no row
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back(1)  # the quote that is wrong here may have swallowed good rows
            problem = f"line {lines.number}: {error}: mend the quotes there"
        if (line := lines.first_not_utf8()) is not None:
            problem = f"line {line} is not UTF-8: save it as UTF-8"
        number += 1
        if problem is None and len(values) != len(header):
            problem = (f"row {number} (line {lines.number}) has {len(values)} fields, the header has {len(header)}: "
                       "put quotes around a text with commas")
        if problem:
            yield Row(number, lines.position(), problem=problem, content=lines.content)
        else:
            yield Row(number, lines.position(), dict(zip(header, values, strict=True)))


def _read_jsonl(path: str, file: BinaryIO) -> Iterator[Row]:
    lines, number = _Lines(file), 0
    for line in lines:
        if line.strip():
            number += 1
            problem, row = None, None
            try:
                row = json.loads(line)
                if "\\ud" in line.lower():  # JSON can name half a character, which no text can hold
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                problem = f"line {lines.number} holds half of a \\ud... pair: write the character itself"
            except (ValueError, RecursionError) as error:
                problem = f"line {lines.number} is not JSON: {error}"
            if lines.first_not_utf8():
                problem = f"line {lines.number} is not UTF-8: save it as UTF-8"
            if problem is None and not isinstance(row, dict):
                problem = f"line {lines.number} is no JSON object such as {{\"text\": ..., \"label\": ...}}"
            if problem is None and _is_deep(row, line):
                problem = f"line {lines.number} nests more than {DEEPEST} brackets: flatten it"
            if problem:
                yield Row(number, lines.position(), problem=problem, content=lines.content)
            else:
                yield Row(number, lines.position(), row)
        lines.mark()


def _is_deep(row: dict, line: str) -> bool:
    if line.count("[") + line.count("{") <= DEEPEST:
        return False
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = [value for each in level for value in (each.values() if isinstance(each, dict) else each)
                 if isinstance(value, dict | list)]
    return bool(level)


def _read_txt(path: str, file: BinaryIO) -> Iterator[Row]:
    lines, number = _Lines(file), 0
    for line in lines:
        if line.strip():
            number += 1
            if lines.first_not_utf8():
                yield Row(number, lines.position(), problem=f"line {lines.number} is not UTF-8: save it as UTF-8",
                          content=lines.content)
            else:
                yield Row(number, lines.position(), {"text": line.rstrip("\r\n")})
        lines.mark()


def _read_parquet(path: str) -> Iterator[Row]:
    with _opened_parquet(path) as file:
        if len(set(names := file.schema_arrow.names)) < len(names):
            raise UserError(f"{path}: two columns have the same name in {', '.join(names)}: rename one")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, number, values)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise _unreadable(path, error) from None


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _opened_parquet(path: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable parquet file: {brief(error)}")
