"""Draw docs/speed.png, the picture of the README, from the table of training speeds in benchmarks/README.md.

    python -m benchmarks.picture
"""

from __future__ import annotations

import re

from matplotlib.figure import Figure

from utils import PROJECT

TABLE, PICTURE = PROJECT / "benchmarks" / "README.md", PROJECT / "docs" / "speed.png"
CONTENDERS = {"fp32, its default": "trainer (fp32)", "bf16, its best settings": "trainer-best (bf16)"}
RATIO = re.compile(r"\*\*([\d.]+)\*\* \(([\d.]+) to ([\d.]+)\)")  # median, least and most of three rounds


def read_table(text: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """{shape and tokens: {contender: (median, least, most) of the suite's speed in bf16 as multiples of its}}"""
    lines = text[text.index("| shape, tokens | suite (bf16) / trainer"):].split("\n\n")[0].splitlines()
    titles = [title.strip() for title in lines[0].strip("|").split("|")]
    found = {}
    for line in lines[2:]:
        shape, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        ratios = dict(zip(titles[1:], cells, strict=True))
        found[shape] = {name: tuple(map(float, RATIO.search(ratios[f"suite (bf16) / {column}"]).groups()))
                        for name, column in CONTENDERS.items()}
    return found


def main() -> None:
    table = read_table(TABLE.read_text(encoding="utf-8"))
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    for place, (contender, colour) in enumerate(zip(CONTENDERS, ("#b8c4d6", "#2f5d9b"), strict=True)):
        medians, least, most = zip(*(of_shape[contender] for of_shape in table.values()), strict=True)
        heights = [number + (place - 0.5) * 0.38 for number in range(len(table))]
        errors = [[median - low for median, low in zip(medians, least, strict=True)],
                  [high - median for median, high in zip(medians, most, strict=True)]]
        bars = axes.barh(heights, medians, 0.36, xerr=errors, color=colour, label=f"Trainer in {contender}",
                         error_kw={"ecolor": "#555555", "elinewidth": 0.8, "capsize": 2})
        for bar, median in zip(bars, medians, strict=True):
            axes.text(0.06, bar.get_y() + 0.19, f"{median:.1f} x", va="center", fontsize=8,
                      color="black" if place == 0 else "white")
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(table)), [f"{shape} tokens" for shape in table])
    axes.invert_yaxis()
    axes.set_xlabel("training speed, bf16, two CPU cores; Trainer's is 1")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
