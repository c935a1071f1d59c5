"""Evaluation in bf16 on a CPU: its logits are those of float64 as closely as under autocast, of the weights as they are
now; and where it cannot be, transformers' own layers take its place.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ENCODERS, train_here
from test_model import batch, build

from suite.common.devices import Devices
from suite.encoders import cpu_kernels, evaluation_pass
from suite.encoders.evaluation_pass import PackedLayer, arithmetic, attend, packed_layers
from suite.encoders.loading import load_encoder_config
from suite.encoders.masked_lm import new_masked_lm
from suite.encoders.placement import compute_logits, place_model
from suite.inference import labelling
from utils import Config, ModelConfig, TrainConfig

BF16, FP32 = (Devices(Config(train_config=TrainConfig(device="cpu", mixed_precision=precision)))
              for precision in ("bf16", "no"))
needs_operators = pytest.mark.skipif(not evaluation_pass.has_operators(), reason="torch packs no bf16 weights here")


def logits_of(model, inputs, devices=BF16, **more) -> np.ndarray:
    reviews = len(more.get("windows", inputs["input_ids"]))
    ids = torch.arange(reviews)
    return compute_logits(model, [{"id": ids, "labels": ids, **inputs, **more}], reviews, devices)[2]


@pytest.fixture
def packed_calls(monkeypatch) -> list:
    """One entry for each packed layer that is computed."""
    calls, own = [], PackedLayer.__call__
    monkeypatch.setattr(PackedLayer, "__call__", lambda *given: calls.append(1) or own(*given))
    return calls


def placed(folder: str, **settings):
    model = build(folder, **settings).eval()
    with torch.no_grad():  # of weights that make the scores of attention differ
        for weights in model.encoder.encoder.parameters():
            if weights.dim() == 2:
                weights *= 5
    place_model(model, torch.device("cpu"))
    return model


def exact(model, inputs, **more) -> np.ndarray:
    """In float64, by transformers' own layers."""
    model.double()
    model.encoder.config._attn_implementation = "sdpa"
    with torch.no_grad():
        logits = model(**inputs, **more).logits.numpy()
    model.float().encoder.config._attn_implementation = "sdpa_cpu"
    return logits


@needs_operators
@pytest.mark.parametrize("has_amx", [False, True])  # attention by blocks, and by torch
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_logits_are_as_exact_as_under_autocast(encoder_folder, name, pooling, has_amx, packed_calls, monkeypatch):
    monkeypatch.setattr(evaluation_pass, "has_fast_fused_attention", lambda: has_amx)
    model = placed(encoder_folder(name), pooling=pooling)
    model.head.weight.data *= 20
    inputs, _ = batch(ENCODERS[name].pad_token_id)
    whole = {"input_ids": torch.randint(5, 1200, (4, 20), generator=torch.Generator().manual_seed(4))}
    for given, more in ((inputs, {}), (whole, {}), (inputs, {"windows": torch.tensor([1, 2, 1])})):
        expected = exact(model, given, **more)
        packed_calls.clear()
        found = logits_of(model, given, **more)
        assert len(packed_calls) == 2
        with monkeypatch.context() as patch:
            patch.setattr(evaluation_pass, "has_operators", lambda: False)
            under_autocast = logits_of(model, given, **more)
        assert len(packed_calls) == 2
        errors = [np.linalg.norm(logits - expected) / np.linalg.norm(expected) for logits in (found, under_autocast)]
        assert errors[0] < max(1.5 * errors[1], 0.02), errors


@needs_operators
def test_masked_words_are_evaluated_so_too(encoder_folder, packed_calls):
    settings = ModelConfig(model_name=encoder_folder("bert"))
    model = new_masked_lm(settings, load_encoder_config(settings)).eval()
    place_model(model, torch.device("cpu"))
    inputs, _ = batch()
    with torch.inference_mode():
        expected = model(**inputs, masked=torch.tensor([3, 25, 79])).logits
        with packed_layers(model, BF16):
            found = model(**inputs, masked=torch.tensor([3, 25, 79])).logits
    assert len(packed_calls) == 2
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@needs_operators
def test_padding_on_either_side_counts_for_nothing(encoder_folder, packed_calls):
    model, (inputs, _) = placed(encoder_folder("bert"), pooling="mean"), batch()
    turned = {name: values.flip(1) for name, values in inputs.items()}
    for given in (inputs, turned):
        other = given | {"input_ids": torch.where(given["attention_mask"] == 0, 7, given["input_ids"])}
        assert np.array_equal(logits_of(model, given), logits_of(model, other))
    assert len(packed_calls) == 8


