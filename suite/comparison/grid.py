"""Read an experiment file (a base configuration, a grid of settings, seeds) and find out which of its runs exist.

    question: Which effective batch?                  the question that the report answers, in any words
    script: main_accumulation.py                      default: main.py, which cannot accumulate gradients
    config: config.yaml                               the base configuration
    overrides: {data_config.batch_size: 64}           for every run
    grid:                                             every combination of these values is a setting
      train_config.effective_batch_size: [64, 256, 1024]
    settings:                                         or, in place of a grid, the settings one by one
      - {}                                            that of `config` and `overrides`
      - {model_config.pooling: mean}
    seeds: [42, 43, 44]                               each setting runs with each of these seeds
    also: [bag-of-words, stack]                       what is made beside each encoder: a bag of words on the same
                                                      reviews, with the first seed; the stack of the two
    published:                                        figures of others, shown beside ours
      - where: {train_config.effective_batch_size: 64}
        accuracy: {their name: 0.8918}

On the command line, grid.KEY=[...], seeds=[...] and also=[...] replace what the file says.

A cell is one setting with one seed, or what is made beside it. Every setting runs with the first seed before any runs
with the second, so that an experiment that is cut short has something of each setting. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from suite.common.checks import in_plain_words, shown
from suite.common.run_folder import (
    BAG_OF_WORDS_KEYS,
    SAME_TEST,
    STACK_OF,
    changed_input,
    content_of,
    contents_of,
    read_metrics,
    read_saved_config,
    shaping_values,
    stack_name,
    without_encoder,
)
from suite.common.storage import MANIFEST, read_json, sha256_of
from utils import BAG_OF_WORDS, LONGEST_RUN_NAME, Config, UserError, leaves, load_config, read_override, read_yaml

MODEL = "model"  # in the setting of a cell that is made beside an encoder's: which model it is
# The default run_name names these already.
NAMED = (MODEL, "model_config.model_name", "data_config.max_len", "train_config.effective_batch_size")


Sections = BeforeValidator(lambda tree: dict(leaves(tree)) if isinstance(tree, dict) else tree)  # dotted keys
Values = Annotated[dict[str, Any], Sections]


class Published(BaseModel, extra="forbid"):
    """Figures of others for a setting."""

    where: Values
    accuracy: dict[str, Annotated[float, Field(ge=0, le=1)]]  # {source: share of reviews}


class ExperimentFile(BaseModel, extra="forbid"):
    """What may stand in the file. The example at the top of this module says what each key means."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] | None = None  # None: that of the file
    question: str = ""
    script: Literal["main.py", "main_accumulation.py"] = "main.py"
    config: str = "config.yaml"
    overrides: Values = {}
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Sections] = {}
    settings: list[Values] = []
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    also: list[Literal["bag-of-words", "stack"]] = []  # a stack needs a bag of words, so it brings one
    published: list[Published] = []

    def all_settings(self) -> list[dict[str, Any]]:
        """{dotted key: value} of each setting: those that are listed, or every combination of the grid's values."""
        return self.settings or [dict(zip(self.grid, values, strict=True))
                                 for values in itertools.product(*self.grid.values())]


@dataclass
class Cell:
    """One run of the experiment."""

    index: int  # from 1, in the order of running
    setting: dict[str, Any]  # {dotted key: value} of what differs between the experiment's settings
    seed: int
    config: Config
    arguments: list[str]  # the script and what it gets; run_name is added when the cell runs
    members: list[Cell] = field(default_factory=list)  # of a stack
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def is_begun(self) -> bool:
        return (self.folder / "config.yaml").exists()

    @property
    def command(self) -> list[str]:
        if self.members:
            return ["ensemble.py", *(str(member.folder) for member in self.members), "--output", str(self.folder)]
        return [*self.arguments, f"run_name={self.config.run_name}"]


def result_key(config: Config) -> str:
    """Equal for two configurations if they give the same result, whatever the names of their run folders."""
    return json.dumps(shaping_values(config), sort_keys=True)


@dataclass
class Experiment:
    name: str
    question: str
    cells: list[Cell]
    published: list[Published]
    overrides: list[str]  # those of the command line that change results, so that the file alone does not describe them

    @property
    def report_folder(self) -> Path:
        return Path(self.cells[0].config.output_dir) / f"{self.name}-report"

    def published_for(self, setting: dict[str, Any]) -> dict[str, float]:
        """{source: accuracy} of others for a setting of the grid."""
        return {source: share for entry in self.published if entry.where.items() <= setting.items()
                for source, share in entry.accuracy.items()}


