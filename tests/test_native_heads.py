"""--format transformers: the same logits from transformers' own classifiers, in a program that knows only them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENCODERS, PROJECT, SHARED, SMALL, run_here
from transformers import AlbertConfig, AutoModel, AutoTokenizer, DebertaConfig, MPNetConfig, XLMRobertaConfig

from model import EncoderForClassification
from suite.encoders import native_heads
from suite.encoders.loading import new_model, save_model
from suite.encoders.native_heads import native_model, problem_of
from suite.encoders.tokenizers import load_tokenizer
from suite.inference.classifier import Classifier
from suite.training.devices import SingleDevice
from utils import ModelConfig, load_config

FAMILIES = ENCODERS | {
    "albert": AlbertConfig(**SMALL, embedding_size=16), "mpnet": MPNetConfig(**SMALL | {"pad_token_id": 1}),
    "xlm-roberta": XLMRobertaConfig(**SMALL | {"pad_token_id": 1, "type_vocab_size": 1}),
    "deberta": DebertaConfig(**SMALL, type_vocab_size=0, relative_attention=True, position_biased_input=False,
                             pos_att_type=["p2c", "c2p"])}
CLASSES = (2, 7, 20)
CASES = [(name, "cls", classes) for name in FAMILIES for classes in CLASSES] + [
    ("modernbert", "mean", classes) for classes in CLASSES]
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


def make(folder, name: str, pooling: str, classes: int, width: int = 64) -> EncoderForClassification:
    """A model folder with a head as large as training makes it; returns the model in eval mode."""
    torch.manual_seed(1)
    sizes = {"dim" if name == "distilbert" else "hidden_size": width, "vocab_size": 1367}
    encoder = folder / "encoder"
    AutoModel.from_config(type(FAMILIES[name]).from_dict(FAMILIES[name].to_dict() | sizes)).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(PROJECT / "demo" / "bert").save_pretrained(encoder)
    names = [f"class {label}" for label in range(classes)]
    model = new_model(ModelConfig(str(encoder), num_labels=classes, pooling=pooling), names).eval()
    model.head.weight.data *= 50
    model.head.bias.data.normal_()
    model.config.max_len, model.config.truncation = 40, "head"
    save_model(folder / "model", model.config, model.state_dict(), load_tokenizer(str(encoder)))
    return model


def export(folder, *more: str, formats=("transformers",)):
    return run_here("train_config.device=cpu", *more, mode="export", model=str(folder / "model"), formats=formats)


def is_long(name: str, classes: int) -> bool:
    """One family of each kind of head is always tested with every number of classes, the others with two."""
    return classes > 2 and name not in ("bert", "electra", "modernbert")


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory, request):
    """{(family, pooling, classes): (class of transformers, its logits (texts, classes), ours)}"""
    expected, folders = {}, {}
    for name, pooling, classes in CASES:
        if is_long(name, classes) and not request.config.getoption("--long"):
            continue
        folder = tmp_path_factory.mktemp(f"{name}-{classes}")
        model = make(folder, name, pooling, classes)
        result = export(folder)
        assert result.returncode == 0, result.stderr
        folders[name, pooling, classes] = str(folder / "model-export")
        inputs = AutoTokenizer.from_pretrained(folder / "model")(TEXTS, truncation=True, padding=True,
                                                                 return_tensors="pt")
        with torch.inference_mode():
            logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        expected[name, pooling, classes] = logits.numpy()
    done = subprocess.run([sys.executable, "-c", READER, json.dumps(TEXTS), *folders.values()], capture_output=True,
                          text=True, cwd=tmp_path_factory.mktemp("elsewhere"), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {case: (found[folder][0], np.array(found[folder][1]), expected[case]) for case, folder in folders.items()}


@pytest.mark.parametrize(("name", "pooling", "classes"), [
    pytest.param(*case, marks=[pytest.mark.long] * is_long(case[0], case[2])) for case in CASES])
def test_a_program_that_knows_only_transformers_computes_the_same(read_elsewhere, name, pooling, classes):
    kind, logits, expected = read_elsewhere[name, pooling, classes]
    assert kind.endswith("ForSequenceClassification")
    assert kind != "EncoderForClassification"
    assert logits.shape == expected.shape == (len(TEXTS), classes)
    assert np.ptp(expected, axis=0).max() > 0.1  # these texts do differ
    np.testing.assert_allclose(logits, expected, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "pooling"), [("bert", "cls"), ("electra", "cls"), ("modernbert", "mean")])
def test_half_precision_costs_no_more_than_it_costs_ours(tmp_path, name, pooling, dtype):
    model = make(tmp_path, name, pooling, 7, width=768)
    native = native_model(model)
    input_ids = torch.randint(5, 1367, (64, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.randint(5, 41, (64, 1), generator=torch.Generator().manual_seed(1))).long()
    with torch.inference_mode():
        exact = model(input_ids, mask).logits
        ours, theirs = (each.to(dtype)(input_ids=input_ids, attention_mask=mask).logits.float()
                        for each in (model, native))
    error, others = ((logits - exact).abs().mean() for logits in (ours, theirs))
    assert others < 2 * error + 1e-3
    assert (theirs.argmax(1) != exact.argmax(1)).sum() <= (ours.argmax(1) != exact.argmax(1)).sum() + 2


def test_what_cannot_be_said_is_refused_with_another_way(tmp_path):
    make(tmp_path, "bert", "mean", 2)
    result = export(tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "bert reads the first token, and this model the mean over all of them" in line
    assert line.endswith("train it with model_config.pooling=cls; or export it with --format onnx")
    assert not (tmp_path / "model-export").exists()


def test_more_classes_than_the_head_has_rows_are_refused(tmp_path):
    assert problem_of(make(tmp_path, "distilbert", "cls", 16, width=32)) is None
    (tmp_path / "more").mkdir()
    model = make(tmp_path / "more", "distilbert", "cls", 17, width=32)
    assert "room for 16 classes, and this model has 17" in problem_of(model)


def test_an_unknown_family_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(native_heads.HEADS, "bert")
    assert "transformers has no classifier for bert" in problem_of(make(tmp_path, "bert", "cls", 2))


def test_this_project_reads_its_export_as_it_was_cut_in_training(tmp_path, cpu):
    make(tmp_path, "modernbert", "mean", 2)
    assert export(tmp_path).returncode == 0
    config = load_config(PROJECT / "config.yaml", ["train_config.device=cpu", "data_config.max_len=64"])
    devices = SingleDevice(config)
    ours, exported = (Classifier(tmp_path / name, config, devices) for name in ("model", "model-export"))
    assert exported.encode.room == ours.encode.room == 38  # not config.yaml's 64 tokens
    expected = ours.logits(TEXTS)
    unit = {"fp32": 5e-5, "bf16": torch.finfo(torch.bfloat16).eps * np.abs(expected).max()}  # of the last place
    np.testing.assert_allclose(exported.logits(TEXTS), expected, atol=unit[cpu])


def test_an_export_can_be_exported_again(tmp_path):
    make(tmp_path, "bert", "cls", 2)
    assert export(tmp_path).returncode == 0
    again = run_here("train_config.device=cpu", mode="export", model=str(tmp_path / "model-export"),
                     formats=("transformers",))
    assert again.returncode == 0, again.stderr
    first, second = ((tmp_path / name / "model.safetensors").read_bytes()
                     for name in ("model-export", "model-export-export"))
    assert first == second


def test_other_readers_find_the_keys_that_they_look_for(tmp_path):
    wanted = {"modernbert": {"global_attn_every_n_layers": 2, "global_rope_theta": 160_000.0,
                             "local_rope_theta": 10_000.0, "num_labels": 2, "classifier_pooling": "cls"},
              "deberta-v3": {"pooler_hidden_size": 64, "pooler_hidden_act": "gelu", "num_labels": 2}}
    for name, keys in wanted.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name, name, "cls", 2)
        assert export(tmp_path / name).returncode == 0
        folder = tmp_path / name / "model-export"
        config = json.loads((folder / "config.json").read_text())
        assert {key: config.get(key) for key in keys} == keys
        assert "auto_map" not in config
        assert not list(folder.glob("*.py"))
        assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 40


@pytest.mark.parametrize("truncation", ["head", "head_tail", "windows"])
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


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="no trained encoder at hand")
def test_minilm_says_the_same(tmp_path):
    encoder = str(SHARED / "models" / "all-MiniLM-L6-v2")
    torch.manual_seed(0)
    model = new_model(ModelConfig(encoder), ["bad", "good"]).eval()
    model.config.max_len = 128
    save_model(tmp_path / "model", model.config, model.state_dict(), load_tokenizer(encoder))
    result = export(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "model.safetensors: on" in result.stdout
