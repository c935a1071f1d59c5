"""Refuses a model's files that would have foreign code run, or that do not give the model that they name.

The functions raise ValueError, whose text names what is wrong; `suite/encoders/loading.py` adds the folder and the fix.
Those that are given a `key` of the configuration or the command line raise UserError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from suite.common.storage import read_json
from utils import UserError

WEIGHTS = "model.safetensors"
# The ways to compute attention and experts that transformers itself contains and that work in this suite on any device.
# Most other names are those of compiled code on the Hub.
IMPLEMENTATIONS = ("eager", "sdpa", "batched_mm", "grouped_mm")
# Keys of a config.json that make transformers read other files, or replace parts of the model by other code.
NOT_FOLLOWED = {"transformers_weights", "quantization_config", "fusion_config", "kernel_config", "use_kernels"}

# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_config(path: Path) -> dict[str, Any]:
    """The content of a model's config.json, which does not ask for other code or other files."""
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"its config.json is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError("its config.json names no model_type, which is the architecture")
    if values["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"its architecture, {values['model_type']!r}, is none of this version of transformers, and "
                         "code from a model's folder is not run")
    if (path.parent / "adapter_config.json").exists():
        raise ValueError("it has an adapter_config.json, and adapters are not read: merge it into the model")
    for key, value in _entries(values):
        if problem := _entry_problem(key, value):
            raise ValueError(problem)
    return values


def _entries(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each key with its value, those of a model's parts included."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def _entry_problem(key: str, value: Any) -> str | None:
    if key == "position_embedding_type" and str(value).startswith("relative_key"):
        return (f"{key} is {value!r}: transformers no longer computes such positions, and would leave their weights, "
                "distance_embedding, unread")
    if key in NOT_FOLLOWED and value:
        return f"{key} makes the model depend on other code or files, which is not supported"
    if "attn_implementation" in key or "experts_implementation" in key:
        names = value.values() if isinstance(value, dict) else [value]  # for the parts of a model, one each
        if foreign := [name for name in names if name is not None and name not in IMPLEMENTATIONS]:
            return f"{key} is {foreign[0]!r}: foreign code is not run; give sdpa or eager"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: one, or those that an index lists. None of them is outside the folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return []
    there = {path.name for path in folder.glob("*.safetensors")}
    try:
        names = set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError):  # a broken download
        raise ValueError(f"{index.name} is damaged") from None
    if lost := names - there:
        raise ValueError(f"{index.name} names the file {min(lost)}, and this folder has no such safetensors")
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


def refuse_not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        # A sum costs no memory. It is not finite if a value is not, or, rarely, if large ones add up to infinity.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite numbers")


@torch.no_grad()
def try_forward_pass(model: nn.Module, shape: tuple[int, int], **inputs: torch.Tensor) -> None:
    """Raises ValueError if two tokens do not give finite logits of this shape, and whatever the architecture raises if
    the values of its config.json do not work together."""
    was_training, tokens = model.training, torch.ones(1, 2, dtype=torch.int64)
    logits = model.eval()(input_ids=tokens, attention_mask=tokens, **inputs).logits
    model.train(was_training)
    if logits.shape != shape or not logits.isfinite().all():
        raise ValueError("its weights and its config.json do not give finite logits")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def refuse_no_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers makes a tokenizer of special tokens alone out of nothing."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer has no words: the files are missing, such as tokenizer.json, or empty")


def refuse_foreign_tokens(key: str, name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError if the tokenizer gives tokens that its encoder, of `vocab_size` embeddings, does not have."""
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UserError(f"{key}: the tokenizer of {name} gives token {largest}, but its encoder only knows "
                        f"{vocab_size}: take a model whose files belong together")


def refuse_unknown_words(key: str, name: str, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> None:
    """Raises UserError if most of the words in reviews are unknown to the tokenizer. `tokens`: the ids of the reviews,
    one after the other.

    A tokenizer that reads bytes has no token for an unknown word, and leaves nothing to be noticed.
    """
    is_unknown = np.isin(tokens, unknown_tokens(tokenizer))
    words = np.count_nonzero(is_unknown | ~np.isin(tokens, tokenizer.all_special_ids))
    share = np.count_nonzero(is_unknown) / max(words, 1)
    if words == 0 or share > 0.5:
        problem = f"does not know {share:.0%} of the words" if words else "finds no word"
        raise UserError(f"{key}: the tokenizer of {name} {problem} in the reviews: give reviews in the language of "
                        "this model, or name another one")


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand for an unknown word."""
    found = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # where it names another one, that is the true one
        of_nothing = backend.model.tokenize("\ue000")  # a character without meaning; read as bytes, it is several
        found += [token.id for token in of_nothing if len(of_nothing) == 1]
    return found
