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
    published:                                        figures of others, shown beside ours
      - where: {train_config.effective_batch_size: 64}
        accuracy: {their name: 0.8918}

A cell is one setting with one seed. Every setting runs with the first seed before any runs with the second, so that an
experiment that is cut short has something of each setting. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.common.checks import LONGEST_RUN_NAME
from suite.common.run_folder import SAME_TEST, read_metrics, read_saved_config, shaping_values
from utils import Config, UserError, config_fields, leaves, load_config, read_yaml, suggest

SCRIPTS = ("main.py", "main_accumulation.py")
KEYS = ("name", "question", "script", "config", "overrides", "grid", "settings", "seeds", "published")
PER_CELL = {"train_config.seed": "list it under `seeds`", "run_name": "each run gets a name of its own",
            "train_config.objective": "an experiment tests classifiers"}
# The default run_name names these already.
NAMED = ("model_config.model_name", "data_config.max_len", "train_config.effective_batch_size")


@dataclass
class Cell:
    """One run of the experiment."""

    index: int  # from 1, in the order of running
    setting: dict[str, Any]  # {dotted key: value} of what differs between the experiment's settings
    seed: int
    config: Config
    arguments: list[str]  # for the script; run_name is added when the cell runs
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def is_begun(self) -> bool:
        return (self.folder / "config.yaml").exists()

    @functools.cached_property
    def identity(self) -> str:
        return identity(self.config)


def identity(config: Config) -> str:
    """Equal for two configurations if they give the same result, whatever the names of their run folders."""
    return json.dumps(shaping_values(config), sort_keys=True)


@dataclass
class Experiment:
    name: str
    question: str
    script: str
    cells: list[Cell]
    published: list[tuple[dict[str, Any], dict[str, float]]]  # ({dotted key of the grid: value}, {source: accuracy})
    overrides: list[str]  # those of the command line that change results, so that the file alone does not describe them

    @property
    def report_folder(self) -> Path:
        return Path(self.cells[0].config.output_dir) / f"{self.name}-report"

    def published_for(self, setting: dict[str, Any]) -> dict[str, float]:
        """{source: accuracy} of others for a setting of the grid."""
        return {source: share for where, accuracy in self.published if where.items() <= setting.items()
                for source, share in accuracy.items()}


