"""Which reviews form an optimizer step, and how they are divided into batches of similar lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def cut(rows: np.ndarray, lengths: np.ndarray, batch_size: int, processes: int, pass_tokens: float = math.inf
        ) -> list[list[np.ndarray]]:
    """The reviews `rows` as batches, [round][process], of up to `batch_size` reviews of similar lengths.

    The cut is the one of least work, where one more round costs as much as `pass_tokens` tokens do. With the default
    there are as few rounds as possible, of even sizes. Every process gets the same number of batches, because forward
    passes wait for each other. Where a round has fewer reviews than processes, a process gets ~row: a review that is
    computed and not counted.
    """
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    longest = lengths[rows]  # descending
    if math.isinf(pass_tokens) or longest[0] == longest[-1]:
        rounds = np.array_split(rows, -(-len(rows) // (batch_size * processes)))
    else:
        rounds = np.split(rows, _cheapest_cuts(longest, batch_size * processes, processes, pass_tokens))
    shares = ([reviews[rank::processes] for rank in range(processes)] for reviews in rounds)
    return [[share if len(share) else ~rows[-1:] for share in round_] for round_ in shares]


def _cheapest_cuts(longest: np.ndarray, most: int, processes: int, pass_tokens: float) -> list[int]:
    """Where to cut reviews of these descending lengths into rounds of up to `most`, so that padded tokens + pass_tokens
    x rounds is least."""
    cost, start_of_last = np.zeros(len(longest) + 1), np.zeros(len(longest) + 1, dtype=np.int64)
    for stop in range(1, len(longest) + 1):  # the cheapest way for the first `stop` reviews, by their last round
        starts = np.arange(max(0, stop - most), stop)
        costs = cost[starts] - (starts - stop) // processes * longest[starts] + pass_tokens
        best = costs.argmin()
        cost[stop], start_of_last[stop] = costs[best], starts[best]
    cuts = [int(start_of_last[-1])]
    while cuts[-1] > 0:
        cuts.append(int(start_of_last[cuts[-1]]))
    return cuts[-2::-1]


@dataclass
class StepSampler:
    """Yields this process's micro-batches of each optimizer step of an epoch: a list of arrays of indices.

    Which reviews form an effective batch depends on the seed, the epoch and the effective batch size alone, never on
    the micro-batch or the number of processes. The last one of an epoch may be smaller.
    """

    lengths: np.ndarray  # (reviews,) tokens
    effective_batch: int  # reviews of an optimizer step, over all micro-batches and processes
    micro_batch: int
    seed: int
    rank: int = 0
    processes: int = 1
    pass_tokens: float = math.inf  # what a forward and backward pass costs apart from its tokens, in tokens
    epoch: int = 0
    first_step: int = 0  # steps to skip, when an epoch is resumed in its middle

    def effective_batches(self) -> list[np.ndarray]:
        """The reviews of each optimizer step of the epoch, those before `first_step` included."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        return [order[i:i + self.effective_batch] for i in range(0, len(order), self.effective_batch)]

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for rows in self.effective_batches()[self.first_step:]:
            rounds = cut(rows, self.lengths, self.micro_batch, self.processes, self.pass_tokens)
            yield [micro_batches[self.rank] for micro_batches in rounds]

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.effective_batch) - self.first_step


@dataclass
class LengthSampler:
    """Yields this process's batches of a split for evaluation, longest reviews first, each review exactly once."""

    lengths: np.ndarray
    batch_size: int
    rank: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for batches in cut(np.arange(len(self.lengths)), self.lengths, self.batch_size, self.processes):
            yield batches[self.rank]

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.processes))
