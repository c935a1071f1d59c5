#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1, Python 3.11): two Parquet files that declare the same classes in another order.
#
# Each file is right by itself: its own metadata say that 0 is `bad` in train.parquet and `good` in test.parquet.
#
# Guess, written before the run: load_dataset refuses the folder, as concatenate_datasets refuses the two tables, or
# it maps the numbers to one order.
# What happens: load_dataset takes the order of one file for all of them and leaves the numbers as they are. Every label
# of the other file then means the other class, between splits and between the shards of one split, without an
# error or a warning. A test set turned round like this gives one minus the accuracy.
#
# Output (2026-11-29):
#     written  train: bad good bad good          test: bad good bad good
#     loaded   train: bad good bad good          test: good bad good bad
#     loaded   two shards of one split: bad good bad good good bad good bad
#     concatenate_datasets: ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import datasets
from datasets import ClassLabel, Dataset, Value, concatenate_datasets, load_dataset

datasets.disable_progress_bars()
LABELS = ["bad", "good", "bad", "good"]


def table(names):
    written = Dataset.from_dict({"text": [f"review {row}" for row in range(4)], "label": LABELS})
    return written.cast_column("label", ClassLabel(names=names))


def labels(loaded):
    return [loaded.features["label"].int2str(number) for number in loaded["label"]]


tables = table(["bad", "good"]), table(["good", "bad"])
assert [labels(one) for one in tables] == [LABELS, LABELS]
for one, split, shard in zip(tables, ("train", "test"), ("train-00000-of-00002", "train-00001-of-00002")):
    one.to_parquet(f"splits/{split}.parquet")
    one.to_parquet(f"shards/{shard}.parquet")
splits, shards = load_dataset("splits"), load_dataset("shards")["train"]
print("written ", "         ".join(f"train: {' '.join(LABELS)}".replace("train", name) for name in ("train", "test")))
print("loaded  ", "         ".join(f"{name}: {' '.join(labels(splits[name]))}" for name in ("train", "test")))
print("loaded   two shards of one split:", *labels(shards))
try:
    concatenate_datasets(list(tables))
    refused = "no error"
except ValueError as error:
    refused = type(error).__name__
print("concatenate_datasets:", refused)
assert labels(splits["train"]) == LABELS
assert labels(splits["test"]) == ["good", "bad", "good", "bad"]
assert labels(shards) == [*LABELS, "good", "bad", "good", "bad"]
assert refused == "ValueError"
PYTHON
