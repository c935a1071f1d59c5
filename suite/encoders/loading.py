"""Models from the Hub and from folders, and a trained model's folder.

Weights are read and written as safetensors only: no pickle is loaded, and no code from a folder or the Hub is run. No
weight of an encoder is drawn at random or left unread without a word.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

from model import ClassifierConfig, EncoderForClassification
from suite.common.checks import position_limit, too_long
from suite.common.hub import explained, is_hub_name
from suite.common.storage import atomic_write, read_json, write_json
from suite.encoders.checkpoints import (
    WEIGHTS,
    kind_of,
    load_weights,
    own_classifier,
    read_config,
    try_forward_pass,
    weight_files,
)
from suite.encoders.native_heads import undo_scale
from suite.encoders.tokenizers import refuse_foreign_tokens, refuse_unknown_words
from utils import BAG_OF_WORDS, PROJECT, Config, ModelConfig, UserError, say

PRETRAINED_TEXTS = "pretraining_texts.npy"  # beside the weights that a pretraining run has saved
TRAINED_TEXTS = "training_texts.npy"  # beside those of a classifier
STACK = "stack"  # the model_type of finished runs that were combined
WITHOUT_ENCODER = (BAG_OF_WORDS, STACK)  # model types of this suite
EXAMPLES = "take one such as bert-base-uncased or answerdotai/ModernBERT-base"

# ---------------------------------------------------------------------------------------------------------------------
# An encoder, and a new head on it


def load_encoder_config(model_config: ModelConfig) -> PreTrainedConfig:
    """The configuration of the encoder `model_config.model_name`, before any weight is loaded.

    Raises UserError if it does not describe a text encoder.
    """
    key, name = "model_config.model_name", model_config.model_name
    if not is_hub_name(name) and not Path(name).is_dir():
        raise UserError(f"{key}: no such folder: {name}")
    if (kind := kind_of(Path(name))) in WITHOUT_ENCODER:
        raise UserError(f"{key}: {name} holds a {kind} model, not a text encoder: {EXAMPLES}")
    if (Path(name) / "best" / "config.json").is_file() and not (Path(name) / "config.json").exists():
        raise UserError(f"{key}: {name} is a run folder: name the model in it, {Path(name) / 'best'}")
    with explained(key, name):
        config = read_config(name)
    config = config.encoder if isinstance(config, ClassifierConfig) else config
    kind = config.model_type
    is_decoder = getattr(config, "is_decoder", False) or config.is_encoder_decoder or (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if is_decoder or not hasattr(config, "vocab_size"):
        raise UserError(f"{key}: {name} is a {kind} model, not a text encoder: {EXAMPLES}")
    if model_config.encoder_dropout is not None:  # of every place, whatever the architecture calls them
        for rate, value in config.to_dict().items():
            if "dropout" in rate and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(config, rate, model_config.encoder_dropout)
    return config


def new_model(model_config: ModelConfig, label_names: list[str] | None = None,
              encoder_config: PreTrainedConfig | None = None) -> EncoderForClassification:
    """A new head on the encoder `model_config.model_name`; fresh weights everywhere if not `pretrained`.

    `label_names`: None numbers the classes; `encoder_config`: what `load_encoder_config` gave, None loads it. Raises
    UserError if the encoder cannot be loaded or lacks weights. Of a classifier of this suite, the encoder is taken, and
    the head if it was trained for the same classes and pooling.
    """
    key, name = "model_config.model_name", model_config.model_name
    if encoder_config is None:
        encoder_config = load_encoder_config(model_config)
    names, encoder = label_names or [str(label) for label in range(model_config.num_labels)], None
    with explained(key, name):
        own = own_classifier(name) if model_config.pretrained else None
        if not model_config.pretrained:
            encoder = AutoModel.from_config(encoder_config, dtype=torch.float32)
        elif own is None:
            encoder, _ = load_checkpoint(AutoModel, name, encoder_config)
        encoder_config.name_or_path = ""  # a path of this machine, which must not be saved
        config = ClassifierConfig(encoder_config, model_config.pooling, model_config.dropout_rate,
                                  id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)})
        model = EncoderForClassification(config, encoder)
        if own is not None:
            _take_weights(name, own, model)
        try_forward_pass(model, (1, len(names)))
    return model


def _take_weights(name: str, own: ClassifierConfig, model: EncoderForClassification) -> None:
    """Into `model`, the encoder of this suite's classifier `name`, whose configuration is `own`, and where it fits its
    head. A line says what was taken."""
    differs = ("its classes are " + ", ".join(map(str, own.id2label.values())) if own.id2label != model.config.id2label
               else f"it was trained with pooling={own.pooling}" if own.pooling != model.config.pooling else None)
    weights = safetensors.torch.load_file(cached_file(name, WEIGHTS))
    if differs:
        weights |= {f"head.{key}": values for key, values in model.head.state_dict().items()}
    model.load_state_dict(weights)
    say(f"{name}: going on from its encoder " + (f"with a new head, because {differs}" if differs else "and its head"))


def load_checkpoint(kind: type, name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """(the model `name`, built by an Auto class of transformers, the weights of its head that the checkpoint lacks).

    Raises UserError if the weights do not fit, or if some of the encoder's are missing or stay unread.
    """
    key = "model_config.model_name"
    if Path(name).is_dir() and not weight_files(Path(name)):
        raise UserError(f"{key}: {name} holds no weights in safetensors: take a model that does, or train this one "
                        "from scratch with model_config.pretrained=false")
    model, lacking = load_weights(key, kind, name, config)
    # A missing weight would be drawn at random and train to a number that nobody can explain.
    of_encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    if missing := [weight for weight in lacking if weight.startswith(of_encoder) and not weight.startswith("pooler.")]:
        raise UserError(f"{key}: {name} lacks {len(missing)} weights of its architecture ({missing[0]}, ...): take a "
                        "complete model, or model_config.pretrained=false")
    undo_scale(model.base_model, config)
    return model, lacking


# ---------------------------------------------------------------------------------------------------------------------
# Whether an encoder and the reviews go together


def trained_texts(model_config: ModelConfig, held_out: np.ndarray) -> np.ndarray:
    """The digests (texts and groups,) of 16 bytes of what the encoder was trained on, if a run of this suite made it.

    Raises UserError if some of `held_out`, the digests of what is validated or tested on, are among them.
    """
    key, name = "model_config.model_name", model_config.model_name
    path = next(filter(Path.is_file, (Path(name) / file for file in (PRETRAINED_TEXTS, TRAINED_TEXTS))), None)
    if path is None:
        return np.empty(0, "V16")
    if not model_config.pretrained:
        raise UserError(f"model_config.pretrained is false, so nothing that {name} has learned would be used: set "
                        "model_config.pretrained=true")
    seen = np.load(path)  # no pickle is read
    if count := np.isin(held_out, seen).sum():
        raise UserError(f"{key}: {name} was trained on {count:,} groups or texts that are validated or tested on here: "
                        "give data_config the values of its training, or train it again with these")
    return seen


def refuse_incompatible(config: Config, encoder_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase,
                        tokens: np.ndarray, data_fingerprint: str) -> None:
    """Raises UserError for reviews that the encoder or its tokenizer cannot read. `tokens`: of all reviews."""
    key, name = "model_config.model_name", config.model_config.model_name
    if config.model_config.pretrained and not (Path(name) / TRAINED_TEXTS).is_file():
        learned = getattr(own_classifier(name) or encoder_config, "data_fingerprint", None)
        if learned not in (None, data_fingerprint):  # of an earlier version, from the Hub, or exported
            say(f"{name} has no {TRAINED_TEXTS}, so nobody can tell whether it was trained on texts that are validated "
                "or tested on here: if it was, the accuracy is too high")
    if problem := too_long(config.data_config.max_len, name, position_limit(encoder_config.to_dict())):
        raise UserError(problem)
    refuse_foreign_tokens(key, name, tokenizer, encoder_config.vocab_size)
    refuse_unknown_words(key, name, tokenizer, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# A trained model's folder


def save_model(folder: Path, config: ClassifierConfig, weights: dict[str, torch.Tensor],
               tokenizer: PreTrainedTokenizerBase) -> None:
    """What the Hugging Face ecosystem expects of a model folder: tokenizer, code, config.json, and the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, tokenizer, config.max_len, config.truncation)
    shutil.copyfile(PROJECT / "model.py", folder / "model.py")
    write_json(folder / "config.json", config.to_dict() | {
        "architectures": [EncoderForClassification.__name__], "dtype": "float32",
        "auto_map": {"AutoConfig": f"model.{ClassifierConfig.__name__}",
                     "AutoModelForSequenceClassification": f"model.{EncoderForClassification.__name__}"}})
    save_weights(folder, weights)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, max_len: int | None, truncation: str) -> None:
    """The tokenizer as it reads here, for every reader of tokenizer.json, and how it cuts."""
    tokenizer.save_pretrained(folder)
    values = read_json(folder / "tokenizer_config.json")
    values["truncation_side"] = "left" if truncation == "tail" else "right"
    values["padding_side"] = "right"
    values["model_max_length"] = max_len or values.get("model_max_length")
    if hasattr(tokenizer, "backend_tokenizer"):  # tokenizer.json is all of it; BertTokenizer would build a part anew
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", values)


