"""A model's folder that is not what it should be: one line that names it and the fix, exit code 2, nothing written.

It holds these promises: wrong input ends in one line before work is lost; no pickle is loaded, and no code from a
model's folder is run; a truncated model is noticed when it is read; no row of a labelled file is lost.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENCODERS, PROJECT, run_here
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification, GPT2Config, T5Config, ViTConfig

from suite.common.devices import Devices
from suite.encoders.loading import load_encoder_config, new_model, save_model
from suite.encoders.tokenizers import load_tokenizer
from suite.inference.classifier import Classifier
from utils import ModelConfig, UserError, load_config

KERNEL = "kernels-community/flash-attn2"
INDEX = "model.safetensors.index.json"
DOORS = ("encoder", "ours", "theirs")

# ---------------------------------------------------------------------------------------------------------------------
# What may be wrong with a folder. Each function makes FOLDER/encoder, some from FOLDER/whole, a tiny BERT


def encoder(folder: Path, tokenizer: bool = True, **changes) -> Path:
    """A folder with a tiny encoder's config.json, `changes` made, and a tokenizer; no weights."""
    (folder / "encoder").mkdir()
    (folder / "encoder/config.json").write_text(json.dumps(ENCODERS["bert"].to_dict() | changes))
    if tokenizer:
        AutoTokenizer.from_pretrained(PROJECT / "demo/bert").save_pretrained(folder / "encoder")
    return folder / "encoder"


def of_config(config):
    return lambda folder: config.save_pretrained(folder / "encoder")


def no_padding(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo/bert")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(encoder(folder, tokenizer=False))


def spoiled(change):
    return lambda folder: change(shutil.copytree(folder / "whole", folder / "encoder"))


def values(**changes):
    """Other values in config.json; in a classifier of the suite, in its encoder's part."""
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.get("encoder", config).update(changes)
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def words(change):
    """The tokenizer with the vocabulary `change(vocabulary)`."""
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = change(content["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return spoil


def weights(change, name: str = "layer.1.output.dense.bias", shards: bool = False, **index: str):
    """`change` made to a tensor (None: it is lost); `shards`: in two files, with an index, which names the files
    `index` as well."""
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        place = next(key for key in tensors if key.endswith(name))
        tensors |= {place: change(tensors.pop(place))}
        tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        if not shards:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return
        (folder / "model.safetensors").unlink()
        files = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(sorted(tensors))}
        for half in set(files.values()):
            save_file({key: tensors[key] for key in files if files[key] == half}, folder / half, {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | index}))
    return spoil


def own_code(folder: Path) -> None:
    relabelled(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (folder / "mine.py").write_text("1 / 0")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "weights.bin")
    (folder / "weights.bin").rename(folder / "model.safetensors")


def one(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor
    return change


other_words = words(lambda known: {word if word[0] == "[" else f"{number}x": number for word, number in known.items()})
TINY = {"vocab_size": 2500, "bos_token_id": 2, "eos_token_id": 3}
BAD_MODELS = [
    ("no folder", lambda folder: None, "cannot be reached and"),  # taken for a Hub name, and the tests are offline
    ("an empty folder", lambda folder: (folder / "encoder").mkdir(), "{}/config.json"),
    ("a pickle for weights", lambda folder: torch.save({}, encoder(folder) / "pytorch_model.bin"),
     "{} holds no weights in safetensors"),
    ("no padding token", no_padding, "{} has no padding token"),
    ("GPT-2", of_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, **TINY)), "{} is a gpt2 model, not a text encoder"),
    ("T5", of_config(T5Config(d_model=8, num_layers=1, num_heads=2, **TINY)), "{} is a t5 model, not a text encoder"),
    ("ViT", of_config(ViTConfig(num_hidden_layers=1)), "{} is a vit model, not a text encoder"),
    ("heads that do not divide", spoiled(values(num_attention_heads=5)), "not a multiple"),
    ("no JSON", lambda folder: (encoder(folder) / "config.json").write_text("{"), "{} cannot be loaded"),
    ("no tokenizer", lambda folder: encoder(folder, tokenizer=False), "its tokenizer has no words"),
    ("half a tokenizer", lambda folder: os.truncate(encoder(folder) / "tokenizer.json", 900), "{} cannot be loaded"),
    ("no words", spoiled(words(lambda known: {})), "its tokenizer has no words"),
    ("other words", spoiled(other_words), "the tokenizer of {} does not know"),
    ("more words than the encoder's", spoiled(words(lambda known: known | {"film": 99999})), "{} gives token 99999"),
]
SPOILED = [
    ("a nan in a tensor", weights(one(float("nan"))), "are finite: "),
    ("a nan in one word's embedding", weights(one(float("nan")), "word_embeddings.weight"), "word_embeddings.weight"),
    ("finite weights, infinite logits", weights(lambda tensor: torch.full_like(tensor, 3e38)), "give finite logits"),
    ("a missing shard", weights(one(0), shards=True, x="part-7.safetensors"), "part-7.safetensors"),
    ("a pickled shard", weights(one(0), shards=True, x="part.bin"), "no pickle is loaded"),
    ("half a file", lambda folder: os.truncate(folder / "model.safetensors", 9000), ""),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "no "),
    ("no config.json", lambda folder: (folder / "config.json").unlink(), "config.json"),
    ("a pickle of that name", pickled, "cannot be loaded"),
    ("a weight less", weights(lambda tensor: None), "layer.1.output.dense.bias"),
    ("a weight of another shape", weights(lambda tensor: tensor[:9].clone()), "layer.1.output.dense.bias is [9]"),
    ("code of its own", own_code, "code from a model's folder is not run"),
    ("an adapter", lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json"),
]
CLASSIFIERS = [  # an encoder has no classes, and its words are compared with the reviews that it is trained on
    ("more words than the encoder's", words(lambda known: known | {"film": 99999}), "gives token 99999"),
    ("other words", other_words, "does not know 100% of the words"),
    *((f"classes {names}", lambda folder, names=names: relabelled(folder, id2label=names), "id2label in its config")
      for names in ({"0": "a"}, {"0": "a", "1": "a"}, {"1": "a", "2": "b"})),
    ("names of words", lambda folder: relabelled(folder, architectures=["BertForTokenClassification"]), "whole texts"),
    ("several labels", lambda folder: relabelled(folder, problem_type="multi_label_classification"), "problem_type"),
]
WHOLE = [
    ("float16", weights(torch.Tensor.half)), ("two shards", weights(one(0.1), shards=True)),
    ("large finite weights", weights(one(3e38), "word_embeddings.weight")),
    *((f"{key}: {name}", values(**{key: name})) for key, name in (  # whatever else is asked for, transformers chooses
        ("attn_implementation", "eager"), ("attn_implementation", KERNEL), ("attn_implementation", {"": KERNEL}),
        ("_attn_implementation", "owner/name:function"), ("experts_implementation", KERNEL),
        ("transformers_weights", "other.bin"))),
]


