"""The configuration, and small helpers that every script shares.

`load_config` reads config.yaml with omegaconf, applies overrides such as `train_config.epochs=3`, and refuses unknown
keys, wrong types and impossible values in one error that lists them all. Torch is only imported when it is needed, so
the answer to a typing mistake comes at once.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.common.checks import INPUTS, deep_yaml, impossible_values, odd_number, short_name, shown

PROJECT = Path(__file__).resolve().parent
TRUNCATIONS = ("head", "tail", "head_tail", "windows")
ROW_FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")  # suite/reviews/rows.py reads them
BAG_OF_WORDS = "bag-of-words"  # the model_name of a run of --mode baseline
DEMO_WARNING = "DEMO: generated reviews and small encoders from scratch. These figures say nothing about IMDB."

# Control characters, those that turn the direction of writing, the ends of lines and halves of characters, as escapes
CONTROLS = {code: chr(code).encode("unicode_escape").decode() for codes in (
    range(9), range(10, 32), range(127, 160), range(0x2028, 0x202F), range(0x2066, 0x206A), range(0xD800, 0xE000))
    for code in codes}


class UserError(Exception):
    """The user's input is wrong. The message is one line that names the file, key, row or value, and the fix."""


def brief(error: BaseException) -> str:
    """The message of a library's error as one line of at most 200 characters; the error's type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The configuration: type, default, meaning, unit and bounds of every key


def option(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of the configuration. `meaning` stands in the table of settings, docs/settings.md.

    `bounds`: `choices` (a tuple of allowed values), `at_least`, `at_most`, `above` and `below` (numbers).
    `shapes_result=False` marks a key that no trained weight depends on. It may change when a run is resumed.
    """
    metadata = {"meaning": meaning, "shapes_result": True, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    model_name: str = option("bert-base-uncased", "the pretrained encoder: Hub id or local folder")
    pretrained: bool = option(True, "false: the same architecture with random weights")
    num_labels: int = option(2, "number of classes", at_least=2, at_most=100_000)
    pooling: str = option("cls", "what represents a review: `cls`, the first token's hidden state, or `mean`, the mean "
                          "over its tokens without padding", choices=("cls", "mean"))
    dropout_rate: float = option(0.1, "dropout before the classification head", at_least=0, below=1)
    encoder_dropout: float | None = option(None, "dropout everywhere in the encoder; null: the encoder's own rates",
                                           at_least=0, below=1)


@dataclass
class DataConfig:
    dataset: str = option("stanfordnlp/imdb", "Hub id, local folder, or a .csv, .tsv, .jsonl, .json or .parquet file")
    subset: str | None = option(None, "which configuration, or subset, of a dataset that has several; null: its own "
                                "default")
    text_column: str = option("text", "column that holds the review")
    label_column: str = option("label", "column that holds the class: numbers, which are ordered by their size, or "
                               "names, by their Unicode code points")
    split: Any = option([0.8, 0.1, 0.1], "shares of train, valid and test in all labelled rows, stratified by class; "
                        "or `official`: the dataset's own test split")
    split_seed: int = option(42, "seed of the split; independent of train_config.seed", at_least=0, at_most=2**32 - 1)
    drop_duplicates: bool = option(True, "keep only the first of exactly equal texts; "
                                   "false: keep them all, in the same part of the split")
    limit: int | None = option(None, "use only this many rows, for a quick look", at_least=1)
    max_len: int = option(128, "longest input in tokens, special tokens included", at_least=4)
    truncation: str = option("head", "what is read of a review longer than max_len: its head, its tail, half from each "
                             "end, or all of it in windows whose logits are averaged", choices=TRUNCATIONS)
    max_windows: int = option(4, "with truncation=windows, the most windows of a review; of a longer one, half of them "
                              "are from each end", at_least=1, at_most=1024)
    line_breaks: str = option("keep", "how `<br />` in a text is read: as it is written, or as a space",
                              choices=("keep", "space"))
    batch_size: int = option(64, "reviews per forward pass on one device, or their windows: the micro-batch",
                             at_least=1)
    eval_batch_size: int = option(256, "reviews per forward pass in evaluation and prediction, or their windows; "
                                  "at most 8,192 tokens on a CPU", at_least=1, shapes_result=False)
    num_workers: int = option(0, "processes that prepare batches; without them, a batch takes 0.15 ms", at_least=0,
                              at_most=256, shapes_result=False)


@dataclass
class TrainConfig:
    seed: int = option(42, "seed of the head's weights, dropout and review order", at_least=0, at_most=2**32 - 1)
    objective: str = option("classification", "what is learned, classes or masked words; `--mode pretrain` sets it",
                            choices=("classification", "masked_lm"))
    epochs: int = option(5, "passes over the training reviews", at_least=1)
    max_steps: int | None = option(None, "end after this many optimizer steps, if not before", at_least=1)
    optimizer: str = option("adam", "adam adds weight decay to the gradient (L2), adamw decouples it from the gradient",
                            choices=("adam", "adamw", "sgd"))
    learning_rate: float = option(5e-5, "learning rate after the warm-up", above=0, at_most=1e30)
    weight_decay: float = option(0.0, "weight decay, on all weights except biases and norms", at_least=0)
    class_weights: str | None = option(None, "`balanced`: a review's weight in the loss is inversely proportional to "
                                       "its class's share of training; null: all count the same", choices=("balanced",))
    scheduler: str = option("constant", "how the learning rate changes with the optimizer steps after the warm-up",
                            choices=("constant", "linear", "cosine"))
    warmup_ratio: float = option(0.0, "share of the optimizer steps that warm up from 0", at_least=0, at_most=1)
    max_grad_norm: float | None = option(None, "clip each step's gradient to this L2 norm; null: never", above=0)
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step on each device; above 1 for "
                                              "main_accumulation.py", at_least=1)
    effective_batch_size: int | None = option(None, "reviews per optimizer step, over all micro-batches and devices; "
                                              "sets gradient_accumulation_steps", at_least=1)
    auto_micro_batch: bool = option(False, "halve the micro-batch when a GPU runs out of memory, at the same effective "
                                    "batch", shapes_result=False)
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cuda", "mps", "cpu"))
    mixed_precision: str = option("auto", "precision of the forward pass; auto: bf16 if the device supports it, else "
                                  "no", choices=("auto", "no", "bf16", "fp16"))
    compile: bool = option(False, "compile the encoder with torch.compile")
    gradient_checkpointing: bool = option(False, "compute layers twice, which takes less memory", shapes_result=False)
    early_stopping_patience: int | None = option(None, "stop after so many epochs without a better metric", at_least=1)
    best_metric: str = option("accuracy", "validation metric that chooses the best epoch", choices=("accuracy", "loss"))
    test: bool = option(True, "measure the best model on the test split at the end; false: for runs that choose "
                        "settings, which compare.py compares on validation", shapes_result=False)
    resume: str = option("auto", "auto: continue the same run where it stopped; never: start it again; must: fail if "
                         "there is nothing to continue", choices=("auto", "never", "must"), shapes_result=False)
    overwrite: bool = option(False, "with resume=never: replace a finished run", shapes_result=False)
    save_every_minutes: float = option(10.0, "minutes between two saved states; one more is saved after each epoch",
                                       at_least=0, shapes_result=False)
    save_every_steps: int | None = option(None, "save after every so many optimizer steps, too", at_least=1,
                                          shapes_result=False)


