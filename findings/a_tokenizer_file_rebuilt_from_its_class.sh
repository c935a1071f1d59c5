#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3 (Python 3.11): a tokenizer.json with a normalizer of its own, and a
# tokenizer_config.json that names the class BertTokenizer.
#
# Guess, written before the run: tokenizer.json is the whole tokenizer, so AutoTokenizer reads texts as
# tokenizers.Tokenizer.from_file does, whatever class is named. In the 4.x versions the fast class was the file.
# What happens: only the vocabulary is taken. Normalizer and pre-tokenizer are made anew by the class, so that the
# file's replacement of one word by another is not applied. save_pretrained then writes a tokenizer.json without it.
# With "PreTrainedTokenizerFast" as the class, the file is read as it is. No message says so in either case.
#
# Output (2026-11-29):
#     tokenizers, the file itself   ['a', 'movie']
#     BertTokenizer                 ['a', 'film']
#     PreTrainedTokenizerFast       ['a', 'movie']
#     saved by BertTokenizer        normalizer BertNormalizer
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "movie"]
tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("film", "movie")])
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(WORDS[:5])


def loaded(kind):
    folder = Path(kind)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "unk_token": "[UNK]"}))
    return AutoTokenizer.from_pretrained(folder)


of_file = tokenizer.encode("A film", add_special_tokens=False).tokens
bert, fast = loaded("BertTokenizer"), loaded("PreTrainedTokenizerFast")
bert.save_pretrained("again")
saved = json.loads(Path("again/tokenizer.json").read_text())["normalizer"]["type"]
print(f"{'tokenizers, the file itself':29} {of_file}")
print(f"{'BertTokenizer':29} {bert.tokenize('A film')}")
print(f"{'PreTrainedTokenizerFast':29} {fast.tokenize('A film')}")
print(f"{'saved by BertTokenizer':29} normalizer {saved}")
assert of_file == fast.tokenize("A film") == ["a", "movie"]
assert bert.tokenize("A film") == ["a", "film"]
assert saved == "BertNormalizer"
PYTHON
