"""The rows of a file, labelled window by window, with everything that can interrupt it.

Memory does not grow with the file. A window's result goes into a file of its own in the folder `<output>.parts`; when
all are there, they are joined. What was done before an interruption is found there, and several processes share the
windows.

    labelled.csv.parts/job.json         what is labelled by which model; another job is refused
    labelled.csv.parts/00000003.jsonl   the labelled rows of window 3 (.parquet, where the output is)
    labelled.csv.parts/00000003.csv     its broken rows, if any
    labelled.csv.parts/output.csv       all of them, joined; then it gets its name, and the folder goes
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from suite.common.stopping import SIGNALS
from suite.common.storage import NOT_SEALED, atomic_write, lock, refuse_existing, room_for, sync_folder, write_json
from suite.inference.classifier import Classifier
from suite.reviews.rows import Row, columns_of, read_rows, size_of
from suite.reviews.sources import as_text, misfit
from utils import Config, UserError, num_processes, process_rank, say

WINDOW = 2048  # rows that are read, sorted by length and labelled together
SHOWN = 3  # broken rows that are shown; the file of rejected rows has them all


def read_windows(path: str, column: str, added: list[str]) -> Iterator[list[Row]]:
    """The rows of a file, or of standard input for `-`, WINDOW at a time; one without a usable text is a broken one.

    Raises UserError if there is no text column, or if there is one of the columns that will be `added`.
    """
    if path == "-":
        if sys.stdin is None:
            raise UserError("--input -: standard input is closed: give a file")
        rows, columns = read_rows("-.txt", sys.stdin.buffer), []
    else:
        rows, columns = read_rows(path), columns_of(path)
    if Path(path).suffix in (".txt", ""):
        column = "text"
    elif columns and column not in columns:
        raise UserError(f"{path}: no column {column!r}; found {', '.join(columns)}: set data_config.text_column")
    if taken := set(added) & set(columns):
        raise UserError(f"{path}: it has a column {min(taken)!r} already: rename or remove it")
    window = []
    for row in rows:
        window.append(checked(row, column, added))
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def checked(row: Row, column: str, added: list[str]) -> Row:
    """The row with its text as a text, or as a broken row if it has none."""
    if row.problem is None:
        problem = misfit(row, (column,))
        text = None if problem else as_text(row.values[column])
        if problem is None and not (text and text.strip()):
            problem = f"row {row.number} has no text: fill it or remove the row"
        if taken := row.values.keys() & added:
            problem = f"row {row.number} has a column {min(taken)!r} already: rename or remove it"
        if problem:
            return Row(row.number, row.position, problem=problem, content=json.dumps(row.values, default=str))
        row.text = text
    return row


def label(classifier: Classifier, window: list[Row]) -> list[dict[str, Any]]:
    """The whole rows of a window, each with what is predicted for it."""
    whole = [row for row in window if row.problem is None]
    if not whole:
        return []
    probabilities = classifier.probabilities([row.text for row in whole])
    return [row.values | classifier.columns(values) for row, values in zip(whole, probabilities, strict=True)]


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a row as a .csv file holds them."""
    return {name: json.dumps(value, default=str) if isinstance(value, dict | list) else value
            for name, value in row.items()}


