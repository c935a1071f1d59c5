"""--format transformers: the same logits from transformers' own classifiers, in a program that knows only them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENCODERS, PROJECT, SMALL, run_here
from transformers import AlbertConfig, AutoTokenizer, DebertaConfig, MPNetConfig, XLMRobertaConfig

from model import ClassifierConfig, EncoderForClassification
from suite.common.devices import Devices
from suite.common.storage import read_json, write_json
from suite.encoders import native_heads
from suite.encoders.loading import new_model, save_model
from suite.encoders.native_heads import native_model, problem_of
from suite.inference.classifier import Classifier, open_classifier
from utils import ModelConfig, load_config

FAMILIES = ENCODERS | {
    "albert": AlbertConfig(**SMALL, embedding_size=16), "mpnet": MPNetConfig(**SMALL | {"pad_token_id": 1}),
    "xlm-roberta": XLMRobertaConfig(**SMALL | {"pad_token_id": 1, "type_vocab_size": 1}),
    "deberta": DebertaConfig(**SMALL, type_vocab_size=0, relative_attention=True, position_biased_input=False,
                             pos_att_type=["p2c", "c2p"])}
TEXTS = ["word", "a gripping and moving film", "dull dreary pointless " * 40, "the film was a story of this and that"]
# It imports nothing of this project and is told no code: a folder that needed some would not load.
READER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(json.loads(sys.argv[1]), truncation=True, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        found[folder] = [type(model).__name__, model(**inputs).logits.tolist()]
assert not {"model", "suite", "utils"} & set(sys.modules)
print(json.dumps(found))
"""


def build(name: str, pooling: str = "cls", classes: int = 2, width: int = 64) -> EncoderForClassification:
    """A tiny model in eval mode, with a head as large as training makes it."""
    torch.manual_seed(1)
    sizes = {"dim" if name == "distilbert" else "hidden_size": width, "vocab_size": 1367}
    encoder = type(FAMILIES[name]).from_dict(FAMILIES[name].to_dict() | sizes)
    names = [f"class {label}" for label in range(classes)]
    model = EncoderForClassification(ClassifierConfig(
        encoder, pooling, max_len=40, id2label=dict(enumerate(names)),
        label2id={label: i for i, label in enumerate(names)})).eval()
    model.head.weight.data *= 50
    model.head.bias.data.normal_()
    return model


def make(folder, *arguments) -> EncoderForClassification:
    """The folder `model` of such a model."""
    model = build(*arguments)
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo" / "bert")
    save_model(folder / "model", model.config, model.state_dict(), tokenizer)
    return model


def export(folder, *more: str, formats=("transformers",)):
    return run_here("train_config.device=cpu", *more, mode="export", model=str(folder / "model"), formats=formats)


def test_the_tested_families_are_those_that_can_be_exported():
    assert {config.model_type for config in FAMILIES.values()} == set(native_heads.HEADS)


@pytest.mark.parametrize(("name", "pooling"), [*((name, "cls") for name in FAMILIES), ("modernbert", "mean")])
def test_every_family_s_own_classifier_computes_the_same(name, pooling):
    input_ids = torch.randint(5, 1367, (4, 30), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(30) < torch.tensor([30, 22, 9, 3])[:, None]).long()
    for classes in (2, 7, 20):
        model = build(name, pooling, classes)
        native = native_model(model)
        assert type(native).__name__.endswith("ForSequenceClassification")
        assert not isinstance(native, EncoderForClassification)
        with torch.inference_mode():
            expected, logits = (each(input_ids=input_ids, attention_mask=mask).logits for each in (model, native))
        assert logits.shape == (4, classes)
        assert np.ptp(expected.numpy(), axis=0).max() > 0.1  # these texts do differ
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


def test_a_program_that_knows_only_transformers_computes_the_same(tmp_path):
    expected, folders = [], []
    for name, pooling in (("bert", "cls"), ("electra", "cls"), ("modernbert", "mean")):  # one of each kind of head
        (tmp_path / name).mkdir()
        model = make(tmp_path / name, name, pooling, 7)
        assert export(tmp_path / name).returncode == 0
        folders.append(str(tmp_path / name / "model-export"))
        inputs = AutoTokenizer.from_pretrained(tmp_path / name / "model")(TEXTS, truncation=True, padding=True,
                                                                         return_tensors="pt")
        with torch.inference_mode():
            expected.append(model(inputs["input_ids"], inputs["attention_mask"]).logits.numpy())
    done = subprocess.run([sys.executable, "-c", READER, json.dumps(TEXTS), *folders], capture_output=True, text=True,
                          cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, logits in zip(folders, expected, strict=True):
        kind, read = found[folder]
        assert kind.endswith("ForSequenceClassification")
        assert kind != "EncoderForClassification"
        np.testing.assert_allclose(read, logits, atol=5e-5)


@pytest.mark.parametrize("name", ["bert", "electra", "modernbert"])
def test_training_can_go_on_from_an_export(tmp_path, name):
    """The encoder is the one that was trained, whatever the exported head needs of it."""
    trained = make(tmp_path, name, "cls", 2)
    assert export(tmp_path).returncode == 0
    model = new_model(ModelConfig(str(tmp_path / "model-export"), num_labels=2))
    weights = trained.encoder.state_dict()
    assert model.encoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(values, weights[name]) for name, values in model.encoder.state_dict().items())
    assert "final_norm_scale" not in model.config.encoder.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "pooling"), [("bert", "cls"), ("electra", "cls"), ("modernbert", "mean")])
