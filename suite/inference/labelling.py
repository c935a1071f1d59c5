"""Labels the rows of a file chunk by chunk, so that an interrupted job goes on where it stopped.

Memory does not grow with the file: what is labelled of each chunk goes into a file of its own, see parts.py. Several
processes share the chunks. When all of them are labelled, the main process joins their files into the output.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from suite.common.stopping import SIGNALS
from suite.common.storage import NOT_SUMMED, atomic_write, lock, refuse_existing, room_for, sha256_of, write_json
from suite.inference.classifier import Labeller
from suite.inference.parts import Parts
from suite.reviews.rows import Row, as_text, column_problem, columns_of, listed, read_rows, size_of, text_files
from suite.reviews.sampling import CHUNK_ROWS
from utils import Config, UserError, file_kind, num_processes, process_rank, say

SHOWN = 3  # broken rows that are printed; the file of rejected rows has all of them


def text_column_of(path: str, column: str) -> str:
    """The column that holds the texts: `column`, unless the input is of a kind whose columns have fixed names."""
    return "text" if path == "-" or os.path.isdir(path) or file_kind(path) == ".txt" else column


def read_chunks(path: str, column: str, added: list[str], gives_tokens: Callable[[str], bool] = bool
                ) -> Iterator[list[Row]]:
    """The rows of a file, or of standard input for `-`, CHUNK_ROWS at a time. A row without a usable text is broken, as
    is one whose text does not `gives_tokens`.

    Raises UserError if there is no text column, or if a column has the name of one that will be `added`.
    """
    column = text_column_of(path, column)
    if path == "-":
        rows, columns = read_rows("-.txt", file=sys.stdin.buffer), ["text"]
    else:
        rows, columns = read_rows(path, [column]), columns_of(path, [column])
    if columns and column not in columns:
        raise UserError(f"{path}: no column {column!r}; found {listed(columns)}: set data_config.text_column")
    if taken := set(added) & set(columns):
        raise UserError(f"{path}: it has a column {min(taken)!r} already: rename or remove it")
    rows = (checked(row, column, added, gives_tokens) for row in rows)
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def checked(row: Row, column: str, added: list[str], gives_tokens: Callable[[str], bool]) -> Row:
    """The row with its text, or a broken row that says why it cannot be labelled."""
    if row.problem:
        return row
    problem = column_problem(row, (column,))
    if problem is None:
        row.text = as_text(row.values[column]) or ""
        if not row.text.strip():
            problem = f"row {row.number} has no text: fill it or remove the row"
        elif not gives_tokens(row.text):
            problem = f"row {row.number} has a text of which the model's tokenizer makes no token: change or remove it"
    if taken := row.values.keys() & added:
        problem = f"row {row.number} has a column {min(taken)!r} already: rename or remove it"
    if problem:
        return Row(row.number, row.position, problem=problem, content=json.dumps(row.values, default=str))
    return row


def label(classifier: Labeller, chunk: list[Row]) -> list[dict[str, Any]]:
    """The values of a chunk's whole rows, each with what is predicted for it."""
    whole = [row for row in chunk if row.problem is None]
    probabilities = classifier.probabilities([row.text for row in whole]) if whole else []
    return [row.values | classifier.columns(values) for row, values in zip(whole, probabilities, strict=True)]


