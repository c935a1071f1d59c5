#!/usr/bin/env bash
# numba 0.68.1 with llvmlite 0.50.0 and numpy 2.4.6 (Python 3.11, a CPU with AVX512): a function with cache=True, in the
# process that compiles it and in the next one, which loads it.
#
# Guess, written before the run: what a process compiles is what it writes to the cache, so both run the same machine code,
# and the same input gives the same bits, fastmath or not.
# What happens: with parallel=True and fastmath=True, a quarter of the values of a residual addition and layer norm differ
# in their last bits, between the first process and all later ones. Those agree with each other. A job that is stopped
# in its first process and goes on in a second one ends with other bits, and never again after that. Without fastmath
# both agree, so it is the order of additions, or which of them are fused with a product, that is another.
#
# Output (2026-11-29):
#     with fastmath     the first process and the second differ in 17706 of 76800 values, the second and the third in 0
#     without fastmath  the first process and the second differ in 0 of 76800 values, the second and the third in 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6 2>/dev/null
cd "$folder"
cat > kernel.py <<'PYTHON'
import os
import sys

import numpy as np
from numba import njit, prange

f32 = np.float32


@njit("void(f4[:, ::1], f4[:, ::1], f8, f4[:, ::1], f4[:, ::1])", parallel=True, fastmath=os.environ["FAST"] == "yes",
      cache=True, error_model="numpy")
def add_and_normalize(hidden, residual, factor, total, out):
    rows, width = hidden.shape
    share, factor = f32(1) / f32(width), f32(factor)
    for block in prange(8):
        for row in range(rows * block // 8, rows * (block + 1) // 8):
            h, r, t, b = hidden[row], residual[row], total[row], out[row]
            mean, variance = f32(0), f32(0)
            for i in range(width):
                y = r[i] + (f32(0) if i % 10 == 3 else h[i] * factor)
                t[i] = y
                mean += y
            mean *= share
            for i in range(width):
                variance += (t[i] - mean) * (t[i] - mean)
            scale = f32(1) / np.sqrt(variance * share + f32(1e-6))
            for i in range(width):
                b[i] = (t[i] - mean) * scale


rng = np.random.default_rng(0)
h, r = (rng.normal(size=(200, 384)).astype(f32) for _ in range(2))
t, out = np.empty_like(h), np.empty_like(h)
add_and_normalize(h, r, 1.1, t, out)
print("loaded" if sum(add_and_normalize.stats.cache_hits.values()) else "compiled")
np.save(sys.argv[1], out)
PYTHON
for fast in yes no; do
    for number in 1 2 3; do
        FAST=$fast NUMBA_CACHE_DIR="$folder/$fast" venv/bin/python kernel.py "$fast$number.npy" >> "$fast.log"
    done
    [ "$(tr '\n' ' ' < "$fast.log")" = "compiled loaded loaded " ]
done
venv/bin/python - <<'PYTHON'
import numpy as np

for fast, title in (("yes", "with fastmath   "), ("no", "without fastmath")):
    first, second, third = (np.load(f"{fast}{number}.npy") for number in (1, 2, 3))
    print(f"{title}  the first process and the second differ in {(first != second).sum()} of {first.size} values, "
          f"the second and the third in {(second != third).sum()}")
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert (first != second).any() == (fast == "yes")
    assert (second == third).all()
PYTHON
