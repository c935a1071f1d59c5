"""Models and tokenizers from the Hub and from folders, and a trained model's folder.

Weights are read and written as safetensors only: no pickle is loaded, and no code from a folder or the Hub is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

from model import ClassifierConfig, EncoderForClassification
from suite.common.hub import explained, is_hub_name
from suite.common.storage import (
    MANIFEST,
    atomic_write,
    read_json,
    refuse_damage,
    write_json,
)
from suite.encoders.refusals import (
    WEIGHTS,
    read_config,
    refuse_not_finite,
    try_forward_pass,
    unread_weights,
    weight_files,
)
from suite.encoders.tokenizers import remark
from utils import BAG_OF_WORDS, PROJECT, ModelConfig, UserError, brief, say

PRETRAINED_TEXTS = "pretraining_texts.npy"  # beside the weights that a pretraining run has saved
TRAINED_TEXTS = "training_texts.npy"  # beside those of a classifier
STACK = "stack"  # the model_type of finished runs that were combined
NO_ENCODERS = (BAG_OF_WORDS, STACK)

AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig)  # here, transformers needs no code from the folder
AutoModelForSequenceClassification.register(ClassifierConfig, EncoderForClassification)

# ---------------------------------------------------------------------------------------------------------------------
# An encoder, and a new head on it


def new_model(model_config: ModelConfig, label_names: list[str] | None = None,
              encoder_config: PreTrainedConfig | None = None) -> EncoderForClassification:
    """A new head on the encoder `model_config.model_name`; fresh weights everywhere if not `pretrained`.

    `label_names`: None numbers the classes; `encoder_config`: what `load_encoder_config` gave, None loads it. Raises
    UserError if the encoder cannot be loaded or lacks weights. Of a classifier of this suite, the encoder is taken, and
    the head if it was trained for the same classes and pooling.
    """
    name = model_config.model_name
    if encoder_config is None:
        encoder_config = load_encoder_config(model_config)
    encoder = None
    with explained("model_config.model_name", name, any_error=True):
        own = own_classifier(name) if model_config.pretrained else None
        if not model_config.pretrained:
            encoder = AutoModel.from_config(encoder_config, dtype=torch.float32)
        elif own is None:
            encoder, _ = load_weights(AutoModel, name, encoder_config)
    names = label_names or [str(label) for label in range(model_config.num_labels)]
    encoder_config.name_or_path = ""  # a path of this machine, which concerns nobody else
    config = ClassifierConfig(encoder_config, model_config.pooling, model_config.dropout_rate,
                              id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)})
    with explained("model_config.model_name", name, any_error=True):
        model = EncoderForClassification(config, encoder)
        if own is not None:
            _take_weights(name, own, model)
        try_forward_pass(model, (1, len(names)))
    return model


def own_classifier(name: str) -> ClassifierConfig | None:
    """The configuration of a classifier of this suite; None if `name` is another model."""
    if kind_of(model_folder(name)) != ClassifierConfig.model_type:
        return None
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _take_weights(name: str, own: ClassifierConfig, model: EncoderForClassification) -> None:
    """Into `model`, the encoder of this suite's classifier `name`, whose configuration is `own`, and where it fits its
    head. A line says what was taken."""
    differs = ("its classes are " + ", ".join(map(str, own.id2label.values())) if own.id2label != model.config.id2label
               else f"it was trained with pooling={own.pooling}" if own.pooling != model.config.pooling else None)
    weights = safetensors.torch.load_file(cached_file(name, WEIGHTS))
    if differs:
        weights |= {f"head.{key}": values for key, values in model.head.state_dict().items()}
    model.load_state_dict(weights)
    refuse_not_finite(model.named_parameters())
    say(f"{name}: going on from its encoder " + (f"with a new head, because {differs}" if differs else "and its head"))


def load_weights(kind: type, name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """(the model `name`, built by an Auto class of transformers, the weights of its head that the checkpoint lacks).

    Raises UserError if the weights do not fit, or if all or some of the encoder's are missing.
    """
    if Path(name).is_dir() and not weight_files(Path(name)):
        raise UserError(f"model_config.model_name: {name} holds no weights in safetensors: take a model that does, or "
                        "train this one from scratch with model_config.pretrained=false")
    # float32, whatever the checkpoint was stored in: Adam's small updates vanish in half precision.
    model, report = kind.from_pretrained(
        name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True)
    if mismatched := sorted(report["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise UserError(f"model_config.model_name: the weights in {name} are not of the model in its "
                        f"config.json ({key} is {list(stored)} instead of {list(expected)}): take a model "
                        "whose files belong together")
    refuse_unread("model_config.model_name", name, model, report["unexpected_keys"])
    # A missing weight would be drawn at random and train to a number that nobody can explain.
    of_encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = sorted(report["missing_keys"])
    if missing := [key for key in lacking if key.startswith(of_encoder) and not key.startswith("pooler.")]:
        raise UserError(f"model_config.model_name: {name} lacks {len(missing)} weights of its architecture "
                        f"({missing[0]}, ...): take a complete model, or model_config.pretrained=false")
    refuse_not_finite(model.named_parameters())
    return model, lacking


def refuse_unread(key: str, name: str, model: PreTrainedModel, unread: Iterable[str]) -> None:
    """Raises UserError if weights of the encoder are among the `unread` ones of a checkpoint: relative positions, an
    unmerged adapter. Another model than the published one would be trained. Further layers may be meant to stay
    unread, and a line says so. `key` gives the checkpoint `name`."""
    layers, others = unread_weights(model, unread)
    if others:
        raise UserError(f"{key}: {name} has {len(others)} weights of its encoder that a {type(model).__name__} of "
                        f"transformers does not read ({others[0]}, ...): merge its adapters into it, or take a model "
                        "that is read completely")
    if layers:
        remark(key, f"{name}: config.json asks for fewer layers than its weights have: {len(layers)} of these stay "
                    f"unread ({layers[0]}, ...)")


def trained_texts(model_config: ModelConfig) -> np.ndarray:
    """The digests (texts,) of 16 bytes of what the encoder was trained on, if it is from a run of this suite."""
    paths = [Path(model_config.model_name) / name for name in (PRETRAINED_TEXTS, TRAINED_TEXTS)]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        return np.empty(0, "V16")
    if not model_config.pretrained:
        raise UserError(f"model_config.pretrained is false, so nothing that {path.parent} has learned would be used: "
                        "set model_config.pretrained=true")
    with explained("model_config.model_name", str(path)):
        return np.load(path)  # no pickle is read


def model_folder(name: str) -> Path:
    """The folder of a model, which is in the Hub's cache if `name` is one on the Hub."""
    return Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent


def load_encoder_config(model_config: ModelConfig) -> PreTrainedConfig:
    """The configuration of the encoder `model_config.model_name`, before any weight is loaded.

    Raises UserError if it describes no text encoder, or one that cannot be built.
    """
    name = model_config.model_name
    if not is_hub_name(name) and not Path(name).is_dir():
        raise UserError(f"model_config.model_name: no such folder: {name}")
    if (kind := kind_of(Path(name))) in NO_ENCODERS:
        raise UserError(f"model_config.model_name: {name} holds a {kind} model, not a text encoder: take one such as "
                        "bert-base-uncased or answerdotai/ModernBERT-base")
    if (Path(name) / "best" / "config.json").is_file() and not (Path(name) / "config.json").exists():
        raise UserError(f"model_config.model_name: {name} is a run folder: name the model in it, {Path(name) / 'best'}")
    with explained("model_config.model_name", name, any_error=True):
        folder = model_folder(name)
        if (folder / MANIFEST).exists():
            refuse_damage(folder)
        read_config(folder / "config.json")
        own = own_classifier(name)
        encoder_config = own.encoder if own else AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = encoder_config.model_type
    is_decoder = getattr(encoder_config, "is_decoder", False) or encoder_config.is_encoder_decoder or (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if is_decoder or not hasattr(encoder_config, "vocab_size"):
        raise UserError(f"model_config.model_name: {name} is a {kind} model, not a text encoder: take one such as "
                        "bert-base-uncased or answerdotai/ModernBERT-base")
    if model_config.encoder_dropout is not None:
        set_encoder_dropout(encoder_config, model_config.encoder_dropout)
    try:
        with torch.device("meta"):  # shapes without memory, before any review is read
            AutoModel.from_config(encoder_config)
    except Exception as error:  # of any type: each architecture fails on bad values in its own way
        reason = f"{type(error).__name__}: {brief(error)}"
        raise UserError(f"model_config.model_name: no encoder can be built from the config.json of {name} ({reason}): "
                        "correct it or take another model") from error
    return encoder_config


def set_encoder_dropout(encoder_config: PreTrainedConfig, rate: float) -> None:
    """Set every dropout rate of an encoder's configuration, whatever its architecture calls them."""
    for name, value in encoder_config.to_dict().items():
        if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(encoder_config, name, rate)


# ---------------------------------------------------------------------------------------------------------------------
# A trained model's folder


def save_model(folder: Path, config: ClassifierConfig, weights: dict[str, torch.Tensor],
               tokenizer: PreTrainedTokenizerBase) -> None:
    """What the Hugging Face ecosystem expects of a model folder: tokenizer, code, config.json, and the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    values["truncation_side"] = "left" if config.truncation == "tail" else "right"
    values["model_max_length"] = config.max_len or values.get("model_max_length")
    if hasattr(tokenizer, "backend_tokenizer"):  # tokenizer.json is all of it; BertTokenizer would build a part anew
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, values)
    shutil.copyfile(PROJECT / "model.py", folder / "model.py")
    write_json(folder / "config.json", config.to_dict() | {
        "architectures": [EncoderForClassification.__name__], "dtype": "float32",
        "auto_map": {"AutoConfig": f"model.{ClassifierConfig.__name__}",
                     "AutoModelForSequenceClassification": f"model.{EncoderForClassification.__name__}"}})
    save_weights(folder, weights)


def save_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))


def kind_of(folder: Path) -> str | None:
    """The model_type in a model folder's config.json; None if it cannot be read."""
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


def load_model(folder: str | Path) -> nn.Module:
    """A trained classifier: one of this suite, or any other sequence classifier that transformers knows.

    Raises UserError naming the file that is missing or does not fit. A sealed folder, such as a run's, is verified to
    the last bit before anything is read from it.
    """
    folder = Path(folder)
    if (kind := kind_of(folder)) in NO_ENCODERS:
        raise UserError(f"{folder} holds a {kind} model, which can label and be tested, but not be explained or "
                        "exported: name an encoder's folder")
    with explained("--model", str(folder)):
        files = weight_files(folder)
    if not files and (folder / "onnx").is_dir():
        raise UserError(f"{folder} is an export without PyTorch's weights: name its run, or export it again with "
                        "--format onnx,transformers")
    if lost := "config.json" if not (folder / "config.json").is_file() else None if files else WEIGHTS:
        raise UserError(f"{folder}: no {lost}; train this run first, or name a folder with a trained model")
    if (folder / MANIFEST).exists():
        refuse_damage(folder)
    with explained("--model", str(folder), any_error=True):
        values = read_config(folder / "config.json")
        if str(values.get("architectures")).endswith("ForMaskedLM']"):
            raise UserError(f"{folder}: it predicts masked words and has no classes: fine-tune it first, with "
                            f"model_config.model_name={folder}")
        is_ours = values.pop("model_type") == ClassifierConfig.model_type
        config = ClassifierConfig(**values) if is_ours else AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_other_tasks(config)
        model = _load_ours(files, config) if is_ours else _load_foreign(folder, config)
        refuse_not_finite(model.named_parameters())
        try_forward_pass(model, (1, config.num_labels))
    return model


def refuse_other_tasks(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that does not say which one of several classes a review has."""
    names = config.id2label
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names) or len(names) < 2:
        raise ValueError(f"id2label in its config.json is {names}: two or more different names, numbered from 0, are "
                         "needed")
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"problem_type in its config.json is {config.problem_type!r}: one class of a review must be "
                         "right")


def says_how_to_cut(config: PreTrainedConfig) -> bool:
    """Whether a classifier's configuration tells how its reviews were cut: all of this suite do, exported ones, too."""
    return {"max_len", "truncation", "max_windows"} <= vars(config).keys()


def _load_ours(files: list[Path], config: ClassifierConfig) -> nn.Module:
    model = EncoderForClassification(config)
    try:
        model.load_state_dict({name: weights for path in files
                               for name, weights in safetensors.torch.load_file(path).items()})
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{files[0]}: damaged, or not of the model in config.json: {brief(error)}") from error
    return model


def _load_foreign(folder: Path, config: PreTrainedConfig) -> nn.Module:
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True)
    refuse_unread("--model", str(folder), model, report["unexpected_keys"])
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise UserError(f"{folder / WEIGHTS}: no weights for {lacking[0]}: take a trained classifier, not an encoder")
    return model
