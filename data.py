"""From labelled reviews to batches: clean, split, tokenize once, and cut every epoch into optimizer steps.

    data = prepare_data(config)                                     # the three splits, the tokenizer, the classes
    loader = evaluation_loader(data, "valid", config, device)       # padded batches
    loader = train_loader(data, new_sampler(data, config), epoch, config, device)    # optimizer steps

The split depends on the reviews, their order, the order of their classes and `split_seed` alone; with a group column,
on none of these orders. The order of an epoch depends on the seed, the epoch and the effective batch size alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from suite.common.hub import cached
from suite.common.stopping import EXIT_CODES
from suite.common.storage import sum_of_files
from suite.encoders.loading import trained_texts
from suite.encoders.tokenizers import COMPARED_TEXTS, load_tokenizer
from suite.reviews.classes import name_rows
from suite.reviews.sampling import StepSampler, evaluation_batches
from suite.reviews.splitting import Split, data_record, load_split
from utils import Config, DataConfig, UserError, num_processes, process_rank, say

if TYPE_CHECKING:
    from datasets import Dataset

    from suite.reviews.sources import Part

CPU_TOKENS = 8192  # of a pass without a backward one, measured in benchmarks/README.md
IGNORED = -100  # the label of a review that is in a batch only to keep processes in step; cross-entropy skips it


def pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both (rows, tokens of the longest row) int64; the mask is 1 for real tokens."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(rows)
    return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))


def classes_of(labels: torch.Tensor) -> torch.Tensor:
    """(batch,) int64: the labels, or the most probable classes of targets (batch, num_labels), IGNORED for zeros."""
    return labels if labels.ndim == 1 else labels.argmax(dim=1).where(labels.any(dim=1), IGNORED)


class Step(NamedTuple):
    """An optimizer step on the mean over its effective batch, which all micro-batches of all processes form."""

    rows: np.ndarray  # (reviews,) of the effective batch
    micro_batches: list[dict[str, torch.Tensor]]  # this process's, see `IMDBDataset.batch`
    total_weight: float  # what the summed loss is divided by: the reviews, or the sum of the weights of their classes
    num_predictions: int  # of the effective batch: its reviews, or its masked words


class IMDBDataset(torch.utils.data.Dataset):
    """The tokenized reviews of one split, as flat arrays: nothing is looked up or padded review by review.

    All splits share `tokens` (tokens of all windows,), `offsets` (windows + 1,), `window_bounds` (reviews + 1,), the
    places of the reviews in `offsets` (None: each review is one window), and `texts`, the pooled data. A split has
    `rows` (n,), its places in `window_bounds`; `labels` (n,), the classes; and `ids` (n,), its rows in the pooled data.
    `class_weights`: (num_labels,) what a review of each class counts in the loss; None: all count the same. `targets`:
    (n, num_labels) float32, the probability of each class, with which the loss is taken in place of the labels.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray, labels: np.ndarray, ids: np.ndarray,
                 pad_token_id: int, has_token_types: bool = False, texts: Dataset | None = None,
                 window_bounds: np.ndarray | None = None, class_weights: np.ndarray | None = None,
                 targets: np.ndarray | None = None):
        window_bounds = np.arange(len(offsets)) if window_bounds is None else window_bounds
        self.tokens, self.offsets, self.labels, self.ids, self.texts = tokens, offsets, labels, ids, texts
        self.first_windows, self.windows = window_bounds[rows], window_bounds[rows + 1] - window_bounds[rows]
        self.lengths = self.window_lengths(self.first_windows)  # (n,) tokens of each review's first window, its longest
        self.pad_token_id, self.has_token_types = pad_token_id, has_token_types
        self.class_weights, self.targets = class_weights, targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """One review: `input_ids` (tokens,), `labels` () and `id` (); its windows, if it has several, as in `batch`."""
        return {name: values[0] if len(values) == 1 else values for name, values in self.batch(np.array([row])).items()}

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The padded batch of the reviews `rows` (batch,).

        It holds `input_ids`, `attention_mask` where anything is padded, and `token_type_ids` where the encoder takes
        them, all (windows of these reviews, longest); `labels` and `id`: (batch,); and where a review is more than one
        window, `windows`: (batch,), how many each one is; all int64. With targets, these are the `labels`: (batch,
        num_labels) float32. A row ~i stands for review i with the label IGNORED, or a target of zeros, and the id -1:
        it is there only to keep processes in step.
        """
        ignored = rows < 0
        rows = np.where(ignored, ~rows, rows)
        places = self.windows_of(rows)
        bounds = zip(self.offsets[places], self.offsets[places + 1], strict=True)
        input_ids, mask = pad([self.tokens[start:stop] for start, stop in bounds], self.pad_token_id)
        labels = (np.where(ignored, IGNORED, self.labels[rows]) if self.targets is None
                  else np.where(ignored[:, None], np.float32(0), self.targets[rows]))
        batch = {"input_ids": input_ids, "labels": torch.from_numpy(labels),
                 "id": torch.from_numpy(np.where(ignored, -1, self.ids[rows]))}
        if not mask.all():  # attention without a mask is faster
            batch["attention_mask"] = mask
        if self.has_token_types:
            batch["token_type_ids"] = torch.zeros_like(input_ids)
        if len(places) > len(rows):
            batch["windows"] = torch.from_numpy(self.windows[rows])
        return batch

    def step(self, rows: np.ndarray, micro_batches: list[np.ndarray], seed: tuple[int, ...]) -> Step:
        """This process's part, `micro_batches`, of the optimizer step on the reviews `rows`. `seed`: of what is drawn
        for this step; nothing is, here."""
        weight = len(rows) if self.class_weights is None else self.class_weights[self.labels[rows]].sum()
        return Step(rows, list(map(self.batch, micro_batches)), float(weight), len(rows))

    def windows_of(self, rows: np.ndarray) -> np.ndarray:
        """(windows,) the places in `offsets` of all windows of the reviews `rows`, one review after the other."""
        counts = self.windows[rows]
        return np.repeat(self.first_windows[rows] - (counts.cumsum() - counts), counts) + np.arange(counts.sum())

    def window_lengths(self, places: np.ndarray) -> np.ndarray:
        """The tokens of the windows at these places in `offsets`; same shape."""
        return self.offsets[places + 1] - self.offsets[places]

    def text(self, review_id: int) -> str:
        """The review whose `id` this is."""
        return self.texts[int(review_id)]["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenize


def truncate(tokens: list[int], room: int, truncation: str, max_windows: int = 1) -> list[list[int]]:
    """The windows of a review, of at most `room` tokens each.

    There is one, with the head of the review, its tail, or half from each end (Sun et al. 2019). With "windows" there
    are as few as the whole review needs, of equal lengths but for one token, the longest first. If these are more than
    `max_windows`, so many full ones are left, half of them from each end.
    """
    count = min(-(-len(tokens) // room), max_windows) or 1 if truncation == "windows" else 1
    if len(tokens) > count * room:
        head = {"head": room, "tail": 0, "head_tail": room // 2, "windows": -(-count // 2) * room}[truncation]
        tokens = tokens[:head] + tokens[len(tokens) - (count * room - head):]
    size, longer = divmod(len(tokens), count)
    bounds = [place * size + min(place, longer) for place in range(count + 1)]
    return [tokens[start:stop] for start, stop in itertools.pairwise(bounds)]


class Encode:
    """Texts to windows of token ids with the special tokens around them; a function for `datasets.map`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_len: int, truncation: str, max_windows: int = 1):
        self.tokenizer, self.max_len, self.truncation, self.max_windows = tokenizer, max_len, truncation, max_windows
        # What the tokenizer puts around a text, [CLS] and [SEP] for BERT, found by encoding one known text.
        content = self._tokens(["a"])[0]
        whole = tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i:i + len(content)] == content)
        self.prefix, self.suffix = whole[:start], whole[start + len(content):]
        self.room = max_len - len(self.prefix) - len(self.suffix)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False,
                              return_token_type_ids=False, verbose=False)["input_ids"]

    def windows(self, texts: list[str]) -> list[list[list[int]]]:
        """The token ids of each window of each text."""
        return [[self.prefix + window + self.suffix
                 for window in truncate(tokens, self.room, self.truncation, self.max_windows)]
                for tokens in self._tokens(texts)]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """`input_ids`: the windows of each text, one after the other; `lengths`: their tokens."""
        windows = self.windows(batch["text"])
        return {"input_ids": [list(itertools.chain.from_iterable(of_text)) for of_text in windows],
                "lengths": [list(map(len, of_text)) for of_text in windows]}

    def fingerprint(self, digests: np.ndarray) -> str:
        """The name of the cached result: the same for the same reviews, tokenizer and lengths, in any process."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        own = backend.to_str() if backend else sum_of_saved(self.tokenizer)
        parts = (digests.tobytes(), own, self.prefix, self.suffix, self.room, self.truncation, self.max_windows)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def sum_of_saved(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sum of all files that a tokenizer saves: its vocabulary, merges and settings."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum_of_files(Path(folder), Path(folder).iterdir())


def tokenize(table: Dataset, rows: np.ndarray, digests: np.ndarray, encode: Encode, parts: list[Part]
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens (total,) int32 of these `rows` (n,) of `table`, the offsets of the windows in them (windows + 1,), and
    those of the rows in the windows (n + 1,), from the library's cache.

    `digests`: of all rows of the table; `parts`: what it was pooled from. Raises UserError, which counts them, for
    texts without a token: a tokenizer that puts none around a text can leave nothing of it.
    """
    from datasets import Features, List, Value  # here, because labelling does not need it

    table, fingerprint = table.select(rows), encode.fingerprint(digests[rows])
    tokenized = cached(f"windows-{fingerprint}", lambda folder: table.map(
        encode, batched=True, remove_columns=table.column_names, desc="tokenizing", new_fingerprint=fingerprint,
        features=Features({"input_ids": List(Value("int32")), "lengths": List(Value("int32"))}),
        cache_file_name=str(folder / "tokens.arrow")))
    tokens, lengths = (tokenized.data.column(name).combine_chunks() for name in ("input_ids", "lengths"))
    offsets = np.concatenate([[0], lengths.values.to_numpy().cumsum(dtype=np.int64)])
    if len(empty := rows[np.diff(tokens.offsets) == 0]):
        other = "or take a model whose tokenizer puts tokens such as [CLS] around a text"
        raise UserError(name_rows(parts, empty, f"gives no token: remove it, {other}",
                                  f"give no token: remove them, {other}"))
    return tokens.values.to_numpy(), offsets, lengths.offsets.to_numpy().astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# All of a run's data


