"""--mode export: writes a trained model for programs that do not know this project.

    checkpoints/my-run/export/
        onnx/model.onnx             --format onnx, the default: see `suite/inference/onnx_file.py`
        onnx/model_quantized.onnx   --int8: see the same file
        index.html, page.json       --format web: a page in which a browser runs the ONNX, with --int8 the one in 8 bits
        model.safetensors           --format transformers: a classifier of transformers' own, without code
        config.json                 that classifier's configuration; max_len, truncation and max_windows say how reviews
                                    were cut (tokens, special tokens included)
        tokenizer.json              and the tokenizer's other files, from the model's folder
        sentence_bert_config.json   the length, where text-embeddings-inference looks for it
        README.md                   the model card, with what was checked
        manifest.json               the SHA-256 sums of these files

The folder gets its name only after each model in it, read back from its file, has computed the same logits as PyTorch
on inputs of many lengths. So every model in a folder of that name has been checked.
"""

from __future__ import annotations

import csv
import itertools
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from data import Encode, pad
from model import EncoderForClassification
from suite.common.cli import Command
from suite.common.devices import Devices
from suite.common.pages import TRUNCATION_NOTES, write_export_card, write_page
from suite.common.storage import THRESHOLD, new_folder, read_json, refuse_existing, room_for, write_json
from suite.encoders.checkpoints import weight_files
from suite.encoders.loading import save_tokenizer, save_weights
from suite.encoders.native_heads import native_config, native_model, problem_of
from suite.inference.classifier import Classifier, chosen_model
from suite.inference.onnx_file import OnnxModel, load_validation, refuse_missing_packages, write_int8, write_onnx
from utils import PROJECT, UserError, say

ONNX, INT8 = Path("onnx", "model.onnx"), Path("onnx", "model_quantized.onnx")  # where transformers.js looks for them
TOLERANCE = 1e-4  # the largest allowed difference between two logits, absolute
BATCHES = (1, 2, 7, 33)  # reviews
MOST_SCORES = 1 << 23  # batch x tokens x tokens of a checked batch: 32 MB of attention scores for every head


def export(command: Command, devices: Devices) -> None:
    """Write the model of `command` to the folder `command.output`, or to `export` in the run folder.

    Raises UserError if packages are missing, the folder exists, or the model cannot be written in one of
    `command.formats`, and RuntimeError if the written model's logits differ from PyTorch's. In each case it leaves
    nothing behind.
    """
    formats = set(command.formats)
    if "web" in formats:
        formats.add("onnx")  # which the page runs
    if "onnx" in formats:
        refuse_missing_packages()
    if not devices.is_main:
        return
    folder, target = chosen_model(command), output_folder(command)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    classifier = Classifier(folder, command.config, devices)
    classifier.model.cpu()
    if "transformers" in formats and (problem := problem_of(classifier.model)):
        raise UserError(f"{folder}: {problem}; or export it with --format onnx")
    if "web" in formats and not classifier.tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer, {type(classifier.tokenizer).__name__}, is written in Python, so a "
                        "web page cannot run it: leave web out of --format")
    validation = load_validation(command.config, classifier) if command.int8 else ()
    size = sum(path.stat().st_size for path in weight_files(folder)) * (len(formats - {"web"}) + command.int8)
    with room_for(target.parent, size, fix="make room or choose another --output"):
        new_folder(target, lambda partial: write_export(partial, folder, classifier, formats, validation))
    for name in (ONNX, INT8, Path("model.safetensors")):
        if (size := sum(path.stat().st_size for path in (target / name).parent.glob(name.name + "*"))):
            say(f"exported: {target / name} ({size / 1e6:,.1f} MB)")
    if "web" in formats:
        say(f"open http://127.0.0.1:8000 after: python -m http.server --bind 127.0.0.1 --directory "
            f"{shlex.quote(str(target))}")


def output_folder(command: Command) -> Path:
    """Where the exported model goes."""
    if command.output:
        return Path(command.output)
    if command.model:
        model = Path(command.model).resolve()
        return model.with_name(model.name + "-export")
    return command.config.run_folder / "export"


