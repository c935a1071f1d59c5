"""An optimizer step is the mean loss over its effective batch, however that is cut and whoever computes it."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accumulation_worker import build_model, distance, explicit_data, single_device, train_steps
from conftest import PROJECT, free_port, run_here, run_script, train, train_here
from safetensors.torch import load_file

import main
import main_accumulation
from main_accumulation import AcceleratedDevices
from model import EncoderForClassification
from suite.common import cli
from suite.reviews.sampling import StepSampler
from suite.training.accelerated import refuse_other_settings
from suite.training.devices import SingleDevice
from utils import Config, TrainConfig, UserError, load_config


def after(folder: str, micro_batch: int, steps: int | None = None, dtype: torch.dtype = torch.float32,
          **settings) -> dict[str, torch.Tensor]:
    model = build_model(folder, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_steps(model, optimizer, single_device(), explicit_data(), 64, micro_batch, steps, **settings)
    return model.state_dict()


@pytest.mark.parametrize("micro_batch", [32, 8, 13])
@pytest.mark.parametrize("steps", [1, None])
@pytest.mark.parametrize("encoder", ["bert", "modernbert"])
def test_any_micro_batch_gives_the_same_parameters(encoder_folder, encoder, steps, micro_batch, cpu):
    """An optimizer step is the mean over its effective batch, however it is cut, in either precision."""
    folder = encoder_folder(encoder)
    start, whole = build_model(folder).state_dict(), after(folder, 64, steps)
    assert (moved := distance(start, whole)) > 1e-4  # it trained at all
    assert distance(whole, after(folder, micro_batch, steps)) < {"fp32": 1e-6, "bf16": 0.01 * moved}[cpu]


@pytest.mark.parametrize("class_weights", [None, [0.5, 3.0]])
@pytest.mark.parametrize("micro_batch", [64, 13])
def test_against_the_gradient_of_the_whole_batch_in_float64(encoder_folder, micro_batch, class_weights):
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
    trained = after(folder, micro_batch, dtype=torch.float64, class_weights=class_weights)
    assert distance(model.state_dict(), trained) < 1e-12


def test_the_gradient_is_clipped_once_a_step(encoder_folder):
    folder = encoder_folder("bert")
    start = build_model(folder).state_dict()
    for micro_batch in (64, 13):
        clipped = after(folder, micro_batch, 1, max_grad_norm=1e-3)
        step = sum(((clipped[name] - start[name]) ** 2).sum() for name in start).sqrt()
        assert float(step) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def launcher(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    return run_script(*launcher(processes), *arguments, timeout=300)


@pytest.mark.parametrize(("processes", "micro_batch", "class_weights"),
                         [(2, 32, None), (2, 9, [0.5, 3.0]), pytest.param(3, 16, None, marks=pytest.mark.long)])
def test_several_processes_give_the_same_parameters(encoder_folder, tmp_path, processes, micro_batch, class_weights):
    folder, result = encoder_folder("bert"), tmp_path / "weights.pt"
    finished = launch(processes, "tests/accumulation_worker.py", folder, str(result), "64", str(micro_batch),
                      *map(str, class_weights or []))
    assert finished.returncode == 0, finished.stderr
    class_weights = class_weights and torch.tensor(class_weights)
    alone = after(folder, 64, class_weights=class_weights)
    assert distance(alone, torch.load(result, weights_only=True)) < 1e-6
    assert class_weights is None or distance(alone, after(folder, 64)) > 1e-4  # the weights matter
    record = json.loads(result.with_suffix(".json").read_text())
    assert record["processes"] == processes
    assert record["exchanges"] == 4  # one a step: none before its last micro-batch
    model = build_model(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = train_steps(model, optimizer, single_device(), explicit_data(), 64, 64, class_weights=class_weights)
    assert record["totals"] == pytest.approx(expected.tolist(), rel=1e-5)


def runs(overrides: list[str], tmp_path: Path, processes: int, batch_size: int) -> Path:
    arguments = [*overrides, f"run_name=processes{processes}", f"data_config.batch_size={batch_size}",
                 "train_config.effective_batch_size=159", "train_config.optimizer=sgd", "model_config.dropout_rate=0",
                 "train_config.learning_rate=0.5",
                 "model_config.encoder_dropout=0", "train_config.max_grad_norm=0.5"]
    result = launch(processes, "main_accumulation.py", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return tmp_path / "runs" / f"processes{processes}"


def test_the_script_on_three_processes(overrides, tmp_path):
    # 160 training reviews in effective batches of 159 and 1, which is less than the number of processes; 20 test ones.
    one, three = runs(overrides, tmp_path, 1, 159), runs(overrides, tmp_path, 3, 53)
    assert distance(load_file(one / "best/model.safetensors"), load_file(three / "best/model.safetensors")) < 1e-6
    rows = [(folder / "test_predictions.csv").read_text().splitlines() for folder in (one, three)]
    assert [row.split(",")[:3] for row in rows[0]] == [row.split(",")[:3] for row in rows[1]]
    assert len({row.split(",")[0] for row in rows[1][1:]}) == 20
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, three)]
    for split in ("valid", "test"):
        for name, value in metrics[0][split].items():
            assert value == pytest.approx(metrics[1][split][name], rel=1e-4), name
    assert metrics[1]["train"]["optimizer_steps"] == 4
    assert metrics[1]["environment"]["processes"] == 3
    history = [[json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
               for folder in (one, three)]
    assert len(history[0]) == len(history[1])
    for first, second in zip(*history, strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_two_processes_stopped_and_started_again_end_with_the_same_bits(overrides, tmp_path):
    arguments = ["main_accumulation.py", *overrides, "train_config.save_every_steps=3", "data_config.batch_size=8"]
    assert launch(2, *arguments, "run_name=whole").returncode == 0
    stopped = subprocess.Popen([sys.executable, *launcher(2), *arguments, "run_name=stopped"], cwd=PROJECT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    saved = tmp_path / "runs" / "stopped" / "last"
    deadline = time.monotonic() + 90
    while not any(saved.glob("*-step-00000012")) and time.monotonic() < deadline:
        time.sleep(0.002)
    stopped.terminate()  # torchrun passes it on to both
    output = stopped.communicate(timeout=90)[0]
    assert "SIGTERM: saved at optimizer step" in output
    again = launch(2, *arguments, "run_name=stopped")
    assert "continuing from" in again.stdout, again.stderr
    for name in ("best/model.safetensors", "history.jsonl", "test_predictions.csv"):
        assert (saved.parent / name).read_bytes() == (tmp_path / "runs" / "whole" / name).read_bytes(), name


ZERO = [pytest.param("deepspeed", ["--zero_stage", stage], marks=pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")) for stage in "123"]


@pytest.mark.parametrize(("kind", "more"), [("fsdp2", []), *ZERO])
def test_a_sharded_model_gets_the_weights_of_one_process(overrides, tmp_path, kind, more):
    """With the launcher's file from launch/, accumulated gradients and clipping."""
    arguments = [*overrides, "data_config.batch_size=4", "train_config.effective_batch_size=16",
                 "train_config.optimizer=sgd", "train_config.max_grad_norm=0.2", "model_config.dropout_rate=0",
                 "model_config.encoder_dropout=0"]

    def sharded():
        worker = "tests/fsdp_worker.py" if kind == "fsdp2" else "tests/deepspeed_worker.py"
        return run_script("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", f"launch/{kind}.yaml",
                          "--num_processes", "2", "--main_process_port", str(free_port()), *more, worker, *arguments,
                          "run_name=sharded", timeout=300)

    for result in (run_script("main_accumulation.py", *arguments, "run_name=one"), sharded()):
        assert result.returncode == 0, result.stderr
    assert {"fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind] in result.stdout
    folders = [tmp_path / "runs" / name for name in ("one", "sharded")]
    unclipped = run_here(*arguments, "run_name=unclipped", "train_config.max_grad_norm=null",
                         "data_config.batch_size=16")
    assert unclipped.returncode == 0, unclipped.stderr
    weights = [load_file(folder / "best/model.safetensors") for folder in (*folders, tmp_path / "runs" / "unclipped")]
    assert distance(weights[0], weights[1]) < 1e-6
    assert distance(weights[0], weights[2]) > 1e-4  # clipping did shape the result
    # Going on from the sharded state: only the test is left to do, and it comes out the same.
    predictions = (folders[1] / "test_predictions.csv").read_bytes()
    for name in ("metrics.json", "test_predictions.csv"):
        (folders[1] / name).unlink()
    again = sharded()
    assert "continuing from" in again.stdout, again.stderr
    assert (folders[1] / "test_predictions.csv").read_bytes() == predictions


def test_two_machines_give_the_weights_of_one_process(overrides, tmp_path):
    """Two launchers on this machine. Without GPUs, --multi_gpu asks for the launcher that GPUs would get."""
    arguments = [*overrides, "data_config.batch_size=8", "train_config.optimizer=sgd", "model_config.dropout_rate=0",
                 "model_config.encoder_dropout=0"]
    assert run_here(*arguments, "run_name=one", "data_config.batch_size=16").returncode == 0
    port = str(free_port())
    machines = [subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "2",
         "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes",
         "2", "main_accumulation.py", *arguments, "run_name=two"],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "on 2 x cpu" in outputs[0]
    weights = [load_file(tmp_path / "runs" / name / "best/model.safetensors") for name in ("one", "two")]
    assert distance(*weights) < 1e-6


def test_both_scripts_give_the_same_bits_on_the_demo(tmp_path, cpu):
    arguments = [f"output_dir={tmp_path}", "data_config.limit=800", "train_config.epochs=2",
                 "train_config.mixed_precision=auto"]
    train_here(*arguments, "run_name=main", config="demo.yaml")
    train("--config", "demo.yaml", *arguments, "run_name=main_accumulation", script="main_accumulation.py")
    for name in ("best/model.safetensors", "history.jsonl", "test_predictions.csv", "misclassified.csv"):
        assert (tmp_path / "main" / name).read_bytes() == (tmp_path / "main_accumulation" / name).read_bytes(), name


def test_accumulation_equals_the_large_batch_in_the_script(overrides, tmp_path):
    plain = [*overrides, "train_config.effective_batch_size=64", "train_config.optimizer=sgd",
             "model_config.dropout_rate=0", "model_config.encoder_dropout=0"]
    for result in (run_here(*plain, "run_name=whole", "data_config.batch_size=64"),
                   run_script("main_accumulation.py", *plain, "run_name=cut", "data_config.batch_size=16")):
        assert result.returncode == 0, result.stderr
    weights = [load_file(tmp_path / "runs" / name / "best/model.safetensors") for name in ("whole", "cut")]
    assert distance(*weights) < 1e-6


def run_of(overrides, devices_class, *more) -> main.Run:
    plain = ["train_config.optimizer=sgd", "model_config.dropout_rate=0", "model_config.encoder_dropout=0",
             "train_config.epochs=1", "data_config.eval_batch_size=8"]
    config = load_config(PROJECT / "config.yaml", [*overrides, *plain, *more])
    return main.Run.open(config, devices_class(config))


@pytest.mark.parametrize("devices_class", [SingleDevice, AcceleratedDevices])
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


@pytest.mark.parametrize("devices_class", [SingleDevice, AcceleratedDevices])
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
    run = run_of(overrides, SingleDevice)

    def short_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EncoderForClassification, "forward", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        main.train(run)


def test_a_step_that_the_loss_scaler_skips_does_not_advance_the_schedule(overrides):
    run = run_of(overrides, SingleDevice, "train_config.scheduler=linear")
    run.devices.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-9, growth_interval=999)
    run.model.head.weight.data *= 30  # large gradients, which overflow until the scale has come down
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    rates = []
    step = run.devices.step
    run.devices.step = lambda *given: rates.append(step(*given)) or rates[-1]
    main.train(run)
    skipped = rates.count(False)
    assert 0 < skipped < len(rates) == 10
    assert run.scheduler.last_epoch == 10 - skipped
    assert not torch.equal(before["head.weight"], run.model.state_dict()["head.weight"])
    assert all(weight.isfinite().all() for weight in run.model.state_dict().values())


