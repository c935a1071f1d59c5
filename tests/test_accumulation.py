"""An optimizer step is the mean loss over its effective batch, however that is cut and whoever computes it."""

import importlib.util
import json
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accumulation_worker import build_model, distance, explicit_data, single_device, train_steps
from conftest import (
    ACCELERATE,
    PROJECT,
    differing_files,
    expect,
    free_port,
    history_of,
    launch,
    metrics_of,
    run_script,
    start_script,
    train,
    train_here,
)
from safetensors.torch import load_file

import main
from main_accumulation import AcceleratedDevices
from model import EncoderForClassification
from suite.common.devices import Devices
from suite.reviews.sampling import StepSampler
from utils import load_config


def after(folder: str, micro_batch: int, steps: int | None = None, dtype: torch.dtype = torch.float32,
          **settings) -> dict[str, torch.Tensor]:
    model = build_model(folder, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_steps(model, optimizer, single_device(), explicit_data(), 64, micro_batch, steps, **settings)
    return model.state_dict()


@pytest.mark.parametrize("encoder", ["bert", "modernbert"])
def test_any_micro_batch_gives_the_same_parameters(encoder_folder, encoder, cpu):
    """In either precision; the last effective batch is a short one."""
    folder = encoder_folder(encoder)
    start, whole = build_model(folder).state_dict(), after(folder, 64)
    assert (moved := distance(start, whole)) > 1e-4  # it trained at all
    for micro_batch in (8, 13):
        assert distance(whole, after(folder, micro_batch)) < {"fp32": 1e-6, "bf16": 0.01 * moved}[cpu]


@pytest.mark.parametrize("class_weights", [None, [0.5, 3.0]])
def test_against_the_gradient_of_the_whole_batch_in_float64(encoder_folder, class_weights):
    folder, dataset = encoder_folder("bert"), explicit_data()
    class_weights = class_weights and torch.tensor(class_weights, dtype=torch.float64)
    model = build_model(folder, torch.float64)
    parameters = dict(model.named_parameters())
    for rows in StepSampler(dataset.lengths, 64, 64, seed=3).effective_batches(0):  # the short last one included
        batch = dataset.batch(rows)
        of_windows = model(batch["input_ids"], batch["attention_mask"]).logits.split(batch["windows"].tolist())
        logits = torch.stack([logits.mean(dim=0) for logits in of_windows])
        log_likelihoods = torch.log_softmax(logits, dim=1)[torch.arange(len(rows)), batch["labels"]]
        weights = torch.ones(len(rows)) if class_weights is None else class_weights[batch["labels"]]
        loss = -(weights * log_likelihoods).sum() / weights.sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for micro_batch in (64, 13):
        trained = after(folder, micro_batch, dtype=torch.float64, class_weights=class_weights)
        assert distance(model.state_dict(), trained) < 1e-12


def test_the_gradient_is_clipped_once_a_step(encoder_folder):
    folder = encoder_folder("bert")
    start = build_model(folder).state_dict()
    for micro_batch in (64, 13):
        clipped = after(folder, micro_batch, 1, max_grad_norm=1e-3)
        step = sum(((clipped[name] - start[name]) ** 2).sum() for name in start).sqrt()
        assert float(step) == pytest.approx(0.1 * 1e-3, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize(("processes", "micro_batch", "class_weights"), [(2, 9, [0.5, 3.0]), (3, 16, None)])
def test_several_processes_give_the_same_parameters(encoder_folder, tmp_path, processes, micro_batch, class_weights):
    folder, result = encoder_folder("bert"), tmp_path / "weights.pt"
    launch(processes, "tests/accumulation_worker.py", folder, str(result), "64", str(micro_batch),
           *map(str, class_weights or []))
    class_weights = class_weights and torch.tensor(class_weights)
    model = build_model(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    totals = train_steps(model, optimizer, single_device(), explicit_data(), 64, 64, class_weights=class_weights)
    assert distance(model.state_dict(), torch.load(result, weights_only=True)) < 1e-6
    assert class_weights is None or distance(model.state_dict(), after(folder, 64)) > 1e-4  # the weights matter
    record = json.loads(result.with_suffix(".json").read_text())
    assert record["processes"] == processes
    assert record["exchanges"] == 4  # one a step: none before its last micro-batch
    assert record["totals"] == pytest.approx(totals.tolist(), rel=1e-5)


# Plain gradients without dropout: how they are cut shows in nothing but the rounding
PLAIN = ["train_config.optimizer=sgd", "model_config.dropout_rate=0", "model_config.encoder_dropout=0"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "best/model.safetensors")


def test_the_script_on_three_processes(overrides, tmp_path):
    """160 training reviews in effective batches of 159 and 1, fewer than there are processes; 20 to test."""
    arguments = [*overrides, *PLAIN, "train_config.learning_rate=0.5", "train_config.max_grad_norm=0.5"]
    train_here(*arguments, "run_name=one", "data_config.batch_size=159")
    launch(3, "main_accumulation.py", *arguments, "run_name=three", "data_config.batch_size=53",
           "train_config.effective_batch_size=159")
    one, three = tmp_path / "runs/one", tmp_path / "runs/three"
    assert distance(weights_of(one), weights_of(three)) < 1e-6
    rows = [[row.split(",")[:3] for row in (folder / "test_predictions.csv").read_text().splitlines()]
            for folder in (one, three)]
    assert rows[0] == rows[1]
    assert len({row[0] for row in rows[1][1:]}) == 20
    first, second = metrics_of(one), metrics_of(three)
    for split in ("valid", "test"):
        for name, value in first[split].items():
            assert value == pytest.approx(second[split][name], rel=1e-4), name
    assert (second["train"]["optimizer_steps"], second["environment"]["processes"]) == (4, 3)
    for first, second in zip(history_of(one), history_of(three), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_two_processes_stopped_and_started_again_end_with_the_same_bits(overrides, tmp_path):
    """`accelerate launch` itself starts them, and passes on the signal that it gets."""
    arguments = ["main_accumulation.py", *overrides, "train_config.save_every_steps=3", "data_config.batch_size=8"]
    launch(2, *arguments, "run_name=whole")
    stopped = start_script(*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()),
                           *arguments, "run_name=stopped", merged=True)
    saved = tmp_path / "runs/stopped/last"
    deadline = time.monotonic() + 90
    while not any(saved.glob("*-step-00000012")) and time.monotonic() < deadline:
        time.sleep(0.002)
    stopped.terminate()
    assert "SIGTERM: saved at optimizer step" in stopped.communicate(timeout=90)[0]
    assert "continuing from" in launch(2, *arguments, "run_name=stopped")
    assert differing_files(tmp_path / "runs/whole", tmp_path / "runs/stopped") == []


ZERO = [pytest.param("deepspeed", ["--zero_stage", stage], marks=pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")) for stage in "123"]


def sharding_variables(kind: str, folder: Path, *more: str) -> dict[str, str]:
    """What `accelerate launch` makes of its file in launch/; `folder`: for a script that tells."""
    (folder / "environment.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    given = expect(0, run_script(*ACCELERATE, "--config_file", f"launch/{kind}.yaml", "--num_processes", "1", *more,
                                 str(folder / "environment.py"))).stdout.splitlines()[-1]
    return {name: value for name, value in json.loads(given).items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.parametrize(("kind", "more"), [("fsdp2", []), *ZERO])
def test_a_sharded_model_gets_the_weights_of_one_process(overrides, tmp_path, kind, more):
    """With what `accelerate launch` makes of its file in launch/, accumulated gradients and clipping."""
    variables = sharding_variables(kind, tmp_path, *more)
    arguments = [*overrides, *PLAIN, "train_config.max_grad_norm=0.2"]
    train_here(*arguments, "run_name=one")
    train_here(*arguments, "run_name=unclipped", "train_config.max_grad_norm=null")
    sharded = [2, f"tests/{kind}_worker.py", *arguments, "run_name=sharded", "data_config.batch_size=4",
               "train_config.effective_batch_size=16"]
    assert {"fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind] in launch(*sharded, **variables)
    one, unclipped, run = (tmp_path / "runs" / name for name in ("one", "unclipped", "sharded"))
    assert distance(weights_of(one), weights_of(run)) < 1e-6
    assert distance(weights_of(one), weights_of(unclipped)) > 1e-4  # clipping did shape the result
    # Going on from the sharded state: only the test is left to do, and it comes out the same.
    predictions = (run / "test_predictions.csv").read_bytes()
    for name in ("metrics.json", "test_predictions.csv"):
        (run / name).unlink()
    assert "continuing from" in launch(*sharded, **variables)
    assert (run / "test_predictions.csv").read_bytes() == predictions


def test_a_sharded_model_in_bf16_is_rounded_where_that_of_ddp_is(overrides, tmp_path):
    """Not its loss, logits or gradients, whatever policy Accelerate has for them."""
    arguments = [*overrides, *PLAIN, "train_config.epochs=1", "train_config.mixed_precision=bf16",
                 "data_config.batch_size=4", "train_config.effective_batch_size=16"]
    launch(2, "main_accumulation.py", *arguments, "run_name=ddp")
    launch(2, "tests/fsdp2_worker.py", *arguments, "run_name=sharded", **sharding_variables("fsdp2", tmp_path))
    ddp, sharded = tmp_path / "runs/ddp", tmp_path / "runs/sharded"
    assert distance(weights_of(ddp), weights_of(sharded)) < 1e-6


@pytest.mark.long
def test_two_machines_give_the_weights_of_one_process(overrides, tmp_path):
    """Two launchers on this machine. Without GPUs, --multi_gpu asks for the launcher that GPUs would get."""
    train_here(*overrides, *PLAIN, "run_name=one")
    port = str(free_port())
    machines = [start_script(
        *ACCELERATE, "--multi_gpu", "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip",
        "127.0.0.1", "--main_process_port", port, "--num_processes", "2", "main_accumulation.py", *overrides, *PLAIN,
        "data_config.batch_size=8", "run_name=two", merged=True) for rank in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "on 2 x cpu" in outputs[0]
    assert distance(weights_of(tmp_path / "runs/one"), weights_of(tmp_path / "runs/two")) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Both scripts, and what a step does when something is in its way


def test_both_scripts_give_the_same_bits_on_the_demo(tmp_path, cpu):
    arguments = [f"output_dir={tmp_path}", "data_config.limit=400", "train_config.epochs=2",
                 "train_config.mixed_precision=auto"]
    train_here(*arguments, "run_name=main", config="demo.yaml")
    train("--config", "demo.yaml", *arguments, "run_name=main_accumulation", script="main_accumulation.py")
    assert differing_files(tmp_path / "main", tmp_path / "main_accumulation") == []


def test_accumulation_equals_the_large_batch_in_the_script(overrides, tmp_path):
    train_here(*overrides, *PLAIN, "run_name=whole", "data_config.batch_size=64")
    train(*overrides, *PLAIN, "run_name=cut", "train_config.effective_batch_size=64", script="main_accumulation.py")
    assert distance(weights_of(tmp_path / "runs/whole"), weights_of(tmp_path / "runs/cut")) < 1e-6


def run_of(overrides, devices_class, *more) -> main.Run:
    config = load_config(PROJECT / "config.yaml", [*overrides, *PLAIN, "train_config.epochs=1",
                                                   "data_config.eval_batch_size=8", *more])
    return main.Run.open(config, devices_class(config))


@pytest.mark.parametrize("devices_class", [Devices, AcceleratedDevices])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_result(overrides, devices_class, monkeypatch, capsys):
    undisturbed = run_of(overrides, devices_class, "data_config.batch_size=64")
    main.train(undisturbed)
    forward, calls = EncoderForClassification.forward, []

    def short_of_memory(self, input_ids, *args, **kwargs):
        calls.append(len(input_ids))
        if len(input_ids) > 16 or len(calls) == 9:  # the 9th comes with gradients of its step already in place
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(EncoderForClassification, "forward", short_of_memory)
    more = ["data_config.batch_size=64", "train_config.auto_micro_batch=true", "run_name=oom"]
    run = run_of(overrides, devices_class, *more)
    capsys.readouterr()
    main.train(run)
    assert capsys.readouterr().out.count("out of memory") == 3  # 64 -> 32 -> 16 -> 8, each said once
    assert (run.sampler.micro_batch, run.progress.micro_batch, run.progress.step) == (8, 8, 3)
    assert distance(undisturbed.model.state_dict(), run.model.state_dict()) < 1e-6


@pytest.mark.parametrize("devices_class", [Devices, AcceleratedDevices])
def test_the_right_step_is_named_after_an_optimizer_ran_out_of_memory(overrides, devices_class, monkeypatch):
    run = run_of(overrides, devices_class, "train_config.auto_micro_batch=true", "log_config.log_every_steps=100")
    guard, calls = run.devices.guard, []
    step, train_step = guard.step, main.train_step

    def short_of_memory(*args, **kwargs):  # where Adam's moments are made, at the first step
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(*args, **kwargs)

    def poisoned(run, step):
        if run.progress.step == 9:  # the last of the epoch
            run.devices.unwrap(run.model).head.weight.register_hook(lambda gradient: gradient * float("nan"))
        return train_step(run, step)

    monkeypatch.setattr(guard, "step", short_of_memory)
    monkeypatch.setattr(main, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="^optimizer step 10: ") as stopped:
        main.train(run)
    ids = sorted(run.data.splits["train"].ids[run.sampler.effective_batches(0)[9]].tolist())
    assert f"reviews {', '.join(map(str, ids))}." in str(stopped.value)


def test_out_of_memory_without_leave_is_an_error(overrides, monkeypatch):
    run = run_of(overrides, Devices)

    def short_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EncoderForClassification, "forward", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        main.train(run)


def scale_losses(run: main.Run, monkeypatch) -> None:
    """As in fp16 on a GPU: the first gradients overflow, until the scale has come down."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-9, growth_interval=999)
    run.devices.scaler = scaler
    run.devices.unwrap(run.model).head.weight.data *= 30
    if isinstance(run.devices, AcceleratedDevices):
        accelerator = run.devices.accelerator
        run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
        accelerator.scaler, accelerator.native_amp, accelerator._optimizers = scaler, True, [run.optimizer]
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        monkeypatch.setattr(run.devices, "autocast", nullcontext)  # the scale is too large for fp16 itself


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])  # the second has a fused kernel, which does the skipping
@pytest.mark.parametrize("devices_class", [Devices, AcceleratedDevices])
def test_a_step_that_the_loss_scaler_skips_does_not_advance_schedule_and_average(
        overrides, devices_class, optimizer, monkeypatch):
    run = run_of(overrides, devices_class, "train_config.scheduler=linear", "train_config.ema_decay=0.9",
                 f"train_config.optimizer={optimizer}")
    scale_losses(run, monkeypatch)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    rates = []
    step = run.devices.step
    run.devices.step = lambda *given: rates.append(step(*given)) or rates[-1]
    main.train(run)
    skipped = rates.count(False)
    assert 0 < skipped < len(rates) == 10
    assert run.scheduler.last_epoch == run.average.updates == 10 - skipped
    assert not torch.equal(before["head.weight"], run.model.state_dict()["head.weight"])
    assert all(weight.isfinite().all() for weight in run.model.state_dict().values())


@pytest.mark.long
def test_the_gradient_norm_benchmark_runs_and_this_suite_is_right():
    printed = expect(0, run_script("-m", "benchmarks.gradient_norm")).stdout
    assert "this suite's norm is right for every cut" in printed
