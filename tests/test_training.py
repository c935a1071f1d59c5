"""The real main.py on tiny data: the run folder, the best weights, the same bits, stopping and going on."""

import csv
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT, run_here, run_script, write_reviews
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import main
from main_accumulation import AcceleratedDevices
from suite.common.stopping import StopRequested
from suite.common.storage import seal
from suite.training.devices import SingleDevice
from suite.training.run import Run, quality
from suite.training.states import saved_states
from utils import load_config

RESULTS = {"history.jsonl", "valid_predictions.csv", "test_predictions.csv", "misclassified.csv", "best/config.json",
           "best/model.safetensors", "best/tokenizer.json", "best/README.md"}
FILES = RESULTS | {"config.yaml", "metrics.json", "plots/learning_curves.png", "plots/confusion_matrix.png",
                   "plots/reliability.png"}


def train(*arguments: str, script: str = "main.py", code: int = 0, **options) -> subprocess.CompletedProcess:
    """The real script, in a process of its own."""
    return expect(code, run_script(script, *arguments, **options))


def train_here(*arguments: str, code: int = 0, mode: str = "train") -> subprocess.CompletedProcess:
    return expect(code, run_here(*arguments, mode=mode))


def expect(code: int, result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == code, result.stdout + result.stderr
    return result


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def history_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def bits_of(folder) -> dict[str, bytes]:
    """Everything of a run that must not depend on when it was interrupted; metrics.json less its timings."""
    measured, files = metrics_of(folder), {name: (folder / name).read_bytes() for name in RESULTS}
    return files | {"metrics": json.dumps([measured["valid"], measured["test"], measured["train"]["optimizer_steps"]])}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoder_folder):
    """(overrides, run folder) of one finished run that the tests of this file share."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_reviews(folder / "reviews.csv")
    overrides = [
        f"output_dir={folder / 'runs'}", f"model_config.model_name={encoder_folder('bert')}",
        "model_config.pooling=mean", f"data_config.dataset={folder / 'reviews.csv'}",
        "data_config.text_column=review", "data_config.label_column=verdict",
        "data_config.max_len=32", "data_config.batch_size=16",
        "train_config.epochs=3", "train_config.learning_rate=0.01", "train_config.scheduler=linear",
        "train_config.mixed_precision=no", "train_config.device=cpu", "train_config.save_every_steps=4",
        "log_config.log_every_steps=3", "log_config.wandb_mode=disabled"]
    train(*overrides, "run_name=run")
    return overrides, folder / "runs" / "run"


def test_the_run_folder_is_complete(undisturbed):
    _, folder = undisturbed
    assert {name for name in FILES if not (folder / name).is_file()} == set()
    measured = metrics_of(folder)
    assert set(measured) == {"train", "valid", "test", "environment"}
    assert set(measured["train"]) == {
        "samples_per_second", "tokens_per_second", "seconds", "peak_memory_mb", "model_tflops_per_second",
        "executed_tflops_per_second", "model_flops_utilization", "executed_flops_utilization", "optimizer_steps"}
    assert set(measured["test"]) == {"loss", "accuracy", "accuracy_ci95", "precision", "recall", "f1", "macro_f1",
                                     "roc_auc", "ece", "n"}
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


def test_a_run_can_leave_the_test_split_alone_until_later(undisturbed):
    overrides, folder = undisturbed
    untested = folder.with_name("untested")
    arguments = [*overrides, "run_name=untested"]
    for words in ("validation accuracy", "finished: nothing was done again"):
        assert words in train_here(*arguments, "train_config.test=false").stdout
        assert not {"test_predictions.csv", "misclassified.csv"} & {path.name for path in untested.iterdir()}
        assert metrics_of(untested).keys() == {"train", "valid", "environment"}
    assert "test accuracy" in train_here(*arguments).stdout
    assert bits_of(untested) == bits_of(folder) | {
        "best/README.md": (folder / "best/README.md").read_bytes().replace(b"# run", b"# untested").replace(
            b"name: run", b"name: untested")}


def test_an_interrupted_run_can_be_tested(undisturbed):
    overrides, folder = undisturbed
    shutil.copytree(folder, folder.parent / "partial")
    (folder.parent / "partial" / "metrics.json").unlink()
    train_here(*overrides, "run_name=partial", mode="test")
    assert metrics_of(folder.parent / "partial")["test"] == metrics_of(folder)["test"]
    assert "interrupted" in (folder.parent / "partial" / "best" / "README.md").read_text()


def test_a_finished_run_is_not_repeated_and_not_overwritten(undisturbed):
    overrides, folder = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "finished: nothing was done again" in train_here(*overrides, "run_name=run").stdout
    assert "other settings (train_config.epochs: 3 -> 4)" in train_here(
        *overrides, "run_name=run", "train_config.epochs=4", code=2).stderr
    assert "train_config.overwrite=true" in train_here(
        *overrides, "run_name=run", "train_config.resume=never", code=2).stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_replacing_a_run_leaves_nothing_of_it(undisturbed):
    overrides, folder = undisturbed
    replaced = shutil.copytree(folder, folder.parent / "replaced")
    (replaced / "misclassified.html").write_text("")
    arguments = [*overrides, "run_name=replaced", "train_config.resume=never", "train_config.overwrite=true"]
    config = load_config(PROJECT / "config.yaml", arguments)
    Run.open(config, SingleDevice(config))
    assert {path.name for path in replaced.iterdir()} == {"config.yaml", "history.jsonl", "last", "best.sha256",
                                                           ".lock"}
    assert list((replaced / "last").iterdir()) == []
    assert (replaced / "best.sha256").read_text() == ""
    assert not (replaced / "history.jsonl").read_text()


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
    main.train_and_test(config, SingleDevice(config))
    measured = metrics_of(folder.parent / "worse")
    assert measured["valid"]["epoch"] == 1
    assert measured["test"]["accuracy"] == 1.0
    saved = load_file(folder.parent / "worse" / "best" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in best.items())


def test_equal_accuracies_are_told_apart_by_the_loss():
    assert quality({"accuracy": 0.9, "loss": 0.3}, "accuracy") > quality({"accuracy": 0.9, "loss": 0.4}, "accuracy")
    assert quality({"accuracy": 0.8, "loss": 0.3}, "loss") > quality({"accuracy": 0.9, "loss": 0.4}, "loss")


def test_a_run_stopped_before_its_last_validation_makes_up_for_it(undisturbed, monkeypatch):
    overrides, folder = undisturbed
    for name, steps in (("owed", 30), ("owed_early", 13)):
        arguments = [*overrides, f"run_name={name}", f"train_config.max_steps={steps}"]
        config = load_config(PROJECT / "config.yaml", arguments)
        run = Run.open(config, SingleDevice(config))

        def stop_at_the_last_step(devices, run=run, steps=steps):
            if run.progress.step == steps:
                raise StopRequested

        with monkeypatch.context() as patch:
            patch.setattr(main, "stop_if_asked", stop_at_the_last_step)
            with pytest.raises(SystemExit):
                main.train(run)
        train_here(*arguments)
        measured, history = metrics_of(folder.parent / name), history_of(folder.parent / name)
        assert measured["train"]["optimizer_steps"] == steps
        assert [record["step"] for record in history if "valid/loss" in record] == sorted({10, min(20, steps), steps})
        assert measured["valid"]["epoch"] == len([record for record in history if "valid/loss" in record])


@pytest.mark.parametrize("other", [{"windows": 3}, {"version": 0}])
def test_a_state_of_another_version_is_refused_with_one_line(undisturbed, other):
    overrides, folder = undisturbed
    old = shutil.copytree(folder, folder.parent / "old")
    (old / "metrics.json").unlink()
    for state in saved_states(old / "last"):
        progress = json.loads((state / "progress.json").read_text())
        (state / "progress.json").write_text(json.dumps(progress | other))
        seal(state)
    assert "was saved by another version of this project" in train_here(*overrides, "run_name=old", code=2).stderr
    shutil.rmtree(old)


def test_a_state_is_saved_by_the_clock(undisturbed, monkeypatch):
    overrides, folder = undisturbed
    overrides = [item for item in overrides if not item.startswith("train_config.save_every_steps")]

    def saved(*more: str) -> list[int]:
        """The optimizer steps of an epoch after which a state was saved."""
        steps = []
        monkeypatch.setattr(Run, "save", lambda run: (steps.append(run.progress.step), own(run)))
        train_here(*overrides, "run_name=clock", "train_config.epochs=1", "train_config.resume=never",
                   "train_config.overwrite=true", *more)
        return steps

    own, ticks = Run.save, itertools.count(step=20)
    clock = SimpleNamespace(monotonic=lambda: next(ticks))  # it is asked after every step
    monkeypatch.setattr("suite.training.run.time", clock)
    assert saved("train_config.save_every_minutes=1") == [3, 6, 9, 10]
    assert saved("train_config.save_every_minutes=1000", "train_config.save_every_steps=4") == [4, 8, 10]
    assert saved() == [10]


def test_data_that_changed_after_training_is_refused(undisturbed, tmp_path):
    overrides, folder = undisturbed
    reviews = write_reviews(tmp_path / "changing.csv")
    arguments = [*overrides, f"data_config.dataset={reviews}", "run_name=changing", "train_config.max_steps=5"]
    train_here(*arguments)
    with open(reviews, "a") as file:
        file.write("one more gripping film,good\nand one more dull film,bad\n")
    assert "has changed since the run" in train_here(*arguments, mode="test", code=2).stderr


def test_a_typing_mistake_destroys_no_finished_run(undisturbed):
    overrides, folder = undisturbed
    before = bits_of(folder)
    arguments = ["run_name=run", "train_config.resume=never", "train_config.overwrite=true"]
    train_here(*overrides, *arguments, "data_config.dataset=typo.csv", code=2)
    assert bits_of(folder) == before
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert "for one process" in train(*overrides, "run_name=run", environment=launched, code=2).stderr


def test_early_stopping_and_max_steps(undisturbed):
    overrides, folder = undisturbed
    train_here(*overrides, "run_name=early", "train_config.optimizer=sgd", "train_config.learning_rate=1e-30",
          "train_config.early_stopping_patience=2", "train_config.epochs=9")
    assert metrics_of(folder.parent / "early")["train"]["optimizer_steps"] == 30  # the best, and two more
    train_here(*overrides, "run_name=short", "train_config.max_steps=13")
    assert metrics_of(folder.parent / "short")["train"]["optimizer_steps"] == 13


def test_training_happens_with_wandb_off_offline_or_broken(undisturbed, tmp_path):
    overrides, folder = undisturbed
    result = train(*overrides[:-1], "run_name=run_offline", "log_config.wandb_mode=auto", "train_config.max_steps=10",
                   environment={"WANDB_MODE": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")})
    [offline] = (folder.parent / "wandb").glob("offline-run-*")
    assert f"wandb sync {offline}" in result.stdout
    recorded = next(offline.glob("*.wandb")).read_bytes()
    for name in (b"train/loss", b"valid/accuracy", b"test/accuracy", b"test/misclassified", b"test/confusion_matrix",
                 b"plots/reliability", b"learning_rate"):
        assert name in recorded, name
    broken = tmp_path / "wandb"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    result = train(*overrides[:-1], "run_name=run_broken", "log_config.wandb_mode=offline", "train_config.max_steps=10",
                   environment={"PYTHONPATH": str(tmp_path)})
    assert "left out of this run (ImportError: broken on purpose)" in result.stdout
    for name in ("run_offline", "run_broken"):
        assert metrics_of(folder.parent / name)["train"]["optimizer_steps"] == 10


@pytest.mark.parametrize(("script", "sent", "code"), [
    ("main.py", signal.SIGHUP, 129), ("main.py", signal.SIGINT, 130),  # SIGTERM, SIGKILL: test_kills.py
    ("main_accumulation.py", signal.SIGUSR1, 143), ("main_accumulation.py", signal.SIGKILL, -9)])
def test_stopped_and_started_again_it_ends_with_the_same_bits(undisturbed, script, sent, code):
    overrides, folder = undisturbed
    name = f"run_{sent.name}_{script}"
    arguments = [sys.executable, script, *overrides, f"run_name={name}"]
    process = subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wanted = folder.parent / name / "last"
    deadline = time.monotonic() + 60
    while not any(wanted.glob("*-step-00000012")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sent)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    result = train(*overrides, f"run_name={name}", script=script)
    assert "continuing from" in result.stdout
    stopped = bits_of(folder.parent / name)
    stopped["best/README.md"] = stopped["best/README.md"].replace(name.encode(), b"run")
    assert stopped == bits_of(folder)


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
                                                   f"model_config.model_name={encoder_folder(encoder)}"])
    run = Run.open(config, SingleDevice(config))
    [batch] = next(iter(run.train_loader))
    assert "attention_mask" in batch
    with Waits() as waits:
        main.train_step(run.model, run.optimizer, [batch, batch], 32, run.devices, run.scheduler, max_grad_norm=1.0)
        assert waits.count == 0
        run.devices.guard.failed.item()
        assert waits.count == 1  # it would have been seen


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("script", ["main.py", "main_accumulation.py"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(undisturbed, tmp_path, script, optimizer):
    overrides, _ = undisturbed
    arguments = [*overrides, f"output_dir={tmp_path}", "run_name=run", f"train_config.optimizer={optimizer}"]
    config = load_config(PROJECT / "config.yaml", arguments)
    devices_class = SingleDevice if script == "main.py" else AcceleratedDevices
    run = Run.open(config, devices_class(config))
    good = main.train_step
    weights = {}

    def poisoned(model, *rest):
        if run.progress.step == 4:  # optimizer step 5, in the middle of a log interval
            weights.update({name: weight.clone() for name, weight in model.state_dict().items()})
            head = model.head.weight
            handle = head.register_hook(lambda gradient: gradient * float("nan"))
        result = good(model, *rest)
        if run.progress.step == 4:
            handle.remove()
        return result

    main.train_step = poisoned
    try:
        with pytest.raises(FloatingPointError, match="optimizer step 5: loss or gradient is not finite") as stopped:
            main.train(run)
    finally:
        main.train_step = good
    assert run.progress.step == 6  # noticed at the next record
    assert all(torch.equal(weight, weights[name]) for name, weight in run.model.state_dict().items())
    ids = run.train_loader.dataset.ids[np.sort(run.sampler.effective_batches()[4])]
    assert f"reviews {', '.join(map(str, ids))}." in str(stopped.value)
    state = saved_states(run.folder / "last")[0]
    assert state.name.endswith("step-00000004")  # the last good one, untouched
    assert f"(last saved state: {state})" in str(stopped.value)


def test_a_damaged_state_is_found_and_the_one_before_it_is_taken(undisturbed):
    overrides, folder = undisturbed
    run = folder.parent / "run_damaged"
    train_here(*overrides, "run_name=run_damaged")
    for name in ("metrics.json", "best/README.md"):
        (run / name).unlink()
    newest = saved_states(run / "last")[0] / "state.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = train_here(*overrides, "run_name=run_damaged")
    assert f"{newest} is damaged" in result.stdout
    damaged = bits_of(run)
    damaged["best/README.md"] = damaged["best/README.md"].replace(b"run_damaged", b"run")
    assert damaged == bits_of(folder)


def test_a_damaged_history_is_found_before_anything_is_trained(undisturbed):
    overrides, folder = undisturbed
    run = shutil.copytree(folder, folder.parent / "run_history")
    (run / "metrics.json").unlink()
    lines = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    for damage in (b"XX" + lines[1][2:], b"\xff\xfe" + lines[1][2:]):
        (run / "history.jsonl").write_bytes(b"".join([lines[0], damage, *lines[2:]]))
        refused = train_here(*overrides, "run_name=run_history", code=2)
        assert f"{run / 'history.jsonl'}: line 2 is damaged" in refused.stderr


def test_plain_lines_where_the_output_is_no_terminal(tmp_path):
    result = train("--config", "demo.yaml", f"output_dir={tmp_path}", "data_config.limit=900", "train_config.epochs=1",
                   "log_config.log_every_steps=5")
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


def test_a_cut_configuration_is_refused_rather_than_filled_with_defaults(undisturbed):
    overrides, folder = undisturbed
    cut = shutil.copytree(folder, folder.parent / "cut")
    text = (folder / "config.yaml").read_text()
    for content in ("", text[:text.index("train_config:")]):
        (cut / "config.yaml").write_text(content)
        card = (cut / "best" / "README.md").read_bytes()
        result = train_here(f"output_dir={folder.parent}", "run_name=cut", mode="test", code=2)
        assert f"{cut / 'config.yaml'}: damaged, or of another version" in result.stderr
        assert (cut / "best" / "README.md").read_bytes() == card


@pytest.mark.parametrize("override", ["train_config.learning_rate=7", "train_config.effective_batch_size=64"])
def test_a_test_with_other_training_settings_than_the_run_s_is_refused(undisturbed, override):
    overrides, folder = undisturbed
    result = train_here(f"output_dir={folder.parent}", "run_name=run", override, mode="test", code=2)
    assert f"{override.partition('=')[0]}: " in result.stderr