def read_experiment(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Raises a UserError that lists every problem of the file and of the overrides (`section.key=value`): first those
    of its shape, then those of what it asks for."""
    tree = read_yaml(path, "name an experiment such as experiments/demo.yaml")
    own = [item for item in overrides if re.split("[.=]", item)[0] in ExperimentFile.model_fields]
    overrides = [item for item in overrides if item not in own]
    for key, value in itertools.chain(*map(read_override, own)):
        section, _, inner = key.partition(".")
        before = tree.get(section)
        tree[section] = (dict(leaves(before)) if isinstance(before, dict) else {}) | {inner: value} if inner else value
    try:
        file = ExperimentFile.model_validate({key: value for key, value in tree.items() if value is not None})
    except ValidationError as error:
        problems = [_problem(found) for found in error.errors()]
    else:
        problems = _impossible(file, file.all_settings(), [key for item in overrides for key, _ in read_override(item)])
        if not any(item.startswith(("grid", "settings")) for item in own):  # else some of the file's are not asked for
            problems += [f"published: where is {shown(entry.where)}, which is of no setting" for entry in file.published
                         if not any(entry.where.items() <= setting.items() for setting in file.all_settings())]
    if problems:
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(f"{path}: {count}{'; '.join(problems)}")
    cells = _cells(file, path, overrides)
    _name_runs(cells)
    known = shaping_values(cells[0].config)
    shaping = [item for item in overrides if any(key in known for key, _ in read_override(item))]
    return Experiment(file.name or Path(path).stem, file.question, cells, file.published, [*own, *shaping])


def _cells(file: ExperimentFile, path: str, overrides: Sequence[str]) -> list[Cell]:
    """Raises a UserError that lists every problem of what the file asks for."""
    cells: list[Cell] = []
    found: dict[str, Cell] = {}  # {result_key: the first cell with that result}, of all but stacks
    problems = []

    def given(replaced: dict[str, Any]) -> list[str]:
        # JSON is valid YAML, so each value reaches the script with its type.
        return ["--config", file.config, *(f"{key}={json.dumps(value)}" for key, value in replaced.items()), *overrides]

    for seed, setting in itertools.product(file.seeds, file.all_settings()):
        replaced = file.overrides | setting | {"train_config.seed": seed}
        try:
            config = load_config(file.config, overrides, {path: replaced})
        except UserError as error:
            problems.append(str(error))
            continue
        if file.script == "main.py" and (steps := config.train_config.gradient_accumulation_steps) > 1:
            problems.append(f"{path}: script main.py takes one micro-batch a step, and {describe(setting)} needs "
                            f"{steps}: set script: main_accumulation.py")
        if file.also:
            of_words = {key: value for key, value in setting.items() if key in BAG_OF_WORDS_KEYS and key not in NAMED}
            replaced_here = replaced | {"train_config.seed": file.seeds[0]}  # it has no use for another one
            named = load_config(file.config, [*overrides, f"model_config.model_name={BAG_OF_WORDS}"],
                                {path: replaced_here})
            words = Cell(len(cells) + 1, {MODEL: BAG_OF_WORDS} | of_words, file.seeds[0],
                         without_encoder(named, BAG_OF_WORDS),
                         ["main.py", "--mode", "baseline", *given(replaced_here)])
            words = found.setdefault(result_key(words.config), words)
            if words.index > len(cells):  # else it is the same beside another encoder
                cells.append(words)
        cell = Cell(len(cells) + 1, setting, seed, config, [file.script, *given(replaced)])
        cells.append(cell)
        twin = found.setdefault(result_key(cell.config), cell)
        if twin is not cell:
            problems.append(f"{path}: runs {twin.index} and {cell.index} are the same ({describe(setting)}, seed "
                            f"{seed}): leave one out")
        if "stack" in file.also:
            if not config.train_config.test:
                problems.append(f"{path}: also: a stack needs tested runs: leave out train_config.test=false, or stack")
            stack = without_encoder(config, STACK_OF)  # its name follows from those of its members, see `find_finished`
            stack.run_name = f"stack-{config.run_name}"
            cells.append(Cell(len(cells) + 1, {MODEL: "stack"} | setting, seed, stack, [], [words, cell]))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))  # most problems are common to all cells
    return cells


def _problem(error: dict[str, Any]) -> str:
    """One of pydantic's errors in words."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "missing"):
        kind = "unknown key" if error["type"] == "extra_forbidden" else "missing key"
        return f"{kind} {key}: the keys are {', '.join(ExperimentFile.model_fields)}"
    return f"{key} is {shown(error['input'])}: {in_plain_words(error['msg'])}"


def _impossible(file: ExperimentFile, settings: list[dict[str, Any]], overridden: list[str]) -> list[str]:
    """What a file of the right shape asks for and cannot have. `overridden`: the keys on the command line that are not
    its own."""
    problems, varying = [], dict.fromkeys(itertools.chain(*settings))
    if bool(file.grid) == bool(file.settings):
        problems.append("give the settings either as a grid, such as grid: {train_config.learning_rate: [5e-5, 1e-4]}, "
                        "or one by one under settings")
    problems += [f"{key} varies: set it under overrides, because all runs lie in one folder and are tested on the same "
                 "reviews" for key in varying if key in (*SAME_TEST, "output_dir")]
    problems += [f"{key}: give seeds, such as seeds=[42]" for key in {**varying, **dict.fromkeys(overridden)}
                 if key == "train_config.seed"]
    problems += [f"{key} varies, so one value of it is not for the command line: give "
                 + (f'"grid.{key}=[...]"' if file.grid else "settings") for key in overridden if key in varying]
    return problems


def describe(setting: dict[str, Any]) -> str:
    """`model_name=..., learning_rate=...`"""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in setting.items()) or "base"


