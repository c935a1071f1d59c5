"""A model's own files, from the Hub or from a folder: its config.json, its weights, and whether they go together.

No pickle is loaded, and no code from a folder or the Hub is run. The functions raise ValueError, whose text names what
is wrong; whoever calls them adds the model and the fix. Those with a `key` of the configuration raise UserError.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from model import ClassifierConfig, EncoderForClassification
from suite.common.storage import MANIFEST, read_json, refuse_damage
from utils import UserError, printable, process_rank, say

WEIGHTS = "model.safetensors"

AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig)  # here, transformers needs no code from the folder
AutoModelForSequenceClassification.register(ClassifierConfig, EncoderForClassification)

# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of the model `name`: its own, or one of transformers.

    Raises ValueError if it asks for code that is not transformers' own, or for what transformers does not compute, and
    UserError if it is that of a saved folder which has changed.
    """
    folder = model_folder(name)
    if (folder / MANIFEST).exists():
        refuse_damage(folder)
    values = read_json(folder / "config.json")
    if values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"its architecture, {values.get('model_type')!r}, is none of this version of transformers, "
                         "and code from a model's folder is not run")
    if str(positions := values.get("position_embedding_type")).startswith("relative_key"):
        raise ValueError(f"position_embedding_type is {positions!r}: transformers no longer computes such positions, "
                         "and would leave their weights, distance_embedding, unread")
    # transformers would load adapters through peft, where that is installed, with the weights of yet another model.
    if file_of(name, "adapter_config.json"):
        raise ValueError("it has an adapter_config.json, and adapters are not read: merge it into the model")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    for part in (config, config.encoder) if isinstance(config, ClassifierConfig) else (config,):
        # transformers chooses. In config.json, these could name compiled code on the Hub, or a pickle.
        part._attn_implementation = part._experts_implementation = None
        vars(part).pop("transformers_weights", None)
        if part.model_type == "big_bird":  # it turns to this for good at its first short text, and would not save it
            part.attention_type = "original_full"
    return config


def file_of(name: str, file: str) -> str | None:
    """The path of a file of the model `name`; None if it has none."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def model_folder(name: str) -> Path:
    """The folder of a model, which is in the Hub's cache if `name` is one on the Hub."""
    return Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent


def kind_of(folder: Path) -> str | None:
    """The model_type in a model folder's config.json; None if it cannot be read."""
    try:
        return read_json(folder / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def own_classifier(name: str) -> ClassifierConfig | None:
    """The configuration of a classifier of this suite; None if `name` is another model."""
    if kind_of(model_folder(name)) != ClassifierConfig.model_type:
        return None
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load_weights(key: str, kind: type, name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """(the model `name`, which `key` gives, built by an Auto class of transformers, the weights that it lacks).

    Raises UserError if the weights are of other shapes, or some of the encoder's stay unread.
    """
    index = file_of(name, f"{WEIGHTS}.index.json")
    if index and not all(file.endswith(".safetensors") for file in read_json(index)["weight_map"].values()):
        raise ValueError(f"{Path(index).name} names files that are no safetensors, and no pickle is loaded")
    # float32, whatever the checkpoint was stored in: Adam's small updates vanish in half precision.
    model, report = kind.from_pretrained(
        name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True)
    if mismatched := sorted(report["mismatched_keys"]):
        weight, stored, expected = mismatched[0]
        raise UserError(f"{key}: the weights in {name} are not of the model in its config.json ({weight} is "
                        f"{list(stored)} instead of {list(expected)}): take a model whose files belong together")
    refuse_unread(key, name, model, report["unexpected_keys"])
    for weight in report["missing_keys"]:
        if weight.endswith("bias"):  # transformers 5.23.0 leaves some of a fresh head's as they lie in memory
            nn.init.zeros_(model.get_parameter(weight))
    return model, sorted(report["missing_keys"])


def refuse_unread(key: str, name: str, model: PreTrainedModel, unread: Iterable[str]) -> None:
    """Raises UserError if weights of the encoder are among the `unread` ones of a checkpoint: relative positions, an
    unmerged adapter. Another model than the published one would be trained. Further layers may be meant to stay
    unread, and a line says so. `key` gives the checkpoint `name`."""
    prefix = f"{model.base_model_prefix}."  # in the file there may be one where the model has none, and vice versa
    parts = {part for part, _ in model.base_model.named_children()}
    known = {_unnumbered(weight) for weight, _ in model.base_model.named_parameters()}
    layers, others = [], []
    for weight in sorted(unread):
        own = weight.removeprefix(prefix)
        part = own.partition(".")[0]
        # Heads and poolers are other parts; position_ids are numbers from 0.
        if (own != weight or part in parts) and part != "pooler" and not own.endswith("position_ids"):
            (layers if _unnumbered(own) in known else others).append(weight)
    if others:
        raise UserError(f"{key}: {name} has {len(others)} weights of its encoder that a {type(model).__name__} of "
                        f"transformers does not read ({others[0]}, ...): merge its adapters into it, or take a model "
                        "that is read completely")
    if layers:
        remark(key, f"{name}: config.json asks for fewer layers than its weights have: {len(layers)} of these stay "
                    f"unread ({layers[0]}, ...)")


def _unnumbered(weight: str) -> str:
    return re.sub(r"\.\d+\.", ".", weight)


@torch.no_grad()
def try_forward_pass(model: nn.Module, shape: tuple[int, int], **inputs: torch.Tensor) -> None:
    """Raises ValueError if a weight is not finite, or two tokens do not give finite logits of this shape, and whatever
    the architecture raises if the values of its config.json do not work together."""
    # A nan in one word's embedding would show in no text but those with this word, whose probabilities would be nan.
    if broken := [name for name, weights in model.named_parameters()
                  if not weights.sum().isfinite() and not weights.isfinite().all()]:  # a sum takes a tenth of the time
        raise ValueError(f"not all numbers in its weights are finite: {broken[0]}")
    was_training, tokens = model.training, torch.ones(1, 2, dtype=torch.int64)
    logits = model.eval()(input_ids=tokens, attention_mask=tokens, **inputs).logits
    model.train(was_training)
    if logits.shape != shape or not logits.isfinite().all():
        raise ValueError("its weights and its config.json do not give finite logits")


def remark(key: str, text: str) -> None:
    """Print a line about the model that `key` gives. It leaves standard output to what a model has labelled."""
    if key != "--model":
        say(text)
    elif process_rank() == 0:
        print(printable(text), file=sys.stderr)
