"""The model card of an exported folder: that of the trained model, with another way to use it and what was checked."""

from __future__ import annotations

from pathlib import Path

from data import Encode
from suite.common.run_folder import read_saved_config, run_of
from suite.common.storage import CARD, write_text
from utils import DEMO_WARNING

USE = "\n## How to use it\n"  # from here on, the card of the trained model speaks of its own folder
NOT_TESTED = "A text classifier, not tested yet"
TRUNCATION_NOTES = {
    "head_tail": "programs that cut a long review themselves, such as transformers' pipeline, read its head alone; in "
                 "training its head and its tail were read",
    "windows": "programs that cut a long review themselves, such as transformers' pipeline, read its first window "
               "alone; in training all of its windows were read, and their logits averaged"}
PYTHON = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER")
print(classify("A film to remember.", truncation=True))
```
"""
JAVASCRIPT = """```javascript
import { pipeline } from "@huggingface/transformers";

// a name on the Hub, or a folder below env.localModelPath
const classify = await pipeline("text-classification", "FOLDER", { dtype: "fp32" });DTYPE
console.log(await classify("A film to remember."));
```
"""


def write_export_card(folder: Path, source: Path, encode: Encode, checks: dict[str, str]) -> None:
    """README.md of an exported folder. `checks`: what was found about each of its models, by their files' names."""
    card = source / CARD
    if card.is_file():
        before = card.read_text(encoding="utf-8", errors="replace").partition(USE)[0].rstrip()
    else:
        before = f"---\npipeline_tag: text-classification\n---\n\n# {NOT_TESTED}"
    run = run_of(source)
    if run and DEMO_WARNING not in before and read_saved_config(run / "config.yaml").is_demo:
        before += f"\n\n> **{DEMO_WARNING}**"
    parts = [before, USE.strip(), "`FOLDER` is the folder of this file. No code is in it, and none has to be trusted."]
    if "model.safetensors" in checks:
        parts.append(PYTHON.rstrip())
    if onnx := [name for name in checks if name.startswith("onnx/")]:
        parts.append(JAVASCRIPT.replace("DTYPE", '    // "q8": in 8 bits' * (len(onnx) > 1)).rstrip())
    parts.append(f"At most {encode.max_len} tokens are read at a time, special tokens included.")
    if note := TRUNCATION_NOTES.get(encode.truncation):
        parts.append(f"**Please note:** {note}.")
    parts += ["## What was checked", "\n".join(f"- `{name}`: {result}." for name, result in checks.items())]
    write_text(folder / CARD, "\n\n".join(parts) + "\n")
