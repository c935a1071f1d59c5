"""As many processes as were asked for, and they decide alike: who fills the caches first, and when a number that is
not finite ends the run."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.config import config_args
from conftest import PROJECT, free_port, run_script

from suite.common.launcher import asked_processes

WORKER = "tests/processes_worker.py"


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results").mkdir()

    def run(machines: int, *arguments: str) -> list[dict]:
        """What the worker's processes say, two on each machine, in the order of their ranks."""
        port = str(free_port())
        nodes = [subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), "--node_rank", str(node),
             "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port, WORKER, arguments[0],
             str(tmp_path / "results"), *arguments[1:]], cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for node in range(machines)]
        for node in nodes:
            output = node.communicate(timeout=120)[0]
            assert node.returncode == 0, output
        return [json.loads((tmp_path / "results" / f"{rank}.json").read_text()) for rank in range(2 * machines)]

    return run


def test_one_process_of_each_machine_fills_its_caches_before_the_others(results):
    found = results(2, "caches")
    first = {each["machine"]: each["time"] for each in found if each["local_rank"] == "0"}
    assert len(first) == 2
    for each in found:
        if each["local_rank"] != "0":
            assert each["time"][0] >= max(ended for _, ended in first.values())
    (start, end), (other_start, other_end) = first.values()
    assert max(start, other_start) < min(end, other_end)  # the machines do not wait for each other's first process


def test_all_processes_name_the_step_whose_loss_is_not_finite_in_one(results, overrides):
    one, two = results(1, "failure", *overrides, "train_config.optimizer=sgd", "train_config.effective_batch_size=32")
    assert one["error"] == two["error"]
    assert one["error"].startswith("optimizer step 5: loss or gradient is not finite")
    assert f"reviews {', '.join(map(str, one['reviews']))}." in one["error"]
    assert one["unchanged"]
    assert two["unchanged"]


def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_noticed(overrides, tmp_path):
    """Wrong settings end in one line with the fix and exit code 2: Accelerate starts one process here, without a word,
    and the effective batch would be half of what was asked for."""
    result = run_script("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2",
                        "main_accumulation.py", *overrides, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in result.stderr.splitlines()
        if "accelerate launch was asked for 2 processes and has started 1: give it --multi_gpu" in line]
    assert "returned non-zero exit status 2." in result.stderr  # the launcher's word about the script
    assert not (tmp_path / "runs").exists()


PYTHON = ["python", "-u"]
CONSOLE = [*PYTHON, "/venv/bin/accelerate", "launch"]
MULTI_CPU = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 3\n"


@pytest.mark.parametrize(("words", "default_file", "asked"), [
    ([*CONSOLE, "--num_processes", "2", "main.py", "--num_processes", "5"], False, 2),
    ([*PYTHON, "/venv/bin/accelerate-launch", "--cpu", "--num-processes=2", "main.py"], True, 2),
    ([*PYTHON, "-m", "accelerate.commands.launch", "--num_machines", "2", "--num_processes", "8", "main.py"], False, 8),
    ([*PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "FILE", "main.py"], False, 3),
    ([*CONSOLE, "--config_file", "FILE", "--num_processes", "4", "main.py", "run_name="], False, 4),
    ([*CONSOLE, "main.py"], True, 3),
    ([*CONSOLE, "--cpu", "main.py"], True, None),  # Accelerate does not read its default file then
    ([*CONSOLE, "main.py"], False, None),
    (["sh", "-c", "accelerate launch --num_processes 2 main.py"], True, None),
    (["/venv/bin/torchrun", "--nproc_per_node", "2", "main.py"], True, None),
    ([], True, None)])
def test_what_a_launcher_was_asked_for(words, default_file, asked, tmp_path, monkeypatch):
    """As its own parser reads its options, and else the file of `accelerate config`."""
    (tmp_path / "FILE").write_text(MULTI_CPU)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_args, "default_config_file", "FILE" if default_file else "absent")
    assert asked_processes(words) == asked
