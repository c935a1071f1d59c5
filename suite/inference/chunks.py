"""Reads the rows of an input chunk by chunk, and labels the rows of a chunk."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite.inference.classifier import Classifier
from suite.reviews.rows import Row, columns_of, read_rows
from suite.reviews.sources import as_text, misfit
from utils import UserError

CHUNK_ROWS = 2048  # rows that are read, sorted by length and labelled together


def read_chunks(path: str, column: str, added: list[str]) -> Iterator[list[Row]]:
    """The rows of a file, or of standard input for `-`, CHUNK_ROWS at a time. A row without a usable text is broken.

    Raises UserError if there is no text column, or if a column has the name of one that will be `added`.
    """
    if path == "-":
        rows, columns = read_rows("-.txt", sys.stdin.buffer), ["text"]
    else:
        rows, columns = read_rows(path), columns_of(path)
    if path == "-" or Path(path).suffix == ".txt":
        column = "text"
    if columns and column not in columns:
        raise UserError(f"{path}: no column {column!r}; found {', '.join(columns)}: set data_config.text_column")
    if taken := set(added) & set(columns):
        raise UserError(f"{path}: it has a column {min(taken)!r} already: rename or remove it")
    rows = (checked(row, column, added) for row in rows)
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def checked(row: Row, column: str, added: list[str]) -> Row:
    """The row with its text, or a broken row that says why it cannot be labelled."""
    if row.problem:
        return row
    problem = misfit(row, (column,))
    if problem is None:
        row.text = as_text(row.values[column]) or ""
        if not row.text.strip():
            problem = f"row {row.number} has no text: fill it or remove the row"
    if taken := row.values.keys() & added:
        problem = f"row {row.number} has a column {min(taken)!r} already: rename or remove it"
    if problem:
        return Row(row.number, row.position, problem=problem, content=json.dumps(row.values, default=str))
    return row


def label(classifier: Classifier, chunk: list[Row]) -> list[dict[str, Any]]:
    """The values of a chunk's whole rows, each with what is predicted for it."""
    whole = [row for row in chunk if row.problem is None]
    probabilities = classifier.probabilities([row.text for row in whole]) if whole else []
    return [row.values | classifier.columns(values) for row, values in zip(whole, probabilities, strict=True)]


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a row as a .csv file holds them."""
    return {name: json.dumps(value, default=str) if isinstance(value, dict | list) else value
            for name, value in row.items()}