def test_half_precision_costs_no_more_than_it_costs_ours(name, pooling, dtype):
    model = build(name, pooling, 7, width=768)
    native = native_model(model)
    input_ids = torch.randint(5, 1367, (32, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.randint(5, 21, (32, 1), generator=torch.Generator().manual_seed(1))).long()
    with torch.inference_mode():
        exact = model(input_ids, mask).logits
        ours, theirs = (each.to(dtype)(input_ids=input_ids, attention_mask=mask).logits.float()
                        for each in (model, native))
    error, others = ((logits - exact).abs().mean() for logits in (ours, theirs))
    assert others < 2 * error + 1e-3
    assert (theirs.argmax(1) != exact.argmax(1)).sum() <= (ours.argmax(1) != exact.argmax(1)).sum() + 2


def test_what_cannot_be_exported_is_refused_with_another_way(tmp_path, monkeypatch):
    make(tmp_path, "bert", "mean", 2)
    result = export(tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "bert reads the first token, and this model the mean over all of them" in result.stderr
    assert result.stderr.endswith("train it with model_config.pooling=cls; or export it with --format onnx\n")
    assert not (tmp_path / "model-export").exists()
    assert problem_of(build("distilbert", "cls", 16, width=32)) is None
    assert "room for 16 classes, and this model has 17" in problem_of(build("distilbert", "cls", 17, width=32))
    monkeypatch.delitem(native_heads.HEADS, "bert")
    assert "transformers has no classifier for bert" in problem_of(build("bert"))


def test_this_project_reads_its_export_as_it_was_cut_in_training(tmp_path, cpu):
    make(tmp_path, "modernbert", "mean", 2)
    write_json(tmp_path / "model" / "threshold.json", {"aim": "f1", "threshold": 0.25})
    assert export(tmp_path).returncode == 0
    config = load_config(PROJECT / "config.yaml", ["train_config.device=cpu", "data_config.max_len=64"])
    devices = Devices(config)
    ours, exported = (Classifier(tmp_path / name, config, devices) for name in ("model", "model-export"))
    assert exported.encode.room == ours.encode.room == 38  # not config.yaml's 64 tokens
    assert open_classifier(tmp_path / "model-export", config, devices).threshold == 0.25
    expected = ours.logits(TEXTS)
    unit = {"fp32": 5e-5, "bf16": torch.finfo(torch.bfloat16).eps * np.abs(expected).max()}  # of the last place
    np.testing.assert_allclose(exported.logits(TEXTS), expected, atol=unit[cpu])


def test_other_readers_find_the_keys_that_they_look_for_and_an_export_can_be_exported_again(tmp_path):
    wanted = {"modernbert": {"global_attn_every_n_layers": 2, "global_rope_theta": 160_000.0,
                             "local_rope_theta": 10_000.0, "num_labels": 2, "classifier_pooling": "cls"},
              "deberta-v3": {"pooler_hidden_size": 64, "pooler_hidden_act": "gelu", "num_labels": 2},
              "bert": {"position_embedding_type": "absolute"}}
    for name, keys in wanted.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name, name, "cls", 2)
        tokenizer = tmp_path / name / "model" / "tokenizer_config.json"
        write_json(tokenizer, read_json(tokenizer) | {"max_length": 8})  # as all-MiniLM-L6-v2 has one of its own
        assert export(tmp_path / name).returncode == 0
        folder = tmp_path / name / "model-export"
        config = json.loads((folder / "config.json").read_text())
        assert {key: config.get(key) for key in keys} == keys
        assert "auto_map" not in config
        assert not list(folder.glob("*.py"))
        assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 40
        tokenizer = read_json(folder / "tokenizer_config.json")
        assert (tokenizer["model_max_length"], tokenizer.get("max_length")) == (40, None)
    again = run_here("train_config.device=cpu", mode="export", model=str(folder), formats=("transformers",))
    assert again.returncode == 0, again.stderr
    assert (folder.with_name("model-export-export") / "model.safetensors").read_bytes() == (
        folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("truncation", ["head", "tail", "windows"])
def test_a_cut_that_others_do_not_know_is_said(tmp_path, truncation):
    make(tmp_path, "bert", "cls", 2)
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text()) | {"truncation": truncation}
    config.write_text(json.dumps(values))
    result = export(tmp_path)
    card = (tmp_path / "model-export" / "README.md").read_text()
    warned = truncation != "head"
    assert ("please note:" in result.stdout, "**Please note:**" in card) == (warned, warned)


def test_a_model_that_differs_gets_no_name(tmp_path, monkeypatch):
    make(tmp_path, "bert", "cls", 2)
    monkeypatch.setattr(native_heads, "TANH", 2.0 ** -4)  # a scale at which tanh bends
    with pytest.raises(RuntimeError, match=r"differs from PyTorch's by \S+ in a logit"):
        export(tmp_path)
    assert not list(tmp_path.glob("model-export*"))
