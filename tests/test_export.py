"""The exported model: PyTorch's logits from ONNX Runtime for every family, checked or not there at all."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENCODERS, PROJECT
from tokenizers import Tokenizer
from transformers import AutoTokenizer

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

import main
from suite.common import cli
from suite.common.devices import Devices
from suite.common.storage import read_json, write_json
from suite.encoders.loading import load_model, new_model, save_model
from suite.encoders.tokenizers import load_tokenizer
from suite.inference import export
from suite.inference.classifier import Classifier
from utils import ModelConfig, UserError, load_config

TEXTS = ["word", "a gripping and moving film", "dull dreary pointless " * 40]


def save(folder, encoder: str, pooling: str = "cls"):
    """A model folder; returns the model in eval mode."""
    torch.manual_seed(1)
    model = new_model(ModelConfig(model_name=encoder, pooling=pooling), ["bad", "good"]).eval()
    model.head.weight.data *= 100  # these reviews' hidden states are much alike
    model.config.max_len, model.config.truncation = 40, "head"
    save_model(folder, model.config, model.state_dict(), load_tokenizer(encoder))
    return model


def run_export(model, output=None):
    config = load_config("config.yaml", ["train_config.device=cpu"])
    main.main(cli.Command("export", config, str(model), output=output and str(output)))


@pytest.fixture
def bert(tmp_path, encoder_folder):
    save(tmp_path / "model", encoder_folder("bert"))
    return tmp_path / "model"


def cases():
    usual = {"modernbert-mean"}  # test_quantize.py exports a BERT, too
    for name in ENCODERS:
        for pooling in ("cls", "mean"):
            case = f"{name}-{pooling}"
            yield pytest.param(name, pooling, id=case, marks=() if case in usual else pytest.mark.long)


@pytest.mark.parametrize(("name", "pooling"), list(cases()))
def test_a_program_without_pytorch_computes_the_same(encoder_folder, tmp_path, name, pooling, capfd):
    model = save(tmp_path / "model", encoder_folder(name), pooling)
    capfd.readouterr()
    run_export(tmp_path / "model")
    printed = capfd.readouterr()
    assert printed.err == ""  # none of the exporter's remarks
    assert len(printed.out.splitlines()) == 2
    folder = tmp_path / "model-export"
    config = json.loads((folder / "config.json").read_text())
    expected = {"id2label": {"0": "bad", "1": "good"}, "truncation": "head", "max_len": 40, "max_windows": 1}
    assert {key: config[key] for key in expected} == expected
    assert config["model_type"] == ENCODERS[name].model_type  # by which transformers.js finds its class
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"]  # the weights are in it
    content = (folder / "onnx" / "model.onnx").read_bytes()
    assert not any(str(path).encode() in content for path in (PROJECT, Path(torch.__file__).parent))  # for publishing
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, truncation=True, max_length=config["max_len"], padding=True, return_tensors="np")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert inputs["input_ids"].shape == (3, 40)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    assert [axis.shape for axis in session.get_inputs()] == [["batch", "tokens"]] * 2
    logits, = session.run(["logits"], inputs)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_model_that_differs_gets_no_name(bert, monkeypatch):
    """What is read back from the file has to compute the same, or no folder is left."""
    model = load_model(bert).eval()

    def drifting(input_ids, attention_mask):  # right for everything but long inputs
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=logits + 2e-4 * (input_ids.shape[1] == 40))

    monkeypatch.setattr(export, "write_onnx", lambda model, path: path.write_bytes(b"a graph"))
    monkeypatch.setattr(export, "OnnxModel", lambda path, config: drifting)
    before = sorted(bert.parent.rglob("*"))
    with pytest.raises(RuntimeError, match="differs from PyTorch's by 2.0e-04 in a logit.* x 40 tokens"):
        run_export(bert)
    assert sorted(bert.parent.rglob("*")) == before


def test_the_check_reads_every_size_and_length(bert):
    config = load_config("config.yaml", ["train_config.device=cpu"])
    encode = Classifier(bert, config, Devices(config)).encode
    batches = list(export.check_batches(encode))
    assert {len(rows) for rows in batches} == set(export.BATCHES)
    lengths = {len(row) - 2 for rows in batches for row in rows}
    assert {1, 2, 4, 8, 16, 32, 38} <= lengths
    assert max(lengths) == encode.room == 38
    assert any(len({len(row) for row in rows}) > 3 for rows in batches)  # ragged


def test_a_full_disk_is_named_by_the_output(bert, tmp_path, monkeypatch):
    config = load_config("config.yaml", ["train_config.device=cpu"])
    command = cli.Command("export", config, str(bert), output=str(tmp_path / "elsewhere" / "onnx"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=f"{tmp_path / 'elsewhere'}: no room to write .* make room or choose another "
                                        "--output$"):
        export.export(command, Devices(config))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_export_reads_a_text_as_the_model_does(bert):
    """transformers builds BertTokenizer by its class; others read tokenizer.json, which may differ."""
    values, config = (read_json(bert / f"tokenizer{name}.json") for name in ("", "_config"))
    write_json(bert / "tokenizer.json", values | {"normalizer": None})
    write_json(bert / "tokenizer_config.json", config | {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    run_export(bert)
    text, exported = "A GREAT Film", bert.with_name("model-export")
    expected = load_tokenizer(bert)(text)["input_ids"]
    assert Tokenizer.from_file(str(bert / "tokenizer.json")).encode(text).ids != expected
    assert Tokenizer.from_file(str(exported / "tokenizer.json")).encode(text).ids == expected
    assert read_json(exported / "tokenizer_config.json")["truncation_side"] == "right"


@pytest.mark.parametrize("problem", ["exists", "no packages", "not exportable"])
def test_what_cannot_be_exported_is_one_line(bert, tmp_path, monkeypatch, problem):
    if problem == "exists":
        (tmp_path / "model-export").mkdir()
        expected = "--output: .*model-export exists already: choose another name, or remove it"
    elif problem == "no packages":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        expected = "--mode export needs onnxruntime: pip install -r requirements-onnx.txt"
    else:
        def fails(*arguments, **options):
            raise torch.onnx.OnnxExporterError("a branch that depends on the data")

        monkeypatch.setattr(torch.onnx, "export", fails)
        expected = r"torch 2\S+ cannot export a bert model \(.*\): use it in PyTorch, or train another encoder"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=expected) as caught:
        run_export(bert)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