@pytest.mark.long
def test_the_gradient_norm_benchmark_runs_and_this_suite_is_right():
    result = run_script("-m", "benchmarks.gradient_norm")
    assert result.returncode == 0, result.stderr
    assert "this suite's norm is right for every cut" in result.stdout


def test_sharding_that_accelerate_would_leave_out_is_refused(overrides, tmp_path):
    result = run_script("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "launch/fsdp2.yaml",
                        "--num_processes", "2", "--main_process_port", str(free_port()), "main_accumulation.py",
                        *overrides)
    assert result.returncode != 0
    assert "error: FSDP is asked for, and Accelerate starts it on GPUs only" in result.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The environment variables that Accelerate reads: an optimizer step is the mean over its effective batch under each of
# them, or it is refused before the first step


@pytest.fixture
def launched(monkeypatch):
    """launched(**variables): the environment of a launcher, and an Accelerate that has not read it yet."""
    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def launch(**variables: str) -> None:
        forget()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield launch
    forget()


@pytest.fixture
def on_gpus(monkeypatch):
    """Makes Accelerate believe that this process runs on a GPU, without which it starts neither FSDP nor DeepSpeed."""
    def believe():
        PartialState(cpu=True)
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
        monkeypatch.setattr(main_accumulation, "Accelerator", lambda cpu, **given: Accelerator(**given))

    return believe