def save_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))


def load_model(folder: str | Path) -> nn.Module:
    """A trained classifier: one of this suite, or any other sequence classifier that transformers knows.

    Raises UserError naming the file that is missing or does not fit. A run's folder is verified to the last bit before
    anything is read from it.
    """
    folder = Path(folder)
    if (kind := kind_of(folder)) in WITHOUT_ENCODER:
        raise UserError(f"{folder} holds a {kind} model, which can label and be tested, but not be explained or "
                        "exported: name an encoder's folder")
    files = weight_files(folder)
    if not files and (folder / "onnx").is_dir():
        raise UserError(f"{folder} is an export without PyTorch's weights: name its run, or export it again with "
                        "--format onnx,transformers")
    if lost := "config.json" if not (folder / "config.json").is_file() else None if files else WEIGHTS:
        raise UserError(f"{folder}: no {lost}; train this run first, or name a folder with a trained model")
    with explained("--model", str(folder)):
        config = read_config(str(folder))
        if str(config.architectures).endswith("ForMaskedLM']"):
            raise UserError(f"{folder}: it predicts masked words and has no classes: fine-tune it first, with "
                            f"model_config.model_name={folder}")
        refuse_other_tasks(config)
        model, lacking = load_weights("--model", AutoModelForSequenceClassification, str(folder), config)
        if lacking:
            raise UserError(f"{folder / WEIGHTS}: no weights for {lacking[0]}: take a trained classifier, not an "
                            "encoder")
        try_forward_pass(model, (1, config.num_labels))
    return model


def refuse_other_tasks(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that does not say which one of several classes a review has."""
    names = config.id2label
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names) or len(names) < 2:
        raise ValueError(f"id2label in its config.json is {names}: two or more different names, numbered from 0, are "
                         "needed")
    known = ("Model", "ForSequenceClassification", EncoderForClassification.__name__)
    if not all(name.endswith(known) for name in config.architectures or []):
        raise ValueError(f"architectures in its config.json is {config.architectures}: a model for the classification "
                         "of whole texts is needed")
    if config.model_type == "xlnet":
        raise ValueError("its classifier reads the last token, after padding on the left, and this suite pads on the "
                         "right")
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"problem_type in its config.json is {config.problem_type!r}: one class of a review must be "
                         "right")