@dataclass
class LogConfig:
    wandb_project: str = option("imdb-sentiment", "name of the project on wandb", shapes_result=False)
    wandb_mode: str = option("auto", "auto: online if there is a login, else offline",
                             choices=("auto", "online", "offline", "disabled"), shapes_result=False)
    log_every_steps: int = option(10, "optimizer steps between two training records; without a terminal, about ten "
                                  "of them are printed in an epoch", at_least=1)


@dataclass
class Config:
    run_name: str | None = option(None, "name of the run folder; null: `<model>-len<max_len>-bs<effective batch>-"
                                  "seed<seed>`, after `pretrain-` for a pretraining run", shapes_result=False)
    output_dir: str = option("checkpoints", "folder that holds the run folders", shapes_result=False)
    model_config: ModelConfig = field(default_factory=ModelConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    train_config: TrainConfig = field(default_factory=TrainConfig)
    log_config: LogConfig = field(default_factory=LogConfig)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / self.run_name

    @property
    def pretrains(self) -> bool:
        return self.train_config.objective == "masked_lm"

    @property
    def is_demo(self) -> bool:
        """Whether the reviews are the demo's generated ones. Every result of such a run is marked DEMO."""
        return (PROJECT / "demo") in Path(self.data_config.dataset).resolve().parents

    @property
    def demo_mark(self) -> str:
        """Text to put before every result of a demo run; empty for other runs."""
        return "DEMO (generated reviews, not IMDB): " if self.is_demo else ""


def num_processes() -> int:
    """The number of processes that torchrun or `accelerate launch` started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_rank() -> int:
    """This process's number among them. Process 0 writes the files."""
    return int(os.environ.get("RANK", 0))


def say(text: str) -> None:
    """Print lines for the user, in process 0 only."""
    if process_rank() == 0:
        print("\n".join(map(printable, text.split("\n"))), flush=True)


def file_kind(path: str | Path) -> str:
    """The kind of a file of rows, one of ROW_FILES, by the end of its name: `.csv` for Reviews.CSV and reviews.csv.gz.

    "" for any other file. A .parquet file is compressed inside, so there is no .parquet.gz.
    """
    name = Path(str(path).lower())
    kind = name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix
    return kind if kind in ROW_FILES and (kind, name.suffix) != (".parquet", ".gz") else ""


def printable(text: str) -> str:
    """The text with its control characters escaped: one in the name of a class could change the terminal's state."""
    return text.translate(CONTROLS)


def config_fields(config: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of the configuration as (dotted key, dataclass field)."""
    for entry in fields(config):
        section = entry.default_factory if entry.name.endswith("_config") else None
        if section is not None:
            yield from config_fields(section, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry


@functools.cache
def text_keys() -> dict[str, bool]:
    """{dotted key: whether it may be null} of every key whose value is a text."""
    return {key: "None" in entry.type for key, entry in config_fields() if entry.type.startswith("str")}


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking it


def load_config(path: str | Path, overrides: Sequence[str] = (), between: Mapping[str, Mapping[str, Any]] | None = None
                ) -> Config:
    """The configuration of `path` with the overrides (`section.key=value`) applied.

    `between` holds values that replace those of the file and are themselves replaced by the overrides:
    {where they come from: {dotted key: value}}. Raises one UserError that lists all problems.
    """
    known = dict(config_fields())
    config = OmegaConf.structured(Config)
    problems: dict[str, str] = {}
    origins: dict[str, str] = {}
    items = [(str(path), key, _beside(path, value) if key in INPUTS else value)
             for key, value in leaves(read_yaml(path))]
    items += [(origin, key, value) for origin, values in (between or {}).items() for key, value in values.items()]
    for origin, key, value in [*items, *_read_overrides(overrides)]:
        if key not in known:
            problems[key] = f"{origin}: unknown key {key}{suggest(key, known)}"
            continue
        origins[key] = origin
        try:
            OmegaConf.update(config, key, value)
            problems.pop(key, None)  # an override replaces a wrong value of the file
        except (OmegaConfBaseException, OverflowError):
            problems[key] = f"{origin}: {key} must be {_type_name(known[key])}, got {shown(value)}"
    try:
        config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = error.full_key or "an interpolation"  # a ${...} whose value is missing or of the wrong type
        raise UserError(f"{origins.get(key, path)}: {key}: {brief(error)}: give a value of the right type") from None
    for section, key in ((config, "output_dir"), (config.model_config, "model_name"), (config.data_config, "dataset")):
        if (value := getattr(section, key)).startswith("~") and "\0" not in value:
            setattr(section, key, os.path.expanduser(value))  # the shell leaves it alone in key=~/folder
    for key, text in impossible_values(config, known, num_processes()).items():
        problems.setdefault(key, f"{origins.get(key, path)}: {text}")
    if problems:
        found = list(problems.values())
        count = f"{len(found)} problems: " if len(found) > 1 else ""
        raise UserError(count + "; ".join(found))
    # The batch was given by one of two keys; from here on, both hold what it means.
    share = config.data_config.batch_size * num_processes()
    if config.train_config.effective_batch_size is None:
        config.train_config.effective_batch_size = share * config.train_config.gradient_accumulation_steps
    config.train_config.gradient_accumulation_steps = config.train_config.effective_batch_size // share
    config.run_name = config.run_name or _default_run_name(config)
    return config


def read_yaml(path: str | Path, fix: str = "give the configuration with --config FILE") -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError; `fix` says what to do if there is no such file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if problem := deep_yaml(text):
            raise UserError(problem)
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        tree = _with_texts(tree, yaml.compose(text, Loader=yaml.SafeLoader))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {fix}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {error.problem}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read: it is not UTF-8: save it as UTF-8") from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {brief(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as model_config, found a {type(tree).__name__}")
    return tree


def _with_texts(value: Any, node: yaml.Node | None, name: str = "") -> Any:
    """What YAML reads of a node, but under a key of the configuration that is a text, wherever it stands in the tree,
    the text as it is written: there, 2026_11 and 1e3 are names, and `no` is a word.

    Raises UserError for a number that YAML reads as another one.
    """
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        nodes = {key.value: child for key, child in node.value}
        return {key: _with_texts(child, nodes.get(str(key)), f"{name}.{key}" if name else str(key))
                for key, child in value.items()}
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        return [_with_texts(child, of_child, name) for child, of_child in zip(value, node.value, strict=True)]
    if not isinstance(node, yaml.ScalarNode):
        return value
    if f".{name}".endswith(tuple(f".{key}" for key in text_keys())):
        return None if node.tag.endswith(":null") else node.value
    if node.style is None and (problem := odd_number(node.value)):
        raise UserError(f"{name}: {problem}")
    return value


def _beside(path: str | Path, value: Any) -> Any:
    """A path in a configuration file: if it exists beside that file, it is found there, whatever the current folder."""
    folder = Path(path).parent
    found = isinstance(value, str) and folder.resolve() != Path.cwd() and os.path.exists(folder / value)
    return str(folder / value) if found else value


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a tree of sections."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_section = name in Config.__dataclass_fields__ and name.endswith("_config")
        if isinstance(value, dict):
            yield from leaves(value, name + ".")
        elif not (is_section and value is None):  # an empty section means its defaults
            yield name, value


def _read_overrides(overrides: Sequence[str]) -> list[tuple[str, str, Any]]:
    items = []
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or item.startswith("-"):
            raise UserError(f"command line: {shown(item)} is not an override; write section.key=value, "
                            "for example train_config.epochs=3")
        text = item[len(key) + 1:]
        if key in (texts := text_keys()):
            items.append(("command line", key, _typed_text(text, is_optional=texts[key])))
            continue
        try:
            if problem := deep_yaml(text):
                raise UserError(problem)
            value = OmegaConf.to_container(OmegaConf.from_dotlist(["value=" + text]))["value"]
            value = _with_texts(value, yaml.compose(text, Loader=yaml.SafeLoader), key)
        except UserError as error:
            raise UserError(f"command line: {shown(key)}: {error}") from None
        except (ValueError, yaml.YAMLError, OmegaConfBaseException):  # ValueError: 5000 digits
            raise UserError(f"command line: the value of {shown(item)} is not valid YAML; quote it") from None
        if isinstance(value, dict):
            items += [("command line", *leaf) for leaf in leaves(value, key + ".")]
        else:
            items.append(("command line", key, value))
    return items


def _typed_text(text: str, is_optional: bool) -> str | None:
    """The value of a text that was typed on the command line: as it is, or what stands in quotes around all of it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with suppress(yaml.YAMLError):
            return str(yaml.safe_load(text))
    return None if is_optional and text in ("", "null", "~") else text


def suggest(key: str, known: dict) -> str:
    """What to say after an unknown key: the nearest valid name, or where all of them stand."""
    if key in Config.__dataclass_fields__:
        return f"; it is a section: set one of its keys, such as {next(k for k in known if k.startswith(key + '.'))}"
    # If the section is missing or misspelt, the last part still finds the key: `epochs` -> train_config.epochs.
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if (not near or leaf in by_leaf) and (leaves := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)):
        near = [by_leaf[leaves[0]]]
    return f"; did you mean {near[0]}?" if near else "; docs/settings.md lists all keys"


def _type_name(entry: Any) -> str:
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
    kinds = [kind.strip() for kind in str(entry.type).split("|")]
    return " or ".join("null" if kind == "None" else names.get(kind, kind) for kind in kinds)


def _default_run_name(config: Config) -> str:
    model = re.sub(r"[^\w.-]+", "-", short_name(config.model_config.model_name)) or "encoder"
    model = model.encode()[:120].decode(errors="ignore")  # a file's name takes 255 bytes
    demo, kind = "DEMO-" if config.is_demo else "", "pretrain-" if config.pretrains else ""
    if config.model_config.model_name == BAG_OF_WORDS:
        return demo + BAG_OF_WORDS
    return (f"{demo}{kind}{model.removeprefix(demo)}-len{config.data_config.max_len}"
            f"-bs{config.train_config.effective_batch_size}-seed{config.train_config.seed}")