# What `accelerate launch` sets by default, and what changes no number
HARMLESS = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "ACCELERATE_GRADIENT_CLIPPING": "0.001", "ACCELERATE_DEBUG_MODE": "true", "FORK_LAUNCHED": "1",
            "ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_DOWNCAST_BF16": "1", "FSDP_VERSION": "1",
            "MEGATRON_LM_GRADIENT_CLIPPING": "0.001", "PARALLELISM_CONFIG_TP_SIZE": "2"}
REFUSED = [  # the variable, its value, what to use instead
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train_config.gradient_accumulation_steps"),
    ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "train_config.compile=true"),
    ("ACCELERATE_FP8_BACKEND", "TE", "train_config.mixed_precision=bf16"),
    ("ACCELERATE_TORCH_DEVICE", "meta", "train_config.device"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "DDP, launch/fsdp2.yaml")]
REFUSED_UNDER_FSDP = [
    ("FSDP_VERSION", "1", "use 2"), ("FSDP_IGNORED_MODULES", "head", "unset it"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use train_config.gradient_checkpointing=true"),
    ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "use SHARDED_STATE_DICT")]


def first_step(folder: str, devices) -> dict[str, torch.Tensor]:
    """The weights after one optimizer step of SGD, not clipped, on 64 reviews in 4 micro-batches."""
    model = build_model(folder)
    prepared = devices.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train_steps(*prepared, devices, explicit_data(), 64, 16, 1)
    return model.state_dict()


