"""What the benchmarks train: encoders of real shapes with random weights, on random words as long as IMDB's reviews."""

from __future__ import annotations

import argparse
import csv
import io
import os
import tempfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from utils import PROJECT, Config, load_config

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig

    from suite.training.run import Run

SMALL = {"hidden_size": 384, "num_hidden_layers": 6}
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
# ModernBERT's small shape alternates its attention as the base shape does: every third layer is global.
SHAPES = {"minilm": ("bert", {**SMALL, "num_attention_heads": 12, "intermediate_size": 1536}),
          "modernbert-small": ("modernbert", {**SMALL, "num_attention_heads": 6, "intermediate_size": 576}),
          "bert-base": ("bert", {}), "modernbert-base": ("modernbert", {}),
          # To see that a benchmark runs, in seconds; its figures mean nothing.
          "bert-tiny": ("bert", {**TINY, "num_hidden_layers": 2}),
          "modernbert-tiny": ("modernbert", {**TINY, "num_hidden_layers": 4})}
WARM_UP_STEPS = 2
EVALUATED = 1 / 3  # reviews, as a share of those that are trained on
LOG_MEAN, LOG_STD = 5.53, 0.65  # of the lengths of IMDB's reviews in BERT's tokens, fitted to every fifth of train
MEGA_BATCH = 50  # batches among which transformers' group_by_length sorts, where there are four times as many


def new_parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """A parser with --shape and, for each of the `defaults`, an option --NAME that takes a number."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    return parser


@contextmanager
def workload(shape: str, reviews: int, batch: int | None = None):
    """A folder with an encoder of this shape and with reviews, of which `config_for` trains on the given number.

    With a `batch`, reviews that are grouped by length pad each other as little as they do among IMDB's 40,000: see
    `grouped_lengths`.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        from transformers import AutoTokenizer

        from suite.common.hub import quiet_libraries

        quiet_libraries()
        work = Path(folder)
        write_encoder(work / "encoder", shape)
        tokenizer = AutoTokenizer.from_pretrained(work / "encoder")
        (work / "reviews").mkdir()
        for seed, (name, share) in enumerate({"train": 1, "validation": EVALUATED, "test": EVALUATED}.items()):
            lengths = (grouped_lengths(reviews, batch) if name == "train" and batch
                       else random_lengths(round(reviews * share), seed))
            write_reviews(work / "reviews" / f"{name}.csv", lengths, tokenizer, seed)
        yield work


def encoder_config(shape: str, **more: int) -> PreTrainedConfig:
    from transformers import BertConfig, ModernBertConfig

    kind, sizes = SHAPES[shape]
    return {"bert": BertConfig, "modernbert": ModernBertConfig}[kind](**sizes, **more)


def write_encoder(folder: Path, shape: str) -> None:
    """config.json of the shape, and the demo's tokenizer, whose tokens are a part of the encoder's vocabulary."""
    from transformers import AutoTokenizer

    kind, _ = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo" / kind)
    special = {"pad_token_id": tokenizer.pad_token_id}
    if kind == "modernbert":
        special |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id,
                    "bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    encoder_config(shape, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_lengths(count: int, seed: int = 0) -> np.ndarray:
    """(count,) tokens of reviews, distributed like IMDB's."""
    import numpy as np

    return as_lengths(np.random.default_rng(seed).normal(size=count))


def grouped_lengths(count: int, batch: int) -> np.ndarray:
    """The same of `count` reviews that are some batches of a mega-batch: of 50 batches between which the reviews are
    divided by length, so many at equal distances, in random order. So few reviews, drawn one by one, would differ more
    within a batch of similar lengths than in a real run, and be padded more."""
    import numpy as np
    from scipy.stats import norm

    random, groups = np.random.default_rng(0), max(1, round(count / batch))
    centers = (np.arange(count) * groups // count + 0.5) / groups
    return as_lengths(norm.ppf(random.permutation(centers + random.uniform(-0.5, 0.5, count) / MEGA_BATCH)))


def as_lengths(normal: np.ndarray) -> np.ndarray:
    """Lengths, with [CLS] and [SEP], that stand where these values stand among normal ones."""
    import numpy as np

    return np.maximum(np.exp(LOG_MEAN + LOG_STD * normal).astype(int), 10)


def write_reviews(path: Path, lengths: np.ndarray, tokenizer: Any, seed: int = 0) -> None:
    """Reviews of random words that are one token each, of so many tokens with [CLS] and [SEP]."""
    import numpy as np

    random = np.random.default_rng([seed, 1])
    vocabulary = {token.removeprefix("\u0120") for token in tokenizer.get_vocab()}  # byte-level BPE's mark of a space
    words = np.array([word for word in sorted(vocabulary) if word.isalpha() and word.islower()
                      and len(tokenizer.tokenize(f"a {word}")) == 1 + len(tokenizer.tokenize("a"))])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number, length in enumerate(lengths):
            writer.writerow([" ".join(random.choice(words, length - 2)), number % 2])


def config_for(work: Path, tokens: int, batch: int, *more: str) -> Config:
    """The suite's configuration for this workload, with the defaults of config.yaml."""
    return load_config(PROJECT / "config.yaml", overrides_for(work, tokens, batch, *more))


def overrides_for(work: Path, tokens: int, batch: int, *more: str) -> list[str]:
    return [
        f"output_dir={work / 'runs'}", f"model_config.model_name={work / 'encoder'}", "model_config.pretrained=false",
        f"data_config.dataset={work / 'reviews'}", "data_config.split=official", f"data_config.max_len={tokens}",
        f"data_config.batch_size={batch}", "log_config.wandb_mode=disabled", *more]


def train_again(run: Run, epochs: int = 1, steps: int | None = None) -> float:
    """Seconds of some more epochs, or of the first steps of one, by main.py's loop without validation and saving."""
    import main
    from suite.training.meter import Meter
    from suite.training.states import Progress

    run.progress, run.meter = Progress(run.data.fingerprint, run.devices.kind), Meter(run.model, run.devices)
    run.total_steps = steps or epochs * run.steps_per_epoch

    def after_epoch(predictions: Any) -> None:
        run.progress.epoch, run.progress.steps_in_epoch = run.progress.epoch + 1, 0

    with (redirect_stdout(io.StringIO()), mock.patch.object(main, "evaluate"),
          mock.patch.object(run, "after_epoch", after_epoch),
          mock.patch.object(run, "_is_time_to_save", return_value=False)):
        main.train(run)
    return run.meter.seconds


def bare_run(model: Any, optimizer: Any, devices: Any) -> SimpleNamespace:
    """What `train_step` reads of a run: a constant learning rate, no clipping, no class weights, no average."""
    import torch

    from suite.training.optimization import AveragedWeights

    return SimpleNamespace(model=model, optimizer=optimizer, devices=devices, class_weights=None, config=Config(),
                           scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
                           average=AveragedWeights(model, devices, decay=None))


def describe_machine() -> str:
    import torch
    import transformers

    from suite.common.devices import Devices

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{Devices(Config())}, {name}, torch {torch.__version__}, transformers {transformers.__version__}"