@needs_operators
@pytest.mark.parametrize("block", [cpu_kernels.BLOCK, 500, 1])  # all reviews at once, some, and one
@pytest.mark.parametrize("tokens", [11, 1])
def test_attention_by_blocks_and_by_torch_is_the_same(monkeypatch, block, tokens):
    monkeypatch.setattr(cpu_kernels, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, count, 3, 8, dtype=torch.bfloat16, generator=generator).transpose(1, 2)
                         for count in (tokens, 11, 11))
    padding = torch.arange(11) >= torch.arange(11, 6, -1)[:, None]
    for given in (None, padding):
        by_blocks = attend(query, key, value, given)
        monkeypatch.setattr(evaluation_pass, "has_fast_fused_attention", lambda: True)
        by_torch = attend(query.double(), key.double(), value.double(), given)
        monkeypatch.setattr(evaluation_pass, "has_fast_fused_attention", lambda: False)
        assert by_blocks.shape == (5, tokens, 24)
        torch.testing.assert_close(by_blocks.double(), by_torch, atol=0.02, rtol=0.02)


@needs_operators
def test_weights_that_changed_between_two_evaluations_are_noticed(encoder_folder):
    model, (inputs, _) = placed(encoder_folder("bert")), batch()
    before = logits_of(model, inputs)
    dense = model.encoder.encoder.layer[0].output.dense
    own = dense.weight.detach().clone()
    with torch.no_grad():
        dense.weight.mul_(1.5)
    changed = logits_of(model, inputs)
    assert not np.array_equal(before, changed)
    with torch.no_grad():
        dense.weight.copy_(own)
    assert np.array_equal(before, logits_of(model, inputs))
    assert "forward" not in vars(model.encoder.encoder)  # nothing is left of it in training


@needs_operators
def test_an_evaluation_that_fails_leaves_transformers_layers(encoder_folder):
    model, (inputs, _) = placed(encoder_folder("bert")), batch()
    with pytest.raises(IndexError):
        logits_of(model, inputs | {"input_ids": inputs["input_ids"] + 10_000})
    assert "forward" not in vars(model.encoder.encoder)


def test_other_precisions_and_encoders_keep_their_pass(encoder_folder, packed_calls):
    inputs, _ = batch()
    logits_of(placed(encoder_folder("bert")), inputs, FP32)
    logits_of(build(encoder_folder("bert")).eval(), inputs)  # to be compiled
    for name in ("modernbert", "distilbert", "deberta-v3"):
        model = build(encoder_folder(name)).eval()
        place_model(model, torch.device("cpu"))
        logits_of(model, inputs)
    assert packed_calls == []
    assert arithmetic(FP32) == {} != arithmetic(BF16)


def test_a_labelling_job_is_not_continued_with_another_arithmetic(overrides, tmp_path, reviews_file, monkeypatch):
    """No labelled file is half of one version and half of another."""
    train_here(*overrides, "train_config.mixed_precision=bf16", "train_config.max_steps=2")
    monkeypatch.setattr(labelling, "CHUNK_ROWS", 64)
    job = {"mode": "predict", "input": str(reviews_file), "output": str(tmp_path / "labelled.csv")}
    calls, own = [], labelling.label

    def stopping(*given):
        calls.append(given)
        if len(calls) == 2:
            raise SystemExit(130)
        return own(*given)

    with monkeypatch.context() as patch:
        patch.setattr(labelling, "label", stopping)
        train_here(*overrides, "train_config.mixed_precision=bf16", code=130, **job)
    described = tmp_path / "labelled.csv.parts" / "job.json"
    known = json.loads(described.read_text())
    described.write_text(json.dumps({key: value for key, value in known.items() if key != "evaluation_pass"}))
    [line] = train_here(*overrides, "train_config.mixed_precision=bf16", code=2, **job).stderr.splitlines()
    assert "interrupted job with another evaluation_pass" in line
    described.write_text(json.dumps(known))
    assert "going on: 1 chunks" in train_here(*overrides, "train_config.mixed_precision=bf16", **job).stdout
