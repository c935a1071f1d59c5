"""What each part of the fast path is worth: the suite against itself with one part left out, on the same reviews.

    python -m benchmarks.ablations                                     MiniLM's shape at 128 tokens, on two CPU cores
    python -m benchmarks.ablations --shape modernbert-small --tokens 512
    python -m benchmarks.ablations --only windows --rounds 6           one of the variants against the suite
    python -m benchmarks.ablations --shape bert-base --batch 64 --reviews 2000          for a GPU

All variants train in one process, in turn, round after round. A ratio below 1 means that leaving the part out is
slower, so that the part pays. Speeds are in tokens a second, which reviews read whole in windows have in common with
those whose head is read. Where numba's kernels train, the next four variants after theirs say little: run them where
numba is not installed. A round that other programs disturb is measured again, and a busy machine gets no verdict.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.noise import in_turn, ratios, refuse_busy_machine
from benchmarks.packing import packed
from benchmarks.workload import SHAPES, WARM_UP_STEPS, config_for, describe_machine, new_parser, train_again, workload


def patched(target: str, replacement: Any) -> Callable[[], Any]:
    return lambda: mock.patch(target, replacement)


def always_masked() -> Any:
    import torch

    from data import IMDBDataset

    own = IMDBDataset.batch

    def masked(self, rows):
        batch = own(self, rows)
        return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}

    return mock.patch.object(IMDBDataset, "batch", masked)


def unfused_adam() -> Any:
    import torch

    return mock.patch("suite.training.run.build_optimizer",
                      lambda model, train: torch.optim.Adam(model.parameters(), lr=5e-5))


def draw_by_torchs_generator(_: Any, rate: float, kept: Any) -> float:
    """`cpu_kernels.draw` with torch's generator, and a mask that is compared into booleans first."""
    import torch

    from suite.encoders.cpu_kernels import LEVELS

    dropped, count = round(rate * LEVELS), kept.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-1 << 63, None).view(torch.int16)[:count]
    kept.copy_(bits.view(kept.shape) >= dropped - LEVELS // 2)
    return LEVELS / (LEVELS - dropped)


def attention_by_autograd(query: Any, key: Any, value: Any, bias: Any, scaling: float, rate: float) -> Any:
    """`cpu_kernels.BlockAttention` of all reviews at once, differentiated by torch."""
    from suite.encoders.cpu_kernels import drop

    scores = (query * scaling) @ key.mT
    attention = (scores if bias is None else scores + bias).softmax(dim=-1).to(value.dtype)
    return ((drop(attention, rate) if rate else attention) @ value).transpose(1, 2).contiguous()


# (name, overrides of the configuration, what is patched while the Run is built and trains)
VARIANTS = [
    ("the suite", [], None),
    ("no kernels of numba", [], patched("suite.common.devices.numba_works", lambda: False)),
    ("torch's dropout and attention", [], patched("suite.encoders.placement.use_cpu_kernels", lambda model: None)),
    ("a slower generator of dropout", [], patched("suite.encoders.cpu_kernels.draw", draw_by_torchs_generator)),
    ("attention not by blocks", [],
     patched("suite.encoders.cpu_kernels.BlockAttention.apply", attention_by_autograd)),
    ("torch's attention where nothing is dropped", [], patched("suite.encoders.cpu_kernels.SHORT", 0)),
    ("every token of the last layer", [], patched("model.read_only_first_token", lambda encoder: None)),
    ("an effective batch not cut by length", [], patched("suite.training.run.pass_tokens", lambda *_: math.inf)),
    ("a mask where nothing is padded", [], always_masked),
    ("Adam not fused", [], unfused_adam),
    ("whole reviews, in windows", ["data_config.truncation=windows"], None),
    ("reviews packed without padding", [], packed),
    ("fp32", ["train_config.mixed_precision=no"], None),
    ("two loader processes", ["data_config.num_workers=2"], None),
    ("torch.compile", ["train_config.compile=true"], None),
]


def speed(run: Any, patch: Callable[[], Any] | None, steps: int | None = None) -> float:
    """Tokens a second over an epoch, or over its first steps, after a step that is not counted."""
    with patch() if patch else nullcontext():
        train_again(run, steps=1)
        seconds = train_again(run, steps=steps)
    return run.meter.tokens / seconds


def measure(work: Path, arguments: argparse.Namespace) -> None:
    from suite.common.devices import Devices
    from suite.training.run import Run

    runs = {}
    is_modernbert = SHAPES[arguments.shape][0] == "modernbert"
    variants = [variant for variant in VARIANTS if variant is VARIANTS[0] or arguments.only in variant[0]
                and (variant[2] is not packed or is_modernbert)]
    for number, (name, overrides, patch) in enumerate(variants):
        config = config_for(work, arguments.tokens, arguments.batch, f"run_name=variant-{number}", *overrides)
        with patch() if patch else nullcontext():
            runs[name] = Run.open(config, Devices(config)), patch
        speed(*runs[name], WARM_UP_STEPS - 1)
    speeds = in_turn(lambda name: speed(*runs[name]), runs, arguments.rounds)
    print(f"{'without it, or with instead':44}  {'tokens/s':>9}  ratio to the suite, median (least to most)")
    for name, values in speeds.items():
        print(f"{name:44}  {statistics.median(values):9,.0f}  {ratios(values, speeds['the suite'])}")


def main() -> None:
    parser = new_parser(__doc__, tokens=128, batch=32, reviews=96, rounds=3)
    parser.add_argument("--only", default="", metavar="WORD", help="only variants whose names hold this word")
    arguments = parser.parse_args()
    print(f"{arguments.shape}, {arguments.tokens} tokens, batch {arguments.batch}, {arguments.reviews} reviews, "
          f"{arguments.rounds} rounds, {describe_machine()}", flush=True)
    refuse_busy_machine()
    with workload(arguments.shape, arguments.reviews) as work:
        measure(work, arguments)


if __name__ == "__main__":
    main()
