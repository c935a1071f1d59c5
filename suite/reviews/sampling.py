"""Which reviews form an optimizer step, and how they are divided into batches of similar lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def cut_window(rows: np.ndarray, lengths: np.ndarray, micro_batch: int, processes: int, pass_tokens: float = math.inf
               ) -> list[list[np.ndarray]]:
    """The reviews `rows` as micro-batches, [round][process], of up to `micro_batch` reviews of similar lengths.

    The cut is the one of least work, where a further round costs as much as `pass_tokens` tokens; where that is more
    than any padding, there are as few rounds as possible, of even sizes. Every process gets the same number of
    micro-batches, for their forward passes wait for each other. Where a round has fewer reviews than processes, a
    process gets ~row: a review that is computed and not counted.
    """
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    longest = lengths[rows]  # descending
    if math.isinf(pass_tokens) or longest[0] == longest[-1]:
        pieces = np.array_split(rows, -(-len(rows) // (micro_batch * processes)))
    else:
        pieces = np.split(rows, _cheapest_cuts(longest, micro_batch, processes, pass_tokens))
    shared = ([piece[rank::processes] for rank in range(processes)] for piece in pieces)
    return [[part if len(part) else ~rows[-1:] for part in parts] for parts in shared]


def _cheapest_cuts(longest: np.ndarray, micro_batch: int, processes: int, pass_tokens: float) -> list[int]:
    """Where to cut reviews of these descending lengths, so that padded tokens + pass_tokens x rounds is least."""
    cost, start_of_last = np.zeros(len(longest) + 1), np.zeros(len(longest) + 1, dtype=np.int64)
    for stop in range(1, len(longest) + 1):  # the cheapest way for the first `stop` reviews, by their last round
        starts = np.arange(max(0, stop - micro_batch * processes), stop)
        costs = cost[starts] - (starts - stop) // processes * longest[starts] + pass_tokens
        best = costs.argmin()
        cost[stop], start_of_last[stop] = costs[best], starts[best]
    cuts = [int(start_of_last[-1])]
    while cuts[-1] > 0:
        cuts.append(int(start_of_last[cuts[-1]]))
    return cuts[-2::-1]


@dataclass
class WindowSampler:
    """Yields this process's micro-batches of an epoch, as arrays of indices, window after window.

    A window is what one optimizer step learns from: `window_size` reviews, fewer in an epoch's last one. Which reviews
    form it depends on seed and epoch alone, never on the micro-batch or the number of processes.
    """

    lengths: np.ndarray
    window_size: int
    micro_batch: int
    seed: int
    rank: int = 0
    processes: int = 1
    epoch: int = 0
    first_window: int = 0  # windows to skip, when an epoch is resumed in its middle
    pass_tokens: float = math.inf  # what a forward and backward pass costs apart from its tokens, in tokens

    def windows(self) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        return [order[i:i + self.window_size] for i in range(0, len(order), self.window_size)]

    def cut(self, window: np.ndarray) -> list[np.ndarray]:
        """This process's micro-batches of a window."""
        rounds = cut_window(window, self.lengths, self.micro_batch, self.processes, self.pass_tokens)
        return [micro_batches[self.rank] for micro_batches in rounds]

    def __iter__(self) -> Iterator[np.ndarray]:
        for window in self.windows()[self.first_window:]:
            yield from self.cut(window)


@dataclass
class LengthSampler:
    """Yields this process's batches of a split for evaluation, longest reviews first, each review exactly once."""

    lengths: np.ndarray
    batch_size: int
    rank: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for batches in cut_window(np.arange(len(self.lengths)), self.lengths, self.batch_size, self.processes):
            yield batches[self.rank]

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.processes))


# What a forward and backward pass costs apart from its tokens (launching kernels, reading all weights), in FLOPs that
# the device could do meanwhile. A CPU's was fitted to MiniLM on two cores; a GPU's is an estimate, not measured.
PASS_FLOPS = {"cpu": 6e9, "mps": 3e10, "cuda": 2e12}
