"""--mode export: writes a trained model as ONNX, for programs without PyTorch.

    checkpoints/my-run/onnx/
        model.onnx      input_ids, attention_mask: (batch, tokens) int64  ->  logits: (batch, num_labels) float32;
                        for windows, (windows, tokens) -> (windows, num_labels), of which the reader takes the mean
        tokenizer.json  and the tokenizer's other files, copied from the model's folder
        config.json     id2label, max_len (tokens, special tokens included), truncation, max_windows
        manifest.json   the SHA-256 sums of these files

The folder gets its name only after ONNX Runtime has computed the same logits as PyTorch on inputs of many lengths. So
every model.onnx has been checked, unless its folder still ends in `.partial`.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import Encode, pad
from suite.common.cli import Command
from suite.common.protocols import Devices
from suite.common.storage import replace_folder, room_for, write_json
from suite.encoders.refusals import weight_files
from suite.inference.classifier import Classifier
from suite.inference.predict import model_folder
from utils import PROJECT, UserError, brief, say

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MODEL = "model.onnx"
TOLERANCE = 1e-4  # the largest allowed difference between two logits, absolute
BATCHES = (1, 2, 7, 33)  # reviews
MOST_SCORES = 1 << 23  # batch x tokens x tokens of a checked batch: 32 MB of attention scores for every head


def export(command: Command, devices: Devices) -> None:
    """Write the model of `command` to the folder `command.output`, or to `onnx` in the run folder.

    Raises UserError if packages are missing, the folder exists or the architecture cannot be exported, and RuntimeError
    if the exported model's logits differ from PyTorch's. In each case it leaves nothing behind.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--mode export needs {', '.join(missing)}: pip install -r requirements-onnx.txt")
    folder = model_folder(command)
    target = output_folder(command)
    if not devices.is_main:
        return
    classifier = Classifier(folder, command.config, devices)
    classifier.model.cpu()
    size = sum(path.stat().st_size for path in weight_files(folder))
    with room_for(target.parent, size, fix="make room or choose another --output"):
        replace_folder(target, lambda partial: write_export(partial, folder, classifier))
    size = sum(path.stat().st_size for path in target.glob(MODEL + "*"))
    say(f"exported: {target / MODEL} ({size / 1e6:,.1f} MB), its tokenizer beside it")


def output_folder(command: Command) -> Path:
    """Where the exported model goes. Raises UserError if that exists or its parent cannot be made."""
    if command.output:
        target = Path(command.output)
    elif command.model:
        target = Path(command.model).resolve()
        target = target.with_name(target.name + "-onnx")
    else:
        target = command.config.run_folder / "onnx"
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: remove it, or choose another folder with --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent} cannot be made ({error.strerror}): choose another folder with --output"
                        ) from None
    return target


def write_export(folder: Path, source: Path, classifier: Classifier) -> None:
    """Write model, tokenizer and config.json into `folder`, and check the model."""
    tokenizer = classifier.tokenizer
    for name in {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 *tokenizer.vocab_files_names.values()}:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    encode = classifier.encode
    write_json(folder / "config.json", {
        "id2label": dict(enumerate(classifier.label_names)), "truncation": encode.truncation,
        "max_len": len(encode.prefix) + encode.room + len(encode.suffix), "max_windows": encode.max_windows})
    write_onnx(classifier.model, folder / MODEL)
    largest, batches = check(classifier.model, folder / MODEL, encode)
    say(f"checked: on {batches} batches of 1 to {max(BATCHES)} reviews, of 1 to {encode.room} tokens and the special "
        f"ones, the logits differ from PyTorch's by at most {largest:.1e}")


def write_onnx(model: nn.Module, path: Path) -> None:
    """Write an eval-mode classifier that is on the CPU in float32. Raises UserError if torch cannot export it.

    The weights are in the same file, unless it would exceed the 2 GB that protobuf allows.
    """
    input_ids = torch.ones(2, 8, dtype=torch.int64)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    axes = {0: "batch", 1: "tokens"}
    with quiet():
        try:
            program = torch.onnx.export(model, kwargs=inputs, dynamo=True, input_names=list(inputs),
                                        output_names=["logits"], dynamic_shapes=dict.fromkeys(inputs, axes),
                                        verbose=False)
        except torch.onnx.OnnxExporterError as error:
            kind = getattr(model.config, "encoder", model.config).model_type
            raise UserError(f"torch {torch.__version__} cannot export a {kind} model "
                            f"({brief(error.__cause__ or error)}): use it in PyTorch, or train another "
                            "encoder") from error
        program.save(path)


@contextmanager
def quiet():
    """Hide the exporter's remarks about its own deprecations and about operators that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def session(path: Path) -> Any:
    """An onnxruntime.InferenceSession on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def check(model: nn.Module, path: Path, encode: Encode) -> tuple[float, int]:
    """(largest difference between a logit and PyTorch's, number of batches). Raises RuntimeError above TOLERANCE."""
    onnx, largest, batches = session(path), 0.0, 0
    for rows in check_batches(encode):
        input_ids, mask = pad(rows, encode.tokenizer.pad_token_id)
        logits, = onnx.run(["logits"], {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()})
        expected = model(input_ids=input_ids, attention_mask=mask).logits.numpy()
        difference = float(np.abs(logits - expected).max())
        if not difference <= TOLERANCE:  # true for NaN, too
            raise RuntimeError(f"the exported model differs from PyTorch's by {difference:.1e} in a logit, more than "
                               f"{TOLERANCE:g}, on a batch of {' x '.join(map(str, input_ids.shape))} tokens")
        largest, batches = max(largest, difference), batches + 1
    return largest, batches


def check_batches(encode: Encode) -> Iterator[list[list[int]]]:
    """Token ids in batches of every size and of every length, at random or from words of the demo's reviews."""
    random = np.random.default_rng(0)
    tokenizer = encode.tokenizer
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    with open(PROJECT / "demo" / "reviews.csv", newline="", encoding="utf-8") as file:
        words = " ".join(row["text"] for row in csv.DictReader(file)).split()
    lengths = [*itertools.takewhile(lambda length: length < encode.room, (2 ** k for k in itertools.count())),
               encode.room]
    for length, batch in itertools.product(lengths, BATCHES):
        rows = []
        for place in range(max(1, min(batch, MOST_SCORES // length ** 2))):
            count = int(random.integers(1, length + 1)) if place else length
            start = int(random.integers(len(words) - count))
            if random.random() < 0.5:
                rows.append(encode.prefix + random.choice(vocabulary, count).tolist() + encode.suffix)
            else:
                rows += encode.windows([" ".join(words[start:start + count])])[0][:1]
        yield rows
