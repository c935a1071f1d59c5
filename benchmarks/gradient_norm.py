"""Does one optimizer step keep its gradient when its effective batch is cut into more and smaller micro-batches?

    python -m benchmarks.gradient_norm                      BERT and ModernBERT: ten seconds on a CPU, no network
    python -m benchmarks.gradient_norm --model modernbert   one of them

Every cut means the same step, on the mean loss over the same reviews, so the gradient's norm must not change. On tiny
classifiers of transformers with random weights, three norms are compared: of `torch.autograd.grad` of the mean loss
over the whole effective batch (the reference), in this suite's `train_step`, and in `transformers.Trainer`.

If a model's forward takes **kwargs, Trainer leaves the division of the loss by the number of micro-batches to it; in
transformers 5.23, BERT's and ModernBERT's classifiers take **kwargs and do not divide
(https://github.com/huggingface/transformers/issues/47688).
"""

import argparse
import copy
import tempfile
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import SGD, Optimizer
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.workload import bare_run
from data import IMDBDataset, Step
from main import train_step
from suite.common.devices import Devices
from suite.reviews.sampling import cut as cut_by_length
from utils import Config, TrainConfig

SEED, REVIEWS, LONGEST, VOCABULARY = 42, 64, 48, 100
CUTS = [(64, 1), (16, 4), (4, 16), (1, 64)]  # (micro-batch, steps), of REVIEWS reviews together
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": LONGEST, "pad_token_id": 0,
         **dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"))}  # not needed: None
# No dropout: its random numbers would differ from cut to cut. ModernBERT has none unless it is asked for.
CONFIGS = {"BERT": BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
           "ModernBERT": ModernBertConfig(**SIZES, local_attention=16)}


class SuiteModel(nn.Module):
    """A classifier of transformers that is called as the suite calls its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, labels: torch.Tensor, reduction: str, class_weights: torch.Tensor | None,
                **inputs: torch.Tensor) -> SequenceClassifierOutput:
        logits = self.model(**inputs).logits  # (batch, 2)
        return SequenceClassifierOutput(F.cross_entropy(logits, labels, class_weights, reduction=reduction), logits)


def random_reviews() -> IMDBDataset:
    """Token ids of ragged lengths, so that the cuts differ in their padding too."""
    random = np.random.default_rng(SEED)
    offsets = np.append(0, random.integers(4, LONGEST, size=REVIEWS, endpoint=True).cumsum())  # (reviews + 1,)
    tokens = random.integers(3, VOCABULARY, size=offsets[-1])  # (all tokens,)
    rows, labels = np.arange(REVIEWS), random.integers(2, size=REVIEWS)  # (reviews,)
    return IMDBDataset(tokens, offsets, rows, labels, rows, pad_token_id=0)


class TrainerDataset(torch.utils.data.Dataset):
    """The reviews in the batches that Trainer's loader asks for."""

    def __init__(self, reviews: IMDBDataset):
        self.reviews = reviews

    def __len__(self) -> int:
        return len(self.reviews)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.reviews.batch(np.array(rows))


def without_id(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "id"}


def applied_norm(take_step: Callable, model: nn.Module, reviews: IMDBDataset, cut: tuple[int, int]) -> float:
    """The norm of the gradient that the optimizer finds in a copy of `model` when `take_step` calls it."""
    model, norms = copy.deepcopy(model), []
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: norms.append(get_total_norm([p.grad for p in model.parameters()])))
    take_step(model, optimizer, reviews, cut)
    [norm] = norms  # one step and no more
    return norm.item()


def suite_step(model: nn.Module, optimizer: Optimizer, reviews: IMDBDataset, cut: tuple[int, int]) -> None:
    rows = np.arange(REVIEWS)
    rounds = cut_by_length(rows, reviews.lengths, cut[0], processes=1)
    devices = Devices(Config(train_config=TrainConfig(device="cpu", mixed_precision="no")))
    step = Step(rows, [reviews.batch(part) for part, in rounds], REVIEWS, REVIEWS)
    train_step(bare_run(SuiteModel(model), optimizer, devices), step)


def trainer_step(model: nn.Module, optimizer: Optimizer, reviews: IMDBDataset, cut: tuple[int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
            max_grad_norm=0.0, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)  # norm 0.0: no clipping
        trainer = Trainer(model, arguments, without_id, TrainerDataset(reviews), optimizers=(optimizer, None))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def describe(ratios: list[float]) -> str:
    """What the norms for CUTS, as multiples of the reference, amount to."""
    if np.allclose(ratios, 1, rtol=1e-3):
        return "right for every cut"
    if np.allclose(ratios, [steps for _, steps in CUTS], rtol=1e-2):
        return "N times too large for N steps"
    return f"wrong, at worst {max(ratios, key=lambda ratio: abs(ratio - 1)):.3g} times the reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name.lower() for name in CONFIGS], help="default: both")
    chosen = parser.parse_args().model
    torch.set_num_threads(1)
    reviews, findings = random_reviews(), {}
    print(f"gradient norm of one optimizer step on {REVIEWS} reviews, cut into micro-batch x steps\n"
          f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in [name for name in CONFIGS if chosen in (None, name.lower())]:
        torch.manual_seed(SEED)
        model = AutoModelForSequenceClassification.from_config(CONFIGS[name]).train()
        loss = model(**without_id(reviews.batch(np.arange(REVIEWS)))).loss
        reference = get_total_norm(torch.autograd.grad(loss, list(model.parameters()))).item()
        print(f"\n{name:10}  reference  this suite   Trainer  Trainer / reference")
        ratios = []  # (suite, Trainer) of each cut
        for cut in CUTS:
            suite, trainer = (applied_norm(step, model, reviews, cut) for step in (suite_step, trainer_step))
            ratios.append((suite / reference, trainer / reference))
            print(f"{cut[0]:4} x {cut[1]:<3}  {reference:9.4f}  {suite:10.4f}  {trainer:8.4f}  {ratios[-1][1]:19.4f}")
        suite, trainer = map(describe, zip(*ratios, strict=True))
        findings.setdefault(f"this suite's norm is {suite}, transformers.Trainer's is {trainer}", []).append(name)
    print("\nConclusion: " + "; ".join(f"for {' and '.join(names)}, {text}" for text, names in findings.items()) + ".")


if __name__ == "__main__":
    main()
