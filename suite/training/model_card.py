"""The model card of a trained model's folder."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

from suite.common.hub import is_hub_name
from suite.common.run_folder import is_encoder
from suite.common.storage import atomic_write
from utils import BAG_OF_WORDS, DEMO_WARNING, Config, DataConfig, printable, short_name

CARD = Template("""---
$metadata
---

# $run_name

$warning$model, $origin for the classes $classes.

| test metric | value |
| --- | --- |
$table

Data: $dataset, split $split (split_seed $split_seed)$best.
$training

## How to use it

$elsewhere

```bash
python main.py --mode predict --model FOLDER --text "A film to remember."
python main.py --mode predict --model FOLDER --input reviews.csv --output labelled.csv
```
""")
TRAINING = Template("""Input: $input$line_breaks.
Training: $optimizer, learning rate $learning_rate, $scheduler schedule,
effective batch $effective_batch, seed $seed, $steps$class_weights.""")
ELSEWHERE = Template("""```python
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER", trust_remote_code=True)
print(classify("A film to remember.", truncation=True))
```

`FOLDER` is the folder of this file. The code to be trusted is `model.py` beside it, a short file that runs nothing
else.$pipeline_note The suite that trained the model runs no code from here:""")

WORDS = "Input: TF-IDF of words and pairs of words, of all of a text."
MEMBERS = "Members: the models in the folders beside this file. Their log-odds are weighted by a fit on validation."


def write_model_card(folder: Path, config: Config, metrics: dict[str, Any], label_names: list[str]) -> None:
    """README.md of a model folder, with the metadata that the Hub reads."""
    from huggingface_hub import ModelCard

    data, name = config.data_config, config.model_config.model_name
    # No path of this machine
    dataset = printable(data.dataset if is_hub_name(data.dataset) else short_name(data.dataset))
    origin = "fine-tuned" if config.model_config.pretrained else "trained from scratch"
    card = CARD.substitute(
        metadata=card_metadata(config, dataset, metrics["test"]).to_yaml(), run_name=plain(config.run_name),
        warning=f"> **{DEMO_WARNING}**\n\n" if config.is_demo else "",
        model=plain(name if is_hub_name(name) else short_name(name)),
        origin=origin if is_encoder(config) else "a logistic regression",
        classes=", ".join(map(plain, label_names)), table=metrics_table(metrics["test"]), dataset=plain(dataset),
        split=data.split if isinstance(data.split, str) else " : ".join(f"{share:g}" for share in data.split),
        split_seed=data.split_seed,
        best="; tested with the weights that were best on validation" if is_encoder(config) else "",
        training=training(config, metrics) if is_encoder(config) else WORDS if name == BAG_OF_WORDS else MEMBERS,
        elsewhere=ELSEWHERE.substitute(pipeline_note=PIPELINE_NOTES.get(data.truncation, ""))
        if is_encoder(config) else "`FOLDER` is the folder of this file. The suite that made the model reads it:")
    with atomic_write(folder / "README.md") as file:
        file.write(str(ModelCard(card)))


def training(config: Config, metrics: dict[str, Any]) -> str:
    """What an encoder read of a text, and how it was trained."""
    data, train = config.data_config, config.train_config
    return TRAINING.substitute(
        input=input_of(data), line_breaks=", `<br />` read as a space" if data.line_breaks == "space" else "",
        optimizer=train.optimizer, learning_rate=f"{train.learning_rate:g}", scheduler=train.scheduler,
        effective_batch=train.effective_batch_size, seed=train.seed,
        steps=f"{metrics['train']['optimizer_steps']:,} optimizer steps" if "train" in metrics else "interrupted",
        class_weights=", the loss weighted by how rare a class is" if train.class_weights else "")


PIPELINE_NOTES = {
    "head_tail": " The pipeline reads the head of a long review, where training read its head and its tail.",
    "windows": " The pipeline reads the head of a long review alone, where training read all of its windows."}


def input_of(data: DataConfig) -> str:
    if data.truncation != "windows":
        return f"at most {data.max_len} tokens ({data.truncation})"
    return (f"at most {data.max_windows} windows of at most {data.max_len} tokens; the logits of a review are the mean "
            "over its windows")


def plain(text: str) -> str:
    """A text that stays text in Markdown, whatever is in it."""
    return re.sub(r"[\\`*\[\]<>|&]", r"\\\g<0>", printable(text))


def card_metadata(config: Config, dataset: str, test: dict[str, Any]) -> Any:
    """The huggingface_hub.ModelCardData of a run."""
    from huggingface_hub import EvalResult, ModelCardData

    on_hub, encoder = is_hub_name(config.data_config.dataset), config.model_config.model_name
    return ModelCardData(
        language="en" if config.is_demo or on_hub and dataset.endswith("imdb") else None,
        library_name="transformers" if is_encoder(config) else None, pipeline_tag="text-classification",
        tags=["sentiment-analysis"] + ["demo"] * config.is_demo,
        base_model=encoder if is_hub_name(encoder) and is_encoder(config) else None,
        datasets=[dataset] if on_hub else None,
        model_name=printable(config.run_name),
        eval_results=[EvalResult(task_type="text-classification", dataset_type=dataset, dataset_name=dataset,
                                 metric_type=name, metric_value=test[name]) for name in ("accuracy", "f1")])


def metrics_table(test: dict[str, Any]) -> str:
    low, high = test["accuracy_ci95"]
    rows = {"accuracy": f"{test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, {test['n']:,} reviews)",
            "F1": f"{test['f1']:.4f}", "macro F1": f"{test['macro_f1']:.4f}",
            "ROC AUC": "-" if test["roc_auc"] is None else f"{test['roc_auc']:.4f}",
            "expected calibration error": f"{test['ece']:.4f}", "cross-entropy (nats)": f"{test['loss']:.4f}"}
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())
