"""Further pretraining: the run of main.py's loop with masked words for labels, and windows of all texts for reviews."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedConfig, PreTrainedTokenizerBase

from data import IGNORED, Encode, IMDBDataset, PreparedData, Step, pad, tokenize
from suite.common.devices import Devices
from suite.common.pages import write_pretrained_card
from suite.encoders.evaluation_pass import packed_layers
from suite.encoders.loading import PRETRAINED_TEXTS, trained_texts
from suite.encoders.masked_lm import new_masked_lm
from suite.encoders.placement import to_device
from suite.encoders.tokenizers import COMPARED_TEXTS, load_tokenizer
from suite.reviews.grouping import draw_units
from suite.reviews.splitting import fingerprint, load_split
from suite.reviews.unlabelled import each_text_once, with_unlabelled
from suite.training.run import Run
from suite.training.tracking import watched
from utils import Config, DataConfig, UserError, say

# ---------------------------------------------------------------------------------------------------------------------
# The texts: training reviews and unlabelled ones, never one that validates or tests


VALID_SHARE, MOST_VALID = 0.05, 1000  # of the texts. A thousand give the loss to within about 0.01 nats


def prepare_texts(config: Config) -> PreparedData:
    """Load the reviews, labelled or not, leave out those that validate or test, and cut the others into windows.

    The splits are `train` and `valid`, a row of them is a window, and `digests` are those of both, and of their groups.
    """
    data_config, name = config.data_config, config.model_config.model_name
    labelled = load_split(config)
    split = with_unlabelled(labelled)
    table, digests, groups = split.reviews.table, split.digests, split.groups
    train, valid = choose(split.ids_of["train"], np.arange(len(labelled.digests), len(table)), digests, split.held_out,
                          data_config, groups)
    seen = trained_texts(config.model_config, split.held_out_anywhere)
    tokenizer = load_tokenizer(name, line_breaks=data_config.line_breaks, texts=table[:COMPARED_TEXTS]["text"])
    if tokenizer.mask_token is None:
        raise UserError(f"model_config.model_name: the tokenizer of {name} has no mask token: take a model that was "
                        "pretrained with one, such as bert-base-uncased")
    used = np.sort(np.concatenate([train, valid]))
    encode = Encode(tokenizer, data_config.max_len, "windows", max_windows=sys.maxsize)
    tokens, offsets, window_bounds = tokenize(table, used, digests, encode, split.reviews.parts)
    text_of = np.repeat(used, np.diff(window_bounds))  # (windows,)
    splits = {}
    for name_of_split, ids, seed in (("train", train, None), ("valid", valid, data_config.split_seed)):
        windows = np.flatnonzero(np.isin(text_of, ids))
        splits[name_of_split] = MaskedWindows(tokens, offsets, windows, text_of[windows], tokenizer, seed)
    if not len(splits["valid"].batch(np.arange(len(splits["valid"])))["labels"]):
        raise UserError(f"{data_config.dataset}: {len(valid)} texts to validate on are too few, none of their words is "
                        "masked: raise data_config.limit or add texts")
    if groups is not None:
        seen = np.union1d(groups[used], seen)
    return PreparedData(splits, tokenizer, ["no class"], fingerprint(digests[used], train, valid), split.held_out,
                        np.union1d(digests[used], seen))


def choose(labelled: np.ndarray, unlabelled: np.ndarray, digests: np.ndarray, held_out: np.ndarray,
           data_config: DataConfig, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows to validate on), both ascending, of what `each_text_once` gives; with `groups`, no group
    is in both."""
    rows, units = each_text_once(labelled, unlabelled, digests, held_out, data_config, groups)
    is_labelled = np.isin(rows, labelled)
    say(f"{data_config.dataset}: {is_labelled.sum():,} training reviews and {len(rows) - is_labelled.sum():,} "
        "unlabelled ones to pretrain on")
    valid = max(1, min(round(VALID_SHARE * len(rows)), MOST_VALID))
    if groups is None:
        return np.sort(rows[valid:]), np.sort(rows[:valid])
    shares = (1 - valid / len(rows), valid / len(rows))
    parts = draw_units(units[rows], np.zeros_like(rows), shares, data_config.split_seed)
    return np.sort(rows[parts == 0]), np.sort(rows[parts == 1])


# ---------------------------------------------------------------------------------------------------------------------
# Which words are masked: 15 % of an effective batch, whatever it is cut into


