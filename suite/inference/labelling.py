"""Labels the rows of a file chunk by chunk, so that an interrupted job goes on where it stopped.

Memory does not grow with the file: the labelled rows of each chunk go into a file of their own, see parts.py. Several
processes share the chunks. When all of them are labelled, their files are joined into the output.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from suite.common.storage import NOT_SEALED, atomic_write, room_for, sha256_of, write_json
from suite.inference.classifier import Labeller
from suite.inference.parts import Parts, is_same
from suite.reviews.rows import Row, as_text, column_problem, columns_of, listed, read_rows, size_of, text_files
from suite.reviews.sampling import CHUNK_ROWS
from utils import Config, UserError, file_kind, num_processes, process_rank, say

SHOWN = 3  # broken rows that are printed; the file of rejected rows has all of them


def read_chunks(path: str, column: str, added: list[str], gives_tokens: Callable[[str], bool] = bool
                ) -> Iterator[list[Row]]:
    """The rows of a file, or of standard input for `-`, CHUNK_ROWS at a time. A row without a usable text is broken, as
    is one whose text does not `gives_tokens`.

    Raises UserError if there is no text column, or if a column has the name of one that will be `added`.
    """
    if path == "-" or os.path.isdir(path) or file_kind(path) == ".txt":
        column = "text"
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
        self.classifier, self.config, self.devices = classifier, config, classifier.devices
        self.from_stdin = path == "-"
        self.parts = Parts(path, output, classifier.added, config.data_config.text_column)

    def run(self) -> None:
        parts, output, is_main = self.parts, self.parts.output, self.devices.is_main
        if self.devices.any(is_main and is_same(parts.joined, output) and self.is_that_of(parts.read_job())):
            if is_main:  # the job was stopped when only its folder was left to remove
                parts.remove()
            say(f"{output} is done")
            return
        with room_for(output.parent, fix="make room or choose another --output"):
            self.open()
            done, with_broken = parts.files(parts.kind), parts.files(".csv")
            self.devices.barrier()  # every process has to see what was done before any of them does more
            if done:
                say(f"going on: {len(done):,} chunks of {CHUNK_ROWS:,} rows are labelled already")
            started = time.perf_counter()
            try:
                counts, broken = self.label_chunks(done, with_broken)
                self.devices.barrier()
                if is_main:
                    self.finish(counts, broken)
            except UserError:
                if is_main and not parts.files(parts.kind):  # nothing was labelled, so nothing is left behind
                    parts.remove()
                raise
            except SystemExit:
                say(f"stopped: the same command goes on from {parts.folder}")
                raise
        seconds = time.perf_counter() - started
        say(f"{output}: {counts['rows'] - counts['broken']:,} rows, {counts['labelled'] / seconds:,.1f} a second")
        if counts["broken"]:
            say(f"{parts.rejected}: the broken rows, {counts['broken']:,}, were skipped")

    def open(self) -> None:
        """Let the main process claim the folder of parts for this job; if it fails, all processes leave."""
        problem = None
        if self.devices.is_main:
            try:
                self.parts.claim()
                before = self.parts.read_job()
                if self.from_stdin:
                    self.copy_standard_input(before)
                self.description = self.describe()
                if self.parts.files(self.parts.kind) and before != self.description:
                    self.parts.refuse([key for key, value in self.description.items() if before.get(key) != value])
                write_json(self.parts.folder / "job.json", self.description)
                self.parts.job = json.dumps(self.description)
                self.parts.discard_damaged()
            except Exception as error:  # raised below, when the other processes know
                problem = error
        if self.devices.any(problem is not None):
            raise problem or SystemExit(2)
        self.parts.job = self.parts.job or json.dumps(self.parts.read_job())  # what the main process has written

    def is_that_of(self, before: dict[str, Any]) -> bool:
        """Whether an earlier command was this one. Of standard input, nobody can tell."""
        return not self.from_stdin and before == self.describe()

    def copy_standard_input(self, before: dict[str, Any]) -> None:
        """Nobody can give standard input twice, so an interrupted job starts again, on a copy of the new input."""
        if before and before.get("input") != str(Path(self.parts.source).resolve()):
            self.parts.refuse(["input"])
        self.parts.remove_files("[0-9]*")
        with atomic_write(self.parts.source, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)

    def describe(self) -> dict[str, Any]:
        """Everything that the labels depend on."""
        source, data, model = Path(self.parts.source).resolve(), self.config.data_config, hashlib.sha256()
        for path in sorted(self.classifier.folder.iterdir()):
            if path.is_file() and path.name not in NOT_SEALED:
                model.update(path.name.encode() + sha256_of(path).encode())
        content = hashlib.sha256()  # of the input, because another file can have the same size and time
        for path in text_files(source) if source.is_dir() else [source]:
            content.update(path.name.encode() + sha256_of(path).encode())
        return {"input": str(source), "content": content.hexdigest(), "model": model.hexdigest(),
                "text_column": data.text_column, "max_len": data.max_len, "truncation": data.truncation,
                "max_windows": data.max_windows, "eval_batch_size": data.eval_batch_size,
                "precision": self.devices.precision, "chunk_rows": CHUNK_ROWS}

    def label_chunks(self, done: dict[int, Path], with_broken: dict[int, Path]) -> tuple[Counter, list[int]]:
        """Label the chunks whose rows are not `done`, or whose broken ones are not; the processes take turns.

        Returns the numbers of chunks, of rows, of broken ones, and of those that all processes together have labelled
        now; and which chunks have broken rows.
        """
        source, counts, turns = self.parts.source, Counter(), itertools.cycle(range(num_processes()))
        numbers: list[int] = []
        bar = tqdm(desc="predict", total=size_of(source), unit="row" if file_kind(source) == ".parquet" else "B",
                   unit_scale=True, dynamic_ncols=True, disable=process_rank() > 0 or not sys.stderr.isatty())
        column, model = self.config.data_config.text_column, self.classifier
        for number, chunk in enumerate(read_chunks(source, column, model.added, model.gives_tokens), start=1):
            broken = [row for row in chunk if row.problem]
            for row in broken[:max(0, SHOWN - counts["broken"])]:
                say(f"skipped: {row.problem}")
            counts.update(chunks=1, rows=len(chunk), broken=len(broken))
            numbers += [number] * bool(broken)
            if not self.parts.is_of(chunk, done.get(number)) or (number in with_broken) != bool(broken):
                if next(turns) == process_rank():
                    self.parts.write(number, label(self.classifier, chunk), chunk)
                counts.update(labelled=len(chunk))
            bar.update(chunk[-1].position - bar.n)
        bar.close()
        return counts, numbers

    def finish(self, counts: Counter, broken: list[int]) -> None:
        if self.describe() != self.description:
            raise UserError(f"{self.parts.source}, or the model, has changed while it was labelled: remove "
                            f"{self.parts.folder} and give the command again")
        self.parts.join(counts["chunks"], counts["rows"] - counts["broken"], broken)
