"""--mode explain: shows which words a trained model's decision rests on, in the terminal and as an HTML page.

attribution.py computes what each word adds to the decision.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from tqdm import tqdm

from suite.common.cli import Command
from suite.common.protocols import Devices
from suite.common.run_folder import read_mistakes
from suite.common.storage import atomic_write, room_for
from suite.inference.attribution import Explanation, attribute
from suite.inference.classifier import Classifier, chosen_model
from utils import UserError, printable, say

MISTAKES, SHOWN_MISTAKES, SHOWN_WORDS = 20, 3, 10
FAINT = 0.1  # of the strongest attribution: the terminal shows weaker words without a colour
GREENS, REDS = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # numbers of terminal colours, from weak to strong
# Control characters could change the terminal's state, and HTML has no place for them.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


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
            parts.append(text.translate(CONTROLS))
        else:
            colours = GREENS if word.attribution > 0 else REDS
            colour = colours[min(int(strength * len(colours)), len(colours) - 1)]
            parts.append(f"\x1b[30;48;5;{colour}m{text.translate(CONTROLS)}\x1b[0m")
    return "".join(parts)


def show(heading: str, explanation: Explanation) -> None:
    say(heading)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        say("green words speak for it, red ones against it:")
        print(in_colour(explanation))
    else:
        say("words that speak for it (+) and against it (-), as shares of all that is attributed:")
        say(as_plain_text(explanation))
    for remark in remarks(explanation):
        say(remark)


def write_page(path: Path, title: str, note: str, explanations: list[tuple[str, Explanation]]) -> None:
    """Write a page that needs neither a server nor the network, from (heading, explanation) of each review."""
    reviews = "".join(f"<h2>{escape(heading)}</h2>\n"
                      f"{''.join(f'<p class=remark>{escape(remark)}</p>' for remark in remarks(explanation))}"
                      f'<p class="review" dir="auto">{as_html(explanation)}</p>\n'
                      for heading, explanation in explanations)
    page = PAGE.substitute(title=escape(title), note=escape(note), reviews=reviews)
    with atomic_write(path) as file:
        file.write(page.translate(CONTROLS))


def as_html(explanation: Explanation) -> str:
    """The whole text, with words coloured by how strongly they speak for or against the predicted class."""
    parts = []
    for text, word, is_read in explanation.pieces():
        if word:
            side = "for" if word.attribution > 0 else "against"
            share = 100 * word.attribution / explanation.total
            parts.append(f'<span class="{side}" style="--strength: {abs(word.attribution) / explanation.largest:.3f}" '
                         f'title="{share:+.1f} % ({word.attribution:+.4f} logits)">{escape(text)}</span>')
        else:
            parts.append(escape(text) if is_read else f'<span class="unread" title="not read">{escape(text)}</span>')
    return "".join(parts)


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1240px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
.note, .remark { color: #555; font-size: .85rem; margin: .2rem 0; }
.review { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60rem; margin: .3rem 0; line-height: 1.7; }
.for, .against { border-radius: 3px; }
.for { background: rgb(0 150 80 / calc(var(--strength) * .6)); }
.against { background: rgb(213 60 0 / calc(var(--strength) * .6)); }
.unread { color: #999; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$note</p>
<p class="note"><span class="for" style="--strength: 1">Green</span> words speak for the predicted class,
<span class="against" style="--strength: 1">red</span> ones against it; stronger words have stronger colours. Point at a
word for its share of all attributions, and for its logits. Grey text was not read, because the review is longer than
the model's input. Method: integrated gradients from a review of padding tokens (Sundararajan et al. 2017).</p>
$reviews
</body>
</html>
""")


def explain(command: Command, devices: Devices) -> None:
    """Explain `command.text`, or the most confident mistakes of the run.

    Raises UserError if there is no model, if its tokenizer cannot tell where its tokens stand in a text, or if there is
    no usable misclassified.csv.
    """
    config, text, output = command.config, command.text, command.output and Path(command.output)
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {output.absolute().parent}")
    folder = chosen_model(command)
    if text is not None:
        rows, title = [{"text": text}], "What the decision rests on"
    else:
        rows, title = read_mistakes(config.run_folder, MISTAKES), f"{config.run_name}: its most confident mistakes"
        output = output or config.run_folder / "misclassified.html"
    if not rows:
        raise UserError(f"{config.run_folder} has no misclassified reviews, which is good news: explain one review "
                        "with --text")
    if not devices.is_main:
        return
    classifier = Classifier(folder, config, devices)
    if not classifier.tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer cannot tell where a token stands in the text: save it as "
                        "tokenizer.json")
    tokens = classifier.encode({"text": [row["text"] for row in rows]})["input_ids"]
    classifier.refuse_unknown_words(np.concatenate(tokens))
    with room_for(output.parent, fix="make room or choose another --output") if output else nullcontext():
        reviews = []
        for row in tqdm(rows, desc="explain", unit="review", leave=False, dynamic_ncols=True,
                        disable=text is not None or not sys.stderr.isatty()):
            explanation = attribute(classifier, row["text"])
            heading = f"predicted {printable(explanation.predicted)} ({explanation.probability:.4f})"
            if text is None:
                heading = f"review {row['id']}: labelled {printable(row['label'])}, {heading}"
            reviews.append((heading, explanation))
        for heading, explanation in reviews[:SHOWN_MISTAKES]:
            show(heading, explanation)
            if text is None:
                say("")
        if output:
            write_page(output, title, f"{config.demo_mark}Model: {folder}", reviews)
            say(f"as a page: {output}")
