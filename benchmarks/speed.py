"""Reviews a second: this suite against transformers.Trainer, on the same reviews.

    python -m benchmarks.speed --quick                          MiniLM's shape, 128 tokens: under 5 minutes on two cores
    python -m benchmarks.speed                                  BERT's and ModernBERT's architecture, 128 and 512 tokens
    python -m benchmarks.speed --shape bert-base modernbert-base --batch 64 --reviews 8000 --contenders suite \
        suite-compile trainer trainer-best trainer-compile      for a GPU
    python -m benchmarks.speed --shape bert-base modernbert-base --tokens 128 --batch 64 --reviews 40000 --epochs 5 \
        --rounds 1 --contenders suite suite-compile trainer-best                         a GPU's time for experiment 1

Every contender trains the same encoder with random weights for the same number of steps on the same reviews, in a
process of its own, in turn, round after round; then it evaluates a third as many. Timed are the optimizer steps alone,
after a few that are not counted. The reviews are random words whose lengths are distributed like IMDB's.

    suite           this suite with every default on
    suite-plain     the same without numba's kernels (requirements-fast.txt), where `suite` has them
    suite-fp32      the same in fp32, in which Trainer runs unless it is told otherwise
    trainer         Trainer's defaults; every review padded to --tokens, as transformers' run_classification.py does
    trainer-best    batches padded to their longest review, reviews grouped by length, as closely as among IMDB's 40,000
                    (`grouped_lengths` in benchmarks/workload.py), a fused optimizer, and bf16 where the device computes
                    in it
    suite-glibc     suite, on a CPU, with freed memory left to glibc, which gives it back to the kernel
    trainer-keeps   trainer-best, on a CPU, with glibc told to keep freed memory, as the suite tells it
    suite-compile, trainer-compile      torch.compile on top of suite and trainer-best, if asked for by --contenders

`of peak`: the FLOPs of the model on real tokens, as suite/training/meter.py counts them, in the time that it took, over
what a product of large matrices reached in the same rounds, in the precision that the suite trains in.
A round that other programs disturb is measured again, and a busy machine gets no verdict: see benchmarks/noise.py.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.noise import in_turn, ratios, refuse_busy_machine
from benchmarks.workload import MEGA_BATCH, SHAPES, WARM_UP_STEPS, config_for, describe_machine, train_again, workload
from utils import Config

CONTENDERS = ("suite", "suite-plain", "suite-fp32", "trainer", "trainer-best", "suite-glibc", "trainer-keeps",
              "suite-compile", "trainer-compile")
GLIBCS_OWN = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}  # glibc's default, but said, so that the suite changes nothing
KEEPS = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
ENVIRONMENTS = {"suite-glibc": GLIBCS_OWN, "trainer-keeps": KEEPS}
MATRIX = {"cpu": 2048, "mps": 4096, "cuda": 8192}  # rows and columns

# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each returns (seconds of training, seconds of evaluation)


def time_suite(work: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    from main import evaluate
    from suite.common.devices import Devices, make_deterministic
    from suite.training.run import Run

    overrides = {"suite-fp32": ["train_config.mixed_precision=no"], "suite-compile": ["train_config.compile=true"]}
    make_deterministic()
    config = config_for(work, arguments.tokens, arguments.batch, f"run_name={arguments.contender}-{arguments.tokens}",
                        f"train_config.epochs={arguments.epochs}", *overrides.get(arguments.contender, []))
    is_plain = arguments.contender == "suite-plain"
    with mock.patch("suite.common.devices.numba_works", return_value=False) if is_plain else nullcontext():
        run = Run.open(config, Devices(config))
    train_again(run, steps=WARM_UP_STEPS)
    seconds = train_again(run, arguments.epochs)
    started = time.perf_counter()
    evaluate(run.model, run.valid_loader, run.devices, "evaluation")
    return seconds, time.perf_counter() - started


def time_trainer(work: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    import datasets
    import torch
    import transformers
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        trainer_pt_utils,
    )

    from data import prepare_data
    from suite.common.devices import pick_device, pick_precision

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_train_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started

    is_plain = arguments.contender == "trainer"
    prepared, device = prepare_data(config_for(work, arguments.tokens, arguments.batch)), pick_device("auto")
    pad = {"padding": "max_length", "max_length": arguments.tokens} if is_plain else {}

    def rows(name: str) -> datasets.Dataset:
        split = prepared.splits[name]
        columns = prepared.tokenizer.pad({"input_ids": [
            split.tokens[start:start + length].tolist() for start, length
            in zip(split.offsets[split.first_windows], split.lengths, strict=True)]}, **(pad or {"padding": False}))
        return datasets.Dataset.from_dict({**columns, "labels": split.labels})

    best = {} if is_plain else {"bf16": pick_precision("auto", device) == "bf16", "optim": "adamw_torch_fused",
                                "train_sampling_strategy": "group_by_length",
                                "torch_compile": arguments.contender == "trainer-compile"}
    clock, train, valid = Clock(), rows("train"), rows("valid")
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(work / "encoder", num_labels=2))

    def trainer(reviews: datasets.Dataset, **limits: Any) -> Trainer:
        made = Trainer(model, TrainingArguments(
            str(work / "trainer"), per_device_train_batch_size=arguments.batch, per_device_eval_batch_size=256,
            learning_rate=5e-5, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda", **best, **limits),
            train_dataset=reviews, processing_class=prepared.tokenizer, callbacks=[clock])
        made.remove_callback(transformers.PrinterCallback)
        return made

    # By itself, it sorts among a quarter of the reviews, up to 50 batches: of so few reviews, within a batch.
    grouped = functools.partial(trainer_pt_utils.get_length_grouped_indices,
                                mega_batch_mult=min(MEGA_BATCH, -(-len(train) // arguments.batch)))
    with mock.patch.object(trainer_pt_utils, "get_length_grouped_indices", grouped):
        trainer(train, max_steps=WARM_UP_STEPS).train()
        timed = trainer(train, num_train_epochs=arguments.epochs)
        timed.train()
    started = time.perf_counter()
    timed.predict(valid)
    return clock.seconds, time.perf_counter() - started


def matrix_flops() -> float:
    """FLOP/s of matrix products in the precision that the suite trains in, the best of some."""
    import torch

    from suite.common.devices import Devices

    devices = Devices(Config())
    n = MATRIX[devices.device.type]
    a, b = torch.randn(2, n, n, device=devices.device,
                       dtype=torch.bfloat16 if devices.precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (a @ b).sum().item()  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2 * n ** 3 / best


def contend(work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """What one contender's process measures."""
    if arguments.contender == "peak":
        return {"flops": matrix_flops()}
    from data import prepare_data
    from suite.common.devices import pick_device
    from suite.common.hub import quiet_libraries
    from suite.training.meter import peak_memory_mb

    quiet_libraries()
    measure = time_suite if arguments.contender.startswith("suite") else time_trainer
    seconds, evaluation = measure(work, arguments)
    splits = prepare_data(config_for(work, arguments.tokens, arguments.batch)).splits
    return {"speed": len(splits["train"]) * arguments.epochs / seconds, "seconds": seconds,
            "evaluated": len(splits["valid"]) / evaluation, "memory": peak_memory_mb(pick_device("auto"))}


