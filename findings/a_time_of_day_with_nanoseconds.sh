#!/usr/bin/env bash
# pyarrow 26.0.1, pandas 3.1.1 (Python 3.11): a time of day with nanoseconds, read in three ways.
#
# Guess, written before the run: Python's datetime.time ends at microseconds, so every way out of Arrow refuses such a
# value, or every way rounds it.
# What happens: to_pylist drops the nanoseconds without a word, to_pandas refuses the same column, and the writer of CSV
# keeps it whole, as a cast to text does. A timestamp with nanoseconds stays whole on all three ways.
#
# Output (2026-11-29):
#     to_pylist    time 00:02:03.456789     timestamp 2001-09-09 01:46:40.123456789
#     to_pandas    time ArrowInvalid        timestamp 2001-09-09 01:46:40.123456789
#     write_csv    time 00:02:03.456789123  timestamp 2001-09-09 01:46:40.123456789
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 pandas==3.1.1 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import pyarrow as pa
import pyarrow.csv

table = pa.table({"time": pa.array([123_456_789_123], pa.time64("ns")),
                  "timestamp": pa.array([10**18 + 123_456_789], pa.timestamp("ns"))})
WHOLE = "2001-09-09 01:46:40.123456789"


def from_pandas(name):
    try:
        return str(table.select([name]).to_pandas()[name][0])
    except pa.ArrowInvalid as error:
        return type(error).__name__


def from_csv(name):
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table.select([name]), buffer)
    return buffer.getvalue().decode().splitlines()[1]


for way, read, expected in (("to_pylist", lambda name: str(table[name].to_pylist()[0]), "00:02:03.456789"),
                            ("to_pandas", from_pandas, "ArrowInvalid"), ("write_csv", from_csv, "00:02:03.456789123")):
    time, timestamp = read("time"), read("timestamp")
    print(f"{way:12} time {time:19} timestamp {timestamp}")
    assert (time, timestamp) == (expected, WHOLE), way
PYTHON
