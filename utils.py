"""The configuration, and small helpers that every script shares.

Each key of config.yaml is a field of one of the classes below, which states its type, default, bounds and meaning.
`load_config` reads the file and the overrides of a command line, such as `train_config.epochs=3`, and refuses whatever
cannot work in one line that names all of it. No torch is imported for that, so the answer comes at once.

    python utils.py       prints the table in docs/settings.md
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, PlainValidator, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from suite.common.checks import choices, contradictions, problems_of, shown, suggestion

PROJECT = Path(__file__).resolve().parent
# Keys whose values may be paths of what is read
INPUTS = ("model_config.model_name", "data_config.dataset", "train_config.teacher")
ROW_FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")  # suite/reviews/rows.py reads them
BAG_OF_WORDS = "bag-of-words"  # the model_name of a run of --mode baseline
DEMO_WARNING = "DEMO: generated reviews and small encoders from scratch. These figures say nothing about IMDB."
LONGEST_RUN_NAME = 200  # characters; some files and folders get a name that is made of it


class UserError(Exception):
    """The user's input is wrong. The message is one line that names the file, key, row or value, and the fix."""


def brief(error: BaseException) -> str:
    """The message of a library's error as one line of at most 200 characters; the error's type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The configuration: type, default, bounds, unit and meaning of every key


def setting(default: Any, meaning: str, shapes_result: bool = True, **bounds: float) -> Any:
    """A key of the configuration. `meaning` stands in the table of settings, docs/settings.md.

    `bounds` are pydantic's: ge (at least), gt (above), le (at most), lt (below). `shapes_result=False` marks a key that
    no trained weight depends on. It may change when a run is resumed.
    """
    return Field(default, description=meaning, json_schema_extra={"shapes_result": shapes_result}, **bounds)


def _three_shares(split: Any) -> list[float] | str:
    if split == "official":
        return split
    try:
        shares = [float(share) for share in split]
    except (TypeError, ValueError):
        shares = []
    if len(shares) != 3:
        raise ValueError("give three shares such as [0.8, 0.1, 0.1], or official")
    if not all(0 < share < 1 for share in shares):
        raise ValueError("each share must lie between 0 and 1")
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"the shares sum to {sum(shares):.6g}; they must sum to 1")
    return shares


def _name_of_a_folder(name: str) -> str:
    if not re.fullmatch(rf"[\w=+-][\w.=+ -]{{,{LONGEST_RUN_NAME - 1}}}", name):
        raise ValueError(f"a folder's name has up to {LONGEST_RUN_NAME} letters, digits and . _ - = +, and does not "
                         "begin with a dot")
    return name


Count = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # the shell leaves key=~/folder alone
RunName = Annotated[str, AfterValidator(_name_of_a_folder)]
Split = Annotated[Any, PlainValidator(_three_shares)]
# Numbers become texts, because ${...} may refer to one; a text is never empty, and a number is finite.
CHECKED = {"extra": "forbid", "coerce_numbers_to_str": True, "str_min_length": 1, "allow_inf_nan": False}


@dataclass(config=CHECKED)
class ModelConfig:
    model_name: PathText = setting("bert-base-uncased", "the pretrained encoder: Hub id or local folder")
    pretrained: bool = setting(True, "false: the same architecture with random weights")
    num_labels: int = setting(2, "number of classes", ge=2, le=100_000)
    pooling: Literal["cls", "mean"] = setting(
        "cls", "what represents a review: the first token's hidden state, or the mean over its tokens without padding")
    dropout_rate: float = setting(0.1, "dropout before the classification head", ge=0, lt=1)
    encoder_dropout: float | None = setting(None, "dropout in the encoder; null: the encoder's own rates", ge=0, lt=1)


@dataclass(config=CHECKED)
class DataConfig:
    dataset: PathText = setting("stanfordnlp/imdb",
                                "Hub id, local folder, or a .csv, .tsv, .jsonl, .json or .parquet file")
    subset: str | None = setting(None, "which configuration of a dataset that has several; null: its own default")
    text_column: str = setting("text", "column that holds the review")
    label_column: str = setting("label", "column that holds the class: numbers, which are ordered by their size, or "
                                "names, by their Unicode code points")
    group_column: str | None = setting(None, "column of what belongs together, such as the film: rows of one group "
                                       "stay in one part of the split; null: each row is drawn alone")
    split: Split = setting([0.8, 0.1, 0.1], "shares of train, valid and test in all labelled rows, stratified by "
                           "class; or `official`: the dataset's own test split")
    split_seed: Seed = setting(42, "seed of the split; independent of train_config.seed")
    drop_duplicates: bool = setting(
        True, "keep only the first of exactly equal texts; false: keep them all, in the same part of the split")
    limit: Count | None = setting(None, "use only this many rows, for a quick look")
    train_limit: Count | None = setting(None, "train on only this many of the training reviews; what validates and "
                                        "tests stays the same")
    max_len: int = setting(128, "longest input in tokens, special tokens included", ge=4, le=2**31)
    truncation: Literal["head", "tail", "head_tail", "windows"] = setting(
        "head", "what is read of a review longer than max_len: its head, its tail, half from each end, or up to "
        "max_windows windows whose logits are averaged")
    max_windows: int = setting(4, "most windows of a review; of a longer one, half are from each end", ge=1, le=1024)
    line_breaks: Literal["keep", "space"] = setting("keep", "how `<br />` is read: as it is written, or as a space")
    batch_size: Count = setting(64, "reviews, or their windows, per forward pass on one device: the micro-batch")
    eval_batch_size: Count = setting(256, "the same in evaluation and prediction; at most 8,192 tokens on a CPU",
                                     shapes_result=False)
    num_workers: int = setting(0, "processes that prepare batches; without them, a batch takes 0.15 ms",
                               shapes_result=False, ge=0, le=256)


@dataclass(config=CHECKED)
class TrainConfig:
    seed: Seed = setting(42, "seed of the head's weights, dropout and review order")
    objective: Literal["classification", "masked_lm", "distillation"] = setting(
        "classification", "classes, masked words, or classes and what a teacher says; `--mode pretrain` and `--mode "
        "distill` set it")
    teacher: PathText | None = setting(None, "the run folder of the model that labels the unlabelled reviews; "
                                       "`--mode distill --teacher FOLDER` sets it")
    epochs: Count = setting(5, "passes over the training reviews")
    max_steps: Count | None = setting(None, "end after this many optimizer steps, if not before")
    optimizer: Literal["adam", "adamw", "sgd"] = setting(
        "adam", "adam adds weight decay to the gradient (L2), adamw decouples it from the gradient")
    learning_rate: float = setting(5e-5, "learning rate after the warm-up", gt=0, le=1e30)
    weight_decay: float = setting(0.0, "weight decay, on all weights except biases and norms", ge=0)
    class_weights: Literal["balanced"] | None = setting(
        None, "`balanced`: a review's weight in the loss is inversely proportional to its class's share of training")
    scheduler: Literal["constant", "linear", "cosine"] = setting("constant", "the learning rate after the warm-up")
    warmup_ratio: float = setting(0.0, "share of the optimizer steps that warm up from 0", ge=0, le=1)
    ema_decay: float | None = setting(
        None, "decay of an exponential moving average of the weights, which is validated and kept in their place; "
        "null: none", gt=0, lt=1)
    max_grad_norm: float | None = setting(None, "clip each step's gradient to this L2 norm; null: never", gt=0)
    gradient_accumulation_steps: Count = setting(
        1, "micro-batches per optimizer step on each device; above 1 for main_accumulation.py")
    effective_batch_size: Count | None = setting(
        None, "reviews per optimizer step, over all micro-batches and devices; sets gradient_accumulation_steps")
    auto_micro_batch: bool = setting(
        False, "halve the micro-batch when a GPU runs out of memory, at the same effective batch", shapes_result=False)
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", "auto: cuda, else mps, else cpu")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto", "precision of the forward pass; auto: bf16 if the device supports it, else no")
    compile: bool = setting(False, "compile the encoder with torch.compile")
    gradient_checkpointing: bool = setting(False, "compute layers twice, which takes less memory", shapes_result=False)
    early_stopping_patience: Count | None = setting(None, "stop after so many epochs without a better metric")
    best_metric: Literal["accuracy", "loss", "macro_f1", "mcc", "roc_auc", "average_precision"] = setting(
        "accuracy", "validation metric that chooses the best epoch; the loss decides between equal ones")
    calibrate: bool = setting(
        False, "divide the logits by the temperature under which the validation labels are most likely")
    test: bool = setting(True, "test the best model at the end; false: for runs that choose settings, which compare.py "
                         "compares on validation", shapes_result=False)
    resume: Literal["auto", "never", "must"] = setting(
        "auto", "auto: continue the same run where it stopped; never: start it again; must: fail if there is nothing "
        "to continue", shapes_result=False)
    overwrite: bool = setting(False, "with resume=never: replace a finished run", shapes_result=False)
    save_every_minutes: float = setting(10.0, "minutes between two saved states; one more is saved after each epoch",
                                        shapes_result=False, ge=0)
    save_every_steps: Count | None = setting(None, "save after every so many optimizer steps, too", shapes_result=False)


@dataclass(config=CHECKED)
class LogConfig:
    tracker: Literal["wandb", "trackio", "tensorboard"] = setting(
        "wandb", "what shows the records; for trackio and tensorboard see requirements-trackers.txt",
        shapes_result=False)
    wandb_project: str = setting("imdb-sentiment", "name of the project on wandb, or in trackio", shapes_result=False)
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto", "of wandb alone; auto: online if there is a login, else offline", shapes_result=False)
    log_every_steps: Count = setting(10, "optimizer steps between two training records")


@dataclass(config=CHECKED)
class Config:
    run_name: RunName | None = setting(
        None, "name of the run folder; null: made of the model and settings", shapes_result=False)
    output_dir: PathText = setting("checkpoints", "folder that holds the run folders", shapes_result=False)
    model_config: ModelConfig = Field(default_factory=ModelConfig)
    data_config: DataConfig = Field(default_factory=DataConfig)
    train_config: TrainConfig = Field(default_factory=TrainConfig)
    log_config: LogConfig = Field(default_factory=LogConfig)

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


SECTIONS = {"model_config": ModelConfig, "data_config": DataConfig, "train_config": TrainConfig,
            "log_config": LogConfig}


def config_fields() -> dict[str, FieldInfo]:
    """{dotted key: pydantic's field} of every key of the configuration."""
    found = {name: entry for name, entry in Config.__pydantic_fields__.items() if name not in SECTIONS}
    for section, its_class in SECTIONS.items():
        found |= {f"{section}.{name}": entry for name, entry in its_class.__pydantic_fields__.items()}
    return found


def shapes_result(field: FieldInfo) -> bool:
    return field.json_schema_extra["shapes_result"]


def settings_table() -> str:
    """docs/settings.md's Markdown table, with one row for each key of the configuration."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in config_fields().items():
        default = field.default if isinstance(field.default, str) else json.dumps(field.default)
        words = ", ".join(choices(field))
        rows.append(f"| `{key}` | `{default}` | {field.description}{words and f' ({words})'} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking it


def load_config(path: str | Path, overrides: Sequence[str] = (), between: Mapping[str, Mapping[str, Any]] | None = None
                ) -> Config:
    """The configuration of `path` with the overrides (`section.key=value`) applied.

    `between` holds values that replace those of the file and are themselves replaced by the overrides:
    {where they come from: {dotted key: value}}. Raises one UserError that lists all problems.
    """
    items = [(str(path), key, _found_from(path, value) if key in INPUTS else value)
             for key, value in leaves(read_yaml(path))]
    items += [(origin, key, value) for origin, values in (between or {}).items() for key, value in values.items()]
    items += [("command line", key, value) for item in overrides for key, value in read_override(item)]
    given = {key: (origin, value) for origin, key, value in items}  # the last one counts
    known = config_fields()
    problems = {key: f"unknown key {key}{suggestion(key, known)}" for key in given if key not in known}
    try:
        tree = OmegaConf.create(asdict(Config()))
        for key in given.keys() & known:
            OmegaConf.update(tree, key, given[key][1])
        config = Config(**OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:  # a ${...} that refers to nothing
        problems[error.full_key] = f"{error.full_key}: {brief(error)}"
    except ValidationError as error:
        problems |= problems_of(error, known)
    else:
        problems |= contradictions(config, num_processes())
    if problems:
        found = [f"{given[key][0] if key in given else path}: {problem}" for key, problem in problems.items()]
        raise UserError((f"{len(found)} problems: " if len(found) > 1 else "") + "; ".join(found))
    # The batch was given by one of two keys; from here on, both hold what it means.
    share = config.data_config.batch_size * num_processes()
    if config.train_config.effective_batch_size is None:
        config.train_config.effective_batch_size = share * config.train_config.gradient_accumulation_steps
    config.train_config.gradient_accumulation_steps = config.train_config.effective_batch_size // share
    config.run_name = config.run_name or _default_run_name(config)
    return config


class Texts(yaml.SafeLoader):
    """Reads the structure of YAML, and every value but null as the text that is written there: the type of its key
    decides what it is. YAML itself would make 13 of a folder called 1_3, and true of a column called `on`."""

    yaml_implicit_resolvers = {first: [(tag, form) for tag, form in forms if tag.endswith(":null")]
                               for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = super().construct_mapping(node, deep=True)
        if len(found) < len(node.value):  # a key that stands there twice, of which YAML would take the last
            names = [key.value for key, _ in node.value]
            key = next(key for key, _ in node.value if names.count(key.value) > 1)
            raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
        return found


def read_yaml(path: str | Path, fix: str = "give the configuration with --config FILE") -> dict[str, Any]:
    """The mapping in a YAML file, with every value as a text. Raises UserError; `fix`: what to do without a file."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Texts)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {fix}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {brief(error)}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: expected sections such as model_config, found a {type(tree).__name__}")
    return tree or {}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a tree of sections. An empty section means its defaults."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif value is not None or key not in SECTIONS:
            yield f"{prefix}{key}", value


