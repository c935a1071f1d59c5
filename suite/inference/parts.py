"""The folder `<output>.parts`, which holds what a labelling job has done until all of it is joined into the output.

    labelled.csv.parts/job.json              which input is labelled by which model; any other job is refused
    labelled.csv.parts/input.txt             a copy of standard input, if that is the input
    labelled.csv.parts/00000003-<sum>.jsonl  a part: the labelled rows of chunk 3 (.parquet if the output is a .parquet
                                             file); <sum>: 16 digits of the SHA-256 sum of what it holds
    labelled.csv.parts/rejected.csv          all broken rows; it becomes labelled.csv.rejected.csv
    labelled.csv.parts/output.csv            all labelled rows; it becomes labelled.csv, and then the folder is removed

Each file gets its name when it is complete and on the disk. A part that does not match its sum is never joined.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from suite.common.storage import atomic_write, read_json, refuse_existing, sync_folder
from suite.reviews.rows import Row
from utils import UserError, say

PART_NAME = re.compile(r"([0-9]{8,})-([0-9a-f]{16})\.(jsonl|parquet)")


class Parts:
    def __init__(self, path: str, output: Path, added: list[str]):
        """`path` is the input, - for standard input; `added` are the names of the columns that labelling adds."""
        self.output, self.added = output, added
        self.folder = output.with_name(output.name + ".parts")
        self.rejected = output.with_name(output.name + ".rejected.csv")
        self.job = self.folder / "job.json"
        self.source = str(self.folder / "input.txt") if path == "-" else path
        self.joined, self.joined_rejected = self.folder / f"output{output.suffix}", self.folder / "rejected.csv"
        self.kind = ".parquet" if output.suffix == ".parquet" else ".jsonl"  # of the parts

    def read_job(self) -> dict[str, Any]:
        """The description of the job that used this folder before; {} if there was none."""
        try:
            return read_json(self.job) if self.job.exists() else {}
        except ValueError:
            raise UserError(f"{self.job} is damaged, so nobody knows what job this is: choose another --output, or "
                            "remove this folder") from None

    def files(self) -> dict[int, Path]:
        """{number of a chunk, from 1: its part}. What the parts hold is not verified here."""
        return {int(found[1]): path for path in self.folder.glob("*") if (found := PART_NAME.fullmatch(path.name))}

    def write(self, number: int, rows: list[dict[str, Any]], chunk: list[Row]) -> None:
        """Write the part of a chunk; `rows` are the values of its whole rows, with what is predicted for them."""
        if self.kind == ".parquet":
            buffer = pa.BufferOutputStream()
            pyarrow.parquet.write_table(self.table(rows, [row for row in chunk if not row.problem]), buffer)
            content = buffer.getvalue().to_pybytes()
        else:
            content = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
        with atomic_write(self.folder / f"{number:08d}-{sum_of(content)}{self.kind}", "wb") as file:
            file.write(content)

    def table(self, rows: list[dict[str, Any]], chunk: list[Row]) -> pa.Table:
        """The rows of a .parquet input as Arrow read them, with the added columns behind theirs."""
        schema = self.schema()
        own = pa.schema(list(schema)[:len(schema) - len(self.added)])
        # Slices copy nothing, and unlike `take` they work with every type. Each is a run of rows without a broken one.
        runs: list[list[Any]] = []  # [batch, first row, number of rows]
        for batch, place in (row.source for row in chunk):
            if runs and runs[-1][0] is batch and sum(runs[-1][1:]) == place:
                runs[-1][2] += 1
            else:
                runs.append([batch, place, 1])
        table = pa.Table.from_batches([batch.slice(first, count).replace_schema_metadata()
                                       for batch, first, count in runs], own)
        for field in list(schema)[len(own):]:
            table = table.append_column(field, [pa.array([row[field.name] for row in rows], field.type)])
        return table

    def schema(self) -> pa.Schema:
        """The columns of a .parquet input with their own types, and the added ones."""
        schema = pyarrow.parquet.read_schema(self.source).remove_metadata()
        for name in self.added:
            schema = schema.append(pa.field(name, pa.string() if name == "predicted" else pa.float64()))
        return schema

    def remove_damaged(self) -> None:
        """Remove the parts that do not match their sums, so that their chunks are labelled again."""
        damaged = [path for _, path in sorted(self.files().items()) if read_whole(path) is None]
        if damaged:
            say(f"{damaged[0]} is damaged{f', and {len(damaged) - 1:,} more are' if damaged[1:] else ''}: these rows "
                "are labelled again")
        for path in damaged:
            path.unlink()

    def join(self, chunks: int, columns: list[str]) -> None:
        """Join the parts of so many chunks in their order; `columns` are those of a .csv output.

        Raises UserError if a part does not match its sum.
        """
        if self.kind == ".parquet":
            with atomic_write(self.joined, "wb") as file, pyarrow.parquet.ParquetWriter(file, self.schema()) as writer:
                for content in self.contents(chunks):
                    writer.write_table(pyarrow.parquet.read_table(pa.BufferReader(content)))
        elif self.output.suffix == ".jsonl":
            with atomic_write(self.joined, "wb") as file:
                file.writelines(self.contents(chunks))
        else:
            with atomic_write(self.joined) as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                for content in self.contents(chunks):
                    writer.writerows(cells(json.loads(line)) for line in io.BytesIO(content))

    def contents(self, chunks: int) -> Iterator[bytes]:
        """What the parts of so many chunks hold, one after the other."""
        files = self.files()
        for number in range(1, chunks + 1):
            if (content := read_whole(files[number])) is None:
                raise UserError(f"{files[number]} was damaged while this job ran: give the same command again, which "
                                "labels its rows again")
            yield content

    def place_joined(self) -> None:
        """Give the joined files their names, those that an earlier process has not placed, and remove the folder."""
        unplaced = [(path, place) for path, place in ((self.joined_rejected, self.rejected), (self.joined, self.output))
                    if path.exists()]
        refuse_existing(*(place for _, place in unplaced))
        for path, place in unplaced:
            os.replace(path, place)
        sync_folder(self.output.parent)
        self.remove()

    def remove_files(self) -> None:
        """Remove all parts, and what a killed process has left of a file that it wrote."""
        for path in (*self.files().values(), *self.folder.glob(".*.tmp")):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the job's files and, if nothing else is in it, the folder. What says which job it was goes last."""
        self.remove_files()
        for path in (self.folder / "input.txt", self.joined_rejected, self.joined, self.folder / ".job.lock", self.job):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def sum_of(content: bytes) -> str:
    """The sum in the name of a part: 16 digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_whole(path: Path) -> bytes | None:
    """What a part holds; None if it does not match the sum in its name."""
    content = path.read_bytes()
    return content if PART_NAME.fullmatch(path.name)[2] == sum_of(content) else None


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a row as a .csv file holds them."""
    return {name: json.dumps(value, default=str) if isinstance(value, dict | list) else value
            for name, value in row.items()}
