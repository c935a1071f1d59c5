"""The programs that measure: do they run on either kind of CPU, see a busy machine, count every operation once, and
pack reviews rightly?

A figure that cannot be measured again on another machine proves nothing, so each program has a small run here.
"""

import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import expect, run_here, run_script, train_here, write_reviews
from transformers import BertModel

from benchmarks import ablations, deletion, elsewhere, gpu, inference, memory, noise, prediction, profile, saving, speed
from benchmarks.packing import packed
from benchmarks.workload import config_for, encoder_config, workload, write_encoder
from main import train_step
from suite.common.devices import Devices
from suite.inference import onnx_file
from suite.training.run import Run

SIZE = ["--tokens", "16", "--batch", "2"]
OTHER_CPU = pytest.param("bf16", marks=pytest.mark.long)  # the same programs again, for a contender or a line more
UNCOMPILED = [name for name in speed.CONTENDERS if not name.endswith("-compile")]


@pytest.fixture(params=["fp32", OTHER_CPU])
def cpu(request, monkeypatch) -> str:
    monkeypatch.setenv("CPU_OF_TESTS", request.param)
    return request.param


@pytest.fixture
def environment():
    """What the benchmarks put into os.environ is gone after the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def small_workload(environment):
    """work = small_workload(shape): an encoder of this shape and 16 reviews to train on."""
    return lambda shape: workload(shape, 16)


@pytest.fixture
def measure(environment, cpu, monkeypatch, capsys):
    """measure(benchmark, *arguments): what it prints, on either kind of CPU, whatever else the machine does."""
    monkeypatch.setattr(noise, "MOST", 1.0)
    monkeypatch.setattr(noise, "LOOK_SECONDS", 0.01)

    def measure(benchmark, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        benchmark.main()
        return capsys.readouterr().out

    yield measure
    AcceleratorState._reset_state(reset_partial_state=True)  # Trainer leaves its precision there


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_folder):
    """(the folder of a finished and exported run, its reviews with columns text and label)"""
    folder = tmp_path_factory.mktemp("trained")
    reviews = write_reviews(folder / "reviews.csv")
    reviews.write_text(reviews.read_text().replace("review,verdict", "text,label"))
    overrides = [f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={reviews}", "data_config.max_len=32", "data_config.batch_size=16",
                 "train_config.epochs=1", "train_config.mixed_precision=no", "log_config.wandb_mode=disabled"]
    train_here(*overrides)
    with mock.patch.object(onnx_file, "FEWEST", 20):
        expect(0, run_here(*overrides, mode="export", formats=("onnx", "transformers"), int8=True))
    return folder / "run", reviews


def test_all_contenders_of_speed_train(measure, monkeypatch, cpu):
    """Here in one process; in theirs, and compiled, in the long test below."""
    monkeypatch.setattr(speed, "start", lambda work, arguments, tokens, contender: speed.contend(
        work, Namespace(**vars(arguments) | {"tokens": tokens, "contender": contender})))
    monkeypatch.setitem(speed.MATRIX, "cpu", 64)
    printed = measure(speed, "--shape", "bert-tiny", *SIZE, "--reviews", "8", "--rounds", "2", "--contenders",
                      *UNCOMPILED)
    for name in UNCOMPILED:
        assert f"\n  {name:15}  " in printed
    assert f"cpu ({cpu})" in printed
    assert "suite-fp32 / trainer: " in printed
    assert ("suite-fp32" in speed.usual_contenders()) == (cpu == "bf16")


@pytest.mark.parametrize("shape", ["bert-tiny", "modernbert-tiny"])
def test_all_ablations_train(measure, monkeypatch, shape):
    variants = [variant for variant in ablations.VARIANTS if variant[0] != "torch.compile"]
    monkeypatch.setattr(ablations, "VARIANTS", variants)
    printed = measure(ablations, "--shape", shape, *SIZE, "--reviews", "6", "--rounds", "1")
    for name, _, patch in variants:
        assert (f"\n{name:44}  " in printed) == (patch is not packed or shape == "modernbert-tiny"), name


def test_all_contenders_of_inference_answer(measure, cpu):
    printed = measure(inference, "--shape", "bert-tiny", "--rounds", "1", "--seconds", "0.01")
    found = {line.split("|")[2].strip(" `") for line in printed.splitlines() if line.startswith(("| 1 |", "| 32 |"))}
    assert found == {"pytorch", "onnxruntime", "onnxruntime-int8"} | ({"pytorch-bf16"} if cpu == "bf16" else set())


def test_all_contenders_of_prediction_label(measure, trained, cpu):
    run, reviews = trained
    printed = measure(prediction, "--model", str(run / "best"), "--reviews", str(reviews), "--rows", "20")
    assert f"20 reviews, cpu ({cpu})" in printed
    rows = {line.split("|")[1].strip(" `"): line.split("|")[-2].strip() for line in printed.splitlines()
            if line.startswith("| `")}
    assert rows.keys() - {"openvino", "openvino-bf16"} == {
        "suite", "autocast", "onnxruntime", "pipeline", "pipeline-bf16", "pipeline-own"}
    assert rows["pipeline"] == rows["suite"] == rows["onnxruntime"] == "0"  # labels other than the suite's


def test_an_export_is_compared_with_its_run(measure, trained):
    printed = measure(elsewhere, str(trained[0]))
    assert [line.split("|")[2].strip() for line in printed.splitlines()[2:]][0] == "0"
    for name in ("`pipeline`, bfloat16", "the suite's model, weights cast to float16", "`onnx/model_quantized.onnx`"):
        assert f"| {name} | " in printed


def test_the_other_programs_measure(measure, trained, cpu):
    run, reviews = trained
    assert "| with the least | 20% | " in measure(deletion, "--model", str(run / "best"), "--input", str(reviews),
                                                 "--reviews", "4")
    assert f"cpu ({cpu})" in (printed := measure(saving, "--shape", "bert-tiny", *SIZE))
    assert "saving adds" in printed
    assert "| kernel | " in measure(profile, "--shape", "modernbert-tiny", *SIZE, "--reviews", "6")
    for more in ([], ["--gradient-checkpointing"]):
        assert float(measure(memory, "--shape", "bert-tiny", "--row", "2", "4", *more)) > 0


@pytest.mark.long
@pytest.mark.parametrize(("name", "arguments", "expected"), [
    ("speed", ["--shape", "bert-tiny", *SIZE, "--reviews", "8", "--rounds", "1", "--contenders", *speed.CONTENDERS],
     "suite-compile / trainer-compile: "),
    ("ablations", ["--shape", "bert-tiny", *SIZE, "--reviews", "6", "--rounds", "1", "--only", "compile"],
     "torch.compile"),
    ("growth", ["--rows", "200"], "\n     200 "),
    ("growth", ["--start-up", "ENCODER", "demo/reviews.csv"], "with filled ones"),
    ("prediction", ["--memory", "10"], "\n| 10 | "),
    ("memory", ["--shape", "bert-tiny"], f"\n{256:11}  {256:15}  {'':8}"),  # and then a number
    ("gpu", ["--rehearse"], "trainer-512: done")])
def test_programs_that_start_others_measure(cpu, tmp_path, name, arguments, expected):
    """Half a minute to some minutes each: all of their processes, and what is compiled."""
    write_encoder(tmp_path, "bert-tiny")
    BertModel(encoder_config("bert-tiny")).save_pretrained(tmp_path)
    arguments = [str(tmp_path) if argument == "ENCODER" else argument for argument in arguments]
    done = expect(0, run_script("-m", f"benchmarks.{name}", *arguments, environment={"MOST_NOISE": "1"}, timeout=1200))
    assert expected in done.stdout


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
    with small_workload("modernbert-tiny") as work:
        for name, patch in (("padded", nullcontext), ("packed", packed)):
            config = config_for(work, 160, 16, f"run_name={name}", "train_config.mixed_precision=no")
            with patch():
                run = Run.open(config, Devices(config))
                step = next(iter(run.train_loader(0)))
                run.model.eval()
                run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
                loss, _ = train_step(run, step)
            found.append((step.micro_batches[0]["input_ids"].shape, loss, dict(run.model.named_parameters())))
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
