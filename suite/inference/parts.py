"""The folder `<output>.parts`, which holds what a labelling job has done until all of it is joined into the output.

    labelled.csv.parts/job.json               which input is labelled by which model; any other job is refused
    labelled.csv.parts/input.txt              a copy of standard input, if that is the input
    labelled.csv.parts/00000003-<sums>.jsonl  the labelled rows of chunk 3 (.parquet if the output is a .parquet file)
    labelled.csv.parts/00000003-<sums>.csv    its broken rows, if it has any
    labelled.csv.parts/rejected.csv           all broken rows; it becomes labelled.csv.rejected.csv
    labelled.csv.parts/output.csv             all labelled rows; it becomes labelled.csv, and then the folder is removed

<sums>: 8 digits of the SHA-256 sum of the input's rows, and 16 of that of job, chunk and content. A file that does not
match its name is never joined, and one that was made from other rows is made again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from suite.common.locks import lock
from suite.common.storage import atomic_write, read_json, refuse_existing, regular, sync_folder
from suite.reviews.rows import Row, columns_of
from utils import UserError, say

PART_NAMES = re.compile(r"([0-9]{8,}-([0-9a-f]{8}))-[0-9a-f]{16}\.(jsonl|parquet|csv)")
OWN_NAMES = re.compile(r"job\.json|\.job\.lock|\.[0-9a-f]{16}\.tmp|input\.txt|rejected\.csv"
                       r"|output\.(csv|jsonl|parquet)|[0-9]{8,}.*\.(jsonl|parquet|csv)")


class Parts:
    def __init__(self, path: str, output: Path, added: list[str], text_column: str):
        """`path` is the input, - for standard input; `added` are the names of the columns that labelling adds."""
        self.output, self.added, self.text_column = output, added, text_column
        self.folder = output.with_name(output.name + ".parts")
        self.rejected = output.with_name(output.name + ".rejected.csv")
        self.source = str(self.folder / "input.txt") if path == "-" else path
        self.joined, self.joined_rejected = self.folder / f"output{output.suffix}", self.folder / "rejected.csv"
        self.kind = ".parquet" if output.suffix == ".parquet" else ".jsonl"  # of the files of the chunks
        self.job = ""  # what the labels depend on; part of every file's sum

    def files(self, kind: str) -> dict[int, Path]:
        """{number of a chunk: its file of labelled rows or, with kind=".csv", of broken ones}. What the files hold is
        not verified here."""
        return {int(found[1].partition("-")[0]): path for path in self.folder.glob(f"[0-9]*{kind}")
                if (found := PART_NAMES.fullmatch(path.name))}

    @staticmethod
    def is_of(chunk: list[Row], file: Path | None) -> bool:
        """Whether the file of a chunk was made from these rows."""
        return file is not None and PART_NAMES.fullmatch(file.name)[2] == sum_of(chunk)

    def claim(self) -> None:
        """Take the folder for this process.

        Raises UserError if it is in use or holds other files, or if there is an output already.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): choose another --output") from None
        found = list(self.folder.iterdir())
        foreign = [path for path in found if not OWN_NAMES.fullmatch(path.name)
                   or path.is_symlink() or not path.is_file()]
        if self.folder.is_symlink() or foreign:
            raise UserError(f"{self.folder} holds files that no job wrote ({min(foreign, default=self.folder).name}): "
                            "move them or choose another --output")
        labelled = [path for path in found if path.suffix in (".csv", ".jsonl", ".parquet")]
        if labelled and not (self.folder / "job.json").exists():
            raise UserError(f"{self.folder} has no job.json, so nobody knows whose rows {min(labelled).name} holds: "
                            "move this folder elsewhere or choose another --output")
        lock(self.folder, "choose another --output", inside=".job.lock")
        self.remove_files(".*.tmp")  # of a job that was killed while it wrote
        if is_same(self.joined_rejected, self.rejected):  # this job was stopped between its two outputs
            self.rejected.unlink()
        refuse_existing(self.output, self.rejected)  # again: another job may have written them since the command began

    def read_job(self) -> dict[str, Any]:
        """The description of the job that used this folder before; {} if there was none."""
        path = self.folder / "job.json"
        try:
            return dict(read_json(path)) if path.exists() else {}
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is damaged, so nobody knows what job this is: choose another --output, or remove "
                            "this folder") from None

    def refuse(self, differing: list[str]) -> None:
        raise UserError(f"{self.folder} holds the rows of an interrupted job with another {', '.join(differing)}: give "
                        "its command again, choose another --output, or remove this folder")

    def write(self, number: int, rows: list[dict[str, Any]], chunk: list[Row]) -> None:
        """Write the labelled `rows` of a chunk and its broken ones. The labelled ones come last, because their file
        tells that the chunk is done."""
        self.remove_files(f"{number:08d}-*")  # one of the two may have been damaged or removed
        place = f"{number:08d}-{sum_of(chunk)}"
        if broken := [row for row in chunk if row.problem]:
            text = io.StringIO(newline="")
            csv.writer(text).writerows([row.number, row.problem, row.content] for row in broken)
            self.write_part(place, ".csv", text.getvalue().encode())
        if self.kind == ".parquet":
            content = pa.BufferOutputStream()
            pyarrow.parquet.write_table(self.table(rows, [row for row in chunk if not row.problem]), content)
            self.write_part(place, self.kind, content.getvalue().to_pybytes())
        else:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            self.write_part(place, self.kind, "".join(lines).encode())

    def write_part(self, place: str, kind: str, content: bytes) -> None:
        with atomic_write(self.folder / self.part_name(place, kind, content), "wb") as file:
            file.write(content)

    def part_name(self, place: str, kind: str, content: bytes) -> str:
        """The name of a chunk's file; `place`: the chunk's number and the sum of its rows."""
        digest = hashlib.sha256(f"{self.job} {place} {kind} ".encode() + content).hexdigest()
        return f"{place}-{digest[:16]}{kind}"

    def read_whole(self, path: Path) -> bytes | None:
        """The content of a chunk's file; None if it is missing, or another one than its name tells."""
        try:
            content = regular(path).read_bytes()
        except OSError:
            return None
        found = PART_NAMES.fullmatch(path.name)
        return content if found and path.name == self.part_name(found[1], path.suffix, content) else None

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

    # -----------------------------------------------------------------------------------------------------------------
    # Whether the files of the chunks are as they were written

    def discard_damaged(self) -> None:
        """Remove the files of chunks whose content does not match their name, so that these chunks are done again."""
        paths = sorted(self.folder.glob("[0-9]*"))
        if damaged := [path for path in paths if self.read_whole(path) is None]:
            say(f"{damaged[0]} is damaged{f', and {len(damaged) - 1:,} more are' if damaged[1:] else ''}: these rows "
                "are labelled again")
        for path in damaged:
            path.unlink()

    def join(self, chunks: int, rows: int, broken: list[int]) -> None:
        """Join the files of the chunks in their order, and give the joined files their names.

        chunks, rows: how many there are, broken rows left out; `broken`: the numbers of the chunks with broken rows.
        Raises UserError if a part is not what was written.
        """
        self.joined_rows = 0
        if broken:
            files = self.files(".csv")
            with atomic_write(self.joined_rejected, "wb") as file:
                file.write(b"row,problem,content\r\n")
                for number in broken:
                    file.write(self.read_part(files, number))
        self.write_joined(chunks)
        if self.joined_rows != rows:
            raise RuntimeError(f"{self.folder}: {self.joined_rows:,} labelled rows of {rows:,}")
        if broken:
            publish(self.joined_rejected, self.rejected)
        publish(self.joined, self.output)
        self.remove()

    def read_part(self, files: dict[int, Path], number: int) -> bytes:
        """Raises UserError if the file of that chunk is missing or is not what was written."""
        content = self.read_whole(files[number]) if number in files else None
        if content is None:
            raise UserError(f"{files.get(number, self.folder)}: rows of chunk {number} were damaged or removed while "
                            "this job ran: give the same command again, which labels them again")
        return content

    def read_parts(self, chunks: int) -> Iterator[bytes]:
        """The content of the chunks' files, one after the other."""
        files = self.files(self.kind)
        return (self.read_part(files, number) for number in range(1, chunks + 1))

    def write_joined(self, chunks: int) -> None:
        if self.kind == ".parquet":
            with atomic_write(self.joined, "wb") as file, pyarrow.parquet.ParquetWriter(file, self.schema()) as writer:
                for content in self.read_parts(chunks):
                    table = pyarrow.parquet.read_table(pa.BufferReader(content))
                    writer.write_table(table)
                    self.joined_rows += table.num_rows
        elif self.output.suffix == ".jsonl":
            with atomic_write(self.joined, "wb") as file:
                for content in self.read_parts(chunks):
                    file.write(content)
                    self.joined_rows += content.count(b"\n")
        else:
            with atomic_write(self.joined) as file:
                found = itertools.chain.from_iterable(self.read_rows(chunks))  # a row of .jsonl can have its own
                columns = dict.fromkeys(itertools.chain(columns_of(self.source, [self.text_column]), found, self.added))
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                for row in self.read_rows(chunks):
                    writer.writerow(cells(row))
                    self.joined_rows += 1

    def read_rows(self, chunks: int) -> Iterator[dict[str, Any]]:
        for content in self.read_parts(chunks):
            yield from map(json.loads, io.BytesIO(content))

    def remove_files(self, *patterns: str) -> None:
        for path in itertools.chain.from_iterable(map(self.folder.glob, patterns)):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the job's files and the folder. Which job it was goes last."""
        self.remove_files("[0-9]*", "input.txt", "rejected.csv", ".job.lock", ".*.tmp", "output.*", "job.json")
        try:
            self.folder.rmdir()
        except OSError as error:
            say(f"{self.folder} stays, because it holds files that no job wrote ({error.strerror})")


def sum_of(chunk: list[Row]) -> str:
    """8 digits of the SHA-256 sum of rows of the input."""
    rows = [[row.number, row.problem, row.content, row.values] for row in chunk]
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()[:8]


def is_same(path: Path, other: Path) -> bool:
    """Whether the two are one existing file."""
    return path.exists() and other.exists() and path.samefile(other)


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a row as a .csv file holds them."""
    return {name: json.dumps(value, default=str) if isinstance(value, dict | list) else value
            for name, value in row.items()}


def publish(path: Path, target: Path) -> None:
    """Give a finished file the name `target`, unless another file has it by now."""
    try:
        os.link(path, target)
    except FileExistsError:
        if not path.samefile(target):
            raise UserError(f"{target} has appeared meanwhile: move it, and give the same command again") from None
    except OSError:  # a file system without hard links
        os.rename(path, target)
    sync_folder(target.parent)
