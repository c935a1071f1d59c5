"""Which words are masked: 15 % of an effective batch, whatever it is cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from data import IGNORED, IMDBDataset, pad
from suite.reviews.sampling import StepSampler


@dataclass
class Step:
    """What a process needs to know of an optimizer step."""

    rows: np.ndarray  # (windows,) of the whole effective batch
    micro_batches: list[np.ndarray]  # this process's
    seed: tuple[int, int, int]  # of the masks: the run's seed, the epoch and the step in it


class MaskingSampler(StepSampler):
    """A StepSampler that yields a `Step`, because masks are drawn for the whole effective batch."""

    def __iter__(self) -> Iterator[Step]:
        steps = zip(self.effective_batches()[self.first_step:], super().__iter__(), strict=True)
        for number, (rows, micro_batches) in enumerate(steps, start=self.first_step):
            yield Step(rows, micro_batches, (self.seed, self.epoch, number))


class MaskedWindows(IMDBDataset):
    """Windows of reviews, of which some tokens are masked by transformers' own rule: of the 15 % that are drawn, 80 %
    become the mask token, 10 % any token, and 10 % stay (Devlin et al. 2019).

    `windows`: their places in `offsets`; `ids` (windows,): the texts that they are of. With `seed`, the masks are
    always the same, for validation; else each `Step` has its own.
    """

    step_sampler = MaskingSampler

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

    def __getitem__(self, wanted: Step | np.ndarray) -> tuple[int, list[dict]] | dict[str, torch.Tensor]:
        """(the masked tokens of the whole effective batch, this process's micro-batches) of a step; for validation, the
        batch of the windows `wanted`."""
        if not isinstance(wanted, Step):
            return self._batch(wanted, *self.fixed)
        rows = np.sort(wanted.rows)
        input_ids, labels = self._mask(rows, *wanted.seed)
        return (int((labels != IGNORED).sum()),
                [self._batch(part, rows, input_ids, labels) for part in wanted.micro_batches])

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
