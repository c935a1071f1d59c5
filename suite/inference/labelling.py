"""Labels the rows of a file chunk by chunk, so that an interrupted job goes on where it stopped.

Memory does not grow with the file: the labelled rows of each chunk go into a file of their own in the folder
`<output>.parts`. Several processes share the chunks. When all of them are labelled, their files are joined.

    labelled.csv.parts/job.json         which input is labelled by which model; any other job is refused
    labelled.csv.parts/input.txt        a copy of standard input, if that is the input
    labelled.csv.parts/00000003.jsonl   the labelled rows of chunk 3 (.parquet if the output is a .parquet file)
    labelled.csv.parts/00000003.csv     its broken rows, if it has any
    labelled.csv.parts/rejected.csv     all broken rows; it becomes labelled.csv.rejected.csv
    labelled.csv.parts/output.csv       all labelled rows; it becomes labelled.csv, and then the folder is removed
"""

from __future__ import annotations

import csv
import hashlib
import itertools
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
from suite.inference import chunks
from suite.inference.classifier import Classifier
from suite.reviews.rows import Row, columns_of, size_of
from utils import Config, UserError, num_processes, process_rank, say

SHOWN = 3  # broken rows that are printed; the file of rejected rows has all of them


class Job:
    """The labelling of one file, or of standard input, into another file."""

    def __init__(self, path: str, output: Path, classifier: Classifier, config: Config):
        self.output, self.classifier, self.config, self.devices = output, classifier, config, classifier.devices
        self.parts = output.with_name(output.name + ".parts")
        self.joined, self.joined_rejected = self.parts / f"output{output.suffix}", self.parts / "rejected.csv"
        self.rejected = output.with_name(output.name + ".rejected.csv")
        self.from_stdin = path == "-"
        self.source = self.parts / "input.txt" if self.from_stdin else Path(path)
        self.kind = ".parquet" if output.suffix == ".parquet" else ".jsonl"  # of the files of the chunks

    def run(self) -> None:
        if self.devices.any(self.devices.is_main and is_same(self.joined, self.output)):
            if self.devices.is_main:  # the job was stopped when only its folder was left to remove
                self.remove_folder()
            say(f"{self.output} is done")
            return
        with room_for(self.output.parent, fix="make room or choose another --output"):
            self.open()
            done = {int(part.stem) for part in self.finished_parts()}
            self.devices.barrier()  # every process has to see what was done before any of them does more
            if done:
                say(f"going on: {len(done):,} chunks of {chunks.CHUNK_ROWS:,} rows are labelled already")
            started = time.perf_counter()
            try:
                counts = self.label_chunks(done)
                self.devices.barrier()
                if self.devices.is_main:
                    self.join()
            except SystemExit:
                say(f"stopped: the same command goes on from {self.parts}")
                raise
        seconds = time.perf_counter() - started
        say(f"{self.output}: {counts['rows'] - counts['broken']:,} rows, {counts['labelled'] / seconds:,.1f} a second")
        if counts["broken"]:
            say(f"{self.rejected}: {counts['broken']:,} broken rows, which were skipped")

    def finished_parts(self) -> list[Path]:
        return sorted(self.parts.glob(f"[0-9]*{self.kind}"))

    def open(self) -> None:
        """Make the folder this job's own, in the main process; if that fails, all processes leave."""
        problem = None
        if self.devices.is_main:
            try:
                self.claim_folder()
                self.claim_input()
            except Exception as error:  # raised below, when the other processes know
                problem = error
        if self.devices.any(problem is not None):
            raise problem or SystemExit(2)

    def claim_folder(self) -> None:
        """Raises UserError if the folder is in use or holds other files, or if there is an output already."""
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.parts} cannot be written ({error.strerror}): choose another --output") from None
        found = [path for path in self.parts.iterdir() if not path.name.startswith(".")]
        if self.parts.is_symlink() or found and not (self.parts / "job.json").exists():
            raise UserError(f"{self.parts} holds files that no labelling job wrote: choose another --output, or move "
                            "them")
        lock(self.parts / "job", "choose another --output")
        if is_same(self.joined_rejected, self.rejected):  # this job was stopped between its two outputs
            self.rejected.unlink()
        refuse_existing(self.output, self.rejected)  # again: another job may have written them since the command began

    def claim_input(self) -> None:
        """Raises UserError if the folder holds what another job has labelled."""
        before = self.read_job()
        if self.from_stdin:
            self.copy_standard_input(before)
        self.job = self.describe()
        if self.finished_parts() and before != self.job:
            self.refuse([key for key in sorted(self.job) if before.get(key) != self.job[key]])
        write_json(self.parts / "job.json", self.job)

    def copy_standard_input(self, before: dict[str, Any]) -> None:
        """Nobody can give standard input twice, so an interrupted job starts again, on a copy of the new input."""
        if before and before.get("input") != str(self.source.resolve()):
            self.refuse(["input"])
        self.remove("[0-9]*")
        with atomic_write(self.source, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)

    def describe(self) -> dict[str, Any]:
        """Everything that the labels depend on."""
        status, data, model = self.source.stat(), self.config.data_config, hashlib.sha256()
        for path in sorted(self.classifier.folder.iterdir()):
            if path.is_file() and path.name not in NOT_SEALED:
                with open(path, "rb") as file:
                    model.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return {"input": str(self.source.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns,
                "model": model.hexdigest(), "text_column": data.text_column, "max_len": data.max_len,
                "truncation": data.truncation, "eval_batch_size": data.eval_batch_size,
                "precision": self.devices.precision, "chunk_rows": chunks.CHUNK_ROWS}

    def read_job(self) -> dict[str, Any]:
        """The description of the job that used this folder before; {} if there was none or it cannot be read."""
        try:
            return dict(json.loads((self.parts / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def refuse(self, differing: list[str]) -> None:
        raise UserError(f"{self.parts} holds the labelled rows of an interrupted job with another "
                        f"{', '.join(differing)}: give the command of that job, choose another --output, or remove "
                        "this folder")

    def remove(self, *patterns: str) -> None:
        for path in itertools.chain.from_iterable(map(self.parts.glob, patterns)):
            path.unlink(missing_ok=True)

    def remove_folder(self) -> None:
        """Remove the job's own files. The joined output is the last, because it tells that the job is done."""
        self.remove("[0-9]*", "input.txt", "rejected.csv", "job.json", ".*", "output.*")
        self.parts.rmdir()

    def label_chunks(self, done: set[int]) -> Counter:
        """Label the chunks that are not `done`; the processes take turns. Returns the numbers of rows, of broken ones,
        and of those that all processes together have labelled now."""
        counts, unit = Counter(), "row" if self.source.suffix == ".parquet" else "B"
        bar = tqdm(total=size_of(str(self.source)), unit=unit, unit_scale=True, dynamic_ncols=True, desc="predict",
                   disable=process_rank() > 0 or not sys.stderr.isatty())
        turns = itertools.cycle(range(num_processes()))
        column, added = self.config.data_config.text_column, self.classifier.added
        for number, chunk in enumerate(chunks.read_chunks(str(self.source), column, added), start=1):
            broken = [row for row in chunk if row.problem]
            for row in broken[:max(0, SHOWN - counts["broken"])]:
                say(f"skipped: {row.problem}")
            counts.update(rows=len(chunk), broken=len(broken))
            if number not in done:
                if next(turns) == process_rank():
                    self.write_part(number, chunks.label(self.classifier, chunk), broken)
                counts.update(labelled=len(chunk))
            bar.update(chunk[-1].position - bar.n)
            if SIGNALS.received:
                raise SystemExit(SIGNALS.exit_code)
        bar.close()
        return counts

    def write_part(self, number: int, rows: list[dict[str, Any]], broken: list[Row]) -> None:
        """The file of the labelled rows comes last, because it tells that the chunk is done."""
        if broken:
            with atomic_write(self.parts / f"{number:08d}.csv") as file:
                csv.writer(file).writerows([row.number, row.problem, row.content] for row in broken)
        with atomic_write(self.parts / f"{number:08d}{self.kind}", "wb" if self.kind == ".parquet" else "w") as file:
            if self.kind == ".parquet":
                pyarrow.parquet.write_table(pa.Table.from_pylist(rows, self.schema()), file)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def schema(self) -> pa.Schema:
        """The columns of a .parquet input with their own types, and the added ones."""
        schema = pyarrow.parquet.read_schema(self.source).remove_metadata()
        for name in self.classifier.added:
            schema = schema.append(pa.field(name, pa.string() if name == "predicted" else pa.float64()))
        return schema

    def join(self) -> None:
        """Join the files of the chunks in their order, and give the joined files their names."""
        if self.describe() != self.job:
            raise UserError(f"{self.source}, or the model, has changed while it was labelled: remove {self.parts} and "
                            "give the command again")
        if broken := sorted(self.parts.glob("[0-9]*.csv")):
            with atomic_write(self.joined_rejected) as file:
                csv.writer(file).writerow(["row", "problem", "content"])
                append(file, broken)
        self.write_joined(self.finished_parts())
        if broken:
            publish(self.joined_rejected, self.rejected)
        publish(self.joined, self.output)
        self.remove_folder()

    def write_joined(self, parts: list[Path]) -> None:
        if self.kind == ".parquet":
            with (atomic_write(self.joined, "wb") as file,
                  pyarrow.parquet.ParquetWriter(file, self.schema()) as writer):
                for part in parts:
                    writer.write_table(pyarrow.parquet.read_table(part))
            return
        with atomic_write(self.joined) as file:
            if self.joined.suffix == ".jsonl":
                append(file, parts)
                return
            found = itertools.chain.from_iterable(read_parts(parts))  # rows of .jsonl can bring columns of their own
            columns = dict.fromkeys([*columns_of(str(self.source)), *dict.fromkeys(found), *self.classifier.added])
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(map(chunks.cells, read_parts(parts)))


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