@dataclass
class PreparedData:
    splits: dict[str, IMDBDataset]
    tokenizer: PreTrainedTokenizerBase
    label_names: list[str]
    fingerprint: str  # of the reviews, their labels and the split
    held_out: np.ndarray  # of 16 bytes: the digests of the texts, and groups, that validate and test
    digests: np.ndarray  # the same of what is trained on here, and of what the model was trained on before
    units: np.ndarray | None = None  # see `Split`

    def text(self, review_id: int) -> str:
        """The review whose `id` this is."""
        return self.splits["train"].text(review_id)

    @property
    def record(self) -> dict[str, Any]:
        """See `data_record`."""
        return data_record(len(self.splits["train"]), self.held_out)


def prepare_data(config: Config, trained_model: str | None = None, split: Split | None = None) -> PreparedData:
    """Load, clean, split and tokenize, once for all three splits.

    `trained_model`: the folder whose tokenizer is used; None means the encoder of the configuration. `split`: what
    `load_split` gave; None loads it.
    """
    data_config, split = config.data_config, split or load_split(config)
    reviews, ids_of = split.reviews, split.ids_of
    for part in () if config.train_config.teacher else reviews.unlabelled:  # a student has learnt from them
        say(f"{part.place}: the split {part.split} has no labels and is not used ({len(part.table):,} rows)")
    seen = split.digests_of("train")
    if trained_model is None:
        seen = np.union1d(seen, trained_texts(config.model_config, split.held_out_anywhere))
        tokenizer = load_tokenizer(config.model_config.model_name, line_breaks=data_config.line_breaks,
                                   texts=reviews.table[:COMPARED_TEXTS]["text"])
    else:
        tokenizer = load_tokenizer(trained_model)  # it was saved with its rule for line breaks
    metric, valid_labels = config.train_config.best_metric, reviews.labels[ids_of["valid"]]
    missing = np.setdiff1d(np.arange(len(reviews.label_names)), valid_labels)
    if metric in ("mcc", "roc_auc", "average_precision") and len(missing):
        raise UserError(f"train_config.best_metric is {metric}, but no validation review has the class "
                        f"{reviews.label_names[missing[0]]!r}: set train_config.best_metric=accuracy, or change "
                        "data_config.split")
    encode = Encode(tokenizer, data_config.max_len, data_config.truncation, data_config.max_windows)
    if trained_model is None and config.model_config.pooling == "cls" and not encode.prefix:
        raise UserError(f"model_config.pooling is cls, but the tokenizer of {config.model_config.model_name} puts no "
                        "token before a text, and the first word would stand for it: set model_config.pooling=mean")
    used = np.sort(np.concatenate(list(ids_of.values())))  # with a limit, only these rows are tokenized
    tokens, offsets, window_bounds = tokenize(reviews.table, used, split.digests, encode, reviews.parts)
    class_weights = None
    if config.train_config.class_weights == "balanced":  # their sum over all training reviews is the number of these
        counts = np.bincount(reviews.labels[ids_of["train"]], minlength=len(reviews.label_names))
        class_weights = counts.sum() / (len(counts) * counts)
    splits = {name: IMDBDataset(tokens, offsets, np.searchsorted(used, ids), reviews.labels[ids], ids,
                                tokenizer.pad_token_id, "token_type_ids" in tokenizer.model_input_names, reviews.table,
                                window_bounds, class_weights) for name, ids in ids_of.items()}
    return PreparedData(splits, tokenizer, reviews.label_names, split.fingerprint, split.held_out, seen, split.units)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


