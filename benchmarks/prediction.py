"""Labelling reviews: this suite against transformers' pipeline, and its memory against the number of rows.

    python -m benchmarks.prediction --model FOLDER --reviews FILE [--rows 25000]    speed; FILE as for --mode predict
    python -m benchmarks.prediction --memory 1000 100000 1000000                    memory: the demo's BERT, short texts

All label the same reviews in turn, a fifth of them at a time. Printed are medians over the five parts, ratios part by
part with the least and the most, and on how many reviews another label comes out. A part that other programs disturb
is measured again, and a busy machine gets no verdict.

    suite           as --mode predict does, from the file's rows to the written file
    pipeline        the same model, at the batch size that was fastest on the first 512 reviews, in its default, fp32
    pipeline-bf16   the same, all of it in bf16
    pipeline-own    its encoder under transformers' own classifier, which computes the whole last layer, fp32; with
                    a head that was not trained: only its speed counts
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from benchmarks.growth import memory_mb
from benchmarks.noise import quietly, ratios, refuse_busy_machine
from benchmarks.workload import PROJECT
from suite.common.devices import Devices
from suite.common.hub import quiet_libraries
from suite.encoders.loading import load_model
from suite.inference.classifier import Classifier
from suite.inference.labelling import Job
from suite.reviews.rows import read_rows
from utils import Config

PARTS, BATCH_SIZES, TRIED = 5, (1, 8, 16, 32, 64), 512


def read_texts(path: str, column: str, rows: int) -> list[str]:
    texts = (row.values[column] for row in read_rows(path, [column]) if not row.problem)
    return list(itertools.islice((text for text in texts if text.strip()), rows))


def timed(call) -> tuple[float, list]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def suite(classifier: Classifier, texts: list[str], folder: Path) -> list[str]:
    """The labels, by way of files, as --mode predict."""
    source, output = folder / "part.jsonl", folder / "labelled.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    Job(str(source), output, classifier, Config()).run()
    with open(output, encoding="utf-8") as file:
        labels = [json.loads(line)["predicted"] for line in file]
    output.unlink()
    return labels


def compare(model: str, texts: list[str], names: list[str]) -> None:
    config = Config()
    classifier = Classifier(Path(model), config, Devices(config))
    classifier.cast_weights()
    own = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model).encoder)
    own.base_model.load_state_dict(load_model(model).encoder.state_dict(), strict=False)
    models = {"pipeline": (model, torch.float32), "pipeline-bf16": (model, torch.bfloat16),
              "pipeline-own": (own, torch.float32)}
    contenders = {name: pipeline("text-classification", model=models[name][0], tokenizer=classifier.tokenizer,
                                 dtype=models[name][1], device=classifier.devices.device) for name in names}
    sizes = {}
    for name, classify in contenders.items():
        seconds = {size: timed(lambda c=classify, s=size: c(texts[:TRIED], batch_size=s, truncation=True))[0]
                   for size in BATCH_SIZES}
        sizes[name] = min(seconds, key=seconds.get)
        print(f"{name}: reviews/s by batch size: "
              + ", ".join(f"{size}: {len(texts[:TRIED]) / s:.1f}" for size, s in seconds.items()), flush=True)
    speeds, labels = {name: [] for name in ("suite", *contenders)}, {name: [] for name in ("suite", *contenders)}
    step = -(-len(texts) // PARTS)

    def label(name: str, part: list[str], folder: Path) -> list[str]:
        if name == "suite":
            return suite(classifier, part, folder)
        return [answer["label"] for answer in contenders[name](part, batch_size=sizes[name], truncation=True)]

    def in_turn(part: list[str], folder: Path) -> dict[str, tuple[float, list[str]]]:
        """Seconds and labels of each contender."""
        return {name: timed(partial(label, name, part, folder)) for name in speeds}

    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(texts), step):
            part = texts[start:start + step]
            for name, (seconds, found) in quietly(partial(in_turn, part, Path(folder)), f"from row {start}").items():
                speeds[name].append(len(part) / seconds)
                labels[name] += found
                print(f"{start:6}  {name:14} {speeds[name][-1]:8.1f} reviews/s", flush=True)
    print(f"\n{len(texts):,} reviews, {classifier.devices}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}\n\n| | batch | reviews/s | suite / it | other labels than the suite |\n"
          "| --- | --- | --- | --- | --- |")
    for name, found in speeds.items():
        other = sum(a != b for a, b in zip(labels["suite"], labels[name], strict=True))
        print(f"| `{name}` | {sizes.get(name, '-')} | {statistics.median(found):.1f} | "
              f"{ratios(speeds['suite'], found)} | {other} |")


def memory(rows: int, model: Path, folder: Path) -> float:
    """The most memory of its own, in MB, that `--mode predict` on this many short texts held."""
    source = folder / f"{rows}.csv"
    with open(source, "w", encoding="utf-8") as file:
        file.write("id,text\n")
        file.writelines(f"{row},a film that number {row % 9973} liked\n" for row in range(rows))
    process = subprocess.Popen([sys.executable, "main.py", "--mode", "predict", "--model", str(model), "--input",
                                str(source), "--output", str(folder / f"{rows}.out.csv")], cwd=PROJECT,
                               stdout=subprocess.DEVNULL)
    most = 0.0
    while process.poll() is None:
        most = max(most, memory_mb(process.pid).get("own", 0.0))
        time.sleep(0.02)
    assert process.returncode == 0
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model's folder")
    parser.add_argument("--reviews", help="a .csv, .jsonl, .parquet or .txt file")
    parser.add_argument("--column", default="text")
    parser.add_argument("--rows", type=int, default=25_000)
    parser.add_argument("--against", nargs="+", default=["pipeline", "pipeline-bf16", "pipeline-own"])
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS")
    arguments = parser.parse_args()
    quiet_libraries()
    if not arguments.memory:
        texts = read_texts(arguments.reviews, arguments.column, arguments.rows)
        refuse_busy_machine()
        compare(arguments.model, texts, arguments.against)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "main.py", "--config", "demo.yaml", f"output_dir={folder}", "run_name=model",
                        "train_config.max_steps=10", "log_config.wandb_mode=disabled"], cwd=PROJECT, check=True,
                       stdout=subprocess.DEVNULL)
        print("| rows | peak memory of its own (MB) |\n| --- | --- |")
        for rows in arguments.memory:
            print(f"| {rows:,} | {memory(rows, Path(folder) / 'model' / 'best', Path(folder)):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
