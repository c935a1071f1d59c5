"""All that waits for a GPU, in one call: programs of this folder and checks of real runs, one after the other.

    python -m benchmarks.gpu --minutes 60 --output FOLDER       everything, the most wanted first
    python -m benchmarks.gpu --only same-bits packing           these steps
    python -m benchmarks.gpu --rehearse                         the same steps in small, on a CPU

Each step has a process of its own, a time limit, and a file FOLDER/STEP.txt with what it printed. One that fails does
not stop the others, and one for which no time is left is not begun. Exit code 1 if a step failed or was not begun.

    experiment-1     BERT-base and ModernBERT-base, 40,000 reviews x 5 epochs at 128 tokens: how long does it take?
    same-bits        does a run give the same bits twice, and after a kill, in bf16 and under fp16's loss scaler?
    out-of-memory    does auto_micro_batch go on after a real out-of-memory error?
    trainer-128, trainer-512, compile       against transformers.Trainer, and both under torch.compile
    memory, saving   what does a larger batch cost, and a saved state?
    packing          is it worth packing reviews of up to 512 tokens without padding?
    parts            what is each part of the fast path worth?
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.workload import describe_machine, overrides_for, workload
from utils import PROJECT

BOTH, SMALL = ["--shape", "bert-base", "modernbert-base"], ["--shape", "bert-tiny"]
CHECKED_FILES = ("best/model.safetensors", "history.jsonl", "valid_predictions.csv")


@dataclass
class Step:
    name: str
    minutes: float  # its limit
    arguments: list[str]  # of python -m
    small: list[str]  # what is added for a rehearsal; the last value of an option counts


STEPS = [
    Step("experiment-1", 6, ["benchmarks.speed", *BOTH, "--tokens", "128", "--batch", "64", "--reviews", "40000",
                             "--epochs", "5", "--rounds", "1", "--contenders", "suite"],
         [*SMALL, "--reviews", "48", "--epochs", "1", "--batch", "8"]),
    Step("same-bits", 4, ["benchmarks.gpu", "--check", "same-bits"], []),
    Step("out-of-memory", 2, ["benchmarks.gpu", "--check", "out-of-memory"], []),
    Step("trainer-128", 6, ["benchmarks.speed", *BOTH, "--tokens", "128", "--batch", "64", "--reviews", "8000",
                            "--rounds", "2", "--contenders", "suite", "trainer", "trainer-best"],
         [*SMALL, "--reviews", "48", "--rounds", "1", "--batch", "8"]),
    Step("packing", 3, ["benchmarks.ablations", "--shape", "modernbert-base", "--tokens", "512", "--batch", "64",
                        "--reviews", "4000", "--only", "packed"],
         ["--shape", "modernbert-tiny", "--tokens", "128", "--reviews", "32", "--batch", "8", "--rounds", "1"]),
    Step("memory", 3, ["benchmarks.memory", "--shape", "bert-base"], [*SMALL, "--row", "8", "8"]),
    Step("saving", 2, ["benchmarks.saving", "--shape", "bert-base", "--batch", "64"], [*SMALL, "--batch", "8"]),
    Step("parts", 6, ["benchmarks.ablations", "--shape", "bert-base", "--batch", "64", "--reviews", "4000"],
         [*SMALL, "--reviews", "32", "--batch", "8", "--rounds", "1", "--only", "mask"]),
    Step("compile", 8, ["benchmarks.speed", *BOTH, "--tokens", "128", "--batch", "64", "--reviews", "8000", "--rounds",
                        "1", "--contenders", "suite", "suite-compile", "trainer-best", "trainer-compile"],
         [*SMALL, "--reviews", "48", "--batch", "8", "--contenders", "suite"]),
    Step("trainer-512", 8, ["benchmarks.speed", *BOTH, "--tokens", "512", "--batch", "64", "--reviews", "4000",
                            "--rounds", "2", "--contenders", "suite", "trainer-best"],
         [*SMALL, "--reviews", "24", "--rounds", "1", "--batch", "8", "--contenders", "suite"]),
]

# ---------------------------------------------------------------------------------------------------------------------
# Checks of real runs


def train(arguments: list[str], name: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "main.py", *arguments, f"run_name={name}"], cwd=PROJECT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"main.py ended with {process.returncode}:\n{output[-3000:]}")
    return output


def same_bits(shape: str, reviews: int, batch: int) -> None:
    """Two runs, and one that is killed after its second saved state, in each precision that this device trains in."""
    with workload(shape, reviews) as work:
        for precision in ("bf16", "fp16") if torch.cuda.is_available() else ("auto",):
            arguments = overrides_for(work, 128, batch, "train_config.epochs=2", "train_config.save_every_steps=4",
                                      f"train_config.mixed_precision={precision}")
            for name in ("one", "two"):
                finish(train(arguments, f"{precision}-{name}"))
            killed = train(arguments, f"{precision}-killed")
            states = work / "runs" / f"{precision}-killed" / "last"
            while killed.poll() is None and len(list(states.glob("*/progress.json"))) < 2:
                time.sleep(0.01)
            killed.kill()
            killed.communicate()
            assert "continuing from" in finish(train(arguments, f"{precision}-killed")), "it was killed too late"
            bits = {name: [(work / "runs" / f"{precision}-{name}" / file).read_bytes() for file in CHECKED_FILES]
                    for name in ("one", "two", "killed")}
            print(f"{precision}: twice the same bits: {bits['one'] == bits['two']}; after a kill: "
                  f"{bits['one'] == bits['killed']}", flush=True)
            if not bits["one"] == bits["two"] == bits["killed"]:
                raise SystemExit(1)


def out_of_memory(shape: str, reviews: int, batch: int) -> None:
    """Two optimizer steps of a batch that no GPU holds in one forward pass."""
    with workload(shape, reviews) as work:
        output = finish(train(overrides_for(work, 512, batch, "train_config.auto_micro_batch=true",
                                            "train_config.max_steps=2", "train_config.epochs=2"), "oom"))
    lines = [line for line in output.splitlines() if "out of memory" in line]
    print("\n".join(lines or ["the device did not run out of memory"]))
    if torch.cuda.is_available() and not lines:
        raise SystemExit(1)


def check(name: str) -> None:
    if torch.cuda.is_available():
        sizes = {"same-bits": ("bert-base", 1280, 64), "out-of-memory": ("bert-base", 8192, 8192)}[name]
    else:
        sizes = ("bert-tiny", 96, 8)
    {"same-bits": same_bits, "out-of-memory": out_of_memory}[name](*sizes)


# ---------------------------------------------------------------------------------------------------------------------
# All steps


def take(step: Step, folder: Path, seconds: float, rehearsed: bool) -> bool:
    """Run a step and print what it printed. Returns whether it ended well."""
    command = [sys.executable, "-m", *step.arguments, *(step.small if rehearsed else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"} | ({"MOST_NOISE": "1"} if rehearsed else {})
    started = time.monotonic()
    with open(folder / f"{step.name}.txt", "w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=environment)
        try:
            outcome = {0: "done"}.get(code := process.wait(seconds), f"failed with exit code {code}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children, too
            process.wait()
            outcome = "stopped at its time limit"
        file.seek(0)
        print(f"\n===== {step.name}: {outcome} after {time.monotonic() - started:.0f} s\n{file.read()[-4000:]}",
              flush=True)
    return outcome == "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="for everything (default: 60)")
    parser.add_argument("--output", metavar="FOLDER", help="default: a new folder among the temporary files")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # of a step's process
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
        return
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA GPU here: --rehearse tries the steps on a CPU")
    folder = Path(arguments.output or tempfile.mkdtemp(prefix="gpu-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--output {folder}: {error.strerror}") from None
    print(f"{describe_machine()}; the whole output of each step: {folder}", flush=True)
    end, failed, skipped = time.monotonic() + 60 * arguments.minutes, [], []
    for step in STEPS:
        if arguments.only and step.name not in arguments.only:
            continue
        left = end - time.monotonic()
        if left < 15:
            skipped.append(step.name)
        elif not take(step, folder, min(60 * step.minutes, left), arguments.rehearse):
            failed.append(step.name)
    if skipped:
        print(f"no time was left for {', '.join(skipped)}: give --only and these names")
    if failed or skipped:
        raise SystemExit(f"failed: {', '.join(failed)}" if failed else 1)


if __name__ == "__main__":
    main()
