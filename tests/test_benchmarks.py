"""The programs that measure: do they see a busy machine, count every operation once, and pack reviews rightly?"""

import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import gpu, noise, profile
from benchmarks.packing import packed
from benchmarks.workload import config_for, workload
from main import train_step
from suite.training.devices import SingleDevice
from suite.training.run import Run


@pytest.fixture
def small_workload(monkeypatch):
    """work = small_workload(shape): an encoder of this shape and 16 reviews to train on."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back after the test
    return lambda shape: workload(shape, 16)


def test_other_programs_are_noticed():
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.2)
    watch, own = noise.Watch(), time.process_time()
    time.sleep(1)
    share = watch.others()
    other.kill()
    other.wait()
    assert time.process_time() - own < 0.5
    assert 0.2 / os.cpu_count() < share < 1.1


def test_what_was_disturbed_is_measured_again(monkeypatch, capsys):
    shares, results = iter([0.5, 0.06, 0.01, *[0.9] * noise.ATTEMPTS]), iter(range(100))
    monkeypatch.setattr(noise.Watch, "others", lambda watch: next(shares))
    assert noise.quietly(lambda: next(results), "round 1") == 2
    assert capsys.readouterr().out.count("measured again") == 2
    with pytest.raises(SystemExit, match="no verdict"):
        noise.quietly(lambda: next(results), "round 2")


def test_a_profile_counts_all_of_the_time_once(small_workload):
    with small_workload("minilm") as work:
        shares = profile.measure(work, tokens=32, batch=8)
    kernel = shares.pop("kernel")
    assert 0 <= kernel < 1
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)
    for part in ("matrix products", "attention", "dropout", "GELU", "layer norm", "embeddings", "optimizer", "Python"):
        assert shares[part] > 0, part
    assert shares["matrix products"] > shares["layer norm"]
    assert shares["the rest"] < 0.2


def test_packed_reviews_give_the_loss_and_the_gradients_of_padded_ones(small_workload):
    found = []
    with small_workload("modernbert-small") as work:
        for name, patch in (("padded", nullcontext), ("packed", packed)):
            config = config_for(work, 160, 16, f"run_name={name}", "train_config.mixed_precision=no")
            with patch():
                run = Run.open(config, SingleDevice(config))
                run.sampler.epoch = 0
                rows, micro_batches = next(zip(run.sampler.effective_batches(), run.train_loader, strict=True))
                descent = torch.optim.SGD(run.model.parameters(), lr=1.0)
                loss, _ = train_step(run.model.eval(), descent, micro_batches, len(rows), run.devices)
            found.append((micro_batches[0]["input_ids"].shape, loss, dict(run.model.named_parameters())))
    (padded_shape, loss, weights), (packed_shape, packed_loss, packed_weights) = found
    assert padded_shape[0] > 1
    assert packed_shape[0] == 1
    torch.testing.assert_close(loss, packed_loss)
    torch.testing.assert_close(weights, packed_weights, atol=1e-5, rtol=1e-4)


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path, capsys):
    steps = [gpu.Step("fine", 1, ["this"], []), gpu.Step("wrong", 1, ["no_such_module"], []),
             gpu.Step("endless", 1, ["http.server", "0"], [])]
    assert [gpu.take(step, tmp_path, 3, rehearsed=False) for step in steps] == [True, False, False]
    printed = capsys.readouterr().out
    assert "wrong: failed with exit code 1" in printed
    assert "endless: stopped at its time limit" in printed
    assert "Beautiful is better than ugly" in (tmp_path / "fine.txt").read_text()
