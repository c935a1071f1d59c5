#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0 (Python 3.11): Trainer.predict on one device,
# with train_sampling_strategy="group_by_length".
#
# Guess, written before the run: the strategy is one of training, as its name says; so the predictions stand in the
# order of the rows, as they do with "random".
# What happens: the strategy also draws the order of evaluation, and predict does not undo it. `label_ids` come in the
# same other order, so the accuracy in the metrics is right. Whoever writes the predictions beside the texts has labels
# at random: a classifier that is right on each of 400 rows is right on 48.5 % of them there. A second Trainer, with
# "random", gives the predictions of the same model in the order of the rows.
#
# Output (2026-11-29):
#     random                           metrics 1.000   beside the rows 1.000   label_ids in the rows' order
#     group_by_length                  metrics 1.000   beside the rows 0.485   label_ids in another order
#     the same model, a second Trainer metrics 1.000   beside the rows 1.000   label_ids in the rows' order
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0 \
    datasets==5.2.0 torch==2.13.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import random

import datasets
import numpy as np
import torch
from transformers import (
    BertConfig, BertForSequenceClassification, BertTokenizer, PrinterCallback, Trainer, TrainingArguments)

datasets.disable_progress_bars()
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad a film of many scenes".split()
with open("vocab.txt", "w") as file:
    file.write("\n".join(WORDS))
tokenizer = BertTokenizer("vocab.txt", model_max_length=64)
draw = random.Random(0)
LABELS = [draw.randrange(2) for _ in range(400)]
TEXTS = [" ".join([("bad", "good")[label], *draw.choices(WORDS[7:], k=draw.randrange(3, 50))]) for label in LABELS]
rows = datasets.Dataset.from_dict(dict(tokenizer(TEXTS)) | {"labels": LABELS})


def accuracy(logits, labels):
    return float((logits.argmax(-1) == labels).mean())


def prepared(model, strategy):
    arguments = TrainingArguments(
        "out", train_sampling_strategy=strategy, num_train_epochs=4, learning_rate=3e-3, save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer,
                      compute_metrics=lambda outputs: {"accuracy": accuracy(*outputs)})
    trainer.remove_callback(PrinterCallback)
    return trainer


def look(title, trainer, moved):
    answer = trainer.predict(rows)
    own, beside = answer.metrics["test_accuracy"], accuracy(answer.predictions, np.array(LABELS))
    same = answer.label_ids.tolist() == LABELS
    print(f"{title:32} metrics {own:.3f}   beside the rows {beside:.3f}   label_ids "
          + ("in the rows' order" if same else "in another order"))
    assert own == 1 and same != moved
    assert 0.4 < beside < 0.6 if moved else beside == 1


for strategy in ("random", "group_by_length"):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64))
    trainer = prepared(model, strategy)
    trainer.train()
    look(strategy, trainer, strategy == "group_by_length")
look("the same model, a second Trainer", prepared(model, "random"), False)
PYTHON
