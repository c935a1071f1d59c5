#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1, Python 3.11): load_dataset on a folder that save_to_disk has written.
#
# load_from_disk is made for such a folder, but load_dataset takes it, too, and gives the right rows at first.
#
# Guess, written before the run: it goes on giving the right rows, since state.json lists the files of the data; or it
# refuses the folder and names load_from_disk.
# What happens: `map` leaves its result beside the data as cache-*.arrow, and load_dataset reads every .arrow file. From
# then on each split has the rows of before and those of after, twice as many. Whoever pools the splits and draws a
# test set has lower-cased copies of its texts in training, which no search for equal texts finds.
#
# Output (2026-11-29):
#     saved             {'train': 8, 'test': 2}
#     loaded            {'train': 8, 'test': 2}
#     after one map     {'train': 16, 'test': 4}
#     test              ['test film 0', 'test film 1', 'test Film 0', 'test Film 1']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

datasets.disable_progress_bars()


def lower(row):
    return {"text": row["text"].lower()}


def counts(tables):
    return {split: len(table) for split, table in tables.items()}


tables = DatasetDict({split: Dataset.from_dict({"text": [f"{split} Film {row}" for row in range(rows)]})
                      for split, rows in (("train", 8), ("test", 2))})
tables.save_to_disk("saved")
before = load_dataset("saved", cache_dir="first")
load_from_disk("saved").map(lower)
after = load_dataset("saved", cache_dir="second")
print("saved            ", counts(tables))
print("loaded           ", counts(before))
print("after one map    ", counts(after))
print("test             ", after["test"]["text"][:])
assert counts(tables) == counts(before) == counts(load_from_disk("saved")) == {"train": 8, "test": 2}
assert counts(after) == {"train": 16, "test": 4}
assert sorted(after["test"]["text"][:]) == ["test Film 0", "test Film 1", "test film 0", "test film 1"]
PYTHON