def relabelled(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cases(table, *more: str):
    return pytest.mark.parametrize((*more, "spoil", "expected"), [row[1:] for row in table],
                                   ids=[row[0] for row in table])


@cases(BAD_MODELS)
def test_a_bad_encoder_is_not_trained(tmp_path, refused, encoder_folder, monkeypatch, spoil, expected):
    (tmp_path / "whole").symlink_to(encoder_folder("bert"))
    spoil(tmp_path)
    monkeypatch.chdir(tmp_path)  # `encoder` without a path could be a name on the Hub
    name = "encoder" if expected.startswith("cannot be reached") else str(tmp_path / "encoder")
    error = refused(f"model_config.model_name={name}")
    assert expected.format(name) in error
    assert "model_config.model_name" in error


# ---------------------------------------------------------------------------------------------------------------------
# Wherever a folder is read: as an encoder to train, as a classifier of this suite, and as one of transformers


@pytest.fixture(scope="module")
def whole(encoder_folder, tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ours", "theirs")}
    tokenizer, model = load_tokenizer(encoder_folder("bert")), new_model(ModelConfig(encoder_folder("bert")))
    save_model(folders["ours"], model.config, model.state_dict(), tokenizer)
    BertForSequenceClassification.from_pretrained(encoder_folder("bert")).save_pretrained(folders["theirs"])
    tokenizer.save_pretrained(folders["theirs"])
    return folders | {"encoder": Path(encoder_folder("bert"))}


@pytest.fixture
def read(whole, tmp_path):
    """read(door, spoil): what a spoiled copy of a whole folder gives, where it is read."""
    def attempt(door: str, spoil) -> object:
        spoil(folder := shutil.copytree(whole[door], tmp_path / "model"))
        if door == "encoder":
            settings = ModelConfig(str(folder))
            return new_model(settings, encoder_config=load_encoder_config(settings))
        config = load_config(PROJECT / "config.yaml", ["data_config.max_len=32", "train_config.device=cpu"])
        return Classifier(folder, config, Devices(config)).probabilities(["the film was a story"])
    return attempt


@cases([(f"{door}: {name}", door, *rest) for name, *rest in SPOILED for door in DOORS]
       + [(f"{door}: {name}", door, *rest) for name, *rest in CLASSIFIERS for door in DOORS[1:]], "door")
def test_a_spoiled_folder_is_refused_wherever_it_is_read(read, tmp_path, door, spoil, expected):
    with pytest.raises(UserError) as refusal:
        read(door, spoil)
    assert expected in str(refusal.value)
    assert str(tmp_path / "model") in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("spoil", [row[1] for row in WHOLE], ids=[row[0] for row in WHOLE])
def test_what_only_looks_odd_is_read(read, door, spoil):
    result = read(door, spoil)
    assert door == "encoder" or np.isclose(result.sum(), 1)


def test_unknown_words_in_a_file_leave_nothing_behind(whole, tmp_path):
    (tmp_path / "in.txt").write_text("a film\nthe story\n" * 5)
    other_words(folder := shutil.copytree(whole["ours"], tmp_path / "model"))
    for mode, options in (("predict", {"input": str(tmp_path / "in.txt"), "output": str(tmp_path / "out.csv")}),
                          ("predict", {"input": str(tmp_path / "in.txt")}), ("explain", {"text": "the film"})):
        result = run_here("data_config.max_len=32", mode=mode, model=str(folder), **options)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert "does not know 100% of the words" in result.stderr
    assert list(tmp_path.glob("out*")) == []


def test_one_odd_row_among_good_ones_is_labelled(whole, tmp_path):
    (tmp_path / "in.txt").write_text("the film was a story\n" * 5 + "\u4eca\u5929 \u2603\n")
    arguments = {"mode": "predict", "input": str(tmp_path / "in.txt"), "model": str(whole["ours"])}
    result = run_here("data_config.max_len=32", **arguments)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 7), result.stderr
