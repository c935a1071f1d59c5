"""The real main.py on tiny data: the run folder, the best weights, the same bits, what a test of a run refuses."""

import csv
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    PROJECT,
    RESULTS,
    bits_of,
    history_of,
    metrics_of,
    rows_of,
    stop_at,
    train,
    train_here,
    write_reviews,
)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, AutoModel, BertConfig

import main
from suite.common import run_folder
from suite.common.devices import Devices
from suite.training import finish
from suite.training.meter import peak_flops, training_flops, work_of
from suite.training.run import Run, quality
from utils import UserError, load_config

FILES = RESULTS | {"config.yaml", "metrics.json", "plots/learning_curves.png", "plots/confusion_matrix.png",
                   "plots/reliability.png", "plots/risk_coverage.png"}


@pytest.mark.parametrize(("config", "reads_first"), [
    (AlbertConfig(hidden_size=64, embedding_size=16, num_attention_heads=2, intermediate_size=128,
                  num_hidden_layers=6), False),  # which passes one layer six times
    (BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=3), True)])
def test_the_flops_are_those_that_torch_counts(config, reads_first):
    with torch.device("meta"):
        model = AutoModel.from_config(config, add_pooling_layer=False)
    given = SimpleNamespace(encoder=model, reads_first_token=reads_first)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 40, dtype=torch.long, device="meta"))
    assert training_flops(work_of(given, executed=False), np.array([40, 40])) == pytest.approx(
        3 * counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None),
    ("NVIDIA RTX A1000", None), ("NVIDIA T400", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 NVL", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("Tesla V100-PCIE-16GB", 112e12), ("NVIDIA GeForce RTX 4090", 165e12)])
def test_the_peak_is_that_of_the_device_itself(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_the_run_folder_is_complete(undisturbed):
    _, folder = undisturbed
    assert {name for name in FILES if not (folder / name).is_file()} == set()
    measured = metrics_of(folder)
    assert set(measured) == {"train", "valid", "test", "data", "environment"}
    assert set(measured["train"]) == {
        "samples_per_second", "tokens_per_second", "seconds", "peak_memory_mb", "model_tflops_per_second",
        "executed_tflops_per_second", "model_flops_utilization", "executed_flops_utilization", "optimizer_steps"}
    assert set(measured["test"]) == {"loss", "accuracy", "accuracy_ci95", "precision", "recall", "f1", "macro_f1",
                                     "mcc", "roc_auc", "average_precision", "ece", "aurc", "surest_accuracy",
                                     "surest_accuracy_ci95", "n"}
    assert measured["train"]["optimizer_steps"] == 30
    assert measured["test"]["accuracy"] == 1.0  # a word gives each review's class away
    history = history_of(folder)
    assert [record["step"] for record in history if "train/loss" in record] == [
        3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 27, 30]  # every third, and each epoch's last
    assert [record["epoch"] for record in history if "valid/loss" in record] == [1.0, 2.0, 3.0]
    assert [record for record in history if "train/loss" in record][-1]["train/loss"] < 0.1
    with open(folder / "test_predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == measured["test"]["n"] == 20


def test_the_same_settings_give_the_same_bits_with_any_number_of_loader_processes(undisturbed):
    overrides, folder = undisturbed
    train(*overrides, "run_name=again", "data_config.num_workers=2")
    again = bits_of(folder.parent / "again")
    again["best/README.md"] = again["best/README.md"].replace(b"again", b"run")
    assert again == bits_of(folder)


def test_mode_test_gives_the_same_figures_to_the_last_digit(undisturbed):
    overrides, folder = undisturbed
    before = bits_of(folder)
    for name in ("test_predictions.csv", "misclassified.csv", "best/README.md"):
        (folder / name).unlink()
    train_here(*overrides, "run_name=run", mode="test")
    assert bits_of(folder) == before


def test_a_finished_run_is_not_taken_for_one_of_other_reviews(undisturbed, tmp_path, monkeypatch):
    """Neither when the file has changed, nor when the same name means another file in another folder."""
    overrides, _ = undisturbed
    source = next(item for item in overrides if item.startswith("data_config.dataset=")).partition("=")[2]
    given = [*overrides, "train_config.epochs=1", "run_name=here", f"output_dir={tmp_path / 'runs'}"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "reviews.csv")
    with open(tmp_path / "two" / "reviews.csv", "a") as file:
        file.write("one more review that was gripping,good\n")
    monkeypatch.chdir(tmp_path / "one")
    train_here(*given, "data_config.dataset=reviews.csv")
    assert "nothing was done again" in train_here(*given, "data_config.dataset=reviews.csv").stdout
    for dataset in ("reviews.csv", str(tmp_path / "two" / "reviews.csv")):
        monkeypatch.chdir(tmp_path / "two")
        refused = train_here(*given, f"data_config.dataset={dataset}", code=2).stderr
        assert f"{dataset} holds other reviews than when the run in " in refused
    monkeypatch.chdir(tmp_path / "one")
    shutil.copy(tmp_path / "two" / "reviews.csv", "reviews.csv")
    assert "holds other reviews" in train_here(*given, "data_config.dataset=reviews.csv", code=2).stderr


def test_a_run_is_not_taken_for_one_of_another_model(undisturbed, tmp_path, monkeypatch):
    """The encoder was trained again under its old name."""
    overrides, folder = undisturbed
    shutil.copytree(folder / "best", tmp_path / "encoder" / "best")
    given = [*overrides, "train_config.epochs=1", f"model_config.model_name={tmp_path / 'encoder' / 'best'}",
             f"output_dir={tmp_path / 'runs'}", "run_name=further", "train_config.seed=7"]
    train_here(*given)
    assert "nothing was done again" in train_here(*given).stdout
    train_here(*given, "run_name=untested", "train_config.test=false")
    stop_at(1, [*given, "run_name=stopped"], monkeypatch)
    shutil.rmtree(tmp_path / "encoder" / "best")
    shutil.copytree(tmp_path / "runs" / "further" / "best", tmp_path / "encoder" / "best")
    for name in ("further", "untested", "stopped"):
        refused = train_here(*given, f"run_name={name}", code=2).stderr
        assert f"holds another model than when the run in {tmp_path / 'runs' / name} began (model_c" in refused


def test_the_card_of_a_dataset_folder_belongs_to_its_content(tmp_path):
    """It may name the classes. Another file in the folder's depth does not count."""
    (tmp_path / "part").mkdir()
    for name in ("train.csv", "README.md", "part/README.md"):
        (tmp_path / name).write_text("text,label\n")
    before = run_folder.content_of("data_config.dataset", str(tmp_path))
    (tmp_path / "part/README.md").write_text("other")
    assert run_folder.content_of("data_config.dataset", str(tmp_path)) == before
    (tmp_path / "README.md").write_text("other")
    assert run_folder.content_of("data_config.dataset", str(tmp_path)) != before


def test_a_run_can_leave_the_test_split_alone_until_later(undisturbed):
    overrides, folder = undisturbed
    untested = folder.with_name("untested")
    arguments = [*overrides, "run_name=untested"]
    for words in ("validation accuracy", "finished: nothing was done again"):
        assert words in train_here(*arguments, "train_config.test=false").stdout
        assert not {"test_predictions.csv", "misclassified.csv"} & {path.name for path in untested.iterdir()}
        assert metrics_of(untested).keys() == {"train", "valid", "data", "environment"}
    before = metrics_of(untested)
    assert "test accuracy" in train_here(*arguments).stdout
    after = metrics_of(untested)
    assert {name: after[name] for name in before} == before  # where, and with how much memory, it was trained
    assert {"test", "tested_on"} <= after.keys()
    assert bits_of(untested) == bits_of(folder) | {
        "best/README.md": (folder / "best/README.md").read_bytes().replace(b"# run", b"# untested").replace(
            b"name: run", b"name: untested")}


def test_testing_on_other_data_than_the_training_split_left_out_is_refused(undisturbed):
    overrides, _ = undisturbed
    result = train_here(*overrides, "run_name=run", "data_config.split_seed=1", mode="test", code=2)
    assert "data_config.split_seed: 42 -> 1" in result.stderr


def test_testing_a_run_that_does_not_exist(undisturbed):
    overrides, folder = undisturbed
    result = train_here(*overrides, "run_name=absent", mode="test", code=2)
    assert "train this run first" in result.stderr
    assert not (folder.parent / "absent").exists()


def test_the_tested_weights_are_the_best_not_the_last(undisturbed, monkeypatch):
    overrides, folder = undisturbed
    config = load_config(PROJECT / "config.yaml", [*overrides, "run_name=worse", "train_config.epochs=2"])
    best, evaluate = {}, main.evaluate

    def spoilt(model, loader, devices, name):
        if best and name == "validation":
            with torch.no_grad():
                model.head.weight.neg_()  # every answer is now the opposite one
        elif name == "validation":
            best.update({name: weight.clone() for name, weight in model.state_dict().items()})
        return evaluate(model, loader, devices, name)

    monkeypatch.setattr(main, "evaluate", spoilt)
    main.train_and_test(config, Devices(config))
    measured = metrics_of(folder.parent / "worse")
    assert measured["valid"]["epoch"] == 1
    assert measured["test"]["accuracy"] == 1.0
    saved = load_file(folder.parent / "worse" / "best" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in best.items())


def test_equal_accuracies_are_told_apart_by_the_loss():
    assert quality({"accuracy": 0.9, "loss": 0.3}, "accuracy") > quality({"accuracy": 0.9, "loss": 0.4}, "accuracy")
    assert quality({"accuracy": 0.8, "loss": 0.3}, "loss") > quality({"accuracy": 0.9, "loss": 0.4}, "loss")
    assert quality({"mcc": 0.8, "loss": 0.5}, "mcc") > quality({"mcc": 0.7, "loss": 0.4}, "mcc")


def test_a_metric_that_validation_does_not_define_is_refused_before_training(undisturbed, tmp_path):
    overrides, folder = undisturbed
    rows = rows_of(folder.parent.parent / "reviews.csv")
    for name, kept in (("train", rows[:100]), ("validation", rows[100:140:2]), ("test", rows[140:])):
        write_rows(tmp_path / f"{name}.csv", kept)
    given = [*overrides, f"data_config.dataset={tmp_path}", "data_config.split=official", "run_name=undefined"]
    for metric in ("mcc", "roc_auc", "average_precision"):
        result = train_here(*given, f"train_config.best_metric={metric}", code=2)
        assert f"train_config.best_metric is {metric}, but no validation review has the class 'good'" in result.stderr
    assert not (folder.parent / "undefined").exists()
    with pytest.raises(UserError, match="best_metric is mcc, which masked words do not have"):
        load_config(PROJECT / "config.yaml", ["train_config.objective=masked_lm", "train_config.best_metric=mcc"])


def write_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_data_that_changed_after_training_is_refused(undisturbed, tmp_path):
    overrides, folder = undisturbed
    reviews = write_reviews(tmp_path / "changing.csv")
    arguments = [*overrides, f"data_config.dataset={reviews}", "run_name=changing", "train_config.max_steps=5"]
    train_here(*arguments)
    with open(reviews, "a") as file:
        file.write("one more gripping film,good\nand one more dull film,bad\n")
    assert "has changed since the run" in train_here(*arguments, mode="test", code=2).stderr


def test_early_stopping_and_max_steps(undisturbed):
    overrides, folder = undisturbed
    train_here(*overrides, "run_name=early", "train_config.optimizer=sgd", "train_config.learning_rate=1e-30",
          "train_config.early_stopping_patience=2", "train_config.epochs=9")
    assert metrics_of(folder.parent / "early")["train"]["optimizer_steps"] == 30  # the best, and two more
    train_here(*overrides, "run_name=short", "train_config.max_steps=13")
    assert metrics_of(folder.parent / "short")["train"]["optimizer_steps"] == 13


def test_training_happens_with_wandb_off_offline_or_broken(undisturbed, monkeypatch):
    overrides, folder = undisturbed
    monkeypatch.setattr(finish, "try_plots", lambda *_: [])  # wandb reads the pictures, and none is drawn here
    result = train_here(*overrides[:-1], "run_name=run_offline", "log_config.wandb_mode=offline",
                        "train_config.max_steps=10")
    [offline] = (folder.parent / "wandb").glob("offline-run-*")
    assert f"wandb sync {offline}" in result.stdout
    recorded = next(offline.glob("*.wandb")).read_bytes()
    for name in (b"train/loss", b"valid/accuracy", b"test/accuracy", b"test/misclassified", b"test/confusion_matrix",
                 b"learning_rate"):
        assert name in recorded, name
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails
    result = train_here(*overrides[:-1], "run_name=run_broken", "log_config.wandb_mode=offline",
                        "train_config.max_steps=10")
    assert "wandb: left out of this run (ModuleNotFoundError" in result.stdout
    for name in ("run_offline", "run_broken"):
        assert metrics_of(folder.parent / name)["train"]["optimizer_steps"] == 10


class Waits(TorchDispatchMode):
    """Counts how often the host asks for a value that the device computes."""

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.count += operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operator(*arguments, **(keywords or {}))


@pytest.mark.parametrize("encoder", ["bert", "modernbert"])
def test_a_step_never_waits_for_the_device(undisturbed, encoder_folder, encoder, tmp_path):
    overrides, _ = undisturbed
    config = load_config(PROJECT / "config.yaml", [*overrides, f"output_dir={tmp_path}",
                                                   f"model_config.model_name={encoder_folder(encoder)}",
                                                   "train_config.max_grad_norm=1"])
    run = Run.open(config, Devices(config))
    step = next(iter(run.train_loader(0)))
    [batch] = step.micro_batches
    assert "attention_mask" in batch
    with Waits() as waits:
        main.train_step(run, step._replace(micro_batches=[batch, batch]))
        assert waits.count == 0
        run.devices.guard.failed.item()
        assert waits.count == 1  # it would have been seen


def test_plain_lines_where_the_output_is_no_terminal(tmp_path):
    result = train_here(f"output_dir={tmp_path}", "data_config.limit=900", "train_config.epochs=1",
                        "log_config.log_every_steps=5", config="demo.yaml")
    assert "reviews/s" in result.stdout
    assert "\r" not in result.stdout + result.stderr


def test_mode_test_without_the_settings_that_the_run_was_trained_with(undisturbed):
    _, folder = undisturbed
    before = bits_of(folder)
    named = [f"output_dir={folder.parent}", "run_name=run"]
    train_here(*named, mode="test")
    assert bits_of(folder) == before
    refused = train_here(*named, "data_config.max_len=16", mode="test", code=2)
    assert "data_config.max_len: 32 -> 16" in refused.stderr


@pytest.mark.parametrize("override", ["train_config.learning_rate=7", "train_config.effective_batch_size=64"])
def test_a_test_with_other_training_settings_than_the_run_s_is_refused(undisturbed, override):
    overrides, folder = undisturbed
    result = train_here(f"output_dir={folder.parent}", "run_name=run", override, mode="test", code=2)
    assert f"{override.partition('=')[0]}: " in result.stderr