def read_experiment(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Raises a UserError that lists every problem of the file and of the overrides (`section.key=value`)."""
    tree = read_yaml(path, "name an experiment such as experiments/demo.yaml")
    tree = {key: value for key, value in tree.items() if value is not None}
    problems = []
    for key in tree.keys() - set(KEYS):
        near = difflib.get_close_matches(str(key), KEYS, n=1)
        problems.append(f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(KEYS)}"))
    name, script = tree.get("name", Path(path).stem), tree.get("script", "main.py")
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", str(name)) or len(str(name).encode()) > LONGEST_RUN_NAME:
        problems.append(f"name is {name!r}: use letters, digits and . _ - + for a folder's name, up to "
                        f"{LONGEST_RUN_NAME} of them")
    if script not in SCRIPTS:
        problems.append(f"script is {script!r}: choose one of {', '.join(SCRIPTS)}")
    sections = {}
    for key in ("overrides", "grid"):
        is_section = isinstance(tree.setdefault(key, {}), dict)
        sections[key] = dict(leaves(tree[key])) if is_section else {}
        if not is_section:
            problems.append(f"{key} must hold section.key: value, got {tree[key]!r}")
    settings, varied, found = _read_settings(sections["grid"], tree.get("settings"), sections["overrides"])
    problems += found + _varied_problems(varied, sections["overrides"], overrides) + _seed_problems(tree.get("seeds"))
    published, found = _read_published(tree.get("published", []), varied)
    problems += found
    if problems:
        raise _refusal(path, problems)

    base = str(tree.get("config", "config.yaml"))
    cells = []
    for seed, setting in itertools.product(tree["seeds"], settings):
        replaced = sections["overrides"] | setting | {"train_config.seed": seed}
        try:
            config = load_config(base, overrides, {path: replaced})
        except UserError as error:
            problems.append(str(error))
            continue
        if script == "main.py" and config.train_config.gradient_accumulation_steps > 1:
            problems.append(f"{path}: script main.py takes one micro-batch a step, and {describe(setting)} needs "
                            f"{config.train_config.gradient_accumulation_steps}: set script: main_accumulation.py")
            continue
        # JSON is valid YAML, so each value reaches the script with its type.
        arguments = ["--config", base, *(f"{key}={json.dumps(value)}" for key, value in replaced.items()), *overrides]
        cells.append(Cell(len(cells) + 1, setting, seed, config, arguments))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))  # most problems are common to all cells
    if twins := [(one, other) for one, other in itertools.combinations(cells, 2) if one.identity == other.identity]:
        raise _refusal(path, [f"runs {one.index} and {other.index} are the same ({describe(one.setting)}; "
                              f"{describe(other.setting)}): leave one out" for one, other in twins])
    _name_runs(cells)
    shaping = [item for item in overrides if item.partition("=")[0] in shaping_values(cells[0].config)]
    return Experiment(str(name), str(tree.get("question", "")), script, cells, published, shaping)


def _refusal(path: str, problems: list[str]) -> UserError:
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return UserError(f"{path}: {count}{'; '.join(problems)}")


def _read_settings(grid: dict[str, Any], listed: Any, fixed: dict[str, Any]
                   ) -> tuple[list[dict[str, Any]], dict[str, list], list[str]]:
    """(the settings, {dotted key: its values} of what differs between them, their problems)."""
    if listed is not None:
        if grid:
            return [], {}, ["grid and settings are both given: leave one out"]
        if not isinstance(listed, list) or not listed or not all(isinstance(setting, dict) for setting in listed):
            return [], {}, ["settings must be a list of {section.key: value}, such as [{}, {model_config.pooling: "
                            f"mean}}], got {listed!r}"]
        settings = [dict(leaves(setting)) for setting in listed]
        varied = {key: [each[key] for each in settings if key in each] for key in itertools.chain(*settings)}
        return settings, varied, []
    problems = [f"{key} stands in grid and in overrides: leave one out" for key in grid.keys() & fixed.keys()]
    if not grid:
        problems.append("grid is empty: give at least one key with its values, such as "
                        "train_config.learning_rate: [5e-5, 1e-4]")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            problems.append(f"grid: {key} must be a list of values, got {values!r}")
        elif twice := [value for place, value in enumerate(values) if value in values[:place]]:
            problems.append(f"grid: {key} lists {twice[0]!r} twice: leave one out")
    if problems:
        return [], grid, problems
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())], grid, []


def _varied_problems(varied: dict[str, Any], fixed: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    known = dict(config_fields())
    problems = [f"unknown key {key}{suggest(key, known)}" for key in varied if key not in known]
    given = {item.partition("=")[0] for item in overrides}
    problems += [f"{key} varies within the experiment: it cannot be replaced on the command line"
                 for key in varied if key in given]
    problems += [f"{key} cannot be set for an experiment: {fix}" for key, fix in PER_CELL.items()
                 if key in varied or key in fixed or key in given]
    problems += [f"{key} varies: runs on other reviews cannot be compared: set it under overrides"
                 for key in varied if key in SAME_TEST]
    if "output_dir" in varied:
        problems.append("output_dir varies: set it under overrides; all runs of an experiment lie together")
    return problems


def _seed_problems(seeds: Any) -> list[str]:
    if not isinstance(seeds, list) or not seeds:
        return [f"seeds must be a list such as [42, 43, 44], got {'nothing' if seeds is None else repr(seeds)}"]
    wrong = [seed for seed in seeds if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32]
    if wrong:
        return [f"seeds: {', '.join(map(repr, wrong))}: use integers from 0 to {2**32 - 1}"]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    return [f"seeds: {', '.join(map(str, twice))} more than once: the same seed gives the same run"] if twice else []


def _read_published(entries: Any, grid: dict[str, Any]) -> tuple[list[tuple[dict, dict]], list[str]]:
    """(the entries as `Experiment.published` has them, their problems)."""
    published, problems = [], []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        parts = (entry.get("where"), entry.get("accuracy")) if isinstance(entry, dict) else (None, None)
        if not all(isinstance(part, dict) and part for part in parts) or len(entry) > 2:
            problems.append(f"published, entry {number}: write where: {{key: value of the grid}} and "
                            "accuracy: {source: share of reviews}")
            continue
        where, accuracy = dict(leaves(parts[0])), parts[1]
        problems += [f"published, entry {number}: {key}: {value!r} is of no setting" for key, value in where.items()
                     if not isinstance(grid.get(key), list) or value not in grid[key]]
        problems += [f"published, entry {number}: the accuracy of {source} is {value!r}: give a share from 0 to 1"
                     for source, value in accuracy.items() if not isinstance(value, float | int) or not 0 <= value <= 1]
        published.append((where, {str(source): value for source, value in accuracy.items()}))
    return published, problems


def describe(setting: dict[str, Any]) -> str:
    """`model_name=..., learning_rate=...`"""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in setting.items()) or "base"


# ---------------------------------------------------------------------------------------------------------------------
# Which runs exist


def _name_runs(cells: list[Cell]) -> None:
    """Give each cell the name of the run folder that holds it already, or else a name that no other run has."""
    names = [_name(cell) for cell in cells]
    for cell, name in zip(cells, names, strict=True):
        short = name.encode()[:LONGEST_RUN_NAME - 9].decode(errors="ignore")
        long_name = f"{short}-{hashlib.sha256(cell.identity.encode()).hexdigest()[:8]}"
        is_usable = names.count(name) == 1 and len(name.encode()) <= LONGEST_RUN_NAME
        cell.config.run_name = name if is_usable else long_name
        if cell.folder.exists() and any(cell.folder.iterdir()):
            cell.config.run_name = long_name  # the folder belongs to another run, unless find_finished says otherwise
    find_finished(cells)


def find_finished(cells: list[Cell]) -> None:
    """Look for the cells among the run folders. A cell takes over the name of the folder that has its configuration."""
    found: dict[str, list[tuple[set[str], str]]] = {}  # {identity: [(parts of its metrics.json, its folder's name)]}
    for path in sorted(Path(cells[0].config.output_dir).glob("*/config.yaml")):
        try:
            key = identity(read_saved_config(path))
        except UserError:
            continue  # not a run of this suite; if a cell needs its name, the script says so
        try:
            parts = set(read_metrics(path.parent))
        except UserError:
            parts = set()
        found.setdefault(key, []).append((parts, path.parent.name))
    for cell in cells:
        needed = {"train", "test"} if cell.config.train_config.test else {"train"}
        if matching := [(needed <= parts, name) for parts, name in found.get(cell.identity, ())]:
            own = cell.config.run_name
            cell.is_finished, cell.config.run_name = max(matching, key=lambda run: (run[0], run[1] == own))


def _name(cell: Cell) -> str:
    extra = [f"{key.rpartition('.')[2]}={value}" for key, value in cell.setting.items() if key not in NAMED]
    return "-".join([cell.config.run_name, *(re.sub(r"[^\w.=+-]+", "-", part).strip("-") for part in extra)])
