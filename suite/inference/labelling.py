"""Labels the rows of a file, or of standard input, into another file. A job that was stopped goes on where it stopped.

Rows are read, labelled and written in chunks, so memory does not grow with the file. Several processes share the
chunks. Until the last row is labelled, everything lies in a folder beside the output:

    labelled.csv.parts/job.json         the input, the model and the settings: parts of another job are refused
    labelled.csv.parts/input.txt        a copy of standard input, if that is the input
    labelled.csv.parts/00000003.jsonl   the labelled rows of chunk 3 (.parquet if the output is a .parquet file)
    labelled.csv.parts/rejected.csv     all broken rows; it becomes labelled.csv.rejected.csv
    labelled.csv.parts/output.csv       all labelled rows; it becomes labelled.csv, and then the folder is removed

A file gets its name when it is complete and on the disk, so the process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from suite.common.stopping import SIGNALS
from suite.common.storage import (
    CARD,
    MANIFEST,
    atomic_write,
    lock,
    read_json,
    refuse_existing,
    room_for,
    sum_of_files,
    sync_folder,
    write_json,
)
from suite.inference.classifier import Labeller
from suite.reviews.rows import Row, as_text, column_problem, columns_of, listed, read_rows, size_of, text_files
from suite.reviews.sampling import CHUNK_ROWS
from utils import Config, UserError, file_kind, num_processes, process_rank, say

SHOWN = 3  # broken rows that are printed; the file of rejected rows has all of them


def read_chunks(path: str, column: str, classifier: Labeller) -> Iterator[list[Row]]:
    """The rows of a file, or of standard input for `-`, CHUNK_ROWS at a time. A row that cannot be labelled is broken.

    Raises UserError if there is no text column, or if a column has the name of one that will be added.
    """
    path, file = ("-.txt", sys.stdin.buffer) if path == "-" else (path, None)
    if os.path.isdir(path) or file_kind(path) == ".txt":
        column = "text"
    rows, columns = read_rows(path, [column], file=file), columns_of(path, [column])
    if columns and column not in columns:
        raise UserError(f"{path}: no column {column!r}; found {listed(columns)}: set data_config.text_column")
    if taken := set(columns) & set(classifier.added):
        raise UserError(f"{path}: it has a column {min(taken)!r} already: rename or remove it")
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        for row in chunk:
            if row.problem is None and (problem := problem_with(row, column, classifier)):
                row.problem, row.content = problem, json.dumps(row.values, default=str)
        yield chunk


def problem_with(row: Row, column: str, classifier: Labeller) -> str | None:
    """Why a row cannot be labelled; None if it can, and then it has its text."""
    if problem := column_problem(row, (column,)):
        return problem
    if taken := row.values.keys() & classifier.added:
        return f"row {row.number} has a column {min(taken)!r} already: rename or remove it"
    row.text = as_text(row.values[column]) or ""
    if not row.text.strip():
        return f"row {row.number} has no text: fill it or remove the row"
    if not classifier.gives_tokens(row.text):
        return f"row {row.number} has a text of which the model's tokenizer makes no token: change or remove it"
    return None


def label(classifier: Labeller, chunk: list[Row]) -> list[dict[str, Any]]:
    """The values of a chunk's whole rows, each with what is predicted for it."""
    whole = [row for row in chunk if row.problem is None]
    probabilities = classifier.probabilities([row.text for row in whole]) if whole else []
    return [row.values | classifier.columns(values) for row, values in zip(whole, probabilities, strict=True)]


