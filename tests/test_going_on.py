"""A run that goes on from an earlier run's best model takes its weights exactly, says which, and never validates or
tests on a text that the model was trained on."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import expect, run_here, train_here, write_reviews
from safetensors.torch import load_file

from suite.encoders.loading import load_model, new_model
from suite.encoders.tokenizers import load_tokenizer
from utils import ModelConfig


@pytest.fixture(scope="module")
def earlier(undisturbed):
    return undisturbed[1] / "best"


@pytest.fixture
def going_on(undisturbed, earlier, tmp_path):
    """going_on(*overrides): a run on the earlier run's data that goes on from it."""
    def train(*more: str, code: int = 0, **options):
        return train_here(*undisturbed[0], f"output_dir={tmp_path / 'runs'}", f"model_config.model_name={earlier}",
                          "train_config.max_steps=2", "train_config.test=false", "run_name=next", *more, code=code,
                          **options)
    return train


# ---------------------------------------------------------------------------------------------------------------------
# Promise: the model that is trained is the checkpoint's


def test_encoder_and_head_are_the_earlier_models(earlier, capsys):
    weights = load_file(earlier / "model.safetensors")
    model = new_model(ModelConfig(str(earlier), pooling="mean"), ["bad", "good"])
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert f"{earlier}: going on from its encoder and its head\n" == capsys.readouterr().out


@pytest.mark.parametrize(("settings", "names", "words"), [
    ({"pooling": "cls"}, ["bad", "good"], "a new head, because it was trained with pooling=mean"),
    ({"pooling": "mean"}, ["good", "bad"], "a new head, because its classes are bad, good"),
    ({"pooling": "mean", "num_labels": 3}, ["a", "b", "c"], "a new head, because its classes are bad, good")])
def test_a_head_for_something_else_is_drawn_anew(earlier, capsys, settings, names, words):
    model, trained = new_model(ModelConfig(str(earlier), **settings), names), load_model(earlier)
    assert words in capsys.readouterr().out
    assert model.head.weight.shape == (len(names), 32)
    assert not torch.equal(model.head.weight[:2], trained.head.weight)
    inputs = torch.randint(5, 1200, (2, 12))
    with torch.no_grad():  # with cls, the new model's last layer computes the first token alone
        hidden, expected = (each.eval().encoder(inputs).last_hidden_state for each in (model, trained))
    torch.testing.assert_close(hidden, expected[:, :1] if model.reads_first_token else expected)


def test_such_a_run_trains_and_its_model_is_one_like_any_other(going_on, earlier, tmp_path):
    out = going_on("train_config.learning_rate=0.001").stdout
    assert f"{earlier}: going on from its encoder and its head" in out
    best = tmp_path / "runs/next/best"
    before, after = (load_file(folder / "model.safetensors") for folder in (earlier, best))
    assert all(not torch.equal(before[name], after[name]) for name in ("head.weight", "head.bias"))
    assert all(torch.isclose(before[name], after[name], atol=0.02).all() for name in before)  # two small steps away
    assert str(earlier.parent) not in (best / "config.json").read_text()
    for mode, options in (("test", {}), ("explain", {"text": "dull and dreary"}), ("predict", {"text": "moving"}),
                          ("export", {"formats": ("onnx",), "output": str(tmp_path / "exported")})):
        expect(0, run_here(mode=mode, config=tmp_path / "runs/next/config.yaml", **options))


def test_a_damaged_model_and_a_length_beyond_its_encoders_are_refused(going_on, earlier, tmp_path):
    damaged = shutil.copytree(earlier, tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    assert "damaged" in going_on(f"model_config.model_name={damaged}", code=2).stderr
    with pytest.raises(Exception, match="takes at most 66 tokens"):
        going_on("data_config.max_len=67")
    result = going_on("model_config.model_name=" + str(earlier), code=2, mode="pretrain")
    assert "is a trained classifier" in result.stderr


def test_the_rule_for_line_breaks_is_taken_once(going_on, tmp_path):
    going_on("data_config.line_breaks=space", "run_name=spaced")
    model = f"model_config.model_name={tmp_path / 'runs/spaced/best'}"
    for line_breaks, words in (("space", False), ("keep", True)):
        out = going_on(model, f"data_config.line_breaks={line_breaks}", f"run_name={line_breaks}").stdout
        assert ("reads <br /> as a space, as in its own training" in out) == words
        files = [(tmp_path / "runs" / run / "best/tokenizer.json").read_text() for run in ("spaced", line_breaks)]
        assert files[0] == files[1]
    assert load_tokenizer(str(tmp_path / "runs/keep/best"))("a<br />b")["input_ids"] == load_tokenizer(
        str(tmp_path / "runs/spaced/best"))("a b")["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# Promise: no text stands in two splits, not even in those of two runs that follow each other


def test_another_split_of_the_same_reviews_is_refused(going_on):
    error = going_on("data_config.split_seed=1", code=2).stderr
    assert "texts that are validated or tested on here" in error
    assert "give data_config the values of its training" in error


def test_texts_of_all_earlier_trainings_count(going_on, undisturbed, tmp_path):
    other = write_reviews(tmp_path / "other.csv", seed=7)
    going_on(f"data_config.dataset={other}", "run_name=second")
    second = tmp_path / "runs/second/best"
    assert len(np.load(second / "training_texts.npy")) == 320
    error = going_on(f"model_config.model_name={second}", "data_config.split_seed=1", code=2).stderr
    assert "texts that are validated or tested on here" in error
    going_on(f"model_config.model_name={second}")  # on the first run's split, nothing of it was trained on


def test_a_model_that_does_not_say_its_texts_is_taken_with_a_line(going_on, earlier, encoder_folder, tmp_path):
    unknown = shutil.copytree(earlier, tmp_path / "unknown")  # as earlier versions have written it
    for name in ("training_texts.npy", "manifest.json"):
        (unknown / name).unlink()
    model = f"model_config.model_name={unknown}"
    assert "too high" not in going_on(model, "run_name=same").stdout  # the same data and split by its config.json
    out = going_on(model, "data_config.split_seed=1", "run_name=other").stdout
    assert "has no training_texts.npy" in out
    assert "the accuracy is too high" in out
    plain = shutil.copytree(encoder_folder("bert"), tmp_path / "plain")  # as an export is written
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"data_fingerprint": "of other data"}))
    assert "the accuracy is too high" in going_on(f"model_config.model_name={plain}", "run_name=plain").stdout
