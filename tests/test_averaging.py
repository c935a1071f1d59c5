"""train_config.ema_decay: the average of the weights is validated, kept and tested, and a kill does not lose it."""

import shutil

import numpy as np
import pytest
import torch
from accumulation_worker import distance
from conftest import PROJECT, differing_files, launch, rows_of, stop_at, train_here
from test_accumulation import PLAIN, run_of, sharding_variables, weights_of
from test_kills import is_equal

import main
from main_accumulation import AcceleratedDevices
from suite.common.devices import Devices
from suite.encoders.loading import load_model
from suite.training import finish
from suite.training.run import Run
from suite.training.states import newest_good_state, saved_states
from utils import load_config

DECAY = "train_config.ema_decay=0.5"  # what the warm-up reaches at the 8th step


@pytest.fixture(scope="module")
def averaged(undisturbed):
    """(settings of the undisturbed run with an average, its folder)."""
    overrides, folder = undisturbed
    train_here(*overrides, DECAY, "run_name=averaged")
    return [*overrides, DECAY], folder.parent / "averaged"


def saved(folder, name: str) -> dict:
    """What the newest state of a run holds."""
    return torch.load(newest_good_state(folder / "last") / name, weights_only=True)


def opened(*arguments: str) -> Run:
    config = load_config(PROJECT / "config.yaml", arguments)
    return Run.open(config, Devices(config))


def test_the_average_is_numpys_and_the_kept_model_has_it(overrides, monkeypatch):
    run, weights, train_step = run_of(overrides, Devices, DECAY), [], main.train_step

    def weights_now() -> list[np.ndarray]:
        return [weight.detach().numpy().astype(np.float64) for weight in run.model.parameters()]

    def recorded(run, step):
        result = train_step(run, step)
        weights.append(weights_now())
        return result

    monkeypatch.setattr(main, "train_step", recorded)
    expected, places = weights_now(), [average.data_ptr() for average in run.average.averages]
    main.train(run)
    for n, now in enumerate(weights, start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = [decay * average + (1 - decay) * weight for average, weight in zip(expected, now, strict=True)]
    kept, averages = weights_of(run.folder.path), run.average.averages
    for name, average, wanted, live, last in zip(dict(run.model.named_parameters()), averages, expected, weights_now(),
                                                 weights[-1], strict=True):
        np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept[name], average)
        assert np.array_equal(live, last)  # what was trained is back after the evaluation
    assert distance(kept, run.model.state_dict()) > 1e-4
    # One more copy of the weights, and no third one: the evaluation has left both where they were.
    assert sum(average.nbytes for average in averages) == sum(weight.nbytes for weight in run.model.parameters())
    assert [average.data_ptr() for average in averages] == places


def test_the_figures_are_those_of_the_average_and_training_is_as_without_it(undisturbed, averaged):
    overrides, off = undisturbed
    _, folder = averaged
    assert is_equal(saved(off, "state.pt"), saved(folder, "state.pt"))
    assert distance(weights_of(off), weights_of(folder)) > 1e-4
    run, model = opened(*overrides, "run_name=again"), load_model(folder / "best")
    for name, loader in (("valid", run.valid_loader), ("test", finish.test_loader(run, model))):
        predictions, rows = main.evaluate(model, loader, run.devices, name), rows_of(folder / f"{name}_predictions.csv")
        assert [int(row["id"]) for row in rows] == predictions.ids.tolist()
        assert [float(row["probability_good"]) for row in rows] == pytest.approx(predictions.probabilities[:, 1])
    states = [newest_good_state(path / "last") for path in (off, folder)]
    assert [(state / "average_0.pt").exists() for state in states] == [False, True]
    sizes = [sum(path.stat().st_size for path in state.glob("*.pt")) for state in states]
    one_more = opened(*overrides, DECAY, "run_name=counted").state_bytes - run.state_bytes
    assert sizes[1] - sizes[0] == pytest.approx(one_more, rel=0.1)  # counted when the disk is asked for room


