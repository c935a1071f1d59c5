#!/usr/bin/env bash
# sentence-transformers 6.2.0 (Python 3.11, torch 2.13.0, transformers 5.23.0), CrossEncoder on a classifier of single
# texts.
#
# Guess, written before the run: CrossEncoder(folder).predict([a, b]) classifies two texts, as a pipeline does, and gives
# two rows of logits; if it cannot, it says so, whatever the number of texts.
# What happens: a list of two texts is one pair, read as "[CLS] a [SEP] b [SEP]". Its answer has two numbers, the logits
# of the two classes for the pair, and looks like one score for each text. Three texts raise ValueError. One text, not in
# a list, is classified as by transformers.
#
# Output (2026-11-29):
#     each alone   [[0.7419, 0.3538], [0.2266, 0.1347]]
#     the list     shape (2,), [0.2586, -0.5414]
#     the pair     [0.2586, -0.5414]
#     three texts  ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sentence-transformers==6.2.0 torch==2.13.0 \
    transformers==5.23.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a film to remember dull mess from its first minute".split()
with open("vocab.txt", "w") as file:
    file.write("\n".join(WORDS))
BertTokenizer("vocab.txt").save_pretrained("model")
torch.manual_seed(0)
config = BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=64, num_labels=2, initializer_range=0.2)
model = BertForSequenceClassification(config).eval()
model.save_pretrained("model")

first, second = "a film to remember", "a dull mess from its first minute"
tokenizer, encoder = AutoTokenizer.from_pretrained("model"), CrossEncoder("model", device="cpu")


@torch.no_grad()
def logits(*texts):
    return model(**tokenizer(*texts, return_tensors="pt")).logits[0].numpy()


def rounded(values):
    return [round(float(value), 4) for value in values]


alone = [encoder.predict(text) for text in (first, second)]
together = encoder.predict([first, second])
try:
    encoder.predict([first, second, first])
    three = "no error"
except ValueError as error:
    three = type(error).__name__
print(f"each alone   {[rounded(values) for values in alone]}")
print(f"the list     shape {together.shape}, {rounded(together)}")
print(f"the pair     {rounded(logits(first, second))}")
print(f"three texts  {three}")
for values, text in zip(alone, (first, second)):
    np.testing.assert_allclose(values, logits(text), atol=1e-5)
assert together.shape == (2,), together.shape
np.testing.assert_allclose(together, logits(first, second), atol=1e-5)
assert not np.allclose(together, [alone[0][0], alone[1][0]], atol=1e-2)
assert three == "ValueError", three
PYTHON
