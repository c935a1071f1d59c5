#!/usr/bin/env bash
# fastembed 0.9.1 with tokenizers 0.23.3 (Python 3.11) reads the same tokenizer folder as transformers 5.23.0.
#
# Guess, written before the run: both cut a long text at `model_max_length` of tokenizer_config.json, the key that
# transformers documents for it. A key `max_length`, which the files of many sentence encoders carry from their training,
# is an old argument of a call, and nobody reads it.
# What happens: transformers reads it as little as guessed. fastembed cuts at the smaller of the two, without a word. So a
# model that was fine-tuned to read 256 tokens reads 128 there if its tokenizer still has its encoder's `max_length`.
#
# Output (2026-11-29):
#     transformers, with max_length 128     256 tokens
#     fastembed, with max_length 128        128 tokens
#     fastembed, without that key           256 tokens
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python3 -m venv "$folder/other"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 2>/dev/null
"$folder/other/bin/pip" install --quiet --disable-pip-version-check fastembed==0.9.1 tokenizers==0.23.3 2>/dev/null
cd "$folder"
cat > by_transformers.py <<'PYTHON'
import json

from transformers import AutoTokenizer, BertTokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] film".split()
with open("vocab.txt", "w") as file:
    file.write("\n".join(WORDS))
BertTokenizer("vocab.txt", model_max_length=256).save_pretrained("with")
with open("with/config.json", "w") as file:
    json.dump({"model_type": "bert", "pad_token_id": 0}, file)
with open("with/tokenizer_config.json") as file:
    config = json.load(file)
with open("with/tokenizer_config.json", "w") as file:
    json.dump(config | {"max_length": 128}, file)
print(len(AutoTokenizer.from_pretrained("with")("film " * 400, truncation=True)["input_ids"]))
PYTHON
cat > by_fastembed.py <<'PYTHON'
import sys
from pathlib import Path

from fastembed.common.preprocessor_utils import load_tokenizer

print(len(load_tokenizer(Path(sys.argv[1]))[0].encode("film " * 400).ids))
PYTHON
ours=$(HF_HUB_OFFLINE=1 venv/bin/python by_transformers.py 2>/dev/null)
cp -r with without
python3 - <<'PYTHON'
import json
with open("without/tokenizer_config.json") as file:
    config = json.load(file)
del config["max_length"]
with open("without/tokenizer_config.json", "w") as file:
    json.dump(config, file)
PYTHON
short=$(other/bin/python by_fastembed.py with)
long=$(other/bin/python by_fastembed.py without)
echo "transformers, with max_length 128     $ours tokens"
echo "fastembed, with max_length 128        $short tokens"
echo "fastembed, without that key           $long tokens"
[ "$ours $short $long" = "256 128 256" ]
