"""Refuses a model's files that give no usable model, or would have more read than themselves.

Each function raises ValueError, whose text names what is wrong. `suite/encoders/loading.py` adds the folder and the
fix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite.common.storage import read_json
from utils import brief

WEIGHTS = "model.safetensors"
# The ways to compute attention and experts that transformers itself contains and that work in this suite on any device.
# Most other names are those of compiled code on the Hub.
IMPLEMENTATIONS = ("eager", "sdpa", "batched_mm", "grouped_mm")
# Keys of a config.json that make transformers read other files, or replace parts of the model by other code.
NOT_FOLLOWED = {"transformers_weights", "quantization_config", "fusion_config", "kernel_config", "use_kernels"}
MOST_LAYERS = 100_000  # and labels, heads, ...: of everything that is counted by a key of config.json
MOST_TENSORS = 5000  # of a model's weights; the largest encoders have hundreds
MOST_TOKENS = 10_000_000  # of a tokenizer
DEEPEST = 20  # objects within objects in a config.json
FLOATS = {"F64", "F32", "F16", "BF16"}  # the types of weights that torch trains; F8 needs scales that are not read here
BYTES_TO_TRAIN = 16  # for each weight: itself, its gradient and Adam's two moments, in float32

# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_config(path: Path) -> dict[str, Any]:
    """The content of a model's config.json, with nothing in it that is of absurd size or would load foreign code."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError("it holds no object of keys and values")
    if not isinstance(values.get("model_type"), str):
        raise ValueError("model_type, the name of the architecture, is missing")
    if not isinstance(values.get("auto_map"), dict | None):
        raise ValueError("auto_map is no object of keys and values")
    if (path.parent / "adapter_config.json").exists():
        raise ValueError("it has an adapter_config.json, and adapters are not read: merge it into the model")
    open_entries = [("", values, 0)]  # a list of what is still to be looked at, because recursion has a limit
    while open_entries:
        key, value, depth = open_entries.pop()
        if depth > DEEPEST:
            raise ValueError("its brackets are nested too deeply")
        if isinstance(value, dict):
            open_entries += [(name, inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            open_entries += [(key, inner, depth + 1) for inner in value]
        if problem := _entry_problem(key, value):
            raise ValueError(problem)
    return values


def _entry_problem(key: str, value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_count = isinstance(value, int) and (key.startswith("num_") or "layer" in key)
        if not abs(value) <= (MOST_LAYERS if is_count else 2 ** 53):  # true for NaN, too
            return f"{key} is {str(value)[:20]}, which is no size that a model can have"
    if key == "position_embedding_type" and str(value).startswith("relative_key"):
        return (f"{key} is {str(value)[:40]!r}: transformers no longer computes such positions, and would leave their "
                "weights, distance_embedding, unread")
    if key in NOT_FOLLOWED and value:
        return f"{key} makes the model depend on other code or files, which is not supported"
    if "attn_implementation" in key or "experts_implementation" in key:
        names = value.values() if isinstance(value, dict) else [value]  # for the parts of a model, one each
        if foreign := [name for name in names if name is not None and name not in IMPLEMENTATIONS]:
            return f"{key} is {str(foreign[0])[:80]!r}: foreign code is not run; give sdpa or eager"
    return None


def build_on_meta(build: Callable[[], nn.Module], most_numbers: int, room: str) -> nn.Module:
    """The model that `build` makes, without memory for its weights: no more than `most_numbers`, which is what `room`
    has room for."""
    numbers = tensors = 0

    def count(module: nn.Module, name: str, weights: nn.Parameter | None) -> None:
        nonlocal numbers, tensors
        numbers, tensors = numbers + (0 if weights is None else weights.numel()), tensors + 1
        if numbers > most_numbers:
            raise ValueError(f"it describes more weights than {room} has room for")
        if tensors > MOST_TENSORS:
            raise ValueError(f"it describes more than {MOST_TENSORS:,} tensors of weights")

    counting = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):  # shapes without memory
            model = build()
    finally:
        counting.remove()
    if empty := [key for key, weights in model.named_parameters() if weights.numel() == 0]:
        raise ValueError(f"{empty[0]} would be empty")
    if getattr(getattr(model.config, "encoder", model.config), "num_hidden_layers", 1) < 1:
        raise ValueError("it has no layers")
    return model


def room_for_weights(files: list[Path]) -> tuple[int, str]:
    """For `build_on_meta`: (how many numbers a model may have, why), from the files of its weights; without any, from
    the machine's memory."""
    if files:  # A number takes two bytes or more. The factor leaves room for weights that no file needs to have.
        return 1_000_000 + 2 * sum(path.stat().st_size for path in files), files[0].name
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = 64 * 2 ** 30
    return memory // BYTES_TO_TRAIN, "this machine's memory"


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: one, or those that an index lists. None of them is outside the folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return []
    there = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    try:
        names = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        names = set()
    if not names:
        raise ValueError(f"{index.name} is damaged")
    if lost := [name for name in names if name not in there]:
        raise ValueError(f"{index.name} names the file {str(lost[0])[:80]!r}, and this folder has no such safetensors")
    return [folder / name for name in sorted(names)]


def unread_weights(model: PreTrainedModel, unread: Iterable[str]) -> tuple[list[str], list[str]]:
    """(those of further layers, the others) among the `unread` weights of a checkpoint that have names of the encoder.
    Heads and poolers are other parts; `position_ids` are numbers from 0.
    """
    prefix = f"{model.base_model_prefix}."  # in the file there may be one where the model has none, and vice versa
    parts = {name for name, _ in model.base_model.named_children()}
    known = {_unnumbered(name) for name, _ in model.base_model.named_parameters()}
    layers, others = [], []
    for name in sorted(unread):
        own = name.removeprefix(prefix)
        part = own.partition(".")[0]
        if (own != name or part in parts) and part != "pooler" and not own.endswith("position_ids"):
            (layers if _unnumbered(own) in known else others).append(name)
    return layers, others


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+\.", ".", name)


def refuse_types(files: list[Path], model: nn.Module) -> None:
    """Weights of integers would be read as numbers. Other integers, such as BERT's `position_ids`, are no weights."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_parameters()} | {"gamma", "beta"}  # names of TensorFlow
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS and name.rpartition(".")[2] in ends:
                    raise ValueError(f"{path.name}: {name} has values of type {kind}, not one of "
                                     f"{', '.join(sorted(FLOATS))}")


def refuse_not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        # A sum costs no memory. It is not finite if a value is not, or, rarely, if large ones add up to infinity.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite numbers")


@torch.no_grad()
def refuse_broken(model: nn.Module) -> None:
    """One forward pass over two tokens tells whether the values of config.json work together."""
    was_training, inputs = model.training, torch.ones(1, 2, dtype=torch.int64)
    try:
        logits = model.eval()(input_ids=inputs, attention_mask=inputs).logits
    finally:
        model.train(was_training)
    if logits.shape != (1, model.config.num_labels) or not logits.isfinite().all():
        raise ValueError("its values give no finite logits")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def refuse_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers makes a tokenizer of special tokens alone out of nothing."""
    vocabulary = tokenizer.get_vocab()
    if not set(vocabulary) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer has no words: the files are missing, such as tokenizer.json, or empty")
    if (largest := max(vocabulary.values())) > MOST_TOKENS:  # what tokenizers does with it takes as long
        raise ValueError(f"its tokenizer gives token {largest}")
    unknown_tokens(tokenizer)
    length = tokenizer.model_max_length
    if not isinstance(length, int | float) or isinstance(length, bool):
        raise ValueError(f"model_max_length in its tokenizer_config.json is {str(length)[:40]!r}, not a number")
    try:
        whole, word = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    except BaseException as error:  # a panic of its Rust code is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"its tokenizer fails on a text: {brief(error)}") from None
        raise
    if not word or word not in [whole[start:start + len(word)] for start in range(len(whole))]:
        raise ValueError("its tokenizer does not keep the words of a text")


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand for an unknown word. Raises Exception if the tokenizer fails on such words."""
    found = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # where it names another one, that is the true one
        of_nothing = backend.model.tokenize("\ue000")  # a character without meaning; read as bytes, it is several
        found += [token.id for token in of_nothing if len(of_nothing) == 1]
    return found


def largest_token(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int:
    """The largest id that the tokenizer can give; `tokens`: ids that it gave, which need not be in its vocabulary."""
    return max(int(tokens.max(initial=0)), tokenizer.pad_token_id, *tokenizer.get_vocab().values())


def refuse_unknown_words(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> None:
    """`tokens`: the ids of reviews, one after the other. Most must not be the token for an unknown word.

    A tokenizer that reads bytes has no such token, and leaves nothing to be noticed.
    """
    is_unknown = np.isin(tokens, unknown_tokens(tokenizer))
    words = np.count_nonzero(is_unknown | ~np.isin(tokens, tokenizer.all_special_ids))
    if words == 0:
        raise ValueError("its tokenizer finds no word in the reviews")
    if (share := np.count_nonzero(is_unknown) / words) > 0.5:
        raise ValueError(f"its tokenizer does not know {share:.0%} of the words in the reviews")