class Job:
    """The labelling of one file, or of standard input, into another file."""

    def __init__(self, path: str, output: Path, classifier: Labeller, config: Config):
        """`path` is the input, - for standard input."""
        self.output, self.classifier, self.devices = output, classifier, classifier.devices
        self.column = config.data_config.text_column
        self.folder = output.with_name(output.name + ".parts")
        self.rejected = output.with_name(output.name + ".rejected.csv")
        self.joined, self.joined_rejected = self.folder / f"output{output.suffix}", self.folder / "rejected.csv"
        self.part_kind = ".parquet" if output.suffix == ".parquet" else ".jsonl"
        self.from_stdin = path == "-"
        self.source = str(self.folder / "input.txt") if self.from_stdin else path

    def run(self) -> None:
        is_main = self.devices.is_main
        with room_for(self.output.parent, fix="make room or choose another --output"):
            if self.open():
                if is_main:
                    self.finish()
                say(f"{self.output} is done")
                return
            done = set(self.parts())
            self.devices.barrier()  # every process has to see what was done before any of them does more
            if done:
                say(f"going on: {len(done):,} chunks of {CHUNK_ROWS:,} rows are labelled already")
            started = time.perf_counter()
            try:
                with SIGNALS.deferred():
                    counts, columns = self.label_chunks(done)
                self.devices.barrier()
                if is_main:
                    self.join(counts, columns)
                    self.finish()
            except UserError:
                if is_main and not self.parts():  # nothing is labelled, so nothing is left behind
                    self.remove()
                raise
            except SystemExit:
                say(f"stopped: the same command goes on from {self.folder}")
                raise
        seconds = time.perf_counter() - started
        say(f"{self.output}: {counts['rows'] - counts['broken']:,} rows, {counts['labelled'] / seconds:,.1f} a second")
        if counts["broken"]:
            say(f"{self.rejected}: the broken rows, {counts['broken']:,}, were skipped")
        if counts["undecided"]:
            say(f"{counts['undecided']:,} rows have no class, because its probability is below "
                f"{self.classifier.min_confidence:g}: they wait for a person")

    def open(self) -> bool:
        """Let the main process take the folder for this job; if it fails, all processes leave.

        Returns whether a killed process has joined all parts, so that only renames are left to do.
        """
        problem = None
        if self.devices.is_main:
            try:
                self.take_folder()
            except Exception as error:  # raised below, when the other processes know
                problem = error
        if self.devices.any(problem is not None):
            raise problem or SystemExit(2)
        return self.devices.any(self.devices.is_main and self.joined.exists())

    def take_folder(self) -> None:
        """Raises UserError if the folder is in use or holds parts of another job, or if there is an output already."""
        lock(self.folder, "choose another --output", inside=".job.lock")
        self.folder.mkdir(exist_ok=True)  # `lock` has made it, except where there are no locks
        if self.from_stdin:
            with atomic_write(self.source, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        path, description = self.folder / "job.json", self.describe()
        before = read_json(path) if path.exists() else {}
        differing = [key for key, value in description.items() if before.get(key) != value]
        if self.from_stdin and differing == ["content"]:  # a new job: the texts that were piped in before are gone
            for old in (self.joined, *self.parts().values()):
                old.unlink(missing_ok=True)
        is_begun = self.joined.exists() or self.parts()
        if differing and is_begun:
            raise UserError(f"{self.folder} holds the rows of an interrupted job with another {', '.join(differing)}: "
                            "give its command again, choose another --output, or remove this folder")
        if not self.joined.exists():
            try:
                refuse_existing(self.output, self.rejected)  # again: they may be newer than the command
            except UserError:
                if not is_begun:  # a kill has left the folder of a job that was done
                    self.remove()
                raise
        write_json(path, description)

    def describe(self) -> dict[str, Any]:
        """Everything that the labels depend on."""
        source, model = Path(self.source).resolve(), self.classifier.folder
        texts = text_files(source) if source.is_dir() else [source]
        of_model = [path for path in model.rglob("*") if path.is_file() and path.name not in (CARD, MANIFEST)]
        return {"input": str(source), "content": sum_of_files(source, texts), "model": sum_of_files(model, of_model),
                "text_column": self.column, "chunk_rows": CHUNK_ROWS,
                "min_confidence": self.classifier.min_confidence, **self.classifier.settings}

    def parts(self) -> dict[int, Path]:
        """{number of a chunk, from 1: the file of its labelled rows}."""
        return {int(path.stem): path for path in self.folder.glob(f"[0-9]*{self.part_kind}")}

    def label_chunks(self, done: set[int]) -> tuple[Counter, dict[str, None]]:
        """Label the chunks that are not `done`, in which the processes take turns, and write all broken rows aside.

        Returns the numbers of chunks, of rows, of broken ones, and of those that all processes together have labelled
        now; and the columns of the input.
        """
        counts, turns = Counter(), itertools.cycle(range(num_processes()))
        columns = dict.fromkeys(columns_of(self.source, [self.column]))
        with (tqdm(desc="predict", total=size_of(self.source), unit_scale=True, dynamic_ncols=True,
                   unit="row" if file_kind(self.source) == ".parquet" else "B",
                   disable=process_rank() > 0 or None) as bar,
              atomic_write(self.joined_rejected) if self.devices.is_main else open(os.devnull, "w") as file):
            rejected = csv.writer(file)
            rejected.writerow(["row", "problem", "content"])
            for number, chunk in enumerate(read_chunks(self.source, self.column, self.classifier), start=1):
                broken = [row for row in chunk if row.problem]
                rejected.writerows([row.number, row.problem, row.content] for row in broken)
                for row in broken[:max(0, SHOWN - counts["broken"])]:
                    say(f"skipped: {row.problem}")
                counts.update(chunks=1, rows=len(chunk), broken=len(broken))
                for row in chunk:
                    if not row.problem:  # one of a .jsonl file can have columns of its own
                        columns |= dict.fromkeys(row.values)
                if number not in done:
                    if next(turns) == process_rank():
                        self.write_part(number, chunk)
                    counts.update(labelled=len(chunk))
                bar.update(chunk[-1].position - bar.n)
                if SIGNALS.received:
                    raise SystemExit(SIGNALS.exit_code)
        return counts, columns

    def write_part(self, number: int, chunk: list[Row]) -> None:
        labelled = label(self.classifier, chunk)
        with atomic_write(self.folder / f"{number:08}{self.part_kind}", "wb") as file:
            if self.part_kind == ".parquet":
                pyarrow.parquet.write_table(self.table(labelled, chunk), file)
            else:
                file.writelines(f"{json.dumps(values, ensure_ascii=False, default=str)}\n".encode()
                                for values in labelled)

    def table(self, labelled: list[dict[str, Any]], chunk: list[Row]) -> pa.Table:
        """The whole rows of a .parquet input as Arrow has read them, with the added columns behind theirs."""
        own, added = self.schemas()
        # Slices work with every type, which `take` does not.
        rows = [batch.slice(place, 1) for batch, place in (row.source for row in chunk if not row.problem)]
        table = pa.Table.from_batches(rows, own).combine_chunks()
        for field in added:
            table = table.append_column(field, pa.array([values[field.name] for values in labelled], field.type))
        return table

    def schemas(self) -> tuple[pa.Schema, pa.Schema]:
        """The columns of a .parquet input with their own types, and the added ones."""
        own = pyarrow.parquet.read_schema(self.source).remove_metadata()
        return own, pa.schema([(name, pa.string() if name == "predicted" else pa.float64())
                               for name in self.classifier.added])

    def join(self, counts: Counter, columns: dict[str, None]) -> None:
        """Join the parts in their order. Once the joined file is there, only renames are left to do."""
        if not counts["broken"]:
            self.joined_rejected.unlink()
        parts, kind = self.parts(), self.output.suffix
        files = [parts[number] for number in range(1, counts["chunks"] + 1)]
        if self.classifier.min_confidence:
            counts["undecided"] = sum(map(undecided, files))
        with atomic_write(self.joined, "w" if kind == ".csv" else "wb") as output:
            if kind == ".parquet":
                with pyarrow.parquet.ParquetWriter(output, pa.unify_schemas(self.schemas())) as writer:
                    for file in files:
                        writer.write_table(pyarrow.parquet.ParquetFile(file).read())
            elif kind == ".jsonl":
                output.writelines(file.read_bytes() for file in files)
            else:
                writer = csv.DictWriter(output, [*columns, *self.classifier.added])
                writer.writeheader()
                for file in files:
                    with open(file, encoding="utf-8") as lines:
                        writer.writerows(cells(json.loads(line)) for line in lines)

    def finish(self) -> None:
        """Give the joined files their names, those that a killed process has not placed, and remove the folder."""
        unplaced = [(path, place) for path, place in ((self.joined_rejected, self.rejected), (self.joined, self.output))
                    if path.exists()]
        refuse_existing(*(place for _, place in unplaced))
        for part in self.parts().values():  # first: a folder without parts is not needed where the output exists
            part.unlink()
        for path, place in unplaced:
            os.replace(path, place)
        sync_folder(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Remove what the job has written, except for parts, and then the folder."""
        for pattern in (".*", "input.txt", "rejected.csv", "output.*", "job.json"):
            for path in self.folder.glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # somebody has put something into it
            self.folder.rmdir()


def undecided(part: Path) -> int:
    """How many of its rows have no class."""
    if part.suffix == ".parquet":
        return pyarrow.parquet.read_table(part, columns=["predicted"])["predicted"].null_count
    with open(part, encoding="utf-8") as lines:
        return sum(json.loads(line)["predicted"] is None for line in lines)


def cells(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a row as a .csv file holds them."""
    return {name: json.dumps(value, default=str) if isinstance(value, dict | list) else value
            for name, value in values.items()}