def write_export(folder: Path, source: Path, classifier: Classifier, formats: set[str],
                 validation: tuple[list[str], np.ndarray] | tuple[()]) -> None:
    """Write the files of an export into `folder`, and check each model in it.

    `validation`: texts and labels (n,) on which the model in 8 bits is checked; (): there is to be none.
    """
    checks: dict[str, str] = {}
    tokenizer, encode = classifier.tokenizer, classifier.encode
    for name in {"special_tokens_map.json", "added_tokens.json", THRESHOLD, *tokenizer.vocab_files_names.values()}:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    save_tokenizer(folder, tokenizer, encode.max_len, encode.truncation)  # its own files may build another one
    path = folder / "tokenizer_config.json"
    # An encoder's own max_length stays out: fastembed would cut at the smaller of the two.
    write_json(path, {key: value for key, value in read_json(path).items() if key != "max_length"})
    write_config(folder, classifier)
    if "transformers" in formats:
        save_weights(folder, native_model(classifier.model).state_dict())
        reloaded = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).eval()
        checks["model.safetensors"] = check(classifier.model, reloaded, encode)
    if "onnx" in formats:
        (folder / ONNX).parent.mkdir()
        write_onnx(classifier.model, folder / ONNX)
        checks[str(ONNX)] = check(classifier.model, OnnxModel(folder / ONNX, classifier.model.config), encode)
    if validation:
        checks[str(INT8)] = write_int8(folder / ONNX, folder / INT8, classifier, *validation)
    for name, result in checks.items():
        say(f"checked: {name}: {result}")
    if note := TRUNCATION_NOTES.get(encode.truncation):
        say(f"please note: {note}")
    write_export_card(folder, source, encode.max_len, encode.truncation, checks, has_page="web" in formats)
    if "web" in formats:
        write_page(folder, source, page_settings(folder, classifier))


def page_settings(folder: Path, classifier: Classifier) -> dict[str, Any]:
    """What the page must know of the model in `folder`: its file, how reviews are cut, and what its logits mean."""
    encode, name = classifier.encode, INT8 if (folder / INT8).is_file() else ONNX
    return {"dtype": "q8" if name == INT8 else "fp32", "megabytes": round((folder / name).stat().st_size / 1e6, 1),
            "prefix": encode.prefix, "suffix": encode.suffix, "room": encode.room, "truncation": encode.truncation,
            "max_windows": encode.max_windows, "classes": classifier.label_names,
            "threshold": read_json(folder / THRESHOLD)["threshold"] if (folder / THRESHOLD).is_file() else None}


def write_config(folder: Path, classifier: Classifier) -> None:
    """config.json as transformers, text-embeddings-inference and CTranslate2 read it, and the second one's file for the
    length."""
    encode, config = classifier.encode, native_config(classifier.model)
    values = config.to_dict() | {"dtype": "float32", "max_len": encode.max_len, "truncation": encode.truncation,
                                 "max_windows": encode.max_windows, "num_labels": len(classifier.label_names),
                                 "data_fingerprint": classifier.data_fingerprint}
    if isinstance(classifier.model, EncoderForClassification) and config.model_type == "modernbert":
        values |= modernbert_keys(values)
    if config.model_type in ("bert", "roberta", "xlm-roberta"):  # transformers 5 has no other, CTranslate2 asks for it
        values["position_embedding_type"] = "absolute"
    write_json(folder / "config.json", values)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encode.max_len, "do_lower_case": False})


def modernbert_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Under their old names, which text-embeddings-inference needs: ModernBERT's rotary bases and its layers' order."""
    bases = {kind: values["rope_parameters"][kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")}
    every = [*values["layer_types"], "full_attention"].index("full_attention", 1)  # the first layer is a global one
    return {"global_attn_every_n_layers": every, "global_rope_theta": bases["full_attention"],
            "local_rope_theta": bases["sliding_attention"]}


@torch.inference_mode()
def check(model: nn.Module, written: nn.Module, encode: Encode) -> str:
    """What the comparison of a written model with its original found. Raises RuntimeError above TOLERANCE."""
    largest, batches = 0.0, 0
    for rows in check_batches(encode):
        input_ids, mask = pad(rows, encode.tokenizer.pad_token_id)
        logits, expected = (each(input_ids=input_ids, attention_mask=mask).logits for each in (written, model))
        difference = float((logits - expected).abs().max())
        if not difference <= TOLERANCE:  # true for NaN, too
            raise RuntimeError(f"the exported model differs from PyTorch's by {difference:.1e} in a logit, more than "
                               f"{TOLERANCE:g}, on a batch of {' x '.join(map(str, input_ids.shape))} tokens")
        largest, batches = max(largest, difference), batches + 1
    return (f"on {batches} batches of 1 to {max(BATCHES)} reviews, of 1 to {encode.room} tokens and the special ones, "
            f"the logits differ from PyTorch's by at most {largest:.1e}")


def check_batches(encode: Encode) -> Iterator[list[list[int]]]:
    """Token ids in batches of every size and of every length, at random or from words of the demo's reviews."""
    random = np.random.default_rng(0)
    tokenizer = encode.tokenizer
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    with open(PROJECT / "demo" / "reviews.csv", newline="", encoding="utf-8") as file:
        words = " ".join(row["text"] for row in csv.DictReader(file)).split()
    lengths = [*(1 << power for power in range((encode.room - 1).bit_length())), encode.room]
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
