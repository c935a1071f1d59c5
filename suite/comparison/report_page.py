"""The web page of a comparison: one file that needs neither a server nor the network.

report_page.html is its template, in which a literal $ is written $$. The plots are part of the page. The reviews lie in
it as JSON, and its script shows them by `textContent`, so that a review is shown as text whatever it contains. The
page's own security policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from suite.common.storage import atomic_write
from suite.comparison.results import Setting
from suite.comparison.summary import LEGEND, PUBLISHED, counts, published_table, settings_table
from utils import DEMO_WARNING

TEMPLATE = Path(__file__).with_name("report_page.html")
MOST_REVIEWS = 5000  # on the page, those that most runs get wrong; a review of IMDB takes 1.3 kB


def write_page(path: Path, summary: dict[str, Any], settings: Sequence[Setting], plots: Sequence[Path],
               texts: dict[int, str]) -> None:
    """`texts`: {id: text} of the misclassified reviews."""
    published = published_table(summary)
    reviews, skipped = _reviews(settings, texts)
    note = " The table shows those that at least one run gets wrong"
    note += f", without the {skipped:,} that the fewest runs get wrong." if skipped else "."
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(summary["title"]), demo=f'<p class="demo">{escape(DEMO_WARNING)}</p>' if summary["demo"] else "",
        question=f"<p>{escape(summary['question'])}</p>" if summary["question"] else "",
        settings=_table(settings_table(summary)), legend=escape(LEGEND),
        published=f"<h2>Published figures</h2><p>{escape(PUBLISHED)}</p>{_table(published)}" if published else "",
        pairs="".join(f"<li{' class=shown' if pair['is_shown'] else ''}>{escape(pair['sentence'])}</li>"
                      for pair in summary["pairs"]),
        plots="".join(map(_picture, plots)), counts=escape(counts(summary) + note), reviews=_embedded(reviews),
        notes="".join(f"<li>{escape(note)}</li>" for note in summary["notes"]))
    with atomic_write(path) as file:
        file.write(page)


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide settings"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(plot: Path) -> str:
    content = base64.b64encode(plot.read_bytes()).decode()
    return f'<figure><img alt="{escape(plot.stem.replace("_", " "))}" src="data:image/png;base64,{content}"></figure>'


def _reviews(settings: Sequence[Setting], texts: dict[int, str]) -> tuple[dict[str, Any], int]:
    """(the data that the page's script shows, how many misclassified reviews are not among them)."""
    runs = [run for setting in settings for run in setting.runs]
    wrong = np.stack([~run.correct for run in runs])  # (runs, reviews)
    confidence = np.stack([run.predictions.confidence for run in runs])
    times = wrong.sum(axis=0)  # (reviews,) how many runs get it wrong
    certainty = (wrong * confidence).sum(axis=0) / np.maximum(times, 1)
    order = np.lexsort((-certainty, -times))[:int((times > 0).sum())]
    ids, labels = runs[0].predictions.ids, runs[0].predictions.labels
    rows = [{"id": int(ids[place]), "label": int(labels[place]), "text": texts.get(int(ids[place]), ""),
             "answers": [[int(run.predicted[place]), round(float(confidence[number, place]), 3)]
                         for number, run in enumerate(runs)]} for place in order[:MOST_REVIEWS]]
    groups = [{"label": setting.label, "seeds": [run.seed for run in setting.runs]} for setting in settings]
    return {"classes": runs[0].label_names, "rows": rows, "settings": groups}, max(0, len(order) - MOST_REVIEWS)


def _embedded(value: Any) -> str:
    """The value as JSON that cannot end its <script> element early: a review may contain `</script>` or `<!--`."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII only: line ends and control characters are escaped, too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
