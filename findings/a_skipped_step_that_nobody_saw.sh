#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0 (Python 3.11): an fp16 step that the loss scaler skips, because a gradient overflowed,
# with AdamW and with AdamW(fused=True). The wrapped scheduler shall stand still with the weights.
#
# Guess, written before the run: `step_was_skipped` is true, and the learning rate stays, in both.
# What happens: a fused optimizer is called even then. The scaler hands it the overflow, and its kernel changes no
# weight. Accelerate takes the call for a step: the scale falls and the weight stays, but `step_was_skipped` is false and
# the schedule moves on, so that each overflow shortens a warmup or a decay by a step.
#
# Output (2026-11-30):
#     AdamW(fused=False)  weight 1.0  scale 32768.0  skipped True   rate 0.10
#     AdamW(fused=True)   weight 1.0  scale 32768.0  skipped False  rate 0.09
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 2>/dev/null
cd "$folder"
cat > overflow.py <<'PYTHON'
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LinearLR

Accelerator(cpu=True)
for fused in (False, True):
    weight = torch.nn.Parameter(torch.ones(()))
    adam = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = AcceleratedOptimizer(adam, device_placement=False, scaler=scaler)
    scheduler = AcceleratedScheduler(LinearLR(adam, 1.0, 0.0, total_iters=10), optimizer)
    scaler.scale(weight * torch.tensor(torch.inf)).backward()
    optimizer.step()
    scheduler.step()
    print(f"{f'AdamW({fused=})':18}  weight {weight.item()}  scale {scaler.get_scale()}  "
          f"skipped {optimizer.step_was_skipped!s:5}  rate {scheduler.get_last_lr()[0]:.2f}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" overflow.py 2>/dev/null | tee seen
diff seen - <<'END'
AdamW(fused=False)  weight 1.0  scale 32768.0  skipped True   rate 0.10
AdamW(fused=True)   weight 1.0  scale 32768.0  skipped False  rate 0.09
END
