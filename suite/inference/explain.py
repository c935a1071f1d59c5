"""--mode explain: which words a trained model's decision rests on, in the terminal and as a page of HTML.

What is attributed, and how, stands in attribution.py.
"""

from __future__ import annotations

import os
import sys
from html import escape
from pathlib import Path
from typing import Any

from suite.common.run_folder import read_mistakes
from suite.common.storage import atomic_write
from suite.encoders.loading import best_model
from suite.inference.attribution import Explanation, attribute
from suite.inference.classifier import Classifier
from suite.training.tracking import ProgressBar
from utils import UserError, say

MISTAKES, SHOWN_MISTAKES, SHOWN_WORDS = 20, 3, 10
FAINT = 0.1  # of the strongest attribution: words below it stay uncoloured in the terminal
GREENS, REDS = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # of the terminal's 256 colours, weak to strong
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def headline(explanation: Explanation) -> str:
    return f"predicted {explanation.predicted} ({explanation.probability:.4f})"


def remarks(explanation: Explanation) -> list[str]:
    """What a reader must know: where the words start from, the part that was not read, shares that do not add up."""
    found = [f"its logit over the others' mean: {explanation.score:+.2f}; with padding in place of the words: "
             f"{explanation.baseline:+.2f}"]
    if explanation.unread:
        start, end = explanation.unread
        found.append(f"not read: {len(explanation.text[start:end].split()):,} of {len(explanation.text.split()):,} "
                     "words, for the review is longer than the model's input")
    if not explanation.is_complete:
        found.append(f"rough: the attributions sum to the difference of these only within {explanation.error:.2f}")
    return found


def as_plain_text(explanation: Explanation) -> str:
    """The strongest words, each with its share of all that is attributed."""
    strongest = sorted(explanation.words, key=lambda word: -abs(word.attribution))[:SHOWN_WORDS]
    texts = [" ".join(explanation.text[word.start:word.end].split()) or "(space)" for word in strongest]
    return "\n".join(f"  {100 * word.attribution / explanation.total:+6.1f} %  {text}"
                     for word, text in zip(strongest, texts, strict=True))


def in_colour(explanation: Explanation) -> str:
    """What was read: green speaks for the predicted class, red against it, the stronger the more."""
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


def show(explanation: Explanation, label: str | None = None) -> None:
    """Print an explanation; `label`: the review's true class, where it is known."""
    say(headline(explanation) + ("" if label is None else f", labelled {label}"))
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        say("green words speak for it, red ones against it:")
        say(in_colour(explanation))
    else:
        say("words that speak for it (+) and against it (-), as shares of all that is attributed:")
        say(as_plain_text(explanation).translate(CONTROLS))
    for remark in remarks(explanation):
        say(remark)


# ---------------------------------------------------------------------------------------------------------------------
# As a page


def write_page(path: Path, title: str, note: str, explanations: list[tuple[str, Explanation]]) -> None:
    """A page that needs neither a server nor the network; `explanations`: each with its heading."""
    parts = {"TITLE": escape(title), "NOTE": escape(note), "REVIEWS": "".join(
        f"<h2>{escape(heading)}</h2>\n{''.join(f'<p class=remark>{escape(remark)}</p>' for remark in remarks(each))}"
        f'<p class="review" dir="auto">{as_html(each)}</p>\n' for heading, each in explanations)}
    # Cut at the marks instead of replaced one after the other: a review may contain what looks like one.
    page = "".join(part if place % 2 == 0 else parts[part] for place, part in enumerate(PAGE.split("@@")))
    with atomic_write(path) as file:
        file.write(page.translate(CONTROLS))


def as_html(explanation: Explanation) -> str:
    """The whole text, its words coloured as strongly as they speak for or against the predicted class."""
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


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>@@TITLE@@</title>
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
<h1>@@TITLE@@</h1>
<p class="note">@@NOTE@@</p>
<p class="note"><span class="for" style="--strength: 1">Green</span> words speak for the predicted class,
<span class="against" style="--strength: 1">red</span> ones against it, the stronger the more; point at a word for its
share of all that is attributed, and for its logits. Grey: not read, for the review is longer than the model's input.
Integrated gradients from a review of padding tokens (Sundararajan et al. 2017).</p>
@@REVIEWS@@
</body>
</html>
"""

# ---------------------------------------------------------------------------------------------------------------------
# One review, or the run's most confident mistakes


def explain(command: Any, devices: Any) -> None:
    """Explain `command.text`, or the most confident mistakes of the run.

    Raises UserError if there is no model, its tokenizer does not know where its tokens stand in a text, or there is no
    usable misclassified.csv.
    """
    config, output = command.config, command.output and Path(command.output)
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {output.absolute().parent}")
    folder = Path(command.model) if command.model else best_model(config.run_folder)
    rows = [] if command.text is not None else read_mistakes(config.run_folder, MISTAKES)
    if command.text is None and not rows:
        raise UserError(f"{config.run_folder} has no misclassified reviews, which is good news: explain one review "
                        "with --text")
    if not devices.is_main:
        return
    classifier = Classifier(folder, config, devices)
    if not classifier.tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer cannot tell where a token stands in the text: save it as "
                        "tokenizer.json")
    if command.text is not None:
        explanation = attribute(classifier, command.text)
        show(explanation)
        if output:
            write_page(output, "What the decision rests on", f"{config.demo_mark}Model: {folder}",
                       [(headline(explanation), explanation)])
            say(f"as a page: {output}")
        return
    output = output or config.run_folder / "misclassified.html"
    explanations, bar = [], ProgressBar("explain", len(rows), unit="review")
    for row in rows:
        explanation = attribute(classifier, row["text"])
        explanations.append((f"review {row['id']}: labelled {row['label']}, {headline(explanation)}", explanation))
        bar.update()
    bar.close()
    for row, (_, explanation) in list(zip(rows, explanations, strict=True))[:SHOWN_MISTAKES]:
        say(f"\nreview {row['id']}")
        show(explanation, row["label"])
    write_page(output, f"{config.run_name}: its most confident mistakes", f"{config.demo_mark}Model: {folder}",
               explanations)
    say(f"\nthe {len(rows)} most confident mistakes as a page: {output}")