def devices_for(**settings: str) -> AcceleratedDevices:
    return AcceleratedDevices(Config(train_config=TrainConfig(**{"device": "cpu", "mixed_precision": "no"} | settings)))


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_launcher_sets_by_default_changes_no_bit(encoder_folder, launched):
    folder = encoder_folder("bert")
    launched(**HARMLESS)
    assert same_bits(first_step(folder, devices_for()), first_step(folder, single_device()))


def test_a_launchers_mixed_precision_counts_where_the_configuration_says_auto(encoder_folder, launched):
    folder, found = encoder_folder("bert"), {}
    for variable, key in (("bf16", "auto"), ("no", "bf16"), ("bf16", "no")):
        launched(ACCELERATE_MIXED_PRECISION=variable)
        found[variable, key] = first_step(folder, devices_for(mixed_precision=key))
    assert same_bits(found["bf16", "auto"], found["no", "bf16"])
    assert same_bits(found["bf16", "no"], first_step(folder, single_device()))
    assert not same_bits(found["bf16", "auto"], found["bf16", "no"])
    launched(ACCELERATE_MIXED_PRECISION="fp16")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION.* is 'fp16', which a CPU cannot train in"):
        devices_for(mixed_precision="auto")


def test_a_launcher_that_asks_for_the_cpu_gets_it(launched, monkeypatch):
    asked = []
    monkeypatch.setattr(main_accumulation, "pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    for value in ("True", "False"):
        launched(ACCELERATE_USE_CPU=value)
        devices_for(device="auto")
    assert asked == ["cpu", "auto"]
    launched(ACCELERATE_USE_CPU="1")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=1: use train_config.device=cpu"):
        refuse_other_settings(devices_for().accelerator, torch.device("cuda"))


@pytest.mark.parametrize(("variable", "value", "instead"), REFUSED)
def test_variables_that_would_change_the_step_are_refused(overrides, tmp_path, launched, capsys, variable, value,
                                                          instead):
    launched(**{variable: value})
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main.main(cli.Command("train", load_config(PROJECT / "config.yaml", overrides)),
                                  AcceleratedDevices))
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert f"{variable}={value}: use {instead}" in error
    assert not (tmp_path / "runs" / "run" / "best").exists()


