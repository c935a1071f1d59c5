#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1, Python 3.11): a JSON column of texts in which one value is a number.
#
# Guess, written before the run: the column becomes texts, the number as "0"; or an error names the mixed types.
# What happens: the column gets the type Json, and each of its texts is read as JSON once more. "007" comes back as 7,
# "null" as None, "true" as True, and "[1]" as a list. Texts that are no JSON stay. With .json and .jsonl alike, and
# no message says so. The same file without the number keeps every text as it is.
#
# Output (2026-11-29):
#     texts alone        string  ['007', 'null', 'true', '[1]', 'a film']
#     and a number       Json    [7, None, True, [1], 'a film', 0]
#     as JSON Lines      Json    [7, None, True, [1], 'a film', 0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import datasets

datasets.disable_progress_bars()
TEXTS = ["007", "null", "true", "[1]", "a film"]
READ_AGAIN = [7, None, True, [1], "a film", 0]


def read(name, rows):
    records = [{"text": value} for value in rows]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    Path(name).write_text(lines if name.endswith(".jsonl") else json.dumps(records))
    return datasets.load_dataset("json", data_files=name)["train"]


for title, name, rows, kind, expected in (
        ("texts alone", "texts.json", TEXTS, "string", TEXTS),
        ("and a number", "mixed.json", [*TEXTS, 0], "Json", READ_AGAIN),
        ("as JSON Lines", "mixed.jsonl", [*TEXTS, 0], "Json", READ_AGAIN)):
    table = read(name, rows)
    feature = table.features["text"]
    found = getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__
    print(f"{title:18} {found:7} {table['text'][:]}")
    assert (found, table["text"][:]) == (kind, expected), title
PYTHON
