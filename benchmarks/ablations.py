"""What each part of the fast path is worth: the suite against itself with one part left out, on the same reviews.

    python -m benchmarks.ablations                                     MiniLM's shape at 128 tokens, on two CPU cores
    python -m benchmarks.ablations --shape modernbert-small --tokens 512
    python -m benchmarks.ablations --shape bert-base --batch 64 --reviews 2000          for a GPU

All variants train in one process, in turn, round after round. A ratio below 1 means that leaving the part out is
slower, so that the part pays.
"""

import argparse
import io
import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.workload import SHAPES, WARM_UP_STEPS, describe_machine, settings, workload


def patched(target: str, replacement: Any) -> Callable[[], Any]:
    return lambda: mock.patch(target, replacement)


def always_masked() -> Any:
    import torch

    from data import IMDBDataset

    own = IMDBDataset.__getitems__

    def masked(self, indices):
        batch = own(self, indices)
        return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}

    return mock.patch.object(IMDBDataset, "__getitems__", masked)


def unfused_adam() -> Any:
    import torch

    return mock.patch("suite.training.run.build_optimizer",
                      lambda model, train: torch.optim.Adam(model.parameters(), lr=5e-5))


# (name, overrides of the configuration, what is patched while the Run is built and trains)
VARIANTS = [
    ("the suite", [], None),
    ("torch's dropout and attention", [], patched("suite.encoders.cpu_kernels.use_cpu_kernels", lambda model: None)),
    ("torch's attention where nothing is dropped", [], patched("suite.encoders.cpu_kernels.SHORT", 0)),
    ("every token of the last layer", [], patched("model.read_only_first_token", lambda encoder: None)),
    ("a window not cut by length", [],
     patched("suite.training.run.PASS_FLOPS", {kind: math.inf for kind in ("cpu", "cuda", "mps")})),
    ("a mask where nothing is padded", [], always_masked),
    ("Adam not fused", [], unfused_adam),
    ("fp32", ["train_config.mixed_precision=no"], None),
    ("two loader processes", ["data_config.num_workers=2"], None),
    ("torch.compile", ["train_config.compile=true"], None),
]


def train(run: Any, patch: Callable[[], Any] | None, steps: int | None = None) -> float:
    """Reviews a second over an epoch, or over its first steps."""
    from main import train_epoch

    progress = run.progress
    progress.windows = progress.step = progress.reviews = progress.recorded_reviews = 0
    progress.seconds, run.total_steps = 0.0, steps or run.steps_per_epoch
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))  # the progress of each of them
        if patch:
            stack.enter_context(patch())
        train_epoch(run)
    return progress.reviews / progress.seconds


def measure(work: Path, arguments: argparse.Namespace) -> None:
    from suite.training.devices import SingleDevice
    from suite.training.run import Run

    runs = {}
    for number, (name, overrides, patch) in enumerate(VARIANTS):
        config = settings(work, arguments.tokens, arguments.batch, f"run_name=variant-{number}", *overrides)
        with ExitStack() as stack:
            if patch:
                stack.enter_context(patch())
            runs[name] = Run(config, SingleDevice(config)), patch
        run, patch = runs[name]
        run.start(None)
        train(run, patch, WARM_UP_STEPS)
    speeds = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, (run, patch) in runs.items():
            speeds[name].append(train(run, patch))
    print(f"{'without it, or with instead':44}  {'reviews/s':>9}  ratio to the suite, median (least to most)")
    for name, values in speeds.items():
        ratios = [value / suite for value, suite in zip(values, speeds["the suite"], strict=True)]
        print(f"{name:44}  {statistics.median(values):9.1f}  {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
              f"{max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="reviews an optimizer step (default: 32)")
    parser.add_argument("--reviews", type=int, default=96, help="reviews of each variant and round (default: 96)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.shape}, {arguments.tokens} tokens, batch {arguments.batch}, {arguments.reviews} reviews, "
          f"{arguments.rounds} rounds, {describe_machine()}", flush=True)
    with workload(arguments.shape, arguments.reviews) as work:
        measure(work, arguments)


if __name__ == "__main__":
    main()