def test_all_variables_that_would_change_the_step_are_named_at_once(launched):
    launched(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2", ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    with pytest.raises(UserError, match="ACCUMULATION_STEPS=2: .*; ACCELERATE_DYNAMO_BACKEND=INDUCTOR: "):
        devices_for()


@pytest.mark.parametrize(("variable", "value", "instead"), REFUSED_UNDER_FSDP)
def test_variables_of_fsdp_that_would_change_the_step_are_refused(launched, on_gpus, variable, value, instead):
    """Tried with two processes: a module that FSDP ignores is trained on the reviews of its own process alone."""
    launched(**{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | {variable: value})
    on_gpus()
    with pytest.raises(UserError, match=f"file: {variable}={value}: {instead}"):
        devices_for()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(("variables", "variable"), [
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "ACCELERATE_DEEPSPEED_CONFIG_FILE")])
def test_variables_of_deepspeed_that_would_change_the_step_are_refused(launched, on_gpus, tmp_path, monkeypatch,
                                                                       variables, variable):
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4}')
    launched(ACCELERATE_USE_DEEPSPEED="true", **variables)
    on_gpus()
    with pytest.raises(UserError, match=f"file: {variable}="):
        devices_for()


def test_processes_that_only_accelerate_counts_are_refused(launched):
    """The configuration has counted one: two would make another effective batch than the one that it says."""
    launched(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
    with pytest.raises(UserError, match="Accelerate would join 2 processes"):
        devices_for()


def test_main_is_not_moved_by_what_accelerate_reads(overrides, tmp_path, monkeypatch):
    one_step = [*overrides, "train_config.max_steps=1", "train_config.optimizer=sgd", "train_config.test=false",
                "train_config.mixed_precision=auto"]
    train_here(*one_step, "run_name=plain")
    for variable, value, _ in [*REFUSED, *REFUSED_UNDER_FSDP]:
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    train_here(*one_step, "run_name=launched")
    plain, launched = (tmp_path / "runs" / name / "best/model.safetensors" for name in ("plain", "launched"))
    assert plain.read_bytes() == launched.read_bytes()
