"""Launchers: as many processes as were asked for, and an environment that moves no optimizer step."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config import config_args
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accumulation_worker import build_model, explicit_data, single_device, train_steps
from conftest import ACCELERATE, launch, run_here, run_script, train_here

import main_accumulation
from main_accumulation import AcceleratedDevices
from suite.common.launcher import asked_processes, refuse_other_settings
from utils import Config, TrainConfig, UserError

# ---------------------------------------------------------------------------------------------------------------------
# Processes that decide alike


@pytest.fixture
def results(tmp_path):
    """results(machines, kind of work, *overrides): what the worker's processes say, two on each machine, by rank."""
    (tmp_path / "results").mkdir()

    def run(machines: int, work: str, *overrides: str) -> list[dict]:
        launch(2, "tests/processes_worker.py", work, str(tmp_path / "results"), *overrides, machines=machines)
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
    result = run_script(*ACCELERATE, "--num_processes", "2",
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


@pytest.mark.parametrize(("variable", "value", "instead"), [*REFUSED, *REFUSED_UNDER_FSDP])
def test_variables_that_would_change_the_step_are_refused(launched, on_gpus, variable, value, instead):
    """Tried with two processes: a module that FSDP ignores is trained on the reviews of its own process alone."""
    is_fsdp = (variable, value, instead) in REFUSED_UNDER_FSDP
    launched(**({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if is_fsdp else {}) | {variable: value})
    if is_fsdp:
        on_gpus()
    with pytest.raises(UserError, match=f"{variable}={value}: (use )?{instead}"):
        devices_for()


def test_all_of_them_are_named_at_once_and_nothing_is_written(overrides, tmp_path, launched):
    launched(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2", ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    result = run_here(*overrides, devices_class=AcceleratedDevices)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "ACCUMULATION_STEPS=2: " in result.stderr
    assert "; ACCELERATE_DYNAMO_BACKEND=INDUCTOR: " in result.stderr
    assert not (tmp_path / "runs" / "run" / "best").exists()


def test_sharding_that_accelerate_would_leave_out_is_refused(launched):
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    with pytest.raises(UserError, match="FSDP is asked for, and Accelerate starts it on GPUs only"):
        devices_for()


def test_an_average_of_weights_that_deepspeed_keeps_to_itself_is_refused(launched):
    launched(ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(UserError, match="train_config.ema_decay is 0.9, but DeepSpeed's engine"):
        devices_for(ema_decay=0.9)


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
