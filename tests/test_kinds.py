"""Data of other kinds: several named classes of very different sizes, other languages and scripts, remains of HTML."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from conftest import PROJECT, expect, metrics_of, run_here, train_here

import data
from suite.common.devices import Devices
from suite.encoders.tokenizers import load_tokenizer
from suite.training.run import Run
from utils import load_config

SHARES = {"film": 20, "музыка": 60, "食べ物": 100, "😀 fun": 220}  # 400 rows, named in four scripts
WORDS = {"film": "scene actor camera", "музыка": "песня голос гитара", "食べ物": "寿司 ラーメン 味",
         "😀 fun": "😀 🎉 haha"}


@pytest.fixture
def four_classes(tmp_path, overrides):
    """Settings of a run on 400 texts of four classes."""
    generator, path = random.Random(0), tmp_path / "kinds.csv"
    rows = [(name, f"{' '.join(generator.choices(WORDS[name].split(), k=5))} <br /><br />naïve Ünïcode №{number}")
            for name, count in SHARES.items() for number in range(count)]
    generator.shuffle(rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("verdict", "review"), *rows])
    return [*overrides, f"data_config.dataset={path}", "model_config.num_labels=4", "train_config.epochs=4"]


def test_four_named_classes_from_training_to_prediction(four_classes, tmp_path):
    train_here(*four_classes, "train_config.class_weights=balanced")
    run = tmp_path / "runs" / "run"
    test = metrics_of(run)["test"]
    assert test["n"] == 40
    assert test["macro_f1"] == test["f1"]  # with more than two classes, the mean over them
    assert test["accuracy"] > 220 / 400  # better than the largest class alone
    settings = json.loads((run / "best" / "config.json").read_text(encoding="utf-8"))
    assert set(settings["id2label"].values()) == set(SHARES)

    source, output = tmp_path / "kinds.csv", tmp_path / "out.csv"
    expect(0, run_here(*four_classes, mode="predict", input=str(source), output=str(output)))
    with open(source, newline="", encoding="utf-8") as before, open(output, newline="", encoding="utf-8") as after:
        given, found = list(csv.DictReader(before)), list(csv.DictReader(after))
    assert [(row["verdict"], row["review"]) for row in found] == [(row["verdict"], row["review"]) for row in given]
    assert {f"probability_{name}" for name in SHARES} < set(found[0])
    assert sum(row["predicted"] == row["verdict"] for row in found) / 400 == pytest.approx(test["accuracy"], abs=0.15)


def test_balanced_weights_make_every_class_count_the_same(four_classes):
    config = load_config(PROJECT / "config.yaml", [*four_classes, "train_config.class_weights=balanced"])
    run = Run.open(config, Devices(config))
    reviews = run.data.splits["train"]
    totals = reviews.class_weights * np.bincount(reviews.labels)
    assert totals == pytest.approx([len(reviews) / 4] * 4)
    assert run.class_weights.numpy() == pytest.approx(reviews.class_weights)


@pytest.mark.parametrize("class_weights", ["null", "balanced"])
def test_the_recorded_loss_is_the_weighted_mean(four_classes, tmp_path, class_weights):
    settings = [*four_classes, "data_config.batch_size=100", "train_config.max_steps=4", "train_config.optimizer=sgd",
                "train_config.learning_rate=1e-9", "model_config.dropout_rate=0", "model_config.encoder_dropout=0",
                "log_config.log_every_steps=4", "train_config.test=false",
                f"train_config.class_weights={class_weights}"]
    train_here(*settings)
    history = (tmp_path / "runs" / "run" / "history.jsonl").read_text().splitlines()
    config = load_config(PROJECT / "config.yaml", settings)
    config.run_name = "untrained"
    untrained = Run.open(config, Devices(config))
    reviews = untrained.data.splits["train"]
    batch = reviews.batch(np.arange(len(reviews)))
    with torch.inference_mode():
        expected = untrained.model.eval()(batch["input_ids"], batch["attention_mask"], labels=batch["labels"],
                                          class_weights=untrained.class_weights).loss
    assert json.loads(history[0])["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_line_breaks_as_spaces_in_training_and_wherever_the_model_is_used(overrides, encoder_folder, tmp_path):
    path = tmp_path / "breaks.csv"
    texts = [f"moving <br /><br />story<BR/>number {i}" for i in range(60)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("review", "verdict"), *((text, ("bad", "good")[i % 2]) for i, text in
                                                             enumerate(texts))])
    arguments = [*overrides, f"data_config.dataset={path}", "train_config.epochs=1"]
    train_here(*arguments, "train_config.test=false", "data_config.line_breaks=space", "run_name=space")
    config = load_config(PROJECT / "config.yaml", [*arguments, "data_config.line_breaks=space", "run_name=space"])
    plain = load_tokenizer(encoder_folder("bert"))
    expected = plain("moving story number 7")["input_ids"]
    best = load_tokenizer(str(config.run_folder / "best"))
    assert best(texts[7])["input_ids"] == expected
    assert plain(texts[7])["input_ids"] != expected
    read = [data.prepare_data(config, name) for name in (None, str(config.run_folder / "best"))]
    for prepared in read:
        reviews = next(split for split in prepared.splits.values() if 7 in split.ids)
        assert reviews[reviews.ids.tolist().index(7)]["input_ids"].tolist() == expected
        assert reviews.text(7) == texts[7]  # the text itself stays as it is
    expect(0, run_here(*arguments, "data_config.line_breaks=space", "run_name=space", mode="test"))