# ---------------------------------------------------------------------------------------------------------------------
# Which runs exist


def _name_runs(cells: list[Cell]) -> None:
    """Give each cell the name of the run folder that holds it already, or else a name that no other run has."""
    names, content = [_name(cell) for cell in cells], functools.cache(content_of)  # most cells have one dataset
    for cell, name in zip(cells, names, strict=True):
        cell.config.run_name = name
        is_taken = names.count(name) > 1 or cell.folder.exists() and any(cell.folder.iterdir())
        if is_taken or len(name) > LONGEST_RUN_NAME:
            keys = "".join(result_key(part.config) + str(contents_of(part.config, content))
                           for part in (*cell.members, cell))
            digest = hashlib.sha256(keys.encode()).hexdigest()[:8]
            cell.config.run_name = f"{name[:LONGEST_RUN_NAME - 9]}-{digest}"
    find_finished(cells, content)


def find_finished(cells: list[Cell], content: Callable[[str, str], str | None] | None = None) -> None:
    """Look for the cells among the run folders. A cell takes over the name of the folder that has its configuration.
    `content`: see `contents_of`."""
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}  # {result_key: [(its metrics.json, its folder's name)]}
    for path in sorted(Path(cells[0].config.output_dir).glob("*/config.yaml")):
        with suppress(UserError):  # not a run of this version; if a cell needs its name, the script says so
            found.setdefault(result_key(read_saved_config(path)), []).append(
                (read_metrics(path.parent), path.parent.name))
    content = content or functools.cache(content_of)
    for cell in sorted(cells, key=lambda cell: len(cell.members)):  # stacks last
        if cell.members:
            cell.config.model_config.model_name = stack_name(member.config.run_name for member in cell.members)
        needed = {"train", "test"} if cell.config.train_config.test else {"train"}
        if matching := [(needed <= metrics.keys(), name) for metrics, name in found.get(result_key(cell.config), ())
                        if not changed_input(metrics.get("data", {}), contents_of(cell.config, content))
                        and not (cell.members and metrics and _has_other_members(cell, name))]:
            own = cell.config.run_name
            cell.is_finished, cell.config.run_name = max(matching, key=lambda run: (run[0], run[1] == own))


def _has_other_members(cell: Cell, name: str) -> bool:
    """Whether the finished stack in the run folder `name` holds other models than those of the cell's members."""
    try:
        made = read_json(Path(cell.config.output_dir, name, "best", "config.json"))["members"]
        return [member["sha256"] for member in made] != [
            sha256_of(member.folder / "best" / MANIFEST) for member in cell.members]
    except FileNotFoundError:
        return True


def _name(cell: Cell) -> str:
    extra = [f"{key.rpartition('.')[2]}={value}" for key, value in cell.setting.items() if key not in NAMED]
    return "-".join([cell.config.run_name, *(re.sub(r"[^A-Za-z0-9_.=+-]+", "-", part).strip("-") for part in extra)])
