"""--mode audit: which labels of a dataset are probably wrong, as a .csv file and a web page.

Each label is compared with the probabilities of a model that has not seen it: of bags of words, each fitted on four
fifths of all labelled reviews. A finished run judges its validation and test reviews together with them: what both say
is stacked, as stacking.py says. confident_learning.py says which labels are flagged.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax
from tqdm import tqdm

from suite.common.cli import Command
from suite.common.devices import Devices
from suite.common.hub import check_hub
from suite.common.pages import UNPRINTABLE, render
from suite.common.run_folder import best_folder, read_metrics, run_of
from suite.common.storage import atomic_write, room_for, write_text
from suite.comparison.confident_learning import class_thresholds, expected_flags, flagged
from suite.comparison.results import Result, read_result
from suite.comparison.stacking import cross_fit
from suite.encoders.bag_of_words import BagOfWords, NGrams, fit_features, marked, split_words
from suite.inference.classifier import LEAST, log_odds
from suite.reviews.classes import name_rows
from suite.reviews.confirmed import NO_CLASS, Confirmed, read_confirmed, rows_in_split
from suite.reviews.grouping import draw_units, units_of
from suite.reviews.splitting import Split, load_split
from suite.training.calibration import fit_temperature
from suite.training.evaluation import SPLITS, Predictions, share_interval
from utils import Config, UserError, say

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FOLDS = 5
WORDS = 5  # n-grams that are shown for a suspect
FIRST = (100, 500)  # suspects of which it is said how many labels people did not confirm
ON_PAGE = 100  # suspects
COLUMNS = ("rank", "id", "where", "split", "row", "label", "suggested", "probability_of_label", "flagged",
           "words_against_label", "text")


@dataclass
class LabelCheck:
    """Labels, and what a model that has not seen them says."""

    predictions: Predictions
    words: dict[int, list[str]]  # {id: n-grams that speak against the label}, where a bag of words contradicts a label
    measured_by: dict[str, Predictions]  # {who: what they predict}; the accuracy of the first is the one to report

    def __post_init__(self):
        logits = np.log(np.maximum(self.predictions.probabilities, LEAST))
        self.temperature = fit_temperature(Predictions(self.predictions.ids, self.predictions.labels, logits))
        self.ids, self.labels, self.predicted = (getattr(self.predictions, name) for name in (
            "ids", "labels", "predicted"))
        self.probabilities = softmax(logits / self.temperature, axis=1)  # (n, classes)
        self.of_label = self.probabilities[np.arange(len(self.ids)), self.labels]  # (n,)
        thresholds = class_thresholds(self.probabilities, self.labels)
        self.flagged = flagged(self.probabilities, self.labels, thresholds)
        self.expected_flags = expected_flags(self.probabilities, thresholds)
        contradicted = np.flatnonzero(self.predicted != self.labels)
        self.suspects = contradicted[np.argsort(self.of_label[contradicted], kind="stable")]  # places, worst first


def audit(command: Command, devices: Devices) -> None:
    """Write `command.output` and the page beside it. Raises UserError if a run or a file does not fit the data."""
    config, output = command.config, Path(command.output)
    run = command.model and (run_of(Path(command.model)) or Path(command.model))
    results = run and read_run(run)
    check_hub(config)
    split = load_split(config)
    confirmed = command.confirmed and read_confirmed(command.confirmed, split.reviews)
    if run:
        refuse_other_reviews(run, results, split)
    check = cross_fitted(split, config.data_config.line_breaks)
    if run:
        check = with_run(run, results, split, check)
    summary = summary_of(check) + (confirmed_summary(check, confirmed, split) if confirmed else [])
    rows, page = rows_of(check, split), output.with_suffix(".html")
    with room_for(output.parent, fix="make room or choose another --output"):
        with atomic_write(output) as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        write_suspects_page(page, config, summary, rows, check.words)
    say("\n".join(config.demo_mark + line for line in [
        *summary, f"all {len(rows):,} labels that the predictions contradict, the most suspicious first: {output}; the "
        f"first of them as a page: {page}"]))


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities of a model that has not seen the label


def cross_fitted(split: Split, line_breaks: str) -> LabelCheck:
    """All labelled reviews of the split, each fold by a bag of words that was fitted on the other folds."""
    ids = np.sort(np.concatenate(list(split.ids_of.values())))
    labels, names = split.reviews.labels[ids], split.label_names
    fold_of = draw_folds(split, ids)
    ngrams, features = NGrams.of(split_words(list(split.reviews.table.select(ids)["text"]), line_breaks))
    logits, words = np.empty((len(ids), len(names))), {}
    for fold in tqdm(range(FOLDS), desc="fit", unit="fold", leave=False, dynamic_ncols=True, disable=None):
        seen, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        model, _ = fit_features(ngrams, features[seen], labels[seen], names, line_breaks, split.fingerprint)
        logits[held_out] = model.logits_of(features[held_out])
        places = held_out[logits[held_out].argmax(axis=1) != labels[held_out]]
        words |= words_against(model, features[places], Predictions(ids[places], labels[places], logits[places]))
    predictions = Predictions(ids, labels, logits).in_groups(split.units)
    who = f"bags of words that were fitted without them, on {FOLDS - 1} of {FOLDS} folds"
    return LabelCheck(predictions, words, {who: predictions})


def draw_folds(split: Split, ids: np.ndarray) -> np.ndarray:
    """(reviews,) the fold of each of these reviews. Copies of a text, and with a group column whole groups, share one.

    Raises UserError if a class stands in one fold alone.
    """
    labels = split.reviews.labels[ids]
    fold_of = draw_units(split_units(split, ids), labels, [1 / FOLDS] * FOLDS, seed=0)
    for label, name in enumerate(split.label_names):
        if len(np.unique(fold_of[labels == label])) < 2:
            raise UserError(f"the class {name!r} has too few different reviews or groups to be judged by a model that "
                            "has not seen them: add some, or remove the class")
    return fold_of


def split_units(split: Split, ids: np.ndarray) -> np.ndarray:
    """(reviews,) the number of what each of these reviews belongs to: its text, and with a group column, its group."""
    digests = split.digests[ids]
    return units_of(digests, digests if split.groups is None else split.groups[ids])


def read_run(run: Path) -> list[Result]:
    """A finished run as it was measured on validation, and if it was tested, on the test reviews."""
    return [read_result(run, name) for name in SPLITS if name in read_metrics(run)] or [read_result(run)]


def refuse_other_reviews(run: Path, results: Sequence[Result], split: Split) -> None:
    """Raises UserError if the run's reviews are not those of `split`, or its model is lost or damaged."""
    best_folder(run)
    if results[0].data_fingerprint != split.fingerprint:
        raise UserError(f"--model: {run} was trained on other reviews, or another split of them, than these: leave "
                        "data_config out of the command, or put the data back as they were")


