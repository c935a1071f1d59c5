#!/usr/bin/env bash
# datasets 5.2.0 (Python 3.11): Dataset.from_generator with a list of files and a list of class names in gen_kwargs.
#
# Guess, written before the run: with num_proc the files are divided among the processes, and each process gets the
# names as they are; without num_proc the function is called once with what it was given.
# What happens: lists in gen_kwargs are data sources, and are cut into shards of one element each, also in a single
# process. Two files and two names of classes give two calls, each with one file and one name, so that every row of a
# file gets the same label. The table has the right number of rows, and no message says so. Two files and three names are
# refused. A tuple is left whole; the message of that error is where one learns it.
#
# Output (2026-11-29):
#     2 files, 2 names in a list     bad bad bad bad / good good good good
#     2 files, 2 names in a tuple    bad good bad good / bad good bad good
#     2 files, 3 names in a list     RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 2>/dev/null
cd "$folder"
cat > shards.py <<'PYTHON'
import tempfile

import datasets

FEATURES = datasets.Features({"label": datasets.Value("string")})


def rows(files, names):
    for _ in files:
        for row in range(4):
            yield {"label": names[row % 2 % len(names)]}


def labels(names):
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_generator(
                rows, features=FEATURES, cache_dir=cache, gen_kwargs={"files": ["one.txt", "two.txt"], "names": names})
        except Exception as error:
            return type(error.__cause__ or error).__name__
        found = table["label"][:]
    return " ".join(found[:4]) + " / " + " ".join(found[4:])


datasets.disable_progress_bars()
for title, names, expected in (
        ("2 files, 2 names in a list", ["bad", "good"], "bad bad bad bad / good good good good"),
        ("2 files, 2 names in a tuple", ("bad", "good"), "bad good bad good / bad good bad good"),
        ("2 files, 3 names in a list", ["bad", "good", "so so"], "RuntimeError")):
    found = labels(names)
    print(f"{title:30} {found}")
    assert found == expected, title
PYTHON
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" shards.py 2>/dev/null
