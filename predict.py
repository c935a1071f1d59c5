"""--mode predict: label new reviews with a trained model.

The rows are read, labelled and written window by window, so memory does not grow with the file. A window's result goes
into a file of its own in the folder `<output>.parts`; when all are there, they are joined. What was done before an
interruption is found there, and several processes share the windows.

    reviews.labelled.csv.parts/job.json         what is labelled by which model; another job is refused
    reviews.labelled.csv.parts/00000003.jsonl   the labelled rows of window 3 (.parquet, where the input is)
    reviews.labelled.csv.parts/00000003.csv     its broken rows, if any
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from scipy.special import softmax
from torch import nn
from tqdm import tqdm

from checkpointing import best_model
from checks import position_limit, too_long
from data import Encode, IMDBDataset, eval_batch_size
from efficiency import PASS_FLOPS
from loading import WEIGHTS, load_model, load_tokenizer
from rows import Row, read_rows, size_of
from run import place_model
from sampling import cut_window
from sources import as_text, misfit
from storage import lock, room_for
from utils import Config, UserError, atomic_write, num_processes, process_rank, say, write_json

WINDOW = 2048  # rows that are read, sorted by length and labelled together
SHOWN = 3  # broken rows that are shown; the file of rejected rows has them all


class Classifier:
    """A trained model with its tokenizer, from texts to probabilities."""

    def __init__(self, folder: Path, config: Config, devices: Any):
        self.folder = folder
        self.model, self.tokenizer = load_model(folder), load_tokenizer(str(folder))
        self.devices, self.batch_size = devices, eval_batch_size(config)
        own = self.model.config  # a model of this suite says how its reviews were cut, others follow the settings
        max_len = getattr(own, "max_len", None) or config.data_config.max_len
        encoder = getattr(own, "encoder", own)
        if problem := too_long(max_len, str(folder), position_limit(encoder.to_dict())):
            raise UserError(problem)
        self.encode = Encode(self.tokenizer, max_len, getattr(own, "truncation", config.data_config.truncation))
        self.label_names = [str(own.id2label[label]) for label in range(len(own.id2label))]
        weights = sum(p.numel() for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name)
        self.pass_tokens = PASS_FLOPS[devices.device.type] / (6 * weights)
        place_model(self.model, config, devices)
        self.model.eval()

    def cast_weights(self) -> None:
        """Cast once what autocast would cast in each forward pass: the same bits."""
        if (dtype := {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.devices.precision)) is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    @property
    def added(self) -> list[str]:
        """The names of the columns that are added to a row."""
        return ["predicted", *(f"probability_{name}" for name in self.label_names)]

    @torch.inference_mode()
    def probabilities(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64. Reviews of similar lengths share a batch; which ones depends on the texts alone."""
        encoded = self.encode({"text": texts})["input_ids"]
        offsets = np.cumsum([0, *map(len, encoded)])
        rows = np.arange(len(texts))
        reviews = IMDBDataset(np.fromiter(itertools.chain.from_iterable(encoded), np.int64, offsets[-1]), offsets, rows,
                              np.zeros_like(rows), rows, texts=None, tokenizer=self.tokenizer)
        pieces = [piece for piece, in cut_window(rows, reviews.lengths, self.batch_size, 1, self.pass_tokens)]
        logits = []
        for piece in pieces:
            batch = reviews.__getitems__(piece)
            inputs = {name: batch[name].to(self.devices.device) for name in ("input_ids", "attention_mask")
                      if name in batch}
            with self.devices.autocast():
                logits.append(self.model(**inputs).logits)
        result = np.empty((len(texts), len(self.label_names)))
        result[np.concatenate(pieces)] = torch.cat(logits).float().cpu().numpy()
        return softmax(result, axis=1)

    def columns(self, probabilities: np.ndarray) -> dict[str, Any]:
        """What is added to a row whose probabilities (classes,) these are."""
        values = [self.label_names[probabilities.argmax()], *(float(f"{p:.9g}") for p in probabilities)]
        return dict(zip(self.added, values, strict=True))


def predict(command: Any, devices: Any) -> None:
    """Label `command.text`, or the rows of the file `command.input`."""
    config = command.config
    folder = Path(command.model) if command.model else best_model(config.run_folder)
    classifier = Classifier(folder, config, devices)
    classifier.cast_weights()
    if command.text is not None:
        show(classifier, command.text)
    elif command.output is None:
        print_rows(classifier, command.input, config.data_config.text_column)
    else:
        Job(command.input, Path(command.output), classifier, config).run()