def with_run(run: Path, results: Sequence[Result], split: Split, bags: LabelCheck) -> LabelCheck:
    """The validation and test reviews of a run, by its saved predictions and those of the bags of words."""
    own = Predictions(*(np.concatenate([getattr(result.predictions, name) for result in results])
                        for name in ("ids", "labels", "logits"))).in_groups(split.units)
    places = np.searchsorted(bags.ids, own.ids)
    stacked = cross_fit(log_odds([own.probabilities, bags.predictions.probabilities[places]]), own.labels,
                        split.label_names, split_units(split, own.ids))
    predictions = replace(own, logits=stacked)
    agreed = own.ids[predictions.predicted == bags.predicted[places]]
    return LabelCheck(predictions, {review: bags.words[review] for review in agreed.tolist() if review in bags.words},
                      {f"{run}, which has not learnt from them": own,
                       "the two together, it and bags of words that were fitted without them": predictions})


def words_against(model: BagOfWords, features: csr_matrix, contradicted: Predictions) -> dict[int, list[str]]:
    """{id: the n-grams that speak most against the label} of these reviews, whose labels the model contradicts."""
    speaking = model.speaking_for(contradicted.predicted, contradicted.labels, features, WORDS)
    return dict(zip(contradicted.ids.tolist(), speaking, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def rows_of(check: LabelCheck, split: Split) -> list[dict[str, Any]]:
    """Those of the .csv file. `split`, `row` and `label` are what --confirmed takes; `where` is the row as its author
    counts it."""
    reviews, names, numbers, rows = split.reviews, split.label_names, rows_in_split(split.reviews), []
    for rank, place in enumerate(check.suspects, start=1):
        review = int(check.ids[place])
        rows.append(dict(zip(COLUMNS, (
            rank, review, name_rows(reviews.parts, [review]), reviews.split_names[review], numbers[review],
            names[check.labels[place]], names[check.predicted[place]], f"{check.of_label[place]:.6g}",
            "yes" if check.flagged[place] else "no", " | ".join(check.words.get(review, [])), split.text(review)),
            strict=True)))
    return rows


def write_suspects_page(path: Path, config: Config, summary: Sequence[str], rows: Sequence[dict[str, Any]],
                        words: dict[int, list[str]]) -> None:
    """The first of these rows, the words that speak against their labels marked, on a page that needs neither a server
    nor the network."""
    shown = [(row, marked(row["text"], words.get(row["id"], []), config.data_config.line_breaks))
             for row in rows[:ON_PAGE]]
    page = render("suspects.html", summary=summary, is_demo=config.is_demo, shown=shown, contradicted=len(rows))
    write_text(path, page.translate(UNPRINTABLE))


def summary_of(check: LabelCheck) -> list[str]:
    n, flags = len(check.ids), int(check.flagged.sum())
    return [
        *(f"{n:,} labels compared with the predictions of {who}: accuracy "
          f"{accuracy(predictions, predictions.labels)}" for who, predictions in check.measured_by.items()),
        f"flagged as probably wrong: {flags:,} ({100 * flags / n:.1f} %), by confident learning, at the temperature "
        f"{check.temperature:.3f}",
        f"if no label were wrong and reviews were as hard as the probabilities say, {check.expected_flags:,.0f} would "
        "be flagged: the number is no estimate of the wrong labels, so read them from the top"]


def confirmed_summary(check: LabelCheck, confirmed: Confirmed, split: Split) -> list[str]:
    """Accuracy on all labels and on those that people confirmed or corrected, of the run if there is one, and what
    people said of the suspects; of the dataset's splits that the file names, as nobody was asked about others."""
    asked = np.isin(split.reviews.split_names[check.ids], confirmed.splits)
    if not asked.any():
        return ["none of these labels is in a split of which --confirmed names rows"]
    (who, measured), labels = next(iter(check.measured_by.items())), confirmed.labels[check.ids]
    agreed, doubted = asked & (labels != NO_CLASS), asked & (labels != check.labels)
    suspects = check.suspects[asked[check.suspects]]
    first = ", ".join(f"{doubted[suspects[:count]].sum()} of the first {count}"
                      for count in sorted({min(count, len(suspects)) for count in FIRST}))
    flags = asked & check.flagged
    return [
        f"labels of the split {' and '.join(confirmed.splits)} of the dataset, and {who}: accuracy "
        f"{accuracy(measured, check.labels, asked)} on all {asked.sum():,}, and "
        f"{accuracy(measured, labels, agreed)} on the {agreed.sum():,} that people confirmed or corrected, or were not "
        "asked about",
        f"people did not confirm {doubted.sum():,} labels: {first}, {(doubted & flags).sum():,} of the {flags.sum():,} "
        "that are flagged"]


def accuracy(measured: Predictions, labels: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> str:
    """With its interval, on these `labels` (n,) of the reviews that are `chosen` (n,) bool."""
    is_right, groups = (measured.predicted == labels)[chosen], measured.groups
    low, high = share_interval(is_right, None if groups is None else groups[chosen])
    return f"{is_right.mean():.4f} (95 % interval {low:.4f} to {high:.4f})"
