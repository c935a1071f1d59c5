#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, scipy 1.17.1 (Python 3.11): what importing BERT's modelling file brings along.
#
# Guess, written before the run: torch, and transformers' own files for attention and outputs. Whether SciPy is
# installed makes no difference to a text encoder.
# What happens: with SciPy installed, the file imports scipy.optimize, for the loss of models that find objects in
# pictures (it matches boxes), and transformers' continuous batching, with or without SciPy. So the same import of a text
# encoder is slower where SciPy stands in the environment, though nothing of it is called.
#
# Output (2026-11-29; the seconds, of processor time, differ from machine to machine):
#     without SciPy   scipy.optimize no    continuous batching yes
#     with SciPy      scipy.optimize yes   continuous batching yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@" 2>/dev/null; }
pip transformers==5.23.0 torch==2.13.0
cd "$folder"
cat > modules.py <<'PYTHON'
import sys
import time

started = time.process_time()
from transformers.models.bert import modeling_bert  # noqa: E402, F401

seconds = time.process_time() - started
names = ("scipy.optimize", "transformers.generation.continuous_batching")
print(*("yes" if name in sys.modules else "no" for name in names), f"{seconds:.1f}")
PYTHON
look() {
    read -r optimize batching seconds <<<"$(HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" modules.py)"
    printf '%-15s scipy.optimize %-4s  continuous batching %-4s (%s s)\n' "$1" "$optimize" "$batching" "$seconds"
    [ "$optimize $batching" = "$2" ]
}
look "without SciPy" "no yes"
pip scipy==1.17.1
look "with SciPy" "yes yes"
