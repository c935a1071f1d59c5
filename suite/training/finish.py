"""How a run ends, whatever model it has trained: metrics.json, predictions, mistakes, plots, model card, last lines."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from data import evaluation_loader, prepare_data
from suite.common.devices import Devices
from suite.common.figures import on_console, show
from suite.common.pages import write_model_card
from suite.common.run_folder import best_folder, contents_of, is_encoder, read_history, read_metrics
from suite.common.storage import THRESHOLD, read_json, write_json, write_text
from suite.encoders.placement import pass_tokens, place_model
from suite.inference.classifier import open_classifier
from suite.reviews.splitting import Split, load_split
from suite.training.calibration import calibration_figures
from suite.training.evaluation import (
    SPLITS,
    SUREST,
    TEST_PREDICTIONS,
    VALID_PREDICTIONS,
    Predictions,
    compute_metrics,
    mistakes,
    threshold_figures,
    write_mistakes,
    write_predictions,
)
from suite.training.meter import environment
from suite.training.states import RunFolder
from suite.training.tracking import Tracker
from utils import Config, UserError, brief, say


class FittedRun:
    """A run whose model a solver has fitted in one go. Its attributes are what the end of a run needs to know: a `Run`
    and a `TrainedRun` have them, too."""

    def __init__(self, folder: RunFolder, devices: Devices, split: Split, train: dict[str, Any], iterations: int,
                 valid: Predictions):
        """Begin the run folder, and write the validation's predictions and the only record of the history.

        `train`: what metrics.json says about the training, in so many `iterations` of the solver.
        """
        folder.begin()
        valid = valid.in_groups(split.units)
        self.config, self.devices, self.data, metrics = folder.config, devices, split, compute_metrics(valid)
        self.contents = contents_of(folder.config)
        self.figures = {"train": train, "valid": metrics | {"epoch": 1}}
        record = {"step": iterations, "epoch": 1.0} | {f"valid/{name}": value for name, value in metrics.items()
                                                       if isinstance(value, float)}
        write_predictions(folder.path / VALID_PREDICTIONS, valid, split.label_names)
        write_text(folder.path / "history.jsonl", json.dumps(record) + "\n")
        self.tracker = Tracker(self.config)
        self.tracker.log(record)


def write_results(run: Any, predictions: Predictions | None = None) -> None:
    """The end of a run, in process 0: write what was measured, and print the main figures.

    `run`: a Run, a TrainedRun or a FittedRun; `predictions`: for the test reviews, None if it was not tested.
    """
    if not run.devices.is_main:
        return
    config, folder = run.config, run.config.run_folder
    tested = {}
    if predictions is not None:
        predictions = predictions.in_groups(run.data.units)
        tested["test"] = compute_metrics(predictions)
        if temperature := run.figures.get("valid", {}).get("temperature"):
            tested["calibration"] = calibration_figures(predictions, temperature)
        if (chosen := folder / "best" / THRESHOLD).exists():
            tested["threshold"] = threshold_figures(predictions, read_json(chosen))
    here = environment(run.devices)
    # A TrainedRun's figures hold the data and the environment of its training, which stay.
    data = run.figures.get("data") or run.data.record | {"contents": run.contents}
    metrics = {"data": data, "environment": here} | run.figures | tested
    if "environment" in run.figures:
        metrics["tested_on"] = here
    if tested:
        label_names, history = run.data.label_names, read_history(folder / "history.jsonl")
        rows = mistakes(predictions, run.data.text, label_names)
        write_predictions(folder / TEST_PREDICTIONS, predictions, label_names)
        write_mistakes(folder / "misclassified.csv", rows)
        plots = try_plots("suite.training.plots", folder / "plots", config, history, predictions, label_names)
        write_model_card(folder / "best", config, metrics, label_names)
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    if tested:
        summary = {f"{split}/{name}": value for split in ("valid", "test") for name, value in
                   metrics.get(split, {}).items()}
        run.tracker.report(summary, rows, predictions, label_names, plots)
    print_results(config, metrics)
    run.tracker.finish()


def try_plots(module: str, *arguments: Any) -> list[Path]:
    """The paths that the module's `save_plots` returns; none, and one line, where matplotlib is broken.

    The module is imported here because it imports matplotlib, and no result may depend on a picture.
    """
    try:
        return importlib.import_module(module).save_plots(*arguments)
    except Exception as error:
        say(f"plots: left out ({type(error).__name__}: {brief(error)}); everything else is in the folder")
        return []


def show_finished(config: Config) -> bool:
    """Whether the run folder holds this run, finished, with nothing left to do; prints its results then.

    Raises UserError as `RunFolder.finished_metrics` does.
    """
    metrics = RunFolder(config).finished_metrics()
    if metrics is None:
        return False
    say(f"{config.run_folder} holds this run, finished: nothing was done again. For another one set run_name=NAME; "
        "to replace it, train_config.resume=never train_config.overwrite=true")
    print_results(config, metrics)
    return True


def lacks_only_its_test(config: Config) -> bool:
    """Whether the run was finished with train_config.test=false, and only its test is missing."""
    return "train" in read_metrics(config.run_folder) and config.train_config.resume != "never"


def print_results(config: Config, metrics: dict[str, Any]) -> None:
    split, train = "test" if "test" in metrics else "valid", metrics.get("train")
    found, unit = metrics[split], "masked words" if config.pretrains else "reviews"
    if "groups" in found:
        unit += f" of {show(found, 'groups')} group{'' if found['groups'] == 1 else 's'}"
    lines = [f"{SPLITS[split]} {on_console(found)}, {show(found, 'n')} {unit}"]
    if "surest_accuracy" in found:
        lines.append(f"accuracy {show(found, 'surest_accuracy')} on the {100 * SUREST:.0f} % of highest confidence")
    if threshold := metrics.get("threshold"):
        lines.append(f"at the threshold of {threshold['threshold']:.4g} ({threshold['aim']}): accuracy "
                     f"{show(threshold, 'accuracy')}, F1 {threshold['f1']:.4f}")
    if calibration := metrics.get("calibration"):
        loss, error = (f"{calibration[f'{name}_before']:.4f} -> {calibration[f'{name}_after']:.4f}"
                       for name in ("loss", "ece"))
        lines.append(f"calibrated: loss {loss}, calibration error {error}")
    if not train:
        lines.append("this run is not finished, and this is its best model so far: give the command that trains it "
                     "again")
    elif is_encoder(config):
        lines.append(f"trained in {show(train, 'optimizer_steps')} optimizer steps and {show(train, 'seconds')} s, "
                     f"{show(train, 'samples_per_second')} {'windows' if config.pretrains else 'reviews'} a second")
    else:
        lines.append(f"trained in {show(train, 'seconds')} s")
    if config.pretrains:
        lines.append(f"fine-tuning starts from it with model_config.model_name={config.run_folder / 'best'}"
                     + ("" if config.model_config.pretrained else " model_config.pretrained=true"))
    lines.append(f"everything about this run: {config.run_folder}")
    say("\n".join(config.demo_mark + line for line in lines))


# ---------------------------------------------------------------------------------------------------------------------
# --mode test


MAY_DIFFER = ("train_config.device", "train_config.mixed_precision", "train_config.compile", "log_config",
              "train_config.gradient_accumulation_steps", "data_config.batch_size")


class TrainedRun:
    """What a test needs to know of a run: the same attributes as a `Run` has, and `classifier`, its best model."""

    def __init__(self, config: Config, devices: Devices):
        """Raises UserError if there is no trained model, or if it was trained on other data, classes or settings: on
        another split, it would be tested on reviews that it was trained on."""
        self.config, self.devices, folder = config, devices, RunFolder(config)
        folder.lock()
        devices.barrier()
        best = best_folder(folder.path)
        folder.refuse_differences(ignored=MAY_DIFFER)
        self.classifier = open_classifier(best, config, devices)
        self.model = getattr(self.classifier, "model", None)  # None: a bag of words, or a stack
        with devices.main_process_first():
            self.data = prepare_data(config, trained_model=str(best)) if is_encoder(config) else load_split(config)
        folder.refuse_other_data(self.classifier.data_fingerprint, self.data.fingerprint)
        if self.data.label_names != self.classifier.label_names:
            raise UserError(f"{config.data_config.dataset} has the classes {self.data.label_names}, {best} was trained "
                            f"on {self.classifier.label_names}: test it on the data of its training")
        self.figures, self.tracker = read_metrics(folder.path), Tracker(config, job_type="test")

    @property
    def contents(self) -> dict[str, str | None]:
        return contents_of(self.config)

    def predictions(self) -> Predictions:
        """Those of a bag of words or a stack for the test reviews."""
        return predictions_of(self.classifier.logits, self.data, "test")


def predictions_of(logits: Callable[[list[str]], np.ndarray], split: Split, name: str) -> Predictions:
    """The predictions for one of the three splits, of a model that gives `logits` (texts, classes) of texts."""
    texts, labels = split.texts_and_labels(name)
    return Predictions(split.ids_of[name], labels, logits(texts))


def test_loader(run: Any, model: nn.Module) -> DataLoader:
    """The test reviews in padded batches, for `model`, which goes to the device of the run."""
    config, device = run.config, run.devices.device
    place_model(model, device, compiled=config.train_config.compile)
    return evaluation_loader(run.data, "test", config, device, pass_tokens(model, device))