def show(classifier: Classifier, text: str) -> None:
    """Print the label of a text and the probability of each class."""
    row = classifier.columns(classifier.probabilities([text])[0])
    width = max(map(len, classifier.label_names))
    say(row["predicted"])
    for name in classifier.label_names:
        say(f"  {name:{width}}  {row[f'probability_{name}']:.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# Windows of rows


def read_windows(path: str, column: str, added: list[str]) -> Iterator[list[Row]]:
    """The rows of a file, or of standard input for `-`, WINDOW at a time; one without a usable text is a broken one.

    Raises UserError if the first whole row has no text column, or has one of the columns that will be `added`.
    """
    rows = read_rows("-.txt", sys.stdin.buffer) if path == "-" else read_rows(path)
    column = "text" if Path(path).suffix in (".txt", "") else column
    window, is_first = [], True
    for row in rows:
        if row.problem is None and is_first:
            is_first = False
            if column not in row.values:
                raise UserError(f"{path}: no column {column!r}; found {', '.join(map(str, row.values))}: set "
                                "data_config.text_column")
            if taken := [name for name in added if name in row.values]:
                raise UserError(f"{path}: it has a column {taken[0]!r} already: rename or remove it")
        window.append(checked(row, column))
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def checked(row: Row, column: str) -> Row:
    """The row with its text as a text, or as a broken row if it has none."""
    if row.problem is None:
        problem = misfit(row, (column,))
        text = None if problem else as_text(row.values[column])
        if problem is None and not (text and text.strip()):
            problem = f"row {row.number} has no text: fill it or remove the row"
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


def print_rows(classifier: Classifier, path: str, column: str) -> None:
    """To standard output as they come: as JSON lines if the input is .jsonl, else as CSV."""
    writer, broken = None, 0
    try:
        for window in read_windows(path, column, classifier.added):
            for row in window:
                if row.problem:
                    broken += 1
                    print(f"left out: {row.problem}", file=sys.stderr)
            for values in label(classifier, window):
                if Path(path).suffix == ".jsonl":
                    print(json.dumps(values, ensure_ascii=False))
                    continue
                if writer is None:
                    writer = csv.DictWriter(sys.stdout, list(values), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(values)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does the interpreter write at its end
    if broken:
        print(f"{broken:,} broken rows were left out", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# A file, with everything that can interrupt it


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
        if self.devices.is_main:
            self.open()
        self.devices.barrier()
        done = {int(part.stem) for part in self.parts.glob(f"*{self.kind}")}
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

    def open(self) -> None:
        """Make the folder of the parts this job's own. Raises UserError if it is another job's, or in use."""
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.parts} cannot be written ({error.strerror}): choose another --output") from None
        lock(self.parts / "job")
        if self.path == "-":  # nobody can say it twice: a file stands for it
            for part in self.parts.glob("[!.]*"):
                part.unlink()
            with atomic_write(self.source, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        status = os.stat(self.source)
        data = self.config.data_config
        with open(self.classifier.folder / WEIGHTS, "rb") as file:
            model = hashlib.file_digest(file, "sha256").hexdigest()
        job = {"input": str(Path(self.source).resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns,
               "model": model, "text_column": data.text_column, "max_len": data.max_len, "truncation": data.truncation,
               "eval_batch_size": data.eval_batch_size, "precision": self.devices.precision, "window": WINDOW}
        path = self.parts / "job.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else job
        except ValueError:
            before = {}
        if differing := sorted(key for key in job if before.get(key) != job[key]):
            raise UserError(f"{self.parts} holds what an interrupted job with another {', '.join(differing)} has "
                            "labelled: give its command, choose another --output, or remove this folder")
        write_json(path, job)

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
        broken = sorted(self.parts.glob("*.csv"))
        if broken:
            with atomic_write(self.rejected) as file:
                csv.writer(file).writerow(["row", "problem", "content"])
                append(file, broken)
        parts = sorted(self.parts.glob(f"*{self.kind}"))
        if self.kind == ".parquet":
            with atomic_write(self.output, "wb") as file, ExitStack() as stack:
                writer = None
                for part in parts:
                    table = pyarrow.parquet.read_table(part)
                    writer = writer or stack.enter_context(pyarrow.parquet.ParquetWriter(file, table.schema))
                    writer.write_table(table)
        else:
            with atomic_write(self.output) as file:
                if self.output.suffix == ".jsonl":
                    append(file, parts)
                else:
                    columns = dict.fromkeys(name for row in read_parts(parts) for name in row)
                    writer = csv.DictWriter(file, list(columns))
                    writer.writeheader()
                    writer.writerows({name: json.dumps(value) if isinstance(value, dict | list) else value
                                      for name, value in row.items()} for row in read_parts(parts))
        shutil.rmtree(self.parts)


def append(file: TextIO, parts: list[Path]) -> None:
    for part in parts:
        with open(part, encoding="utf-8", newline="") as content:
            shutil.copyfileobj(content, file)


def read_parts(parts: list[Path]) -> Iterator[dict]:
    for part in parts:
        with open(part, encoding="utf-8") as file:
            yield from map(json.loads, file)
