"""Windows: a long review is read whole, and the review, never the window, is the sample."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from accumulation_worker import explicit_data
from conftest import PROJECT, differing_files, stop_at, train_here, write_reviews
from scipy.special import softmax
from tokenizers import Tokenizer

import main
from data import Encode, evaluation_loader, prepare_data, truncate
from model import mean_over_windows
from suite.common.devices import Devices
from suite.encoders.loading import load_model
from suite.encoders.placement import pass_tokens
from suite.encoders.tokenizers import load_tokenizer
from suite.inference.classifier import Classifier
from suite.reviews.sampling import cut
from suite.training.run import Run
from utils import load_config

WINDOWS = ["data_config.truncation=windows", "data_config.max_len=12", "data_config.max_windows=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    """(overrides, run folder) of a finished run whose reviews are 1 to 4 windows, of which at most 3 are read."""
    folder = tmp_path_factory.mktemp("windows")
    write_reviews(folder / "reviews.csv")
    overrides = [
        f"output_dir={folder / 'runs'}", f"model_config.model_name={encoder_folder('bert')}",
        f"data_config.dataset={folder / 'reviews.csv'}", "data_config.text_column=review",
        "data_config.label_column=verdict", "data_config.batch_size=16", "train_config.epochs=2",
        "train_config.learning_rate=0.003", "train_config.mixed_precision=bf16", "train_config.device=cpu",
        "train_config.save_every_steps=4", "log_config.wandb_mode=disabled", *WINDOWS]
    train_here(*overrides, "run_name=run")
    return overrides, folder / "runs" / "run"


def opened(overrides: list[str]) -> Run:
    config = load_config(PROJECT / "config.yaml", overrides)
    return Run.open(config, Devices(config))


# ---------------------------------------------------------------------------------------------------------------------
# How a review is cut


@pytest.mark.parametrize("most", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20, 21, 29, 31, 40, 1000])
def test_as_few_windows_as_the_review_needs_and_evenly_cut(count, most):
    tokens = list(range(count))
    windows = truncate(tokens, 10, "windows", most)
    lengths = list(map(len, windows))
    assert len(windows) == max(1, min(-(-count // 10), most))
    assert max(lengths) <= 10
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths)
    read = list(itertools.chain.from_iterable(windows))
    if count <= 10 * most:
        assert read == tokens
    else:  # full windows from both ends
        head = 10 * -(-most // 2)
        assert read == tokens[:head] + tokens[count - (10 * most - head):]


def test_one_long_review_costs_bounded_memory(encoder_folder):
    encode = Encode(load_tokenizer(encoder_folder("bert")), 12, "windows", 3)
    (windows,) = encode.windows(["dull " * 100_000])
    assert [len(window) for window in windows] == [12, 12, 12]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
@pytest.mark.parametrize("pass_tokens", [math.inf, 25])
def test_no_pass_holds_more_windows_than_asked_for_or_one_review(processes, batch_size, pass_tokens):
    generator = np.random.default_rng(0)
    lengths, windows = generator.integers(3, 30, 60), generator.integers(1, 6, 60)
    rounds = cut(np.arange(60), lengths, batch_size, processes, pass_tokens, windows)
    batches = [batch for round_ in rounds for batch in round_]
    assert {len(round_) for round_ in rounds} == {processes}
    assert sorted(np.concatenate([batch[batch >= 0] for batch in batches])) == list(range(60))
    assert all(windows[batch].sum() <= batch_size or len(batch) == 1 for batch in batches if batch[0] >= 0)


def test_the_cut_is_the_one_of_least_work():
    lengths, windows = np.array([9, 38, 11, 40, 8, 39, 7, 12, 37]), np.array([1, 3, 1, 4, 1, 3, 1, 2, 3])

    def work(groups):
        return sum(windows[group].sum() * lengths[group].max() + 25 for group in groups)

    found = [round_[0] for round_ in cut(np.arange(9), lengths, 6, 1, 25, windows)]
    order = np.argsort(-lengths)
    every_cut = (np.split(order, [place for place in range(1, 9) if mask >> place & 1]) for mask in range(0, 512, 2))
    assert work(found) == min(work(groups) for groups in every_cut
                              if all(windows[group].sum() <= 6 for group in groups))


# ---------------------------------------------------------------------------------------------------------------------
# The review is the sample


def test_the_logits_of_a_review_are_the_mean_over_its_windows(encoder_folder, run):
    model = load_model(run[1] / "best").eval()
    dataset = explicit_data()
    assert set(dataset.windows) == {1, 2, 3}
    rows = np.arange(40)
    batch = dataset.batch(rows)
    whole = model(batch["input_ids"], batch["attention_mask"], windows=batch["windows"]).logits
    assert whole.shape == (40, 2)
    for row in rows:
        alone = [model(torch.from_numpy(dataset.tokens[dataset.offsets[place]:dataset.offsets[place + 1]])[None]).logits
                 for place in reversed(dataset.windows_of(np.array([row])))]  # their order does not matter
        torch.testing.assert_close(whole[row], torch.cat(alone).mean(dim=0), atol=1e-5, rtol=1e-5)


def test_the_mean_has_the_gradient_of_a_mean():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    windows = torch.tensor([2, 1, 3])
    assert torch.autograd.gradcheck(lambda each: mean_over_windows(each, windows), logits)
    expected = torch.stack([part.mean(dim=0) for part in logits.split(windows.tolist())])
    torch.testing.assert_close(mean_over_windows(logits, windows), expected)


def test_reviews_of_one_window_give_the_same_bits_as_without_windows(overrides, tmp_path):
    for truncation in ("head", "windows"):
        train_here(*overrides, f"run_name={truncation}", f"data_config.truncation={truncation}",
                   "data_config.max_len=64")
    assert differing_files(tmp_path / "runs" / "head", tmp_path / "runs" / "windows") == []


def test_stopped_and_started_again_it_ends_with_the_same_bits(run, monkeypatch):
    overrides, folder = run
    stop_at(13, [*overrides, "run_name=stopped"], monkeypatch)
    assert "optimizer step 13" in train_here(*overrides, "run_name=stopped").stdout
    assert differing_files(folder, folder.with_name("stopped")) == []


def test_the_meter_counts_reviews_and_the_tokens_of_all_windows(run):
    opened_run = opened([*run[0], "run_name=meter"])
    dataset = opened_run.data.splits["train"]
    step = next(opened_run.steps_left(0))
    opened_run.after_step(step, torch.zeros(()), torch.zeros(()))
    assert opened_run.meter.reviews == 16
    assert opened_run.meter.tokens == sum(np.diff(dataset.offsets)[dataset.windows_of(step.rows)])
    assert opened_run.meter.tokens > 16 * 12


# ---------------------------------------------------------------------------------------------------------------------
# A trained model


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_prediction_has_the_logits_of_evaluation_to_the_last_bit(run, precision, monkeypatch):
    monkeypatch.setattr("suite.reviews.sampling.CHUNK_ROWS", 32)  # more chunks than one
    arguments = [*run[0], f"train_config.mixed_precision={precision}", "data_config.split=[0.1,0.8,0.1]"]
    config = load_config(PROJECT / "config.yaml", arguments)
    data, devices = prepare_data(config, trained_model=str(run[1] / "best")), Devices(config)
    classifier = Classifier(run[1] / "best", config, devices)
    loader = evaluation_loader(data, "valid", config, devices.device, pass_tokens(classifier.model, devices.device))
    predictions = main.evaluate(classifier.model, loader, devices, "evaluation")
    classifier.model.eval()
    classifier.cast_weights()  # `predict` casts them once, evaluation in each pass
    texts = [data.splits["valid"].text(review) for review in predictions.ids]
    assert len(texts) == 160
    assert np.array_equal(classifier.probabilities(texts), softmax(predictions.logits.astype(float), axis=1))


def test_the_model_s_folder_says_how_reviews_are_cut(run):
    config = load_model(run[1] / "best").config
    assert (config.truncation, config.max_len, config.max_windows) == ("windows", 12, 3)
    card = (run[1] / "best" / "README.md").read_text()
    assert "at most 3 windows of at most 12 tokens" in card
    assert "transformers' pipeline, read its first window" in card


def test_an_exported_model_s_windows_are_averaged_as_the_documentation_says(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = load_config(PROJECT / "config.yaml", [*run[0], "train_config.mixed_precision=no"])
    devices = Devices(config)
    main.main(main.cli.Command("export", config, str(run[1] / "best"), output=str(tmp_path / "export")))
    documented = {"numpy": np, "session": onnxruntime.InferenceSession(tmp_path / "export" / "onnx" / "model.onnx"),
                  "config": json.loads((tmp_path / "export" / "config.json").read_text()),
                  "tokenizer": Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))}
    documented["tokenizer"].enable_truncation(12)  # as the documentation does for truncation: head
    documentation = (PROJECT / "docs" / "inference.md").read_text(encoding="utf-8")
    exec(re.search(r"^tokenizer.no_truncation.*?(?=^```)", documentation, re.MULTILINE | re.DOTALL)[0], documented)
    texts = ["dull " * 60, "a gripping film", "moving and delightful with some people " * 3]
    expected = Classifier(run[1] / "best", config, devices).probabilities(texts)
    found = np.concatenate([documented["logits_of"](text) for text in texts])
    np.testing.assert_allclose(softmax(found, axis=1), expected, atol=1e-5)
