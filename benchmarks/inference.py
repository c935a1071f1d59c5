"""How fast is a trained model's answer: in PyTorch, without the packed layers of --mode predict, and in ONNX.

    python -m benchmarks.inference                          MiniLM's shape: about two minutes on two CPU cores
    python -m benchmarks.inference --shape bert-base        or any other shape
    python -m benchmarks.inference --rounds 1 --seconds 0.1     a quick look

Random reviews of exactly 128 tokens, random weights, on the CPU, with torch's number of threads for both (set
OMP_NUM_THREADS). The contenders run in turn, each for some seconds a round, after calls that are not counted. A round
that other programs disturb is measured again. Printed is a Markdown table: medians of the rounds, ratios round by
round, with the least and the most.

    pytorch             fp32
    pytorch-bf16        under autocast, where the CPU computes in bf16
    onnxruntime         the file of --mode export, fp32
    onnxruntime-int8    that of --mode export --int8
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.noise import in_turn, ratios, refuse_busy_machine
from benchmarks.workload import describe_machine, encoder_config, new_parser
from model import ClassifierConfig, EncoderForClassification
from suite.common.devices import pick_precision
from suite.encoders.placement import place_model
from suite.inference.onnx_file import OnnxModel, quantize, write_onnx

CPU = torch.device("cpu")
TOKENS, BATCHES, UNCOUNTED = 128, (1, 32), 3


def contenders(shape: str, folder: Path) -> dict[str, Callable[[torch.Tensor], object]]:
    """{name: what takes input_ids (batch, tokens) to logits}."""
    torch.manual_seed(0)
    model = EncoderForClassification(ClassifierConfig(encoder_config(shape)))
    place_model(model.eval(), CPU)
    write_onnx(model, folder / "model.onnx")
    exported = OnnxModel(folder / "model.onnx", model.config)

    def in_bf16(input_ids: torch.Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids)

    found = {"pytorch": model}
    if pick_precision("auto", CPU) == "bf16":
        found["pytorch-bf16"] = in_bf16
    quantize(folder / "model.onnx", folder / "model_quantized.onnx")
    return found | {"onnxruntime": exported,
                    "onnxruntime-int8": OnnxModel(folder / "model_quantized.onnx", model.config)}


@torch.inference_mode()
def seconds_a_call(run: Callable[[torch.Tensor], object], batch: int, seconds: float) -> float:
    input_ids = torch.randint(1000, 30_000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    for _ in range(UNCOUNTED):
        run(input_ids)
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        run(input_ids)
        calls += 1
    return elapsed / calls


def main() -> None:
    arguments = new_parser(__doc__, rounds=5, seconds=4.0).parse_args()  # seconds: of a contender in a round
    print(f"{arguments.shape}, {TOKENS} tokens, {describe_machine()}", flush=True)
    refuse_busy_machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(arguments.shape, Path(folder))
        times = in_turn(lambda key: seconds_a_call(runs[key[1]], key[0], arguments.seconds),
                        [(batch, name) for batch in BATCHES for name in runs], arguments.rounds)
    print("\n| batch | | ms a batch | reviews/s | of pytorch's speed |\n| --- | --- | --- | --- | --- |")
    for (batch, name), own in times.items():
        print(f"| {batch} | `{name}` | {1000 * statistics.median(own):,.1f} ({1000 * min(own):,.1f} to "
              f"{1000 * max(own):,.1f}) | {batch / statistics.median(own):,.1f} | "
              f"{ratios(times[batch, 'pytorch'], own)} |")


if __name__ == "__main__":
    main()
