"""Peak memory of an optimizer step against its batch: larger micro-batches cost memory, accumulation does not.

    python -m benchmarks.memory                             MiniLM's shape: some minutes on two CPU cores
    python -m benchmarks.memory --shape bert-base           BERT-base's shape, for a GPU
    python -m benchmarks.memory --gradient-checkpointing    with train_config.gradient_checkpointing

Each row is a process of its own that takes two optimizer steps on random reviews of 128 tokens, in the precision that
`mixed_precision: auto` picks, with Adam. On a GPU the figure is the most that torch held there. On a CPU it is the most
memory of the whole process, with glibc told to give freed blocks back at once: left alone, it keeps holes between them
and the figure drifts upwards with the number of micro-batches, whatever is in use.
"""

import argparse
import os
import subprocess
import sys

import numpy as np
import torch
import transformers

from benchmarks.workload import bare_run, encoder_config, new_parser
from data import IMDBDataset, Step
from main import train_step
from model import ClassifierConfig, EncoderForClassification
from suite.common.devices import Devices
from suite.encoders.placement import checkpoint_gradients, place_model
from suite.reviews.sampling import cut
from suite.training.meter import peak_memory_mb
from suite.training.optimization import build_optimizer
from utils import Config

TOKENS, STEPS = 128, 2
ROWS = [(64, 64), (64, 256), (64, 1024), (128, 128), (256, 256)]  # (micro-batch, effective batch)


def random_reviews(reviews: int, vocabulary: int) -> IMDBDataset:
    random = np.random.default_rng(0)
    rows, offsets = np.arange(reviews), TOKENS * np.arange(reviews + 1)
    return IMDBDataset(random.integers(1000, vocabulary - 1000, offsets[-1]), offsets, rows,
                       random.integers(2, size=reviews), rows, pad_token_id=0)


def measure(shape: str, micro_batch: int, effective_batch: int, checkpointed: bool) -> float:
    """Peak memory in MB."""
    config, encoder = Config(), encoder_config(shape)
    devices = Devices(config)
    model = EncoderForClassification(ClassifierConfig(encoder))
    place_model(model, devices.device)
    if checkpointed:
        checkpoint_gradients(model, shape)
    optimizer = build_optimizer(model, config.train_config)
    dataset = random_reviews(effective_batch, encoder.vocab_size)
    run, rows = bare_run(model, optimizer, devices), np.arange(effective_batch)
    rounds = cut(rows, dataset.lengths, micro_batch, processes=1)
    for _ in range(STEPS):
        train_step(run, Step(rows, [dataset.batch(part) for part, in rounds], effective_batch, effective_batch))
    return peak_memory_mb(devices.device)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--row", nargs=2, type=int, help=argparse.SUPPRESS)  # of one process
    arguments = parser.parse_args()
    if arguments.row:
        print(measure(arguments.shape, *arguments.row, arguments.gradient_checkpointing))
        return
    print(f"{arguments.shape}, {TOKENS} tokens, {Devices(Config())}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}\n\nmicro-batch  effective batch  peak memory (MB)", flush=True)
    for micro_batch, effective_batch in ROWS:
        child = subprocess.run([sys.executable, "-m", __spec__.name, *sys.argv[1:], "--row", str(micro_batch),
                                str(effective_batch)], capture_output=True, text=True, check=False,
                               env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
        last = (child.stdout or child.stderr or f"killed with {child.returncode}").strip().splitlines()[-1]
        print(f"{micro_batch:11}  {effective_batch:15}  {float(last):16,.0f}" if child.returncode == 0 else
              f"{micro_batch:11}  {effective_batch:15}  {last}", flush=True)


if __name__ == "__main__":
    main()
