"""Start-up, time an epoch and memory against the number of reviews: time should be linear, memory flat.

    python -m benchmarks.growth                                10,000, 40,000 and 160,000 reviews: minutes on two cores
    python -m benchmarks.growth --rows 1000                    a quick look
    python -m benchmarks.growth --start-up MODEL DATASET       the first step of config.yaml with this model and data

Each row trains the demo's BERT for one epoch on 80 % of that many reviews of random words, with `main.py` in a process
of its own. The first optimizer step is timed from the command, twice: with empty caches, when reviews are read and
tokenized for the first time, and with what the first command left there. Memory is the most of the whole process that
was its own; pages of cached files, which the kernel takes back when it needs them, are counted apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.workload import PROJECT, random_lengths, write_reviews

POLL_SECONDS = 0.02


def memory_mb(pid: int) -> dict[str, float]:
    """What a process holds now in MB: of its own, and of mapped files. Empty where /proc is not Linux's."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {kind: int(status[name].split()[0]) * 1024 / 1e6
                for kind, name in (("own", "RssAnon"), ("mapped", "RssFile"))}
    except (OSError, KeyError):
        return {}


def train(arguments: list[str], folder: Path, only_first_step: bool = False) -> dict[str, float]:
    """Run main.py: seconds from the command to the first optimizer step, and the peaks of memory."""
    started, measured = time.perf_counter(), {"first_step": 0.0, "own": 0.0, "mapped": 0.0}
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments, f"output_dir={folder.parent}", f"run_name={folder.name}",
         "log_config.log_every_steps=1", "log_config.wandb_mode=disabled"],
        cwd=PROJECT, env={**os.environ, "HF_HOME": str(folder.parent / "cache")}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)
    history = folder / "history.jsonl"
    while process.poll() is None:
        if not measured["first_step"] and history.exists() and history.stat().st_size:
            measured["first_step"] = time.perf_counter() - started
            if only_first_step:
                process.kill()
                process.communicate()
                return measured
        for kind, megabytes in memory_mb(process.pid).items():
            measured[kind] = max(measured[kind], megabytes)
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(process.stderr.read()[-3000:])
    return measured


def grow(folder: Path, counts: list[int]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo/bert")
    print(f"{'reviews':>8}  {'first step, cold (s)':>20}  {'cached (s)':>10}  {'epoch (s)':>9}  "
          f"{'ms a 1,000 reviews':>18}  {'own memory (MB)':>15}  {'mapped files (MB)':>17}", flush=True)
    for rows in counts:
        work = folder / str(rows)
        work.mkdir()
        write_reviews(work / "reviews.csv", random_lengths(rows), tokenizer)
        command = ["--config", "demo.yaml", f"data_config.dataset={work / 'reviews.csv'}", "train_config.epochs=1"]
        cold, cached = train(command, work / "cold", only_first_step=True), train(command, work / "cached")
        seconds = json.loads((work / "cached" / "metrics.json").read_text())["train"]["seconds"]
        print(f"{rows:8,}  {cold['first_step']:20.1f}  {cached['first_step']:10.1f}  {seconds:9.1f}  "
              f"{1e6 * seconds / (0.8 * rows):18.0f}  {cached['own']:15,.0f}  {cached['mapped']:17,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-up", nargs=2, metavar=("MODEL", "DATASET"))
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 40_000, 160_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.start_up:
            grow(Path(folder), arguments.rows)
            return
        model, dataset = arguments.start_up
        command = [f"model_config.model_name={model}", f"data_config.dataset={dataset}"]
        cold, cached = (train(command, Path(folder) / name, only_first_step=True) for name in ("cold", "cached"))
        print(f"command to first optimizer step: {cold['first_step']:.1f} s with empty caches, "
              f"{cached['first_step']:.1f} s with filled ones")


if __name__ == "__main__":
    main()
