#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (Python 3.11): AutoModelForMaskedLM.from_pretrained on an encoder that was saved
# without a head for masked words.
#
# Guess, written before the run: a head that the checkpoint lacks begins as `from_config` makes it, in every family: its
# bias, one number for each word, is 0.
# What happens: so it is for BERT, RoBERTa and others. For FNet, Longformer, Data2VecText and Nystromformer, the bias
# keeps the bits that lay in its memory before. Often these are zeros of a fresh page, and nothing shows. Under
# torch.use_deterministic_algorithms(True), which fills new memory with NaN, the bias is NaN. `output_loading_info`
# lists the bias among the missing keys for all of them alike.
#
# Output (2026-11-30):
#     bert             from_config zeros   from_pretrained zeros          missing yes
#     roberta          from_config zeros   from_pretrained zeros          missing yes
#     roformer         from_config zeros   from_pretrained zeros          missing yes
#     fnet             from_config zeros   from_pretrained never written  missing yes
#     longformer       from_config zeros   from_pretrained never written  missing yes
#     data2vec-text    from_config zeros   from_pretrained never written  missing yes
#     nystromformer    from_config zeros   from_pretrained never written  missing yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99,
         "max_position_embeddings": 64}
torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN


def bias_of(model):
    [name] = {name for name, _ in model.named_parameters() if name in ("lm_head.bias", "cls.predictions.bias")}
    bias = model.get_parameter(name)
    return name, "zeros" if not bias.any() else "never written" if bias.isnan().all() else "other numbers"


for kind in ("bert", "roberta", "roformer", "fnet", "longformer", "data2vec-text", "nystromformer"):
    config = AutoConfig.for_model(kind, **SIZES)
    AutoModel.from_config(config).save_pretrained(kind)
    _, made = bias_of(AutoModelForMaskedLM.from_config(config))
    model, report = AutoModelForMaskedLM.from_pretrained(kind, output_loading_info=True)
    name, loaded = bias_of(model)
    missing = "yes" if name in report["missing_keys"] else "no"
    print(f"{kind:16} from_config {made}   from_pretrained {loaded:13}  missing {missing}")
    assert made == "zeros" and missing == "yes"
    assert loaded == ("zeros" if kind in ("bert", "roberta", "roformer") else "never written")
PYTHON
