"""The model card of a trained model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suite.common.hub import is_hub_name
from suite.common.storage import atomic_write
from utils import DEMO_WARNING, Config


def write_model_card(folder: Path, config: Config, metrics: dict[str, Any], label_names: list[str]) -> None:
    """README.md of a model folder, with the metadata that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data, train, test = config.data_config, config.train_config, metrics["test"]
    low, high = test["accuracy_ci95"]
    dataset, encoder = data.dataset, config.model_config.model_name
    on_hub, encoder_on_hub = is_hub_name(dataset), is_hub_name(encoder)
    if not on_hub:
        dataset = Path(dataset).name  # nobody else has this machine's folders
    card_data = ModelCardData(
        language="en" if config.is_demo or on_hub and dataset.endswith("imdb") else None,
        library_name="transformers", pipeline_tag="text-classification",
        tags=["sentiment-analysis"] + ["demo"] * config.is_demo,
        base_model=encoder if encoder_on_hub else None, datasets=[dataset] if on_hub else None,
        model_name=config.run_name,
        eval_results=[EvalResult(task_type="text-classification", dataset_type=dataset, dataset_name=dataset,
                                 metric_type=name, metric_value=test[name]) for name in ("accuracy", "f1")])
    warning = f"> **{DEMO_WARNING}**\n\n" if config.is_demo else ""
    origin = "fine-tuned" if config.model_config.pretrained else "trained from scratch"
    split = data.split if isinstance(data.split, str) else " : ".join(f"{share:g}" for share in data.split)
    steps = f"{metrics['train']['optimizer_steps']:,} optimizer steps" if "train" in metrics else "interrupted"
    breaks = ", `<br />` read as a space" if data.line_breaks == "space" else ""
    weights = ", the loss weighted by how rare a class is" if train.class_weights else ""
    cut = (" The pipeline reads the head of a long review, where training read its head and its tail."
           if data.truncation == "head_tail" else "")
    card = f"""---
{card_data.to_yaml()}
---

# {config.run_name}

{warning}{encoder if encoder_on_hub else Path(encoder).name}, {origin} for the classes {", ".join(label_names)}.

| test metric | value |
| --- | --- |
| accuracy | {test["accuracy"]:.4f} (95 % interval {low:.4f} to {high:.4f}, {test["n"]:,} reviews) |
| F1 | {test["f1"]:.4f} |
| macro F1 | {test["macro_f1"]:.4f} |
| ROC AUC | {"-" if test["roc_auc"] is None else format(test["roc_auc"], ".4f")} |
| expected calibration error | {test["ece"]:.4f} |
| cross-entropy (nats) | {test["loss"]:.4f} |

Data: {dataset}, split {split} (split_seed {data.split_seed}); tested with the weights that were best on validation.
Input: at most {data.max_len} tokens ({data.truncation}){breaks}.
Training: {train.optimizer}, learning rate {train.learning_rate:g}, {train.scheduler} schedule,
effective batch {train.effective_batch_size}, seed {train.seed}, {steps}{weights}.

## How to use it

```python
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER", trust_remote_code=True)
print(classify("A film to remember.", truncation=True))
```

`FOLDER` is where this file lies. The code to be trusted is `model.py` beside it, a short file that runs nothing else.
{cut} In the suite that trained it, no code from here is run:

```bash
python main.py --mode predict --model FOLDER --text "A film to remember."
python main.py --mode predict --model FOLDER --input reviews.csv --output labelled.csv
```
"""
    with atomic_write(folder / "README.md") as file:
        file.write(str(ModelCard(card)))
