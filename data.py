"""From labelled reviews to batches: clean, split, tokenize once, and cut every epoch into optimizer steps.

`get_dataloader(config, "train" | "valid" | "test")` is the whole interface. The split depends on the reviews and
`split_seed` alone; the order of an epoch on the seed, the epoch and the effective batch size alone.
"""

from __future__ import annotations

import functools
import hashlib
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from devices import pick_device
from loading import load_tokenizer
from sampling import LengthSampler, WindowSampler
from sources import Reviews, load_reviews, locate
from stopping import EXIT_CODES
from utils import UserError, num_processes, process_rank, say

CPU_BATCH = 64
IGNORED = -100  # the label of a review that is in a batch only to keep processes in step; cross-entropy skips it


class IMDBDataset(torch.utils.data.Dataset):
    """The tokenized reviews of one split, as flat arrays: nothing is looked up or padded item by item.

    `tokens` (all tokens of all reviews,) and `offsets` (reviews + 1,) are shared by the splits; `rows` (n,) are this
    split's reviews in them, `labels` (n,) their classes, `ids` (n,) their rows in the pooled data.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray, labels: np.ndarray, ids: np.ndarray,
                 texts: Dataset, tokenizer: PreTrainedTokenizerBase):
        self.tokens, self.rows, self.labels, self.ids = tokens, rows, labels, ids
        self.starts, self.lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
        self.texts = texts
        self.pad_token_id = tokenizer.pad_token_id
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask` where anything is padded, and `token_type_ids` where the encoder takes
        them: (batch, longest); `labels` and `id`: (batch,); all int64.

        A negative index ~i stands for review i with the label IGNORED and the id -1.
        """
        indices = np.asarray(indices, dtype=np.int64)
        ignored = indices < 0
        indices = np.where(ignored, ~indices, indices)
        lengths = self.lengths[indices]
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]  # (batch, longest)
        input_ids = np.full(mask.shape, self.pad_token_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.tokens[start:start + length] for start, length
                                          in zip(self.starts[indices], lengths, strict=True)])
        batch = {"input_ids": input_ids,
                 "labels": np.where(ignored, IGNORED, self.labels[indices]),
                 "id": np.where(ignored, -1, self.ids[indices])}
        if not mask.all():  # attention without a mask is faster
            batch["attention_mask"] = mask.astype(np.int64)
        if self.has_token_types:
            batch["token_type_ids"] = np.zeros_like(input_ids)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def text(self, review_id: int) -> str:
        """The review whose `id` this is."""
        return self.texts[int(review_id)]["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Clean and split


def text_digests(table: Dataset) -> np.ndarray:
    """(rows,) of 16 bytes each: equal for equal texts, and all of a text that stays in memory."""
    digests = np.empty(len(table), dtype="V16")
    row = 0
    for batch in table.select_columns("text").iter(batch_size=1000):
        for text in batch["text"]:
            digests[row] = hashlib.blake2b(text.encode(), digest_size=16).digest()
            row += 1
    return digests


def split_reviews(digests: np.ndarray, labels: np.ndarray, split_names: np.ndarray, data_config: Any
                  ) -> dict[str, np.ndarray]:
    """{"train", "valid", "test": the rows of each, ascending}. No text, of which `digests` tell, stands in two of them.

    Raises UserError if a class is too rare to be split.
    """
    name, official = data_config.dataset, data_config.split == "official"
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    originals = first[inverse]  # (rows,) the row at which each row's text stands first
    # The official test split stays whole, for figures that compare with others'; what stands in it is not trained on.
    fixed = split_names == "test" if official else np.zeros(len(labels), dtype=bool)
    if official and not fixed.any():
        raise UserError(f"data_config.split is official, but {name} has no labelled test split (found "
                        f"{', '.join(sorted(set(split_names)))}): give shares such as [0.8, 0.1, 0.1]")
    usable = ~fixed & ~np.isin(originals, originals[fixed])
    is_copy = usable & (originals != np.arange(len(originals)))
    kept_on_one_side = not data_config.drop_duplicates
    pool = np.flatnonzero(fixed | usable & (~is_copy | kept_on_one_side))
    if data_config.limit is not None and data_config.limit < len(pool):
        pool, _ = _draw(pool, labels, data_config.limit, data_config, "limit")
    if kept_on_one_side:  # of the rows left, the first of each text is split, and its copies follow it below
        free = np.sort(pool[~fixed[pool]])
        heads = free[np.unique(originals[free], return_index=True)[1]]
        copies = np.setdiff1d(free, heads)
        pool = np.concatenate([pool[fixed[pool]], np.sort(heads)])

    test, pool = pool[fixed[pool]], pool[~fixed[pool]]
    if official:
        marked = np.isin(split_names[pool], ("validation", "valid", "dev"))
        train, valid = (pool[~marked], pool[marked]) if marked.any() else _draw(
            pool, labels, len(pool) - round(0.1 * len(pool)), data_config)
    else:
        _, valid_share, test_share = data_config.split
        held_out = round(len(pool) * (valid_share + test_share))
        train, rest = _draw(pool, labels, len(pool) - held_out, data_config)
        valid, test = _draw(rest, labels, round(held_out * valid_share / (valid_share + test_share)), data_config)
    splits = {"train": train, "valid": valid, "test": test}
    if empty := [split for split, rows in splits.items() if len(rows) == 0]:
        raise UserError(f"{name}: no rows are left for {' and '.join(empty)}: raise data_config.limit or add rows")
    other = set(labels[np.concatenate([valid, test])].tolist())
    if lacking := other - set(labels[train].tolist()):  # only an official split can
        raise UserError(f"{name}: no row to train on has the class {min(lacking)}, counted from 0: add some, or give "
                        "shares such as data_config.split=[0.8,0.1,0.1]")

    if kept_on_one_side:
        splits = {split: np.concatenate([rows, copies[np.isin(originals[copies], originals[rows])]])
                  for split, rows in splits.items()}
    if repeated := int((~fixed & ~usable).sum()):
        say(f"{name}: {repeated:,} rows repeat a text of the official test split and are dropped")
    if is_copy.any():
        say(f"{name}: {is_copy.sum():,} exact duplicates "
            + ("kept on the side of their first occurrence" if kept_on_one_side else "dropped"))
    return {split: np.sort(rows) for split, rows in splits.items()}


def refuse_contradictions(digests: np.ndarray, reviews: Reviews) -> None:
    """Raises UserError, naming both rows, if equal texts carry different labels."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    contradicting = np.flatnonzero(reviews.labels != reviews.labels[first[inverse]])
    if len(contradicting):
        row = contradicting[0]
        (place, number), (other, other_number) = (locate(reviews.parts, i) for i in (first[inverse[row]], row))
        both = (f"{place}: rows {number} and {other_number}" if place == other else
                f"{place}: row {number} and {other}: row {other_number}")
        raise UserError(f"{both} are the same text with different labels: correct one of them")


def _draw(rows: np.ndarray, labels: np.ndarray, count: int, data_config: Any, key: str = "split"
          ) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the rows at random, stratified by label, and the others."""
    if key == "limit" and len(rows) - count < len(np.unique(labels[rows])):  # too few go for each class to lose one
        order = np.random.default_rng(data_config.split_seed).permutation(rows)
        return order[:count], order[count:]
    try:
        return train_test_split(rows, train_size=count, stratify=labels[rows], random_state=data_config.split_seed)
    except ValueError:
        counts = np.unique(labels[rows], return_counts=True)[1]
        raise UserError(f"{data_config.dataset}: {len(rows)} rows, {min(counts, default=0)} of them of the rarest "
                        f"class, are too few for each of the {len(counts)} classes to be in every part of "
                        f"data_config.{key}={getattr(data_config, key)}: add rows, or change data_config.{key}"
                        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Tokenize


def truncate(tokens: list[int], room: int, truncation: str) -> list[int]:
    """At most `room` of a review's tokens: its head, its tail, or half from each end (Sun et al. 2019)."""
    if len(tokens) <= room:
        return tokens
    head = {"head": room, "tail": 0, "head_tail": room // 2}[truncation]
    return tokens[:head] + tokens[len(tokens) - (room - head):]


class Encode:
    """Texts to token ids with the special tokens around them; a function for `datasets.map`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_len: int, truncation: str):
        self.tokenizer, self.truncation = tokenizer, truncation
        # What the tokenizer puts around a text, [CLS] and [SEP] for BERT, found by encoding one known text.
        content = self._tokens(["a"])[0]
        whole = tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i:i + len(content)] == content)
        self.prefix, self.suffix = whole[:start], whole[start + len(content):]
        self.room = max_len - len(self.prefix) - len(self.suffix)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False,
                              return_token_type_ids=False, verbose=False)["input_ids"]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return {"input_ids": [self.prefix + truncate(tokens, self.room, self.truncation) + self.suffix
                              for tokens in self._tokens(batch["text"])]}

    def fingerprint(self, digests: np.ndarray) -> str:
        """Names the cached result: the same reviews, tokenizer and lengths, in any process on any day."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else sorted(self.tokenizer.get_vocab().items())
        parts = (digests.tobytes(), vocabulary, self.prefix, self.suffix, self.room, self.truncation)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def tokenize(table: Dataset, encode: Encode, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All tokens (total,) int32 and the offsets of the reviews in them (rows + 1,), as datasets cached them."""
    tokenized = table.map(encode, batched=True, remove_columns=table.column_names, desc="tokenizing",
                          features=Features({"input_ids": List(Value("int32"))}),
                          new_fingerprint=encode.fingerprint(digests))
    column = tokenized.data.column("input_ids").combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    return column.values.to_numpy(), offsets


# ---------------------------------------------------------------------------------------------------------------------
# Everything together


@dataclass
class PreparedData:
    splits: dict[str, IMDBDataset]
    tokenizer: PreTrainedTokenizerBase
    label_names: list[str]
    fingerprint: str  # of the reviews, their labels and the split


def prepare_data(config: Any, tokenizer_name: str | None = None) -> PreparedData:
    """Load, clean, split and tokenize, once for all three splits.

    `tokenizer_name` is a trained model's folder; None means the encoder of the configuration.
    """
    if tokenizer_name is None:
        tokenizer_name, line_breaks = config.model_config.model_name, config.data_config.line_breaks
    else:
        line_breaks = "keep"  # a trained model's tokenizer has learnt what to do with them
    return _prepare_data(config.data_config, config.model_config.num_labels, tokenizer_name, line_breaks)


def _once(function):
    """Remember the last result; the key is the arguments as text, for configurations are not hashable."""
    last: dict[str, Any] = {}

    @functools.wraps(function)
    def remembering(*arguments):
        key = repr(arguments)
        if key not in last:
            last.clear()
            last[key] = function(*arguments)
        return last[key]

    return remembering


@_once
def _prepare_data(data_config: Any, num_labels: int, tokenizer_name: str, line_breaks: str) -> PreparedData:
    reviews = load_reviews(data_config, num_labels)
    digests = text_digests(reviews.table)
    refuse_contradictions(digests, reviews)
    splits = split_reviews(digests, reviews.labels, reviews.split_names, data_config)
    tokenizer = load_tokenizer(tokenizer_name, line_breaks=line_breaks)
    used = np.sort(np.concatenate(list(splits.values())))  # with a limit, only these rows are tokenized
    encode = Encode(tokenizer, data_config.max_len, data_config.truncation)
    tokens, offsets = tokenize(reviews.table.select(used), encode, digests[used])
    datasets = {name: IMDBDataset(tokens, offsets, np.searchsorted(used, ids), reviews.labels[ids], ids, reviews.table,
                                  tokenizer) for name, ids in splits.items()}
    parts = (digests, reviews.labels, *splits.values())
    fingerprint = hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).hexdigest()
    return PreparedData(datasets, tokenizer, reviews.label_names, fingerprint)


def _ignore_signals(worker: int) -> None:
    """A signal to the whole job is for the process that trains: it stops its loaders when the state is saved."""
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch  # IMDBDataset.__getitems__ has padded it already


def eval_batch_size(config: Any) -> int:
    """Reviews a forward pass without a backward one: on a CPU, whose caches hold no larger pass, at most CPU_BATCH."""
    size = config.data_config.eval_batch_size
    return min(size, CPU_BATCH) if pick_device(config.train_config.device).type == "cpu" else size


def get_dataloader(config: Any, split: str, tokenizer_name: str | None = None) -> DataLoader:
    """Batches of one split, `train`, `valid` or `test`, as IMDBDataset.__getitems__ describes them.

    `train` comes in the order of WindowSampler (set `loader.batch_sampler.epoch`), the others longest reviews first.
    With several processes, each gets its own share.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split must be train, valid or test, got {split!r}")
    dataset = prepare_data(config, tokenizer_name).splits[split]
    data_config, train_config = config.data_config, config.train_config
    rank, processes = process_rank(), num_processes()
    if split == "train":
        window = data_config.batch_size * train_config.gradient_accumulation_steps * processes
        sampler = WindowSampler(dataset.lengths, window, data_config.batch_size, train_config.seed, rank, processes)
    else:
        sampler = LengthSampler(dataset.lengths, eval_batch_size(config), rank, processes)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_it_is, num_workers=data_config.num_workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=_ignore_signals,
                      generator=torch.Generator())  # its own: the loader must not advance the generator of dropout
