"""Rows of text files: of a .csv or .tsv file, and of a file with one row a line. A broken row costs no other one.

Training counts broken rows and stops, prediction sets them aside.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import pyarrow as pa

from utils import UserError, file_kind

LONGEST_FIELD = 1 << 24  # characters of a .csv field: a quote that is never closed would swallow the rest of the file
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


class Lines:
    """The lines of a text file. It keeps those of the row that is being read, and takes back the ones that turn out to
    belong to other rows. Bytes that are not UTF-8 stay in them as surrogates."""

    def __init__(self, file: BinaryIO):
        self.text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.on_disk = getattr(file, "fileobj", file)  # of a compressed file, the bytes that are there
        self.number, self.of_row, self.returned = 0, [], deque()

    def __iter__(self) -> Lines:
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
        row = Row(number, self.on_disk.tell() if self.on_disk.seekable() else 0, values)
        if problem := self.encoding_problem() or problem:
            content = "".join(self.of_row).rstrip("\r\n").encode(errors="surrogateescape")
            row = replace(row, values={}, problem=problem, content=content.decode(errors="backslashreplace"))
        self.of_row = []
        return row

    def encoding_problem(self) -> str | None:
        """Names the first line of this row that is not UTF-8."""
        for number, line in enumerate(self.of_row, start=self.number - len(self.of_row) + 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                return f"line {number} is {other_encoding(line.encode(errors='surrogateescape'))}"
        return None


def other_encoding(content: bytes) -> str:
    """What is said of bytes that are not UTF-8: the encoding that they probably have, and how to convert them."""
    # WINDOWS-1252 is the usual one of older files, and has all letters of ISO-8859-1, too.
    encoding = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    return f"not UTF-8: it is probably {encoding}; convert the file with iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"


def read_header(path: str, file: BinaryIO, columns: Sequence[str]) -> tuple[Lines, Any, list[str]]:
    """(lines, the csv.reader of the rows after the header, the header) of a .csv or .tsv file; an empty file's header
    is []. A column without a name gets one, such as `column 3`, counted from 1, and so does one whose name is taken.

    The separator is the one under which the header has the `columns`; if there is none, the one of the file's kind, or
    of a first line such as `sep=;`, which Excel reads and writes.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines, own = Lines(file), "\t" if file_kind(path) == ".tsv" else ","
    if stated := re.fullmatch(r"sep=(.)\s*", next(lines, "")):
        own, lines.of_row = stated[1], []
    for separator in (own, *(mark for mark in SEPARATORS if mark != own), own):
        lines.give_back(0)
        try:
            problem, found = None, next((row for row in csv.reader(lines, delimiter=separator, strict=True) if row), [])
        except csv.Error as error:
            problem, found = f"line {lines.number}: {error}: correct the quotes there", []
        header = [name.strip() or f"column {place}" for place, name in enumerate(found, start=1)]
        if problem is None and set(columns) <= set(header):
            break
    if problem := lines.encoding_problem() or problem:
        raise UserError(f"{path}: {problem}")
    if twins := [name for name in columns if header.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {twins[0]!r}: rename one")
    header = [f"{name} (column {place + 1})" if name in header[:place] else name for place, name in enumerate(header)]
    spaced = len(found) > 1 and all(name.startswith(" ") for name in found[1:])  # `text, label`: so do the rows, too
    lines.of_row = []
    return lines, csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True), header


def read_table(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    lines, reader, header = read_header(path, file, columns)
    number, separator = 0, reader.dialect.delimiter
    while True:
        try:
            problem, values = None, next(reader)
            if not values:  # a blank line
                lines.of_row = []
                continue
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back(1)  # the quote that is wrong here may have swallowed good rows
            problem, values = f"line {lines.number}: {error}: correct the quotes there", []
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


def read_lines(path: str, file: BinaryIO, columns: Sequence[str], parse: Callable[[str], dict[str, Any]]
                ) -> Iterator[Row]:
    """The rows of a file with one row a line; `parse` gives a line's values, or raises ValueError with the problem."""
    lines, number = Lines(file), 0
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