def read_override(item: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of each value in `section.key=value`, or in `section={key: value}`.

    A value is the text that was typed. If it is YAML in brackets or quotes, it is what stands in them.
    """
    key, equals, text = item.partition("=")
    if not equals or item.startswith("-"):
        raise UserError(f"command line: {shown(item)} is not an override; write section.key=value, for example "
                        "train_config.epochs=3")
    value: Any = text
    field = config_fields().get(key)
    if text in ("", "null", "~") and field and type(None) in get_args(field.annotation):
        value = None
    elif text.startswith(("[", "{", "'", '"')):
        with suppress(ValueError, yaml.YAMLError):  # as in the name of a file: [final].csv
            value = yaml.load(text, Texts)
    return list(leaves({key: value}))


def _found_from(path: str | Path, value: Any) -> Any:
    """A path in a configuration file: if it exists in that file's folder, it is found there, whatever the current
    folder."""
    folder = Path(path).parent
    found = isinstance(value, str) and folder.resolve() != Path.cwd() and os.path.exists(folder / value)
    return str(folder / value) if found else value


def short_name(path: str) -> str:
    """The last part of a model's or dataset's name; of a run's `best` folder, the name of the run."""
    return Path(path).absolute().parent.name if Path(path).name == "best" else Path(path).name


def _default_run_name(config: Config) -> str:
    model = re.sub(r"[^\w.-]+", "-", short_name(config.model_config.model_name)) or "encoder"
    demo = "DEMO-" if config.is_demo else ""
    kind = {"masked_lm": "pretrain-", "distillation": "distill-"}.get(config.train_config.objective, "")
    if config.model_config.model_name == BAG_OF_WORDS:
        return demo + BAG_OF_WORDS
    return (f"{demo}{kind}{model.removeprefix(demo)}-len{config.data_config.max_len}"
            f"-bs{config.train_config.effective_batch_size}-seed{config.train_config.seed}")


# ---------------------------------------------------------------------------------------------------------------------
# What every script needs


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


def printable(text: str) -> str:
    """The text with control characters and halves of characters as escapes: one in the name of a class could end the
    line, change the state of the terminal, or be refused by a file."""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)


def file_kind(path: str | Path) -> str:
    """The kind of a file of rows, one of ROW_FILES, by the end of its name: `.csv` for Reviews.CSV and reviews.csv.gz.

    "" for any other file. A .parquet file is compressed inside, so there is no .parquet.gz.
    """
    name = Path(str(path).lower())
    kind = name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix
    return kind if kind in ROW_FILES and (kind, name.suffix) != (".parquet", ".gz") else ""


if __name__ == "__main__":
    print(settings_table())
