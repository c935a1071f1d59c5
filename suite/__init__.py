"""The suite behind the scripts. Imports run one way; tests/test_layout.py holds the order."""

import sys

# transformers would fetch compiled code from the Hub through `kernels`, and other models' weights through `peft`, where
# a model's files ask for it. None makes a package look as if it were not installed.
for _package in ("kernels", "peft"):
    sys.modules.setdefault(_package, None)