class Job:
    """The labelling of one file, or of standard input, into another file."""

    def __init__(self, path: str, output: Path, classifier: Labeller, config: Config):
        self.classifier, self.devices = classifier, classifier.devices
        self.parts = Parts(path, output, classifier.added)
        self.source, self.from_stdin = self.parts.source, path == "-"
        self.column = text_column_of(path, config.data_config.text_column)

    def run(self) -> None:
        parts, output, is_main = self.parts, self.parts.output, self.devices.is_main
        with room_for(output.parent, fix="make room or choose another --output"):
            if self.open():
                say(f"{output} is done")
                return
            done = set(parts.files())
            self.devices.barrier()  # every process has to see what was done before any of them does more
            if done:
                say(f"going on: {len(done):,} chunks of {CHUNK_ROWS:,} rows are labelled already")
            started = time.perf_counter()
            try:
                with SIGNALS.deferred():
                    counts, columns = self.label_chunks(done)
                self.devices.barrier()
                if is_main:
                    self.finish(counts, columns)
            except UserError:
                if is_main and not parts.files():  # nothing is labelled, so nothing is left behind
                    parts.remove()
                raise
            except SystemExit:
                say(f"stopped: the same command goes on from {parts.folder}")
                raise
        seconds = time.perf_counter() - started
        say(f"{output}: {counts['rows'] - counts['broken']:,} rows, {counts['labelled'] / seconds:,.1f} a second")
        if counts["broken"]:
            say(f"{parts.rejected}: the broken rows, {counts['broken']:,}, were skipped")

    def open(self) -> bool:
        """Let the main process take the folder of parts for this job; if it fails, all processes leave.

        Returns whether the job was done but for the last renames, which have been made now.
        """
        problem, is_done = None, False
        if self.devices.is_main:
            try:
                is_done = self.take_folder()
            except Exception as error:  # raised below, when the other processes know
                problem = error
        if self.devices.any(problem is not None):
            raise problem or SystemExit(2)
        return self.devices.any(is_done)

    def take_folder(self) -> bool:
        """Raises UserError if the folder is in use or holds parts of another job, or if there is an output already."""
        parts = self.parts
        lock(parts.folder, "choose another --output", inside=".job.lock")
        parts.folder.mkdir(exist_ok=True)  # `lock` has made it, except where there are no locks
        before = parts.read_job()
        is_joined = before.pop("joined", False)
        if self.from_stdin:
            with atomic_write(self.source, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        self.description = self.describe()
        differing = [key for key, value in self.description.items() if before.get(key) != value]
        if is_joined and not differing:
            parts.place_joined()
            return True
        refuse_existing(parts.output, parts.rejected)  # again: they may have been written since the command began
        if self.from_stdin and differing == ["content"]:  # a new job: the texts that were piped in before are gone
            parts.remove_files()
        if differing and parts.files():
            raise UserError(f"{parts.folder} holds the rows of an interrupted job with another {', '.join(differing)}: "
                            "give its command again, choose another --output, or remove this folder")
        write_json(parts.job, self.description)
        parts.remove_damaged()
        return False

    def describe(self) -> dict[str, Any]:
        """Everything that the labels depend on."""
        source, model = Path(self.source).resolve(), self.classifier.folder
        texts = text_files(source) if source.is_dir() else [source]
        return {"input": str(source), "content": sum_of_files(source, texts),
                "model": sum_of_files(model, (path for path in model.rglob("*")
                                              if path.is_file() and path.name not in NOT_SUMMED)),
                "text_column": self.column, "chunk_rows": CHUNK_ROWS, **self.classifier.settings}

    def label_chunks(self, done: set[int]) -> tuple[Counter, dict[str, None]]:
        """Label the chunks that are not `done`, in which the processes take turns, and write all broken rows aside.

        Returns the numbers of chunks, of rows, of broken ones, and of those that all processes together have labelled
        now; and the columns of the input.
        """
        counts, turns = Counter(), itertools.cycle(range(num_processes()))
        columns = dict.fromkeys(columns_of(self.source, [self.column]))
        chunks = read_chunks(self.source, self.column, self.classifier.added, self.classifier.gives_tokens)
        with (tqdm(desc="predict", total=size_of(self.source), unit_scale=True, dynamic_ncols=True,
                   unit="row" if file_kind(self.source) == ".parquet" else "B",
                   disable=process_rank() > 0 or not sys.stderr.isatty()) as bar,
              atomic_write(self.parts.joined_rejected) if self.devices.is_main else open(os.devnull, "w") as file):
            rejected = csv.writer(file)
            rejected.writerow(["row", "problem", "content"])
            for number, chunk in enumerate(chunks, start=1):
                broken = [row for row in chunk if row.problem]
                rejected.writerows([row.number, row.problem, row.content] for row in broken)
                for row in broken[:max(0, SHOWN - counts["broken"])]:
                    say(f"skipped: {row.problem}")
                counts.update(chunks=1, rows=len(chunk), broken=len(broken))
                for row in chunk:  # one of a .jsonl file can have columns of its own
                    columns |= dict.fromkeys(row.values)
                if number not in done:
                    if next(turns) == process_rank():
                        self.parts.write(number, label(self.classifier, chunk), chunk)
                    counts.update(labelled=len(chunk))
                bar.update(chunk[-1].position - bar.n)
                if SIGNALS.received:
                    raise SystemExit(SIGNALS.exit_code)
        return counts, columns

    def finish(self, counts: Counter, columns: dict[str, None]) -> None:
        """Join the parts. Once job.json says that they are joined, only renames are left to do."""
        if self.describe() != self.description:
            self.parts.remove_files()  # some rows may have been labelled before the change, and some after it
            raise UserError(f"{self.source}, or the model, has changed while it was labelled: give the command again, "
                            "which starts afresh")
        self.parts.join(counts["chunks"], [*columns, *self.classifier.added])
        if not counts["broken"]:
            self.parts.joined_rejected.unlink()
        write_json(self.parts.job, self.description | {"joined": True})
        self.parts.place_joined()


def sum_of_files(folder: Path, paths: Iterable[Path]) -> str:
    """The SHA-256 sum, in hex, of the names of files within `folder` and of what they hold."""
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(os.fsencode(path.relative_to(folder)) + sha256_of(path).encode())
    return result.hexdigest()
