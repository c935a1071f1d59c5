"""Whatever is wrong with a model's folder: exit code 2, one line that names it and the fix, nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ENCODERS, PROJECT
from transformers import AutoTokenizer, GPT2Config, T5Config, ViTConfig


def encoder(folder: Path, name: str = "bert", tokenizer: bool = True, **changes) -> Path:
    """A folder with a tiny encoder's config.json, `changes` made, and a tokenizer; no weights."""
    settings = ENCODERS[name].to_dict() | changes
    (folder / "encoder").mkdir()
    (folder / "encoder/config.json").write_text(json.dumps(settings))
    if tokenizer:
        AutoTokenizer.from_pretrained(PROJECT / "demo/bert").save_pretrained(folder / "encoder")
    return folder / "encoder"


def of_config(config):
    return lambda folder: config.save_pretrained(folder / "encoder")


def other_shape(folder: Path):
    encoder(folder, hidden_size=16)
    shutil.copy(Path(folder / "whole" / "model.safetensors"), folder / "encoder")


def no_padding(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo/bert")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(encoder(folder, tokenizer=False))


def planted_pickle(folder: Path):
    torch.save({}, encoder(folder) / "pytorch_model.bin")


TINY = {"vocab_size": 2500, "bos_token_id": 2, "eos_token_id": 3}
BAD_MODELS = [
    ("no folder", lambda folder: None, "cannot be reached and"),  # taken for a Hub name, and the tests are offline
    ("an empty folder", lambda folder: (folder / "encoder").mkdir(), "{} cannot be loaded"),
    ("no weights", encoder, "{} holds no weights in safetensors"),
    ("a pickle for weights", planted_pickle, "{} holds no weights in safetensors"),
    ("weights of another shape", other_shape, "the weights in {} are not of the model in its config.json"),
    ("no padding token", no_padding, "{} has no padding token"),
    ("GPT-2", of_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, **TINY)), "{} is a gpt2 model, not a text encoder"),
    ("T5", of_config(T5Config(d_model=8, num_layers=1, num_heads=2, **TINY)), "{} is a t5 model, not a text encoder"),
    ("ViT", of_config(ViTConfig(num_hidden_layers=1)), "{} is a vit model, not a text encoder"),
    ("no token types", lambda folder: encoder(folder, type_vocab_size=0), "token_type_embeddings.weight would be emp"),
    ("a negative width", lambda folder: encoder(folder, hidden_size=-8), "config.json of {}"),
    ("a word as width", lambda folder: encoder(folder, hidden_size="wide"), "{} cannot be loaded"),
    ("heads that do not divide", lambda folder: encoder(folder, num_attention_heads=5), "not a multiple"),
    ("an unknown activation", lambda folder: encoder(folder, hidden_act="swish-bang"), "swish-bang"),
    ("an unknown architecture", lambda folder: encoder(folder, model_type="nonsense"), "nonsense"),
    ("no JSON", lambda folder: (encoder(folder) / "config.json").write_text("{"), "{} cannot be loaded (Expecting"),
    ("no tokenizer", lambda folder: encoder(folder, tokenizer=False), "{} cannot be loaded"),
    ("half a tokenizer", lambda folder: os.truncate(encoder(folder) / "tokenizer.json", 900), "{} cannot be loaded"),
]


@pytest.mark.parametrize(("write", "words"), [row[1:] for row in BAD_MODELS], ids=[row[0] for row in BAD_MODELS])
def test_bad_models(tmp_path, refused, encoder_folder, monkeypatch, write, words):
    (tmp_path / "whole").symlink_to(encoder_folder("bert"))
    write(tmp_path)
    monkeypatch.chdir(tmp_path)  # `encoder` without a path could be a name on the Hub
    name = "encoder" if words.startswith("cannot be reached") else str(tmp_path / "encoder")
    error = refused(f"model_config.model_name={name}")
    assert words.format(name) in error
    assert "model_config.model_name" in error
