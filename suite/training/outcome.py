"""What a run's test leaves: metrics, predictions, mistakes, plots and model card, whatever model was tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from suite.common.protocols import Devices
from suite.common.run_folder import is_encoder, read_history
from suite.common.storage import write_json, write_text
from suite.training.efficiency import environment
from suite.training.evaluation import (
    SPLITS,
    TEST_PREDICTIONS,
    VALID_PREDICTIONS,
    Predictions,
    compute_metrics,
    mistakes,
    write_mistakes,
    write_predictions,
)
from suite.training.model_card import write_model_card
from suite.training.states import RunFolder
from suite.training.tracking import Tracker, try_plots
from utils import Config, say


def write_results(config: Config, devices: Devices, predictions: Predictions, label_names: list[str],
                  text: Callable[[int], str], figures: dict[str, Any], tracker: Tracker) -> None:
    """Write everything about the `predictions` on the test reviews, in process 0, and print the most of it.

    `text` returns the review with an id; `figures`: what metrics.json says about training and validation.
    """
    folder = config.run_folder
    metrics = figures | {"test": compute_metrics(predictions), "environment": environment(devices)}
    rows = mistakes(predictions, text, label_names)
    write_predictions(folder / TEST_PREDICTIONS, predictions, label_names)
    write_mistakes(folder / "misclassified.csv", rows)
    history = read_history(folder / "history.jsonl")
    plots = try_plots("suite.training.plots", folder / "plots", config, history, predictions, label_names)
    write_model_card(folder / "best", config, metrics, label_names)
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    tracker.report({f"{split}/{name}": value for split in ("valid", "test")
                  for name, value in metrics.get(split, {}).items()}, rows, predictions, label_names, plots)
    print_results(config, metrics)
    tracker.finish()


def write_validation(config: Config, predictions: Predictions, label_names: list[str], iterations: int
                     ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a model that a solver has fitted in one go: write its predictions for the validation reviews, and the only
    record of its history. Returns (metrics, the record)."""
    metrics = compute_metrics(predictions)
    record = {"step": iterations, "epoch": 1.0} | {f"valid/{name}": value for name, value in metrics.items()
                                                   if isinstance(value, float)}
    write_predictions(config.run_folder / VALID_PREDICTIONS, predictions, label_names)
    write_text(config.run_folder / "history.jsonl", json.dumps(record) + "\n")
    return metrics, record


def write_untested(config: Config, devices: Devices, figures: dict[str, Any], tracker: Tracker) -> None:
    """The end of a run without a test, in process 0."""
    if devices.is_main:
        metrics = figures | {"environment": environment(devices)}
        write_json(config.run_folder / "metrics.json", metrics)  # it says that the run is finished
        print_results(config, metrics)
        tracker.finish()


def show_finished(config: Config) -> bool:
    """Whether the run folder holds this run, finished, and nothing is to be done again; its results are printed.

    Raises UserError as `RunFolder.finished_metrics` does.
    """
    metrics = RunFolder(config).finished_metrics()
    if metrics is None:
        return False
    say(f"{config.run_folder} holds this run, finished: nothing was done again. For another one set run_name=NAME; "
        "to replace it, train_config.resume=never train_config.overwrite=true")
    print_results(config, metrics)
    return True


def print_results(config: Config, metrics: dict[str, Any]) -> None:
    demo, split = config.demo_mark, "test" if "test" in metrics else "valid"
    found = metrics[split]
    if config.pretrains:
        say(f"{demo}masked words of the validation texts: loss {found['loss']:.4f}, perplexity "
            f"{found['perplexity']:.2f}, accuracy {found['accuracy']:.4f}, {found['n']:,} words; fine-tuning starts "
            f"from it with model_config.model_name={config.run_folder / 'best'}"
            + ("" if config.model_config.pretrained else " model_config.pretrained=true"))
    else:
        low, high = found["accuracy_ci95"]
        say(f"{demo}{SPLITS[split]} accuracy {found['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), loss "
            f"{found['loss']:.4f}, F1 {found['f1']:.4f}, {found['n']:,} reviews")
    if (train := metrics.get("train")) and not is_encoder(config):
        say(f"{demo}{train['seconds']:.1f} s of training")
    elif train:
        say(f"{demo}{train['optimizer_steps']:,} optimizer steps in {train['seconds']:.1f} s, "
            f"{train['samples_per_second']:.1f} {'windows' if config.pretrains else 'reviews'} a second")
    else:
        say(f"{demo}this run is not finished, and this is its best model so far: give the command that trains it again")
    say(f"{demo}everything about this run: {config.run_folder}")
