"""A run that is stopped, damaged or asked for again: it goes on, or is refused, and nothing is lost."""

import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT, bits_of, history_of, metrics_of, start_script, stop_at, train, train_here

import main
from main_accumulation import AcceleratedDevices
from suite.common.devices import Devices
from suite.common.stopping import StopSignals
from suite.common.storage import seal
from suite.training.meter import SAVED
from suite.training.run import Run
from suite.training.states import Progress, saved_states
from utils import load_config


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
    Run.open(config, Devices(config))
    assert {path.name for path in replaced.iterdir()} == {"config.yaml", "history.jsonl", "last"}
    assert list((replaced / "last").iterdir()) == []
    assert not (replaced / "history.jsonl").read_text()


def test_a_run_stopped_before_its_last_validation_makes_up_for_it(undisturbed, monkeypatch):
    overrides, folder = undisturbed
    for name, steps in (("owed", 30), ("owed_early", 13)):
        arguments = [*overrides, f"run_name={name}", f"train_config.max_steps={steps}"]
        stop_at(steps, arguments, monkeypatch)
        train_here(*arguments)
        measured, history = metrics_of(folder.parent / name), history_of(folder.parent / name)
        assert measured["train"]["optimizer_steps"] == steps
        assert [record["step"] for record in history if "valid/loss" in record] == sorted({10, min(20, steps), steps})
        assert measured["valid"]["epoch"] == len([record for record in history if "valid/loss" in record])


def test_a_state_of_another_version_is_refused_with_one_line(undisturbed):
    """Wrong settings end in one line: what a state of another version says could mean something else here."""
    overrides, folder = undisturbed
    old = shutil.copytree(folder, folder.parent / "old")
    (old / "metrics.json").unlink()
    for state in saved_states(old / "last"):
        progress = json.loads((state / "progress.json").read_text())
        (state / "progress.json").write_text(json.dumps(progress | {"version": 2, "history_sum": ""}))
        seal(state)
    assert "was saved by another version of this project" in train_here(*overrides, "run_name=old", code=2).stderr
    shutil.rmtree(old)


def test_a_state_with_other_items_has_another_version():
    """Killed at any moment, a run goes on: an item that is added here without a new version would stop older runs,
    unless it may be missing, as `contents` may."""
    assert (Progress.version, [entry.name for entry in fields(Progress)], SAVED) == (6, [
        "data_fingerprint", "device", "step", "epoch", "steps_in_epoch", "best_epoch", "best_metrics",
        "epochs_without_improvement", "micro_batch", "history_lines", "contents", "wandb_id", "version"], (
        "sums", "reviews", "tokens", "flops", "executed_flops", "seconds", "predictions", "total_weight"))
    before = asdict(Progress("a", "cpu (fp32)", contents={"model_config.model_name": None}))
    del before["contents"]
    assert Progress(**before).contents == {}


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


def test_a_typing_mistake_destroys_no_finished_run(undisturbed):
    overrides, folder = undisturbed
    before = bits_of(folder)
    arguments = ["run_name=run", "train_config.resume=never", "train_config.overwrite=true"]
    train_here(*overrides, *arguments, "data_config.dataset=typo.csv", code=2)
    assert bits_of(folder) == before
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert "for one process" in train(*overrides, "run_name=run", environment=launched, code=2).stderr


@pytest.mark.parametrize(("script", "sent", "code"), [
    ("main.py", signal.SIGHUP, 129), ("main.py", signal.SIGINT, 130),  # SIGTERM, SIGKILL: test_kills.py
    ("main_accumulation.py", signal.SIGUSR1, 143), ("main_accumulation.py", signal.SIGKILL, -9)])
def test_stopped_and_started_again_it_ends_with_the_same_bits(undisturbed, script, sent, code):
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip(f"{sent.name} is ignored here, as under nohup, and then the run ignores it, too")
    overrides, folder = undisturbed
    name = f"run_{sent.name}_{script}"
    process = start_script(script, *overrides, f"run_name={name}", merged=True)
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


def test_a_launcher_s_second_sigint_does_not_end_the_save_and_nohup_s_sighup_nothing(monkeypatch):
    """A run may be stopped at any moment. Under a launcher, one Ctrl-C arrives twice."""
    signals = StopSignals()

    def interrupted() -> None:
        with signals.deferred():
            for sent, received in ((signal.SIGHUP, None), (signal.SIGINT, "SIGINT"), (signal.SIGINT, "SIGINT")):
                os.kill(os.getpid(), sent)
                assert signals.received == received

    monkeypatch.setenv("LOCAL_RANK", "0")
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        interrupted()
    signal.signal(signal.SIGHUP, own)
    assert left.value.code == 130
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("script", ["main.py", "main_accumulation.py"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(undisturbed, tmp_path, script, optimizer):
    overrides, _ = undisturbed
    arguments = [*overrides, f"output_dir={tmp_path}", "run_name=run", f"train_config.optimizer={optimizer}"]
    config = load_config(PROJECT / "config.yaml", arguments)
    devices_class = Devices if script == "main.py" else AcceleratedDevices
    run = Run.open(config, devices_class(config))
    good = main.train_step
    weights = {}

    def poisoned(run, step):
        if run.progress.step == 4:  # optimizer step 5, in the middle of a log interval
            weights.update({name: weight.clone() for name, weight in run.model.state_dict().items()})
            head = run.model.head.weight
            handle = head.register_hook(lambda gradient: gradient * float("nan"))
        result = good(run, step)
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
    ids = run.data.splits["train"].ids[np.sort(run.sampler.effective_batches(0)[4])]
    assert f"reviews {', '.join(map(str, ids))}." in str(stopped.value)
    state = saved_states(run.folder.last)[0]
    assert state.name.endswith("step-00000004")  # the last good one, untouched
    assert f"(last saved state: {state})" in str(stopped.value)


def test_a_damaged_state_is_found_and_the_one_before_it_is_taken(undisturbed):
    """A bit-flipped state is noticed, and a killed run ends with the same bits: its history is cut back to the state,
    and so is the line that the kill has cut."""
    overrides, folder = undisturbed
    run = folder.parent / "run_damaged"
    train_here(*overrides, "run_name=run_damaged")
    for name in ("metrics.json", "best/README.md"):
        (run / name).unlink()
    newest = saved_states(run / "last")[0] / "state.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with open(run / "history.jsonl", "a") as history:
        history.write('{"step": 30, "epo')
    result = train_here(*overrides, "run_name=run_damaged")
    assert f"{newest} is damaged" in result.stdout
    damaged = bits_of(run)
    damaged["best/README.md"] = damaged["best/README.md"].replace(b"run_damaged", b"run")
    assert damaged == bits_of(folder)


def test_an_interrupted_run_can_be_tested(undisturbed):
    overrides, folder = undisturbed
    shutil.copytree(folder, folder.parent / "partial")
    (folder.parent / "partial" / "metrics.json").unlink()
    assert "this run is not finished" in train_here(*overrides, "run_name=partial", mode="test").stdout
    assert metrics_of(folder.parent / "partial")["test"] == metrics_of(folder)["test"]
    assert "interrupted" in (folder.parent / "partial" / "best" / "README.md").read_text()
