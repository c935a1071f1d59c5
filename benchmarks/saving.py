"""What it costs to save: the state that a run continues from, and the best model.

    python -m benchmarks.saving                             MiniLM's shape: about two minutes on two CPU cores
    python -m benchmarks.saving --shape bert-base --batch 64         for a GPU

Optimizer steps and saves are timed in turn in one run, everything that a save does included: gathering, writing,
SHA-256 sums, and waiting until all of it is on the disk. The shares are of a run at the default settings, which saves
every `train_config.save_every_minutes` and, with the best model, at the end of an epoch of 40,000 reviews.
"""

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.workload import config_for, describe_machine, new_parser, train_again, workload

STEPS, SAVES, EPOCH_REVIEWS = 3, 5, 40_000


def measure(work: Path, arguments: argparse.Namespace) -> None:
    from suite.common.devices import Devices
    from suite.training.run import Run

    config = config_for(work, arguments.tokens, arguments.batch)
    run = Run.open(config, Devices(config))
    train_again(run, steps=1)  # not counted: it allocates
    state, best, seconds = [], [], 0.0
    for _ in range(SAVES):
        seconds += train_again(run, steps=STEPS)
        for save, times in ((run.save, state), (run.save_best, best)):
            started = time.perf_counter()
            save()
            times.append(time.perf_counter() - started)
    step = seconds / (SAVES * STEPS)
    minutes = config.train_config.save_every_minutes
    state_seconds, best_seconds = map(statistics.median, (state, best))
    epoch = step * EPOCH_REVIEWS / arguments.batch
    print(f"an optimizer step: {step:.3f} s; a state of {run.state_bytes / 1e6:,.0f} MB: {state_seconds:.2f} s "
          f"({min(state):.2f} to {max(state):.2f}); the best model of {run.model_bytes / 1e6:,.0f} MB: "
          f"{best_seconds:.2f} s ({min(best):.2f} to {max(best):.2f})")
    whole = (epoch // (60 * minutes) + 1) * state_seconds + best_seconds
    print(f"saving adds {state_seconds / (60 * minutes):.2%} at every {minutes:g} minutes, and {whole:.1f} s "
          f"({whole / epoch:.2%}) to an epoch of {EPOCH_REVIEWS:,} reviews")


def main() -> None:
    arguments = new_parser(__doc__, tokens=128, batch=32).parse_args()
    print(f"{arguments.shape}, {arguments.tokens} tokens, batch {arguments.batch}, {describe_machine()}", flush=True)
    with workload(arguments.shape, arguments.batch * STEPS) as work:
        measure(work, arguments)


if __name__ == "__main__":
    main()
