"""Which words are masked: 15 % of an effective batch, whatever it is cut into."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from data import IGNORED, IMDBDataset, Step, pad


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
