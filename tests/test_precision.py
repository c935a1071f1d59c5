"""What mixed_precision=auto decides: fp32 or bf16 by the CPU, in each process, and for a whole run.

These tests hold two promises: the same command ends with the same bits after a stop, and an optimizer step is the mean
over its effective batch, on either kind of CPU.
"""

import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, content_of, metrics_of, train_here

import main
from suite.common.stopping import StopRequested
from suite.training.devices import SingleDevice, pick_precision
from suite.training.run import Run
from utils import load_config

PICKED = {"fp32": "no", "bf16": "bf16"}
READER = """
import torch
from suite.training.devices import pick_precision
print(pick_precision("auto", torch.device("cpu")))
"""


def test_the_tests_and_their_children_believe_in_the_same_cpu(cpu):
    """Or tests in automatic precision would prove one kind of CPU alone, that of the machine."""
    child = subprocess.run([sys.executable, "-c", READER], capture_output=True, text=True, check=True)
    assert (pick_precision("auto", torch.device("cpu")), child.stdout.strip()) == (PICKED[cpu], PICKED[cpu])


def stop_at(step: int, arguments: list[str], monkeypatch) -> None:
    """Train, and stop after this optimizer step with the state saved."""
    config = load_config(PROJECT / "config.yaml", arguments)
    run = Run.open(config, SingleDevice(config))

    def stop_if_asked(devices):
        if run.progress.step == step:
            raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(main, "stop_if_asked", stop_if_asked)
        with pytest.raises(SystemExit):
            main.train(run)


@pytest.fixture
def automatic(overrides) -> list[str]:
    return [*overrides, "train_config.mixed_precision=auto"]


def test_a_run_in_automatic_precision_ends_with_the_same_bits_after_a_stop(automatic, tmp_path, cpu, monkeypatch):
    """And is the run of the precision that auto has picked, to the last bit."""
    stop_at(13, [*automatic, "run_name=stopped"], monkeypatch)
    assert "continuing from" in train_here(*automatic, "run_name=stopped").stdout
    train_here(*automatic, "run_name=whole", f"train_config.mixed_precision={PICKED[cpu]}")
    stopped, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    for name in ("best/model.safetensors", "history.jsonl", "valid_predictions.csv", "test_predictions.csv"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics_of(stopped)["environment"]["precision"] == PICKED[cpu]
    assert metrics_of(stopped)["test"]["accuracy"] == 1.0


def test_a_run_is_not_continued_in_another_precision(automatic, tmp_path, cpu, monkeypatch):
    """The same command ends with the same bits, or with one line: never half in bf16 and half in fp32."""
    stop_at(13, automatic, monkeypatch)
    before, [other] = content_of(tmp_path / "runs"), {"fp32", "bf16"} - {cpu}
    monkeypatch.setenv("CPU_OF_TESTS", other)
    [line] = train_here(*automatic, code=2).stderr.splitlines()
    assert f"was trained on cpu ({cpu}), and would go on with cpu ({other}) here: finish the run" in line
    assert content_of(tmp_path / "runs") == before
