#!/usr/bin/env bash
# scikit-learn 1.9.1 (Python 3.11): train_test_split for a learning curve, which varies train_size and keeps test_size,
# random_state and the rows.
#
# Guess, written before the run: the test rows stay the same, with stratify or without it, because neither their number
# nor the seed changes; so the sizes can be compared on one test.
# What happens: without stratify they do stay, and each training set holds the smaller ones. With stratify, the training
# sets still hold the smaller ones, but the test rows change with train_size: of 2,000 test rows, 1,500 are the same
# for 500 and 1,000 training rows, and none for 500 and 4,000. They are taken from what the draw of the training rows
# leaves, class by class. So the large training set holds most of the test rows of the small one, and a model of one size
# that is tested on the rows of another has been trained on them. Draw the test first, by a call of its own.
#
# Output (2026-11-29):
#     plain        test rows shared with those of 500: 1,000 2000/2000, 2,000 2000/2000, 4,000 2000/2000
#                  of the test rows for 500, trained on at 4,000: 0
#     stratified   test rows shared with those of 500: 1,000 1500/2000, 2,000 500/2000, 4,000 0/2000
#                  of the test rows for 500, trained on at 4,000: 2000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from sklearn.model_selection import train_test_split

rows = np.arange(10_000)
labels = (rows % 10 < 3).astype(int)  # three in ten are of class 1
seen = {}
for name, classes in (("plain", None), ("stratified", labels)):
    parts = {size: [set(part.tolist()) for part in train_test_split(
        rows, train_size=size, test_size=2000, random_state=0, stratify=classes)] for size in (500, 1000, 2000, 4000)}
    trains, tests = ({size: pair[place] for size, pair in parts.items()} for place in (0, 1))
    assert trains[500] < trains[1000] < trains[2000] < trains[4000]
    shared = [len(tests[500] & tests[size]) for size in (1000, 2000, 4000)]
    trained = len(tests[500] & trains[4000])
    print(f"{name:12} test rows shared with those of 500: "
          + ", ".join(f"{size:,} {count}/2000" for size, count in zip((1000, 2000, 4000), shared, strict=True)))
    print(f"{'':12} of the test rows for 500, trained on at 4,000: {trained}")
    seen[name] = shared, trained
assert seen == {"plain": ([2000, 2000, 2000], 0), "stratified": ([1500, 500, 0], 2000)}, seen
PYTHON