def new_sampler(data: PreparedData, config: Config, pass_tokens: float = math.inf) -> StepSampler:
    """How training is divided into optimizer steps. `pass_tokens`: what one more pass costs, in tokens."""
    dataset, train_config = data.splits["train"], config.train_config
    return StepSampler(dataset.lengths, train_config.effective_batch_size, config.data_config.batch_size,
                       train_config.seed, process_rank(), num_processes(), pass_tokens, dataset.windows)


def train_loader(data: PreparedData, sampler: StepSampler, epoch: int, config: Config, device: torch.device,
                 first_step: int = 0) -> DataLoader:
    """Yields each `Step` of the epoch from `first_step` on."""
    steps = list(enumerate(sampler.effective_batches(epoch)))[first_step:]
    return _loader(steps, functools.partial(_step, data.splits["train"], sampler, epoch), config, device)


def _step(dataset: IMDBDataset, sampler: StepSampler, epoch: int, step: tuple[int, np.ndarray]) -> Step:
    number, rows = step
    return dataset.step(rows, sampler.micro_batches(rows), (sampler.seed, epoch, number))


def evaluation_loader(data: PreparedData, split: str, config: Config, device: torch.device,
                      pass_tokens: float = math.inf) -> DataLoader:
    """Yields this process's share of a split in padded batches. Its `dataset` is the reviews of each batch.
    `pass_tokens`: what one more pass costs, in tokens."""
    dataset, windows = data.splits[split], eval_batch_size(config.data_config, device, config.data_config.max_len)
    batches = evaluation_batches(dataset.lengths, windows, process_rank(), num_processes(), pass_tokens,
                                 dataset.windows)
    return _loader(batches, dataset.batch, config, device)


def _loader(parts: list, make: Callable[[Any], Any], config: Config, device: torch.device) -> DataLoader:
    """Yields `make(part)` of each part, in their order; the workers make them ahead."""
    return DataLoader(parts, batch_size=None, collate_fn=make, num_workers=config.data_config.num_workers,
                      pin_memory=device.type == "cuda", worker_init_fn=_ignore_signals,
                      generator=torch.Generator())  # its own: the loader must not advance the generator of dropout


def eval_batch_size(data_config: DataConfig, device: torch.device, max_len: int) -> int:
    """Windows of up to `max_len` tokens in a forward pass without a backward one. On a CPU they have at most CPU_TOKENS
    together: larger passes overflow its caches."""
    size = data_config.eval_batch_size
    return min(size, max(1, CPU_TOKENS // max_len)) if device.type == "cpu" else size


def _ignore_signals(worker: int) -> None:
    """A signal to the whole job is for the process that trains: it stops its loaders when the state is saved."""
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
