"""The folder `<output>.parts`, which holds what a labelling job has done until all of it is joined into the output.

    labelled.csv.parts/job.json         which input is labelled by which model; any other job is refused
    labelled.csv.parts/input.txt        a copy of standard input, if that is the input
    labelled.csv.parts/00000003.jsonl   the labelled rows of chunk 3 (.parquet if the output is a .parquet file)
    labelled.csv.parts/00000003.csv     its broken rows, if it has any
    labelled.csv.parts/rejected.csv     all broken rows; it becomes labelled.csv.rejected.csv
    labelled.csv.parts/output.csv       all labelled rows; it becomes labelled.csv, and then the folder is removed
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet

from suite.common.storage import atomic_write, lock, read_json, refuse_existing, sync_folder
from suite.reviews.rows import Row, columns_of
from utils import UserError


class Parts:
    def __init__(self, path: str, output: Path, added: list[str]):
        """`path` is the input, - for standard input; `added` are the names of the columns that labelling adds."""
        self.output, self.added = output, added
        self.folder = output.with_name(output.name + ".parts")
        self.rejected = output.with_name(output.name + ".rejected.csv")
        self.source = str(self.folder / "input.txt") if path == "-" else path
        self.joined, self.joined_rejected = self.folder / f"output{output.suffix}", self.folder / "rejected.csv"
        self.kind = ".parquet" if output.suffix == ".parquet" else ".jsonl"  # of the files of the chunks

    def finished(self) -> list[Path]:
        return sorted(self.folder.glob(f"[0-9]*{self.kind}"))

    def claim(self) -> None:
        """Raises UserError if the folder is in use or holds other files, or if there is an output already."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): choose another --output") from None
        found = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        if self.folder.is_symlink() or found and not (self.folder / "job.json").exists():
            raise UserError(f"{self.folder} holds files that no job wrote: move them or choose another --output")
        lock(self.folder / "job", "choose another --output")
        if is_same(self.joined_rejected, self.rejected):  # this job was stopped between its two outputs
            self.rejected.unlink()
        refuse_existing(self.output, self.rejected)  # again: another job may have written them since the command began

    def read_job(self) -> dict[str, Any]:
        """The description of the job that used this folder before; {} if there was none or it cannot be read."""
        try:
            return dict(read_json(self.folder / "job.json"))
        except (OSError, ValueError, TypeError):
            return {}

    def refuse(self, differing: list[str]) -> None:
        raise UserError(f"{self.folder} holds the rows of an interrupted job with another {', '.join(differing)}: give "
                        "its command again, choose another --output, or remove this folder")

    def write(self, number: int, rows: list[dict[str, Any]], broken: list[Row]) -> None:
        """Write the rows of a chunk. The file of the labelled ones comes last, because it tells that it is done."""
        if broken:
            with atomic_write(self.folder / f"{number:08d}.csv") as file:
                csv.writer(file).writerows([row.number, row.problem, row.content] for row in broken)
        with atomic_write(self.folder / f"{number:08d}{self.kind}", "wb" if self.kind == ".parquet" else "w") as file:
            if self.kind == ".parquet":
                pyarrow.parquet.write_table(pa.Table.from_pylist(rows, self.schema()), file)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def schema(self) -> pa.Schema:
        """The columns of a .parquet input with their own types, and the added ones."""
        schema = pyarrow.parquet.read_schema(self.source).remove_metadata()
        for name in self.added:
            schema = schema.append(pa.field(name, pa.string() if name == "predicted" else pa.float64()))
        return schema

    def join(self) -> None:
        """Join the files of the chunks in their order, and give the joined files their names."""
        if broken := sorted(self.folder.glob("[0-9]*.csv")):
            with atomic_write(self.joined_rejected) as file:
                csv.writer(file).writerow(["row", "problem", "content"])
                append(file, broken)
        self.write_joined(self.finished())
        if broken:
            publish(self.joined_rejected, self.rejected)
        publish(self.joined, self.output)
        self.remove()

    def write_joined(self, parts: list[Path]) -> None:
        if self.kind == ".parquet":
            with atomic_write(self.joined, "wb") as file, pyarrow.parquet.ParquetWriter(file, self.schema()) as writer:
                for part in parts:
                    writer.write_table(pyarrow.parquet.read_table(part))
            return
        with atomic_write(self.joined) as file:
            if self.output.suffix == ".jsonl":
                append(file, parts)
                return
            found = itertools.chain.from_iterable(read_parts(parts))  # a row of .jsonl can have columns of its own
            columns = dict.fromkeys(itertools.chain(columns_of(self.source), found, self.added))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(map(cells, read_parts(parts)))

    def remove_files(self, *patterns: str) -> None:
        for path in itertools.chain.from_iterable(map(self.folder.glob, patterns)):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the job's files and the folder. The joined output goes last, because it tells that the job is done."""
        self.remove_files("[0-9]*", "input.txt", "rejected.csv", "job.json", ".*", "output.*")
        self.folder.rmdir()


def is_same(path: Path, other: Path) -> bool:
    """Whether the two are one existing file."""
    return path.exists() and other.exists() and path.samefile(other)


def append(file: TextIO, parts: list[Path]) -> None:
    for part in parts:
        with open(part, encoding="utf-8", newline="") as content:
            shutil.copyfileobj(content, file)


def read_parts(parts: list[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        try:
            with open(part, encoding="utf-8") as file:
                yield from map(json.loads, file)
        except ValueError:
            raise UserError(f"{part} is damaged: remove it, and give the same command again") from None


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
