"""Gradient checkpointing: the same bits whether a layer's values are kept or computed again, dropout included."""

import json

import pytest
import torch
from conftest import ENCODERS, differing_files, launch, stop_at, train_here
from test_model import batch, build
from transformers import MPNetConfig

from suite.common.devices import Devices
from suite.encoders.placement import checkpoint_gradients, place_model
from suite.encoders.tokenizers import load_tokenizer
from utils import Config, TrainConfig

ON = "train_config.gradient_checkpointing=true"


def gradients(folder: str, pooling: str, precision: str, checkpointed: bool) -> tuple[dict, torch.Tensor, int]:
    """After a forward and backward pass with dropout: the gradients, the random generator's state, and how many numbers
    were kept in between."""
    devices = Devices(Config(train_config=TrainConfig(device="cpu", mixed_precision=precision)))
    model = build(folder, pooling=pooling, dropout_rate=0.2, encoder_dropout=0.2).train()
    place_model(model, devices.device)
    if checkpointed:
        checkpoint_gradients(model, folder)
    (inputs, labels), kept = batch(model.encoder.config.pad_token_id or 0), 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), devices.autocast():
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}, torch.get_rng_state(), kept


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", ENCODERS)
def test_less_is_kept_and_the_gradients_are_the_same_bits(encoder_folder, name, pooling, precision):
    plain, generator, kept = gradients(encoder_folder(name), pooling, precision, checkpointed=False)
    again, generator_again, kept_again = gradients(encoder_folder(name), pooling, precision, checkpointed=True)
    assert kept_again < 0.75 * kept
    assert [weight for weight in plain if not torch.equal(plain[weight], again[weight])] == []
    assert torch.equal(generator, generator_again)  # the next step's dropout is the same, too


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_run_that_goes_on_with_it_ends_with_the_same_bits(overrides, encoder_folder, tmp_path, monkeypatch, name):
    arguments = [*overrides, f"model_config.model_name={encoder_folder(name)}", "model_config.pooling=cls",
                 "model_config.encoder_dropout=0.2"]

    stop_at(1, [*arguments, "run_name=stopped"], monkeypatch)
    assert "continuing from" in train_here(*arguments, "run_name=stopped", ON).stdout
    train_here(*arguments)
    assert differing_files(tmp_path / "runs/run", tmp_path / "runs/stopped") == []


def test_two_processes_end_with_the_same_bits(overrides, tmp_path):
    launch(2, "tests/processes_worker.py", "checkpointing", str(tmp_path), *overrides, "train_config.max_steps=2",
           "train_config.effective_batch_size=64")
    for rank in "01":
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"checkpointed": [False, True], "same": True}


def test_what_cannot_be_checkpointed_is_refused(refused, encoder_folder, tmp_path):
    folder = tmp_path / "mpnet"
    MPNetConfig(vocab_size=2500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=64).save_pretrained(folder)
    load_tokenizer(encoder_folder("bert")).save_pretrained(folder)
    message = refused(f"model_config.model_name={folder}", "model_config.pretrained=false", ON)
    assert f"transformers cannot do this for {folder}, a mpnet model" in message
    assert "set one of them to false" in refused("train_config.compile=true", ON)