@pytest.mark.parametrize("step", [10, 13])  # before a validation, and in the middle of an epoch
def test_stopped_and_started_again_it_ends_with_the_same_bits(averaged, monkeypatch, step):
    arguments, whole = averaged
    stop_at(step, [*arguments, f"run_name=stopped_{step}"], monkeypatch)
    assert "continuing from" in train_here(*arguments, f"run_name=stopped_{step}").stdout
    stopped = whole.parent / f"stopped_{step}"
    assert differing_files(whole, stopped) == []
    assert all(is_equal(saved(whole, name), saved(stopped, name)) for name in ("state.pt", "average_0.pt"))


def test_killed_after_a_validation_it_ends_with_the_same_bits(averaged, monkeypatch):
    arguments, whole = averaged
    run, train_step = opened(*arguments, "run_name=killed"), main.train_step

    def killed(run, step):
        if run.progress.step == 11:
            raise KeyboardInterrupt
        return train_step(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(main, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            main.train(run)
    assert "optimizer step 10" in train_here(*arguments, "run_name=killed").stdout
    assert differing_files(whole, run.folder.path) == []
    assert is_equal(saved(whole, "average_0.pt"), saved(run.folder.path, "average_0.pt"))


def test_accumulated_on_two_processes_it_is_that_of_the_large_batch(overrides, tmp_path):
    arguments = [*overrides, *PLAIN, DECAY]
    train_here(*arguments)
    two = [2, "main_accumulation.py", *arguments, "run_name=two", "data_config.batch_size=4",
           "train_config.effective_batch_size=16"]
    launch(*two)
    assert distance(weights_of(tmp_path / "runs/run"), weights_of(tmp_path / "runs/two")) < 1e-6
    go_on_from_the_state_before(two, tmp_path / "runs/two")


def test_a_sharded_average_is_that_of_one_process(overrides, tmp_path):
    """Over two epochs: after a validation, training goes on with the weights and not with their average."""
    arguments = [*overrides, *PLAIN, DECAY]
    train_here(*arguments)
    sharded = [2, "tests/fsdp2_worker.py", *arguments, "run_name=sharded", "data_config.batch_size=4",
               "train_config.effective_batch_size=16"]
    variables = sharding_variables("fsdp2", tmp_path)
    assert "FSDP" in launch(*sharded, **variables)
    assert distance(weights_of(tmp_path / "runs/run"), weights_of(tmp_path / "runs/sharded")) < 1e-6
    go_on_from_the_state_before(sharded, tmp_path / "runs/sharded", **variables)


def go_on_from_the_state_before(command: list, run, **variables: str) -> None:
    """As if the run had been killed in its last epoch: it ends with the same bits."""
    whole = shutil.copytree(run, run.with_name("whole"))
    (run / "metrics.json").unlink()
    shutil.rmtree(saved_states(run / "last")[0])
    assert "continuing from" in launch(*command, **variables)
    assert differing_files(whole, run) == []


@pytest.mark.parametrize("devices_class", [Devices, AcceleratedDevices])
def test_a_step_that_is_not_finite_does_not_change_the_average(overrides, devices_class, monkeypatch):
    run, train_step, before = run_of(overrides, devices_class, DECAY), main.train_step, []

    def poisoned(run, step):
        if run.progress.step == 4:
            before.extend(average.clone() for average in run.average.averages)
            run.devices.unwrap(run.model).head.weight.register_hook(lambda gradient: gradient * float("nan"))
        return train_step(run, step)

    monkeypatch.setattr(main, "train_step", poisoned)
    with pytest.raises(FloatingPointError):
        main.train(run)
    assert is_equal(before, run.average.averages)


def test_pretraining_keeps_the_average(overrides, tmp_path):
    for name, more in (("off", []), ("on", [DECAY])):
        train_here(*overrides, f"run_name={name}", "train_config.epochs=1", *more, mode="pretrain")
    off, on = tmp_path / "runs/off", tmp_path / "runs/on"
    assert is_equal(saved(off, "state.pt"), saved(on, "state.pt"))
    assert distance(weights_of(off), weights_of(on)) > 1e-4