# ---------------------------------------------------------------------------------------------------------------------
# In turn, round after round


def start(work: Path, arguments: argparse.Namespace, tokens: int, contender: str) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--work", str(work), "--contender", contender, "--tokens",
               str(tokens), "--batch", str(arguments.batch), "--epochs", str(arguments.epochs)]
    child = subprocess.run(command, capture_output=True, text=True, check=False,
                           env=os.environ | ENVIRONMENTS.get(contender, {}))
    if child.returncode:
        raise SystemExit(f"{contender} failed:\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def model_flops(work: Path, tokens: int, batch: int) -> float:
    """FLOPs to train on one review, on average."""
    from data import prepare_data
    from suite.encoders.loading import new_model
    from suite.training.meter import training_flops, work_of

    config = config_for(work, tokens, batch)
    model = new_model(config.model_config)
    lengths = prepare_data(config).splits["train"].lengths
    return training_flops(work_of(model, executed=False), lengths) / len(lengths)


def usual_contenders() -> list[str]:
    from suite.common.devices import Devices

    devices = Devices(Config())
    same = {"suite-fp32"} if devices.precision == "no" else set()
    if not devices.has_numba_kernels:
        same.add("suite-plain")
    if devices.device.type != "cpu":
        same |= set(ENVIRONMENTS)
    return [name for name in CONTENDERS if name not in same and not name.endswith("-compile")]


def compare(work: Path, arguments: argparse.Namespace, shape: str, tokens: int) -> None:
    names = arguments.contenders
    print(f"\n{shape}, {tokens} tokens, batch {arguments.batch}: {arguments.reviews:,} reviews x {arguments.epochs} "
          f"epoch(s), {arguments.rounds} round(s), in turn", flush=True)
    results = in_turn(lambda name: start(work, arguments, tokens, name), (*names, "peak"), arguments.rounds,
                      lambda found: print("  reviews a second:", ", ".join(
                          f"{name} {found[name]['speed']:.1f}" for name in names), flush=True))

    def all_of(name: str, figure: str) -> list[float]:
        return [result[figure] for result in results[name]]

    def median(name: str, figure: str) -> float:
        return statistics.median(all_of(name, figure))

    peak = median("peak", "flops")
    flops = model_flops(work, tokens, arguments.batch)
    print(f"\n  {'':15}  {'reviews/s':>9}  {'an epoch (s)':>12}  {'of peak':>7}  {'evaluation/s':>12}  "
          f"{'peak memory (MB)':>16}")
    for name in names:
        speed = median(name, "speed")
        print(f"  {name:15}  {speed:9.1f}  {median(name, 'seconds') / arguments.epochs:12.2f}  "
              f"{speed * flops / peak:7.1%}  {median(name, 'evaluated'):12.1f}  {median(name, 'memory'):16,.0f}")
    print(f"  matrix product: {peak / 1e12:.3f} TFLOP/s; {flops / 1e9:.1f} GFLOPs a review")
    for name, to in (("suite", "trainer"), ("suite", "trainer-best"), ("suite", "trainer-keeps"),
                     ("suite", "suite-plain"), ("suite", "suite-glibc"), ("suite-fp32", "trainer"),
                     ("suite-compile", "trainer-compile")):
        if name in names and to in names:
            within_rounds = ratios(all_of(name, "speed"), all_of(to, "speed"))
            print(f"  {name} / {to}: {within_rounds} times, median (least to most) over the rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minilm, 128 tokens, 96 reviews")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["minilm", "modernbert-small"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--batch", type=int, default=32, help="reviews an optimizer step (default: 32)")
    parser.add_argument("--reviews", type=int, default=256, help="reviews an epoch (default: 256)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all that differ on this device, "
                        "without torch.compile")
    for hidden in ("--work", "--contender"):  # of a contender's process
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        arguments.tokens = arguments.tokens[0]
        print(json.dumps(contend(Path(arguments.work), arguments)))
        return
    if arguments.quick:
        arguments.shape, arguments.tokens, arguments.reviews = ["minilm"], [128], 96
    arguments.contenders = arguments.contenders or usual_contenders()
    print(describe_machine(), flush=True)
    refuse_busy_machine()
    for shape in arguments.shape:
        with workload(shape, arguments.reviews, arguments.batch) as work:
            for tokens in arguments.tokens:
                compare(work, arguments, shape, tokens)


if __name__ == "__main__":
    main()
