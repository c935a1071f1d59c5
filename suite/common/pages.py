"""Model cards, and how the templates in suite/templates/ become cards, reports and web pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from suite.common.figures import on_card
from suite.common.hub import is_hub_name
from suite.common.run_folder import is_encoder, read_saved_config, run_of
from suite.common.storage import CARD, write_json, write_text
from utils import BAG_OF_WORDS, DEMO_WARNING, PROJECT, Config, printable, short_name

USE = "\n## How to use it\n"  # from here on, a model card speaks of its own folder
DECISION = "Decision: `threshold.json` "  # how that line begins
NOT_TESTED = "A text classifier, not tested yet"
OTHERS = "programs that cut a long review themselves, such as transformers' pipeline, read"
TRUNCATION_NOTES = {
    "tail": "programs that do not know truncation_side, such as transformers.js, read the head of a long review; in "
            "training its tail was read, as transformers' pipeline does",
    "head_tail": f"{OTHERS} its head alone; in training its head and its tail were read",
    "windows": f"{OTHERS} its first window alone; in training all of its windows were read, and their logits averaged"}


def escaped(text: str) -> str:
    """A text that stays text in Markdown, whatever is in it."""
    return re.sub(r"[\\`*\[\]<>|&]", r"\\\g<0>", printable(text))


# Control characters could change a terminal's state, and HTML has no place for them.
UNPRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
# What a .html template is given is escaped; what a Markdown template shows of others' texts goes through `escaped`.
TEMPLATES = Environment(loader=FileSystemLoader(PROJECT / "suite" / "templates"), undefined=StrictUndefined,
                        autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
                        keep_trailing_newline=True)
TEMPLATES.filters["escaped"] = escaped
TEMPLATES.globals |= {"DEMO_WARNING": DEMO_WARNING, "TRANSFORMERS_JS": "4.3.2"}  # the version that was tried


def render(template: str, **values: Any) -> str:
    """The text of a file in suite/templates/, filled. Raises jinja2.UndefinedError for a value that is not given."""
    return TEMPLATES.get_template(template).render(values)


def write_model_card(folder: Path, config: Config, metrics: dict[str, Any], label_names: list[str]) -> None:
    """README.md of a tested model's folder, with the metadata that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    data, encoder, test = config.data_config, config.model_config.model_name, metrics["test"]
    dataset, on_hub = _public(data.dataset), is_hub_name(data.dataset)
    metadata = ModelCardData(
        language="en" if config.is_demo or on_hub and dataset.endswith("imdb") else None,
        library_name="transformers" if is_encoder(config) else None, pipeline_tag="text-classification",
        tags=["sentiment-analysis"] + ["demo"] * config.is_demo,
        base_model=encoder if is_hub_name(encoder) and is_encoder(config) and config.model_config.pretrained else None,
        datasets=[dataset] if on_hub else None, model_name=printable(config.run_name),
        eval_results=[EvalResult(task_type="text-classification", dataset_type=dataset, dataset_name=dataset,
                                 metric_type=name, metric_value=test[name]) for name in ("accuracy", "f1")])
    write_text(folder / CARD, render(
        "classifier_card.md", metadata=metadata.to_yaml(), config=config, data=data, train=config.train_config,
        model=_public(encoder), threshold=metrics.get("threshold"),
        teacher=config.train_config.teacher and short_name(config.train_config.teacher),
        dataset=dataset, classes=label_names, figures=on_card(test), reviews=test["n"], groups=test.get("groups"),
        kind="encoder" if is_encoder(config) else "bag of words" if encoder == BAG_OF_WORDS else "stack",
        split=data.split if isinstance(data.split, str) else " : ".join(f"{share:g}" for share in data.split),
        optimizer_steps=metrics.get("train", {}).get("optimizer_steps"), note=TRUNCATION_NOTES.get(data.truncation)))


def write_decision(folder: Path, threshold: dict[str, Any] | None, label_names: list[str]) -> None:
    """Say in a model card from which probability on a text gets class 1; None: nothing. All else stays: where the run's
    data and encoder lie is not known in every folder, and the card may have been edited."""
    lines = [line for line in (folder / CARD).read_text(encoding="utf-8").splitlines(keepends=True)
             if not line.startswith(DECISION)]
    if threshold:
        places = [number for number, line in enumerate(lines, start=1) if line.startswith("Data: ")]
        lines.insert(places[0] if places else len(lines),
                     render("decision.md", threshold=threshold, classes=label_names))
    write_text(folder / CARD, "".join(lines))


def write_pretrained_card(folder: Path, config: Config, valid: dict[str, Any], steps: int) -> None:
    """README.md of a pretrained encoder's folder. `valid`: the metrics on validation after these optimizer steps."""
    from huggingface_hub import ModelCardData

    data, encoder = config.data_config, config.model_config.model_name
    metadata = ModelCardData(library_name="transformers", pipeline_tag="fill-mask",
                             base_model=encoder if is_hub_name(encoder) and config.model_config.pretrained else None,
                             datasets=[data.dataset] if is_hub_name(data.dataset) else None,
                             tags=["demo"] if config.is_demo else None)
    write_text(folder / CARD, render(
        "pretrained_card.md", metadata=metadata.to_yaml(), config=config, train=config.train_config,
        encoder=_public(encoder), dataset=_public(data.dataset), figures=on_card(valid), words=valid["n"], steps=steps))


def write_export_card(folder: Path, source: Path, max_len: int, truncation: str, checks: dict[str, str],
                      has_page: bool) -> None:
    """README.md of an exported folder: the card of the trained model in `source`, with another way to use it.

    `checks`: what was found about each of the exported models, by their files' names. `has_page`: `write_page` follows.
    """
    card, run = source / CARD, run_of(source)
    before = f"---\npipeline_tag: text-classification\n---\n\n# {NOT_TESTED}"
    if card.is_file():
        before = card.read_text(encoding="utf-8", errors="replace").partition(USE)[0].rstrip()
    is_demo = run is not None and read_saved_config(run / "config.yaml").is_demo
    write_text(folder / CARD, render(
        "export_card.md", before=before, is_demo=is_demo and DEMO_WARNING not in before, checks=checks,
        models_in_onnx=sum(name.startswith("onnx/") for name in checks), max_len=max_len, has_page=has_page,
        note=TRUNCATION_NOTES.get(truncation)))


def write_page(folder: Path, source: Path, settings: dict[str, Any]) -> None:
    """index.html of an exported folder, in which a browser runs the model of `source`, and page.json with what the page
    must know of it. The page itself is the same for all models: a browser may still have that of another folder.
    """
    is_demo = DEMO_WARNING in (folder / CARD).read_text(encoding="utf-8")
    write_text(folder / "index.html", render("page.html"))
    write_json(folder / "page.json", {"name": short_name(str(source)), "warning": DEMO_WARNING * is_demo, **settings})


def _public(name: str) -> str:
    """The name of a dataset or model without the folders of this machine."""
    return printable(name if is_hub_name(name) else short_name(name))
