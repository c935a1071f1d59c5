#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (Python 3.11): LengthGroupedSampler, which train_sampling_strategy="group_by_length"
# stands for, on samples of one distribution of lengths (log-normal, at most 512 tokens), batches of 32.
#
# Guess, written before the run: a batch holds texts of like length whatever their number, so padding costs a few
# percent.
# What happens: it sorts among 50 batches at most, and among a quarter of the dataset at most. Up to 255 texts a
# "quarter" is a single batch: nothing is sorted, and 192 texts need 2.15 tokens for each real one, as shuffled texts do. So
# a benchmark on a few hundred texts measures a Trainer that does not group: at 40,000 texts it needs 1.02.
#
# Output (2026-11-30), tokens computed for each token of a text:
#        64 texts: grouped 2.22, shuffled 2.22
#       192 texts: grouped 2.15, shuffled 2.15
#       256 texts: grouped 1.51, shuffled 2.13
#      2048 texts: grouped 1.06, shuffled 2.17
#     40000 texts: grouped 1.02, shuffled 2.19
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0 2>/dev/null
cd "$folder"
cat > lengths.py <<'PYTHON'
import random

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

BATCH = 32
draw = random.Random(0)
for rows in (64, 192, 256, 2048, 40000):
    lengths = [min(int(draw.lognormvariate(5.3, 0.65)), 512) for _ in range(rows)]

    def cost(order):
        batches = [order[start:start + BATCH] for start in range(0, rows, BATCH)]
        padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
        return padded / sum(lengths)

    grouped = list(LengthGroupedSampler(BATCH, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    print(f"{rows:6} texts: grouped {cost(grouped):.2f}, shuffled {cost(shuffled):.2f}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" lengths.py 2>/dev/null | tee seen
diff seen - <<'END'
    64 texts: grouped 2.22, shuffled 2.22
   192 texts: grouped 2.15, shuffled 2.15
   256 texts: grouped 1.51, shuffled 2.13
  2048 texts: grouped 1.06, shuffled 2.17
 40000 texts: grouped 1.02, shuffled 2.19
END
