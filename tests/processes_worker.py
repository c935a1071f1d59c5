"""What several processes agree on; test_processes.py starts this as torchrun would.

    torchrun [...] tests/processes_worker.py caches RESULT_FOLDER
    torchrun [...] tests/processes_worker.py failure RESULT_FOLDER [section.key=value ...]
    torchrun [...] tests/processes_worker.py checkpointing RESULT_FOLDER [section.key=value ...]
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.optimizer import AcceleratedOptimizer

import main
from main_accumulation import AcceleratedDevices
from suite.training.run import Run
from utils import PROJECT, Config, TrainConfig, load_config, process_rank


def fill_caches() -> dict:
    """When this process was in the part that a main process does first."""
    devices = AcceleratedDevices(Config(train_config=TrainConfig(device="cpu", mixed_precision="no")))
    with devices.main_process_first():
        started = time.time()
        time.sleep(0.5)
        ended = time.time()
    devices.barrier()
    return {"machine": os.environ["GROUP_RANK"], "local_rank": os.environ["LOCAL_RANK"], "time": [started, ended]}


def fail_in_one_process(overrides: list[str]) -> dict:
    """What training says when the loss of process 1 is not finite in optimizer step 5, under fp16's loss scaler."""
    config = load_config(PROJECT / "config.yaml", overrides)
    run = Run.open(config, AcceleratedDevices(config))
    devices, accelerator = run.devices, run.devices.accelerator
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # Accelerate makes one on GPUs only
    devices.scaler = accelerator.scaler = scaler
    run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, device_placement=False, scaler=scaler)
    accelerator._optimizers, accelerator.native_amp = [run.optimizer], True
    accelerator.state._mixed_precision, devices.autocast = "fp16", nullcontext
    train_step, before = main.train_step, {}

    def poisoned(run, step):
        if run.progress.step != 4:
            return train_step(run, step)
        before.update({name: weight.clone() for name, weight in run.model.state_dict().items()})
        hook = run.model.module.head.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))
        if process_rank() == 0:
            hook.remove()
        result = train_step(run, step)
        hook.remove()
        return result

    main.train_step = poisoned
    try:
        main.train(run)
    except FloatingPointError as error:
        unchanged = all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())
        reviews = sorted(run.data.splits["train"].ids[run.sampler.effective_batches(0)[4]].tolist())
        return {"error": str(error), "unchanged": unchanged, "reviews": reviews}
    return {"error": None}


def train_with_and_without_checkpointing(overrides: list[str]) -> dict:
    """Whether two runs that differ in nothing but gradient checkpointing end with the same weights."""
    runs = []
    for value in ("false", "true"):
        config = load_config(PROJECT / "config.yaml", [*overrides, f"run_name=checkpointing_{value}",
                                                       f"train_config.gradient_checkpointing={value}"])
        runs.append(Run.open(config, AcceleratedDevices(config)))
        main.train(runs[-1])
    plain, again = (run.devices.state_dict(run.model) for run in runs)
    return {"checkpointed": [run.devices.unwrap(run.model).encoder.is_activation_checkpointing for run in runs],
            "same": all(torch.equal(plain[name], again[name]) for name in plain)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = {"failure": fail_in_one_process, "checkpointing": train_with_and_without_checkpointing}
    found = fill_caches() if sys.argv[1] == "caches" else work[sys.argv[1]](sys.argv[3:])
    Path(sys.argv[2], f"{process_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
