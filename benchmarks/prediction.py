"""Labelling reviews: this suite against transformers' pipeline, ONNX Runtime and OpenVINO; its memory by rows.

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
    autocast        the suite without its packed weights: transformers' layers, in automatic precision
    onnxruntime     the file of --mode export in ONNX Runtime, fp32, with the suite's tokenizing and batches
    openvino, openvino-bf16     the same file in OpenVINO, which is no requirement of the suite: pip install openvino
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.growth import memory_mb
from benchmarks.noise import quietly, ratios, refuse_busy_machine
from benchmarks.workload import PROJECT
from suite.common.devices import Devices
from suite.common.hub import quiet_libraries
from suite.encoders import evaluation_pass
from suite.encoders.loading import load_model
from suite.inference.classifier import Classifier
from suite.inference.labelling import Job
from suite.inference.onnx_file import OnnxModel, probabilities_of, write_onnx
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


class OpenVINOModel(OnnxModel):
    """The same file in OpenVINO, which computes in `precision`: f32 or bf16."""

    def __init__(self, path: Path, config: PreTrainedConfig, precision: str):
        import openvino

        torch.nn.Module.__init__(self)
        self.config = config
        self.session = openvino.compile_model(path, "CPU", {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY"})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.session({"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()})["logits"]
        return SequenceClassifierOutput(logits=torch.from_numpy(logits.copy()))


RUNTIMES = {"onnxruntime": OnnxModel, "openvino": partial(OpenVINOModel, precision="f32"),
            "openvino-bf16": partial(OpenVINOModel, precision="bf16")}
AGAINST = ("autocast", *RUNTIMES, "pipeline", "pipeline-bf16", "pipeline-own")


def by_runtime(classifier: Classifier, model: OnnxModel, texts: list[str], folder: Path) -> list[str]:
    """The labels, with another program in the place of the classifier's model."""
    return [classifier.label_names[label] for label in probabilities_of(model, classifier, texts).argmax(axis=1)]


def by_pipeline(classify: Callable, size: int, texts: list[str], folder: Path) -> list[str]:
    return [answer["label"] for answer in classify(texts, batch_size=size, truncation=True)]


def under_autocast(classifier: Classifier, texts: list[str], folder: Path) -> list[str]:
    with mock.patch.object(evaluation_pass, "has_operators", return_value=False):
        return suite(classifier, texts, folder)


def compare(model: str, texts: list[str], names: list[str], work: Path) -> None:
    config = Config()
    classifier = Classifier(Path(model), config, Devices(config))
    if exported := [name for name in names if name in RUNTIMES]:
        write_onnx(load_model(model).eval(), work / "model.onnx")
    classifier.cast_weights()
    own = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model).encoder)
    own.base_model.load_state_dict(load_model(model).encoder.state_dict(), strict=False)
    models = {"pipeline": (model, torch.float32), "pipeline-bf16": (model, torch.bfloat16),
              "pipeline-own": (own, torch.float32)}
    contenders = {"suite": partial(suite, classifier), "autocast": partial(under_autocast, classifier)}
    contenders |= {name: partial(by_runtime, classifier, RUNTIMES[name](work / "model.onnx", classifier.model.config))
                   for name in exported}
    sizes = {}
    for name in models.keys() & set(names):
        classify = pipeline("text-classification", model=models[name][0], tokenizer=classifier.tokenizer,
                            dtype=models[name][1], device=classifier.devices.device)
        seconds = {size: timed(lambda c=classify, s=size: c(texts[:TRIED], batch_size=s, truncation=True))[0]
                   for size in BATCH_SIZES}
        sizes[name] = min(seconds, key=seconds.get)
        contenders[name] = partial(by_pipeline, classify, sizes[name])
        print(f"{name}: reviews/s by batch size: "
              + ", ".join(f"{size}: {len(texts[:TRIED]) / s:.1f}" for size, s in seconds.items()), flush=True)
    contenders = {name: contenders[name] for name in ("suite", *names)}
    speeds, labels = {name: [] for name in contenders}, {name: [] for name in contenders}
    step = -(-len(texts) // PARTS)

    def in_turn(part: list[str], folder: Path) -> dict[str, tuple[float, list[str]]]:
        """Seconds and labels of each contender."""
        return {name: timed(partial(label, part, folder)) for name, label in contenders.items()}

    for start in range(0, len(texts), step):
        part = texts[start:start + step]
        for name, (seconds, found) in quietly(partial(in_turn, part, work), f"from row {start}").items():
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
    parser.add_argument("--against", nargs="+", choices=AGAINST,
                        default=[name for name in AGAINST if "openvino" not in name or find_spec("openvino")])
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS")
    arguments = parser.parse_args()
    quiet_libraries()
    if not arguments.memory:
        texts = read_texts(arguments.reviews, arguments.column, arguments.rows)
        refuse_busy_machine()
        with tempfile.TemporaryDirectory() as folder:
            compare(arguments.model, texts, arguments.against, Path(folder))
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
