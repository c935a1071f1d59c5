"""Stacking (Wolpert 1992): a logistic regression on the predictions of finished runs, in a run folder of its own.

What it learns from are the runs' log-odds for the validation reviews: of each class against class 0, see `log_odds`.
With two classes and two runs, it learns two weights and a bias. Weights below 1 in sum also calibrate runs that are too
confident. The validation figures are cross-fitted: each review is predicted by weights that were fitted without it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, StratifiedKFold, cross_val_predict

from suite.common.checks import problems_of
from suite.common.devices import Devices
from suite.common.hub import check_hub, quiet_libraries
from suite.common.run_folder import best_folder, differences, is_encoder, read_metrics, stack_name, without_encoder
from suite.common.storage import MANIFEST, room_for, sha256_of, write_json
from suite.comparison.results import Result, read_result, refuse_different_tests
from suite.encoders.bag_of_words import class_logits, refuse_other_version
from suite.encoders.loading import STACK, kind_of
from suite.inference.classifier import log_odds, member_name
from suite.reviews.grouping import draw_units
from suite.reviews.splitting import load_split
from suite.training.evaluation import Predictions
from suite.training.finish import FittedRun, write_results
from suite.training.states import RunFolder
from utils import BAG_OF_WORDS, Config, UserError, config_fields, say

MOST_ITERATIONS = 1000  # of the logistic regression, which is scikit-learn's with its default penalty, L2 with C = 1
FOLDS = 5  # of the cross-fitting, or as many as the rarest class has validation reviews


def stack_runs(folders: Sequence[Path], output: Path) -> None:
    """Combine the finished runs in these folders into the run folder `output`.

    Raises UserError if they are not finished runs of one split, have no validation predictions, or `output` exists.
    """
    quiet_libraries()
    runs = [read_result(folder) for folder in folders]
    refuse_different_tests(runs)
    if other := next((run for run in runs if run.train_limit != runs[0].train_limit), None):
        raise UserError(f"{runs[0].folder} and {other.folder} were trained on different parts of the training reviews "
                        f"(data_config.train_limit: {runs[0].train_limit} and {other.train_limit}): name runs of one "
                        "part")
    models = [best_folder(folder) for folder in folders]  # whole, and the run's own
    for model in models:
        if kind_of(model) == BAG_OF_WORDS:
            refuse_other_version(model)
    valid = [read_result(folder, "valid").predictions for folder in folders]
    config = configuration(runs, output)
    folder, devices, names = RunFolder(config), Devices(config), runs[0].label_names
    folder.lock()
    refuse_existing_output(config)
    check_hub(config)
    split = load_split(config)
    folder.refuse_other_data(runs[0].data_fingerprint, split.fingerprint)
    started = time.perf_counter()
    features, labels = log_odds([predictions.probabilities for predictions in valid]), valid[0].labels
    ids = valid[0].ids
    units = None if split.units is None else np.unique(split.units[ids], return_inverse=True)[1]
    crossed = cross_fit(features, labels, names, units)
    regression = LogisticRegression(max_iter=MOST_ITERATIONS).fit(features, labels)
    seconds, iterations = time.perf_counter() - started, int(regression.n_iter_.max())
    figures = {"seconds": seconds + sum(run.metrics["train"]["seconds"] for run in runs),  # of the members, too
               "optimizer_steps": iterations}
    with room_for(output, sum(path.stat().st_size for model in models for path in model.rglob("*")),
                  fix="make room or choose another --output"):
        run = FittedRun(folder, devices, split, figures, iterations, Predictions(ids, labels, crossed))
        folder.save_best(lambda best: write_stack(best, runs, models, regression))
        tested = log_odds([run.predictions.probabilities for run in runs])
        predictions = Predictions(runs[0].predictions.ids, runs[0].predictions.labels,
                                  class_logits(regression.decision_function(tested).reshape(len(tested), -1)))
        show_weights(config, runs, regression)
        write_results(run, predictions)


def configuration(runs: Sequence[Result], output: Path) -> Config:
    """That of the stack: the members' data, their names, and the seed that the encoders share, or else the first's."""
    config = without_encoder(runs[0].config, stack_name(run.folder.resolve().name for run in runs))
    seeds = {run.seed for run in runs if is_encoder(run.config)}
    config.train_config.seed = seeds.pop() if len(seeds) == 1 else runs[0].seed
    try:
        return replace(config, output_dir=str(output.parent), run_name=output.name)
    except ValidationError as error:
        problems = problems_of(error, config_fields()).values()
        raise UserError(f"--output: {output}: {'; '.join(problems)}") from None


def refuse_existing_output(config: Config) -> None:
    """Raises UserError if the output is there, unless it is what the same command left when it was killed."""
    folder = config.run_folder
    saved = folder / "config.yaml"
    if folder.exists() and any(folder.glob("[!.]*")) and (
            not saved.exists() or read_metrics(folder) or differences(saved, config)):
        raise UserError(f"--output: {folder} exists already: choose another name, or remove it")


def cross_fit(features: np.ndarray, labels: np.ndarray, label_names: list[str], units: np.ndarray | None = None
              ) -> np.ndarray:
    """(reviews, classes) logits of these reviews, each by weights that were fitted on the other folds.

    `units` (reviews,): what belongs together and stays in one fold; None: single reviews.
    """
    counts = np.bincount(labels, minlength=len(label_names))
    if counts.min() < 2:
        raise UserError(f"the class {label_names[counts.argmin()]!r} has {counts.min()} review(s) to fit the weights "
                        "on, and two of each class are needed: train the runs with a larger share of data_config.split")
    count = min(FOLDS, counts.min())
    folds = StratifiedKFold(count, shuffle=True, random_state=0)
    if units is not None:
        fold_of = draw_units(units, labels, [1 / count] * count, seed=0)
        if single := [name for label, name in enumerate(label_names) if len(np.unique(fold_of[labels == label])) < 2]:
            raise UserError(f"the class {single[0]!r} has reviews of too few groups to fit the weights on: train the "
                            "runs with a larger share of data_config.split")
        folds = PredefinedSplit(fold_of)
    scores = cross_val_predict(LogisticRegression(max_iter=MOST_ITERATIONS), features, labels, cv=folds,
                               method="decision_function")
    return class_logits(scores.reshape(len(labels), -1))


def write_stack(folder: Path, runs: Sequence[Result], models: Sequence[Path], regression: LogisticRegression) -> None:
    """The folder needs no other: it holds copies of the members' models."""
    for number, model in enumerate(models):
        shutil.copytree(model, folder / member_name(number))
    write_json(folder / "config.json", {
        "model_type": STACK, "id2label": {str(i): name for i, name in enumerate(runs[0].label_names)},
        "data_fingerprint": runs[0].data_fingerprint, "weights": regression.coef_.tolist(),
        "intercept": regression.intercept_.tolist(),
        "members": [{"run": run.config.run_name, "sha256": sha256_of(model / MANIFEST), "settings": run.values}
                    for run, model in zip(runs, models, strict=True)]})


def show_weights(config: Config, runs: Sequence[Result], regression: LogisticRegression) -> None:
    """Print what each member weighs and gets right on its own."""
    weights = regression.coef_.reshape(len(regression.coef_), len(runs), -1)  # (1 or classes, members, classes - 1)
    for place, run in enumerate(runs):
        shown = " ".join(f"{weight:+.3f}" for weight in weights[:, place].ravel()[:6])
        say(f"{config.demo_mark}{run.folder}: test accuracy {run.metrics['test']['accuracy']:.4f}, weight {shown}")
