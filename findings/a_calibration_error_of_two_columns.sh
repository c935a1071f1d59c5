#!/usr/bin/env bash
# torchmetrics 1.9.0, netcal 1.4.0, uncertainty-calibration 0.1.4 (torch 2.13.0, Python 3.11): the expected calibration
# error of the same probabilities of two classes, in 15 bins. Of 1,000 reviews with a probability of 0.83, 930 are
# positive, and of 1,000 with 0.17, 270. So 83 % of all predictions are right, at a confidence of 0.83.
#
# Guess, written before the run: all three name Guo et al. 2017, who compare confidence and accuracy, so all say 0.00;
# and a third class, of which the split has no review, changes nothing.
# What happens: 0.00 or 0.10. torchmetrics says 0.00 with task="multiclass" and 0.10 with task="binary", which compares
# the probability of the positive class with how often it occurs. netcal says 0.10 where the labels have two values,
# also for two columns of probabilities; uncertainty-calibration says 0.00 for two columns and 0.10 for one. With a
# third column, netcal raises RuntimeError if no review of that class occurs, and says 0.00 as soon as one does. So a
# single review moves its error from 0.10 to 0.00.
#
# Output (2026-11-30):
#     torchmetrics, multiclass                             0.000
#     torchmetrics, binary                                 0.100
#     uncertainty-calibration, two columns                 0.000
#     uncertainty-calibration, one column                  0.100
#     netcal, two columns                                  0.100
#     netcal, one column                                   0.100
#     netcal, three columns, one review of the third class 0.000
#     netcal, three columns, no review of the third class  RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 netcal==1.4.0 \
    uncertainty-calibration==0.1.4 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import calibration
import numpy as np
import torch
from netcal.metrics import ECE
from torchmetrics.classification import CalibrationError

positive = np.repeat([0.83, 0.17], 1000)
labels = np.repeat([1, 0, 1, 0], [930, 70, 270, 730])
two = np.stack([1 - positive, positive], axis=1)
assert ((two.argmax(axis=1) == labels).mean(), two.max(axis=1).min()) == (0.83, 0.83)
three = np.hstack([two, np.zeros((2000, 1))])
with_one = np.vstack([three, [0, 0, 1]]), np.append(labels, 2)


def torchmetrics(values, **task):
    return CalibrationError(n_bins=15, **task)(torch.tensor(values), torch.tensor(labels)).item()


found = {
    "torchmetrics, multiclass": torchmetrics(two, task="multiclass", num_classes=2),
    "torchmetrics, binary": torchmetrics(positive, task="binary"),
    "uncertainty-calibration, two columns": calibration.get_ece(two, labels, num_bins=15),
    "uncertainty-calibration, one column": calibration.get_ece(positive, labels, num_bins=15),
    "netcal, two columns": ECE(15).measure(two, labels),
    "netcal, one column": ECE(15).measure(positive, labels),
    "netcal, three columns, one review of the third class": ECE(15).measure(*with_one)}
for title, error in found.items():
    print(f"{title:52} {error:.3f}")
try:
    ECE(15).measure(three, labels)
    raise AssertionError("netcal takes the third column")
except RuntimeError as error:
    print(f"{'netcal, three columns, no review of the third class':52} {type(error).__name__}")
for title, error in found.items():
    assert abs(error - (0.1 if "binary" in title or "one column" in title or title == "netcal, two columns" else 0)) < 1e-3
PYTHON