class Job:
    """The labelling of one file into another."""

    def __init__(self, path: str, output: Path, classifier: Classifier, config: Config):
        self.path, self.output, self.classifier, self.config = path, output, classifier, config
        self.devices = classifier.devices
        self.parts = output.with_name(output.name + ".parts")
        self.rejected = output.with_name(output.name + ".rejected.csv")
        self.source = str(self.parts / "input.txt") if path == "-" else path
        self.kind = ".parquet" if output.suffix == ".parquet" else ".jsonl"

    def run(self) -> None:
        if self.devices.any(self.devices.is_main and self.is_published()):
            if self.devices.is_main:
                self.clear()
            say(f"{self.output} is done")
            return
        problem = None
        if self.devices.is_main:
            try:
                self.open()
            except UserError as error:
                problem = error
        if self.devices.any(problem is not None):
            raise problem or SystemExit(2)
        done = {int(part.stem) for part in self.finished_parts()}
        self.devices.barrier()  # every process has seen what was done before any of them does more
        if done:
            say(f"going on: {len(done):,} times {WINDOW:,} rows are labelled already")
        started, counts = time.perf_counter(), Counter()
        try:
            with room_for(self.output.parent):
                self.label_windows(done, counts)
                self.devices.barrier()
                if self.devices.is_main:
                    self.join()
        except SystemExit:
            say(f"stopped; the same command goes on from what lies in {self.parts}")
            raise
        seconds = time.perf_counter() - started
        say(f"{self.output}: {counts['rows'] - counts['broken']:,} rows, {counts['labelled'] / seconds:,.1f} a second")
        if counts["broken"]:
            say(f"{self.rejected}: {counts['broken']:,} broken rows that were left out")

    def finished_parts(self) -> list[Path]:
        return sorted(self.parts.glob(f"[0-9]*{self.kind}"))

    def open(self) -> None:
        """Make the folder of the parts this job's own.

        Raises UserError if it is another job's, in use, or not a job's at all, or if there is an output already.
        """
        path = self.parts / "job.json"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.parts} cannot be written ({error.strerror}): choose another --output") from None
        there = [each.name for each in self.parts.iterdir() if not each.name.startswith(".")]
        if self.parts.is_symlink() or there and not path.exists():
            raise UserError(f"{self.parts} holds other files than a job's: choose another --output, or move them")
        lock(self.parts / "job", "choose another --output")
        rejected = self.parts / "rejected.csv"
        if rejected.exists() and self.rejected.exists() and rejected.samefile(self.rejected):
            self.rejected.unlink()  # this job was stopped between its two outputs
        refuse_existing(self.output, self.rejected)  # again: another job may have written them since
        before = self.read_job(path)
        if self.path == "-":  # nobody can say it twice: a file stands for it
            if before and before.get("input") != self.input_name:
                self.refuse(["input"])
            self.clear(but_folder=True)
            if sys.stdin is None:
                raise UserError("--input -: standard input is closed: give a file")
            with room_for(self.parts), atomic_write(self.source, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        self.job = self.describe()
        if self.finished_parts() and before != self.job:
            self.refuse(sorted(key for key in self.job if before.get(key) != self.job[key]))
        write_json(path, self.job)

    @property
    def input_name(self) -> str:
        return str(Path(self.source).resolve())

    def describe(self) -> dict[str, Any]:
        """All that the labels depend on."""
        status, data, folder = os.stat(self.source), self.config.data_config, self.classifier.folder
        model = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in NOT_SEALED:
                with open(path, "rb") as file:
                    model.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return {"input": self.input_name, "bytes": status.st_size, "changed": status.st_mtime_ns,
                "model": model.hexdigest(), "text_column": data.text_column, "max_len": data.max_len,
                "truncation": data.truncation, "eval_batch_size": data.eval_batch_size,
                "precision": self.devices.precision, "window": WINDOW}

    def read_job(self, path: Path) -> dict[str, Any]:
        """What the job before this one was; {} if there was none, or nobody can tell."""
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def refuse(self, differing: list[str]) -> None:
        raise UserError(f"{self.parts} holds what an interrupted job with another {', '.join(differing)} has labelled: "
                        "give its command, choose another --output, or remove this folder")

    def is_published(self) -> bool:
        """Whether the output is that of this folder, whose job was stopped before it could tidy up."""
        joined = self.parts / f"output{self.output.suffix}"
        return joined.exists() and self.output.exists() and joined.samefile(self.output)

    def clear(self, but_folder: bool = False) -> None:
        """Remove what belongs to the job, the file that tells a finished one last."""
        names = [*self.parts.glob("[0-9]*"), *self.parts.glob("input.txt"), *self.parts.glob("rejected.csv"),
                 *self.parts.glob("job.json"), *self.parts.glob(".*"), *self.parts.glob("output.*")]
        for path in names:
            if not (but_folder and path.name == ".job.lock"):
                path.unlink(missing_ok=True)
        if not but_folder:
            self.parts.rmdir()

    def label_windows(self, done: set[int], counts: Counter) -> None:
        processes, rank, open_windows = num_processes(), process_rank(), 0
        is_parquet, column = Path(self.source).suffix == ".parquet", self.config.data_config.text_column
        bar = tqdm(total=size_of(self.source), unit="row" if is_parquet else "B", unit_scale=True, dynamic_ncols=True,
                   disable=rank > 0 or not sys.stderr.isatty(), desc="predict")
        for number, window in enumerate(read_windows(self.source, column, self.classifier.added), start=1):
            for row in window:
                counts["rows"] += 1
                if row.problem:
                    counts["broken"] += 1
                    if counts["broken"] <= SHOWN:
                        say(f"left out: {row.problem}")
            if number not in done:
                if open_windows % processes == rank:
                    self.write_part(number, label(self.classifier, window), [row for row in window if row.problem])
                counts["labelled"] += len(window)
                open_windows += 1
            bar.update(window[-1].position - bar.n)
            if SIGNALS.received:
                raise SystemExit(SIGNALS.exit_code)
        bar.close()

    def write_part(self, number: int, rows: list[dict], broken: list[Row]) -> None:
        if broken:
            with atomic_write(self.parts / f"{number:08d}.csv") as file:
                csv.writer(file).writerows([row.number, row.problem, row.content] for row in broken)
        with atomic_write(self.parts / f"{number:08d}{self.kind}", "wb" if self.kind == ".parquet" else "w") as file:
            if self.kind == ".parquet":
                pyarrow.parquet.write_table(self.table(rows), file)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def table(self, rows: list[dict]) -> pa.Table:
        """With the input's own types."""
        with pyarrow.parquet.ParquetFile(self.source) as file:
            schema = file.schema_arrow.remove_metadata()
        for name in self.classifier.added:
            schema = schema.append(pa.field(name, pa.string() if name == "predicted" else pa.float64()))
        return pa.Table.from_pylist(rows, schema)

    def join(self) -> None:
        """All parts, in order, as one file. It comes last, and stands for the job being done."""
        if self.describe() != self.job:
            raise UserError(f"{self.source}, or the model, has changed while it was labelled: remove {self.parts} and "
                            "give the command again")
        joined, rejected = self.parts / f"output{self.output.suffix}", self.parts / "rejected.csv"
        if broken := sorted(self.parts.glob("[0-9]*.csv")):
            with atomic_write(rejected) as file:
                csv.writer(file).writerow(["row", "problem", "content"])
                append(file, broken)
        parts = self.finished_parts()
        if self.kind == ".parquet":
            schema = self.table([]).schema
            with atomic_write(joined, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
                for part in parts:
                    writer.write_table(pyarrow.parquet.read_table(part))
        elif self.output.suffix == ".jsonl":
            with atomic_write(joined) as file:
                append(file, parts)
        else:
            columns = dict.fromkeys(columns_of(self.source)) | dict.fromkeys(name for row in read_parts(parts)
                                                                             for name in row)
            with atomic_write(joined) as file:
                writer = csv.DictWriter(file, [*columns, *(name for name in self.classifier.added
                                                           if name not in columns)])
                writer.writeheader()
                writer.writerows(map(cells, read_parts(parts)))
        if broken:
            self.publish(rejected, self.rejected)
        self.publish(joined, self.output)
        self.clear()

    def publish(self, path: Path, target: Path) -> None:
        """Give a whole file its name, unless something has it by now."""
        try:
            os.link(path, target)
        except FileExistsError:
            if not path.samefile(target):
                raise UserError(f"{target} has come into being meanwhile: move it, and give the same command again"
                                ) from None
        except OSError:  # a file system without hard links
            os.rename(path, target)
        sync_folder(target.parent)


def append(file: TextIO, parts: list[Path]) -> None:
    for part in parts:
        with open(part, encoding="utf-8", newline="") as content:
            shutil.copyfileobj(content, file)


def read_parts(parts: list[Path]) -> Iterator[dict]:
    for part in parts:
        try:
            with open(part, encoding="utf-8") as file:
                yield from map(json.loads, file)
        except ValueError:
            raise UserError(f"{part} is damaged: remove it, and give the same command again") from None
