"""The web page of a comparison: one file that needs neither a server nor the network.

Plots are inlined. The reviews lie in the page as JSON and get into it by `textContent`, so that whatever a review
contains is shown as text; the page's own security policy forbids to load anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from suite.common.storage import atomic_write
from suite.comparison.results import Setting

MOST_REVIEWS = 5000  # in the page, those that most runs get wrong first: 1.3 kB each for IMDB


def write_page(path: Path, summary: dict[str, Any], settings: Sequence[Setting], plots: Sequence[Path],
               texts: dict[int, str], tables: tuple[list[list[str]], list[list[str]]], legend: str, demo: str) -> None:
    """`texts`: {id: text} of the misclassified reviews; `tables`, `legend`, `demo`: as report.py has them."""
    rows, published = tables
    others = ("<h2>Published figures</h2><p>Each is the accuracy of a single run without an interval, under its "
              f"authors' conditions.</p>{_table(published)}" if published else "")
    pictures = "".join(
        f'<figure><img alt="{escape(plot.stem.replace("_", " "))}" '
        f'src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"></figure>' for plot in plots)
    reviews, left_out = _reviews(settings, texts)
    sentences = "".join(f"<li{' class=shown' if pair['is_shown'] else ''}>{escape(pair['sentence'])}</li>"
                        for pair in summary["pairs"])
    counts = (f"Of {summary['test_reviews']:,} test reviews, all runs get {summary['wrong_in_all_runs']:,} wrong, and "
              f"on {summary['runs_disagree']:,} they disagree. The table has those that at least one run gets wrong"
              + (f", without the {left_out:,} that the fewest get wrong." if left_out else "."))
    parts = {
        "TITLE": escape(summary["title"]), "DEMO": f'<p class="demo">{escape(demo)}</p>' if demo else "",
        "QUESTION": f"<p>{escape(summary['question'])}</p>" if summary["question"] else "",
        "SETTINGS": _table(rows), "LEGEND": escape(legend), "PUBLISHED": others, "PAIRS": sentences,
        "PLOTS": pictures, "COUNTS": escape(counts), "REVIEWS": _embedded(reviews),
        "NOTES": "".join(f"<li>{escape(note)}</li>" for note in summary["notes"])}
    # Cut at the marks instead of replaced one after the other: a review may contain what looks like one.
    page = "".join(part if place % 2 == 0 else parts[part] for place, part in enumerate(PAGE.split("@@")))
    with atomic_write(path) as file:
        file.write(page)


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide settings"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _reviews(settings: Sequence[Setting], texts: dict[int, str]) -> tuple[dict[str, Any], int]:
    """(what the page's script shows, how many reviews were left out)."""
    runs = [run for setting in settings for run in setting.runs]
    wrong = np.stack([~run.correct for run in runs])  # (runs, reviews)
    confidence = np.stack([run.predictions.confidence for run in runs])
    times = wrong.sum(axis=0)
    certainty = (wrong * confidence).sum(axis=0) / np.maximum(times, 1)
    order = np.lexsort((-certainty, -times))[:int((times > 0).sum())]
    ids, labels = runs[0].predictions.ids, runs[0].predictions.labels
    rows = [{"id": int(ids[place]), "label": int(labels[place]), "text": texts.get(int(ids[place]), ""),
             "answers": [[int(run.predicted[place]), round(float(confidence[number, place]), 3)]
                         for number, run in enumerate(runs)]} for place in order[:MOST_REVIEWS]]
    return {"classes": runs[0].label_names, "rows": rows, "settings": [
        {"label": setting.label, "seeds": [run.seed for run in setting.runs]} for setting in settings]
    }, max(0, len(order) - MOST_REVIEWS)


def _embedded(value: Any) -> str:
    """JSON that no HTML parser can leave early: a review may contain `</script>` or `<!--`."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII: what is no character of XML or a line end is escaped, too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@@TITLE@@</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1240px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.demo { background: #ffe08a; border: 2px solid #d55e00; padding: .5rem 1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; }
.legend, .notes { color: #555; font-size: .85rem; }
li.shown { font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin: .8rem 0; }
.filters label { font-size: .85rem; color: #555; } .filters input, .filters select, button { font: inherit; }
.settings td { white-space: nowrap; } .settings th { min-width: 3.5rem; }
#reviews td, #reviews th { text-align: left; }
#reviews td.text { min-width: 24rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer { display: block; white-space: nowrap; } .right { color: #00695c; } .wrong { color: #b33c00; font-weight: 600; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>@@TITLE@@</h1>
@@DEMO@@
@@QUESTION@@
<h2>Settings</h2>
@@SETTINGS@@
<p class="legend">@@LEGEND@@</p>
@@PUBLISHED@@
<h2>Is a difference real?</h2>
<ul>@@PAIRS@@</ul>
<h2>Plots</h2>
@@PLOTS@@
<h2>Misclassified reviews</h2>
<p>@@COUNTS@@</p>
<div class="filters">
<label>text contains <input id="contains" type="search"></label>
<label>true class <select id="class"><option value="">any</option></select></label>
<label>wrong in <select id="wrong"><option value="any">any run</option><option value="all">all runs</option>
<option value="some">some runs, not all</option></select></label>
<label>confidence of a wrong answer at least <input id="confidence" type="number" min="0" max="1" step="0.05" value="0">
</label>
</div>
<p id="count"></p>
<div class="wide"><table id="reviews"><thead></thead><tbody></tbody></table></div>
<p><button id="more">show more</button></p>
<h2>How this was measured</h2>
<ul class="notes">@@NOTES@@</ul>
<script type="application/json" id="data">@@REVIEWS@@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE_ROWS = 50, OPENING = 300;
let shown = PAGE_ROWS;
const element = id => document.getElementById(id);
function add(parent, tag, text, className) {
  const child = parent.appendChild(document.createElement(tag));
  if (text !== undefined) child.textContent = text;
  if (className) child.className = className;
  return child;
}
const runs = [];  // of each run: the number of its setting, its seed
data.settings.forEach((setting, number) => setting.seeds.forEach(seed => runs.push({setting: number, seed})));
data.classes.forEach((name, number) => add(element("class"), "option", name).value = number);
data.settings.forEach((setting, number) =>
  add(element("wrong"), "option", "any run of: " + setting.label).value = number);
const head = add(document.querySelector("#reviews thead"), "tr");
["id", "true class", ...data.settings.map(setting => setting.label + ": answer, confidence"), "review"].forEach(
  name => add(head, "th", name));

function matches(row) {
  const least = Number(element("confidence").value) || 0, where = element("wrong").value;
  const wrong = row.answers.map(answer => answer[0] !== row.label);
  const counted = wrong.map((isWrong, run) => isWrong && row.answers[run][1] >= least
                                              && (isNaN(where) || runs[run].setting === Number(where)));
  if (!counted.some(Boolean)) return false;
  if (where === "all" && !wrong.every(Boolean) || where === "some" && wrong.every(Boolean)) return false;
  if (element("class").value !== "" && row.label !== Number(element("class").value)) return false;
  return row.text.toLowerCase().includes(element("contains").value.toLowerCase());
}
function show() {
  const found = data.rows.filter(matches), body = document.querySelector("#reviews tbody");
  body.replaceChildren();
  for (const row of found.slice(0, shown)) {
    const line = add(body, "tr");
    add(line, "td", row.id);
    add(line, "td", data.classes[row.label]);
    data.settings.forEach((setting, number) => {
      const cell = add(line, "td");
      row.answers.forEach(([answer, confidence], run) => {
        if (runs[run].setting !== number) return;
        const isRight = answer === row.label;
        const text = (isRight ? "\u2713 " : "\u2717 ") + data.classes[answer] + " " + confidence.toFixed(3);
        add(cell, "span", text, "answer " + (isRight ? "right" : "wrong")).title = "seed " + runs[run].seed;
      });
    });
    const cell = add(line, "td", undefined, "text");
    if (row.text.length > OPENING) {
      const details = add(cell, "details");
      add(details, "summary", row.text.slice(0, OPENING) + " \u2026");
      add(details, "div", row.text);
    } else cell.textContent = row.text;
  }
  element("count").textContent = found.length.toLocaleString("en") + " of " + data.rows.length.toLocaleString("en")
    + " reviews" + (found.length > shown ? ", the first " + shown + " shown" : "");
  element("more").hidden = found.length <= shown;
}
for (const id of ["contains", "class", "wrong", "confidence"])
  element(id).addEventListener("input", () => { shown = PAGE_ROWS; show(); });
element("more").addEventListener("click", () => { shown += PAGE_ROWS; show(); });
show();
</script>
</body>
</html>
"""
