"""The model card of a pretrained model's folder."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from suite.common.hub import is_hub_name
from suite.common.storage import write_text
from suite.training.model_card import plain
from utils import DEMO_WARNING, Config, printable, short_name

CARD = Template("""---
$metadata
---

# $run_name

$warning$encoder, pretrained further by masked language modelling: 15 % of the words are masked, and the model says
which words they were. It is where a fine-tuning starts, not a classifier.

| masked words of texts that it was not trained on | value |
| --- | --- |
| cross-entropy (nats) | $loss |
| perplexity | $perplexity |
| accuracy | $accuracy ($n words) |

Data: $dataset, training reviews and unlabelled ones, in windows of at most $max_len tokens. By the digests of these
texts in `pretraining_texts.npy`, a fine-tuning that would validate or test on one of them is refused.
Training: $optimizer, learning rate $learning_rate, $scheduler schedule, effective batch $effective_batch, seed $seed,
$steps optimizer steps.

```bash
python main.py model_config.model_name=FOLDER     # the folder of this file
```
""")


def write_card(folder: Path, config: Config, valid: dict[str, Any], steps: int) -> None:
    """`valid`: the metrics on validation after these optimizer steps."""
    from huggingface_hub import ModelCard, ModelCardData

    data, train, encoder = config.data_config, config.train_config, config.model_config.model_name
    on_hub = is_hub_name(data.dataset)
    dataset = printable(data.dataset if on_hub else short_name(data.dataset))
    metadata = ModelCardData(library_name="transformers", pipeline_tag="fill-mask",
                             base_model=encoder if is_hub_name(encoder) else None,
                             datasets=[data.dataset] if on_hub else None, tags=["demo"] if config.is_demo else None)
    card = CARD.substitute(
        metadata=metadata.to_yaml(), run_name=plain(config.run_name),
        warning=f"> **{DEMO_WARNING}**\n\n" if config.is_demo else "",
        encoder=plain(encoder if is_hub_name(encoder) else short_name(encoder)),
        loss=f"{valid['loss']:.4f}", perplexity=f"{valid['perplexity']:.2f}", accuracy=f"{valid['accuracy']:.4f}",
        n=f"{valid['n']:,}", dataset=plain(dataset), max_len=data.max_len, optimizer=train.optimizer,
        learning_rate=f"{train.learning_rate:g}", scheduler=train.scheduler, effective_batch=train.effective_batch_size,
        seed=train.seed, steps=f"{steps:,}")
    write_text(folder / "README.md", str(ModelCard(card)))
