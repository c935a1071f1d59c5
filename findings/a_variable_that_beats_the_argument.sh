#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0 (Python 3.11): environment variables against arguments of Accelerator.
#
# Guess, written before the run: an argument that is given in the code wins over the environment, as it does for the
# mixed precision; variables fill in what the code leaves open.
# What happens: ACCELERATE_GRADIENT_ACCUMULATION_STEPS wins over Accelerator(gradient_accumulation_steps=1), and
# `backward` divides the gradient by it, also in a loop that calls no `accumulate` and divides by itself. Adam hides
# the factor, SGD and clipping do not. ACCELERATE_MIXED_PRECISION loses against the argument.
#
# Output (2026-11-29):
#     argument 1, no variable      steps 1  gradient 8.0
#     argument 1, variable 4       steps 4  gradient 2.0
#     argument no, variable bf16   precision no
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 2>/dev/null
cd "$folder"
cat > steps.py <<'PYTHON'
import torch
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="no", cpu=True)
weight = torch.nn.Parameter(torch.ones(()))
accelerator.backward(8 * weight)
print(accelerator.gradient_accumulation_steps, weight.grad.item(), accelerator.mixed_precision)
PYTHON
run() { env -i PATH="$PATH" HOME="$folder" "$@" "$folder/venv/bin/python" steps.py 2>/dev/null; }
read -r steps gradient _ <<<"$(run)"
echo "argument 1, no variable      steps $steps  gradient $gradient"
[ "$steps $gradient" = "1 8.0" ]
read -r steps gradient _ <<<"$(run ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4)"
echo "argument 1, variable 4       steps $steps  gradient $gradient"
[ "$steps $gradient" = "4 2.0" ]
read -r _ _ precision <<<"$(run ACCELERATE_MIXED_PRECISION=bf16)"
echo "argument no, variable bf16   precision $precision"
[ "$precision" = "no" ]
