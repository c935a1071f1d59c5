"""--mode explain: shows which words a trained model's decision rests on, in the terminal and as an HTML page.

attribution.py computes what each word adds to the decision.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from suite.common.cli import Command
from suite.common.devices import Devices
from suite.common.pages import UNPRINTABLE, render
from suite.common.run_folder import read_mistakes, read_saved_config, run_of
from suite.common.storage import room_for, write_text
from suite.encoders.tokenizers import refuse_unknown_words
from suite.inference.attribution import Explanation, attribute
from suite.inference.classifier import Classifier, chosen_model
from utils import UserError, printable, say

MISTAKES, SHOWN_MISTAKES, SHOWN_WORDS = 20, 3, 10
FAINT = 0.1  # of the strongest attribution: the terminal shows weaker words without a colour
GREENS, REDS = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # numbers of terminal colours, from weak to strong


def remarks(explanation: Explanation) -> list[str]:
    """What a reader must know: the two logits, which part was not read, and whether the attributions are rough."""
    found = [f"logit of this class minus the mean of the others: {explanation.score:+.2f}; with padding instead of the "
             f"words: {explanation.baseline:+.2f}"]
    if explanation.unread:
        start, end = explanation.unread
        found.append(f"not read: {len(explanation.text[start:end].split()):,} of {len(explanation.text.split()):,} "
                     "words, because the review is longer than the model's input")
    if not explanation.is_complete:
        found.append("rough: the attributions add up to the difference between the two logits only within "
                     f"{explanation.error:.2f}")
    return found


def as_plain_text(explanation: Explanation) -> str:
    """The strongest words, each with its share of the sum of all attributions without their signs."""
    strongest = sorted(explanation.words, key=lambda word: -abs(word.attribution))[:SHOWN_WORDS]
    texts = [" ".join(explanation.text[word.start:word.end].split()) or "(space)" for word in strongest]
    return "\n".join(f"  {100 * word.attribution / explanation.total:+6.1f} %  {text}"
                     for word, text in zip(strongest, texts, strict=True))


def in_colour(explanation: Explanation) -> str:
    """The text that was read: green words speak for the predicted class, red ones against it."""
    parts = []
    for text, word, is_read in explanation.pieces():
        strength = abs(word.attribution) / explanation.largest if word else 0.0
        if not is_read:
            parts.append(f"\x1b[2m[... {len(text.split()):,} words not read ...]\x1b[0m")
        elif strength < FAINT:
            parts.append(text.translate(UNPRINTABLE))
        else:
            colours = GREENS if word.attribution > 0 else REDS
            colour = colours[min(int(strength * len(colours)), len(colours) - 1)]
            parts.append(f"\x1b[30;48;5;{colour}m{text.translate(UNPRINTABLE)}\x1b[0m")
    return "".join(parts)


def show(heading: str, explanation: Explanation) -> None:
    say(heading)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        say("green words speak for it, red ones against it:")
        print(in_colour(explanation))
    else:
        say("words that speak for it (+) and against it (-), as shares of all that is attributed:")
        say(as_plain_text(explanation))
    say("\n".join(remarks(explanation)) + "\n")


def write_explanations(path: Path, title: str, note: str, explanations: list[tuple[str, Explanation]]) -> None:
    """Write a page that needs neither a server nor the network, from (heading, explanation) of each review. Its words
    are coloured by how strongly they speak for or against the predicted class."""
    page = render("explanation.html", title=title, note=note, explanations=explanations, remarks=remarks)
    write_text(path, page.translate(UNPRINTABLE))


def explain(command: Command, devices: Devices) -> None:
    """Explain `command.text`, or the most confident mistakes of the model's run.

    Raises UserError if there is no model, no run of it, or no misclassified.csv.
    """
    config, output = command.config, command.output and Path(command.output)
    folder = chosen_model(command)
    run = run_of(folder) if command.model else config.run_folder
    if command.text is not None:
        reviews, title = [("", command.text)], "What the decision rests on"
    elif run is None:
        raise UserError(f"--model: {folder} is in no run folder, whose mistakes could be explained: give --text")
    else:
        reviews = [(f"review {row['id']}: labelled {printable(row['label'])}, ", row["text"])
                   for row in read_mistakes(run, MISTAKES)]
        title = f"{run.name}: its most confident mistakes"
        output = output or run / "misclassified.html"
    if not devices.is_main:
        return
    classifier = Classifier(folder, config, devices)  # a bag of words is refused
    if not reviews:
        raise UserError(f"{run} has no misclassified reviews, which is good news: explain one review with --text")
    tokens = classifier.encode({"text": [text for _, text in reviews]})["input_ids"]
    refuse_unknown_words("--model", str(folder), classifier.tokenizer, np.concatenate(tokens))
    with room_for(output.parent, fix="make room or choose another --output") if output else nullcontext():
        explained = []
        for before, text in tqdm(reviews, desc="explain", unit="review", leave=False, dynamic_ncols=True, disable=None):
            explanation = attribute(classifier, text)
            heading = f"{before}predicted {printable(explanation.predicted)} ({explanation.probability:.4f})"
            explained.append((heading, explanation))
        for heading, explanation in explained[:SHOWN_MISTAKES]:
            show(heading, explanation)
        if output:
            own = read_saved_config(run / "config.yaml") if run and (run / "config.yaml").exists() else config
            write_explanations(output, title, f"{own.demo_mark}Model: {folder}", explained)
            say(f"as a page: {output}")