class MaskedWindows(IMDBDataset):
    """Windows of reviews, of which some tokens are masked by transformers' own rule: of the 15 % that are drawn, 80 %
    become the mask token, 10 % any token, and 10 % stay (Devlin et al. 2019).

    `windows`: their places in `offsets`; `ids` (windows,): the texts that they are of. With `seed`, the masks are
    always the same, for validation; else each step has its own.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, windows: np.ndarray, ids: np.ndarray,
                 tokenizer: PreTrainedTokenizerBase, seed: int | None = None):
        has_token_types = "token_type_ids" in tokenizer.model_input_names
        super().__init__(tokens, offsets, windows, np.zeros_like(windows), ids, tokenizer.pad_token_id, has_token_types)
        self.collator = DataCollatorForLanguageModeling(tokenizer)
        self.special = torch.tensor(tokenizer.all_special_ids)  # never masked, padding among them
        self.fixed = None if seed is None else (np.arange(len(self)), *self._mask(np.arange(len(self)), seed))

    def _mask(self, rows: np.ndarray, *seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels) of these windows, both (rows, longest) int64; a label is IGNORED where none is masked."""
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        self.collator.generator = torch.Generator().manual_seed(int(state))
        input_ids, _ = pad([self.tokens[self.offsets[place]:self.offsets[place + 1]]
                            for place in self.windows_of(rows)], self.pad_token_id)
        return self.collator.torch_mask_tokens(input_ids, special_tokens_mask=torch.isin(input_ids, self.special))

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return self._batch(rows, *self.fixed)

    def step(self, rows: np.ndarray, micro_batches: list[np.ndarray], seed: tuple[int, ...]) -> Step:
        """The masks are drawn for the whole effective batch, whatever it is cut into."""
        ascending = np.sort(rows)
        input_ids, labels = self._mask(ascending, *seed)
        masked = max(1, int((labels != IGNORED).sum()))  # a last effective batch of one short window may have none
        return Step(rows, [self._batch(part, ascending, input_ids, labels) for part in micro_batches], masked, masked)

    def _batch(self, part: np.ndarray, rows: np.ndarray, input_ids: torch.Tensor, labels: torch.Tensor
               ) -> dict[str, torch.Tensor]:
        """What `MaskedLanguageModel` reads: the windows `part`, taken from the masked `rows`, which are ascending.

        A negative one ~i stands for window i without any masked token: it keeps processes in step.
        """
        ignored = part < 0
        part = np.where(ignored, ~part, part)
        places, lengths = np.searchsorted(rows, part), torch.from_numpy(self.lengths[part])
        input_ids, labels = (matrix[places, :lengths.max()] for matrix in (input_ids, labels))
        labels[ignored] = IGNORED
        masked = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        batch = {"input_ids": input_ids, "masked": masked, "labels": labels.flatten()[masked],
                 "id": torch.from_numpy(self.ids[part])}
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        if not mask.all():  # attention without a mask is faster
            batch["attention_mask"] = mask.long()
        if self.has_token_types:
            batch["token_type_ids"] = torch.zeros_like(input_ids)
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# The run


def metrics_of(sums: np.ndarray) -> dict[str, Any]:
    """`sums`: what `evaluate_masked` returns."""
    loss, hits, count = sums
    return {"loss": loss / count, "perplexity": math.exp(min(loss / count, 700)), "accuracy": hits / count,
            "n": int(count)}


@torch.inference_mode()
def evaluate_masked(model: nn.Module, loader: DataLoader, devices: Devices, name: str) -> np.ndarray:
    """[summed loss, hits, number] of the masked tokens of a split, over all processes; float64.

    Raises StopRequested between batches.
    """
    model.eval()
    sums = []  # on the device, because reading them would wait for each batch
    with packed_layers(devices.unwrap(model), devices):
        for batch in watched(loader, devices, name):
            _, labels, inputs = to_device(batch, devices.device)
            with devices.autocast():
                output = model(**inputs, labels=labels, reduction="sum")
            hits = (output.logits.argmax(dim=1) == labels).sum()
            sums.append(torch.stack([output.loss, hits, torch.tensor(len(labels), device=devices.device)]))
    model.train()
    found, = devices.gather(torch.stack(sums).cpu().double().numpy())
    return found.sum(axis=0)


class PretrainingRun(Run):
    unit = "windows"
    prepare_data, metrics_of = staticmethod(prepare_texts), staticmethod(metrics_of)
    evaluate = staticmethod(evaluate_masked)

    @staticmethod
    def new_model(config: Config, encoder_config: PreTrainedConfig, data: PreparedData) -> nn.Module:
        return new_masked_lm(config.model_config, encoder_config)

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.devices.unwrap(self.model).save(folder, weights, self.data.tokenizer)
        np.save(folder / PRETRAINED_TEXTS, self.data.digests)
        write_pretrained_card(folder, self.config, self.progress.best_metrics, self.progress.step)

    def write_predictions(self, predictions: np.ndarray) -> None:
        pass  # there is no review to predict
