"""Several processes decide alike: who fills the caches first, and when a number that is not finite ends the run."""

import json
import os
import subprocess
import sys

import pytest
from conftest import PROJECT, free_port

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
