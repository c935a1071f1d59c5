"""Which reviews form an optimizer step, and how they are divided into batches of similar lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CHUNK_ROWS = 2048  # reviews that are sorted by length together, where no optimizer step asks for another number
FEWEST_ROUNDS = 1e9  # the cost of a round, in tokens, that makes any other cost count for nothing


def cut(rows: np.ndarray, lengths: np.ndarray, batch_size: int, processes: int, pass_tokens: float = math.inf,
        windows: np.ndarray | None = None) -> list[list[np.ndarray]]:
    """The reviews `rows` as batches, [round][process], of up to `batch_size` windows of similar lengths.

    `lengths`: of the longest window of each review, in tokens; `windows`: how many each review has (None: one). The
    windows of a review stay together, so a batch holds more than `batch_size` of them if a single review does.

    The cut is the one of least work, where one more round costs as much as `pass_tokens` tokens do. With the default
    there are as few rounds as possible; of even sizes, if every review is one window. Every process gets the same
    number of batches, because forward passes wait for each other. Where a round has fewer reviews than processes, a
    process gets ~row: a review that is computed and not counted.
    """
    counts = np.ones_like(rows) if windows is None else windows[rows]
    order = np.lexsort((-counts, -lengths[rows]))  # a stable sort by the last key first
    rows, counts = rows[order], counts[order]
    longest = lengths[rows]  # descending
    if counts.max() == 1 and (math.isinf(pass_tokens) or longest[0] == longest[-1]):
        rounds = np.array_split(rows, -(-len(rows) // (batch_size * processes)))
    else:
        rounds = np.split(rows, _cheapest_cuts(longest, counts, batch_size, processes, min(pass_tokens, FEWEST_ROUNDS)))
    shares = ([reviews[rank::processes] for rank in range(processes)] for reviews in rounds)
    return [[share if len(share) else ~rows[-1:] for share in round_] for round_ in shares]


def _cheapest_cuts(longest: np.ndarray, counts: np.ndarray, batch_size: int, processes: int, pass_tokens: float
                   ) -> list[int]:
    """Where to cut reviews of these descending lengths and these numbers of windows into rounds, so that padded tokens
    + pass_tokens x rounds is least."""
    cost, start_of_last = np.zeros(len(longest) + 1), np.zeros(len(longest) + 1, dtype=np.int64)
    windows = np.concatenate([[0], counts.cumsum()])
    earliest = _earliest_starts(counts, batch_size, processes)
    for stop in range(1, len(longest) + 1):  # the cheapest way for the first `stop` reviews, by their last round
        starts = np.arange(earliest[stop - 1], stop)
        costs = cost[starts] - (windows[starts] - windows[stop]) // processes * longest[starts] + pass_tokens
        best = costs.argmin()
        cost[stop], start_of_last[stop] = costs[best], starts[best]
    cuts = [int(start_of_last[-1])]
    while cuts[-1] > 0:
        cuts.append(int(start_of_last[cuts[-1]]))
    return cuts[-2::-1]


def _earliest_starts(counts: np.ndarray, batch_size: int, processes: int) -> list[int]:
    """Where a round can begin that ends after each review: so that no process gets more than `batch_size` windows, or
    more than one review."""
    loads, start, starts = np.zeros(processes, dtype=np.int64), 0, []  # a process gets every so many-th review
    for place, count in enumerate(counts):
        loads[place % processes] += count
        while loads.max() > batch_size and place - start >= processes:
            loads[start % processes] -= counts[start]
            start += 1
        starts.append(start)
    return starts


@dataclass
class StepSampler:
    """Which reviews form the optimizer steps of an epoch, and this process's micro-batches of each.

    Which reviews form an effective batch depends on the seed, the epoch and the effective batch size alone, never on
    the micro-batch or the number of processes. The last one of an epoch may be smaller.
    """

    lengths: np.ndarray  # (reviews,) tokens of the longest window
    effective_batch: int  # reviews of an optimizer step, over all micro-batches and processes
    micro_batch: int  # windows
    seed: int
    rank: int = 0
    processes: int = 1
    pass_tokens: float = math.inf  # what a forward and backward pass costs apart from its tokens, in tokens
    windows: np.ndarray | None = None  # (reviews,) how many each has; None: one

    def effective_batches(self, epoch: int) -> list[np.ndarray]:
        """The reviews of each optimizer step of the epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        return [order[i:i + self.effective_batch] for i in range(0, len(order), self.effective_batch)]

    def micro_batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """This process's share of the effective batch `rows`, in batches of similar lengths."""
        rounds = cut(rows, self.lengths, self.micro_batch, self.processes, self.pass_tokens, self.windows)
        return [shares[self.rank] for shares in rounds]

    def __len__(self) -> int:
        """The optimizer steps of an epoch."""
        return -(-len(self.lengths) // self.effective_batch)


def evaluation_batches(lengths: np.ndarray, batch_size: int, rank: int = 0, processes: int = 1,
                       pass_tokens: float = math.inf, windows: np.ndarray | None = None) -> list[np.ndarray]:
    """This process's batches of a split for evaluation, each review exactly once.

    They are those that prediction makes of the same reviews, so the logits are the same to the last bit.
    """
    chunks = np.split(np.arange(len(lengths)), range(CHUNK_ROWS, len(lengths), CHUNK_ROWS))
    return [shares[rank] for chunk in chunks
            for shares in cut(chunk, lengths, batch_size, processes, pass_tokens, windows)]
