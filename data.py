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
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from suite.common.stopping import EXIT_CODES
from suite.encoders.loading import load_tokenizer
from suite.reviews.sampling import LengthSampler, WindowSampler
from suite.reviews.sources import load_reviews
from suite.reviews.splitting import refuse_contradictions, split_reviews, text_digests
from suite.training.devices import pick_device
from utils import num_processes, process_rank

CPU_BATCH = 64
IGNORED = -100  # the label of a review that is in a batch only to keep processes in step; cross-entropy skips it


def pad(rows: list, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of sequences of token ids: (batch, longest) int64 each."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(rows)
    return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))


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
