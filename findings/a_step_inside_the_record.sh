#!/usr/bin/env bash
# trackio 0.43.0 (Python 3.11), "a drop-in replacement" for wandb's calls: records that carry their own `step`.
#
# Guess, written before the run: log({"step": 100, "loss": 0.5}) keeps a column `step`, as wandb does, which counts its
# own steps apart and lets a metric name that column for its axis; so the loss stands at 100.
# What happens: `step` is one of the names that trackio keeps for itself. The key is renamed to `__step`, with a warning
# on standard error, and the row is filed at trackio's own count of calls: 0, 1, 2. So the curve is drawn over calls, and
# two runs that log every 10 and every 100 steps look equally long. With log(..., step=100) the row stands at 100. `time`,
# `project`, `run`, `timestamp` and `metrics` are renamed alike, `epoch` is not.
#
# Output (2026-11-29):
#     in the record   steps [0, 1, 2]        columns ['__step', '__time', 'epoch', 'loss']
#     as an argument  steps [100, 200, 300]  columns ['epoch', 'loss']
#     warnings 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trackio==0.43.0 2>/dev/null
cd "$folder"
TRACKIO_DIR="$folder/data" "$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import warnings

import trackio
from trackio.sqlite_storage import SQLiteStorage


def log_all(name, with_step):
    with contextlib.redirect_stdout(io.StringIO()):
        run = trackio.init("findings", name=name)
        for step in (100, 200, 300):
            with_step(run, step)
        trackio.finish()
    rows = SQLiteStorage.get_logs("findings", name)
    return [row["step"] for row in rows], sorted(rows[0].keys() - {"step", "timestamp"})


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    inside = log_all("inside", lambda run, step: run.log({"step": step, "time": 1.5, "epoch": step / 100, "loss": 0.5}))
    beside = log_all("beside", lambda run, step: run.log({"epoch": step / 100, "loss": 0.5}, step=step))
said = len({str(warning.message) for warning in caught if "Reserved keys renamed" in str(warning.message)})
print(f"in the record   steps {inside[0]}        columns {inside[1]}")
print(f"as an argument  steps {beside[0]}  columns {beside[1]}")
print(f"warnings {said}")
assert inside == ([0, 1, 2], ["__step", "__time", "epoch", "loss"]), inside
assert beside == ([100, 200, 300], ["epoch", "loss"]), beside
assert said == 1, said
PYTHON
