#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0, transformers 5.23.0 (Python 3.11): mixed_precision="bf16" under DDP, and the policy
# that FullyShardedDataParallelPlugin(fsdp_version=2) has for it, given to torch's fully_shard. 64 micro-batches, one
# step, two processes; the gradient is compared with that of float32.
#
# Guess, written before the run: bf16 means autocast in both, so the loss is float32 and gradients add up in float32.
# What happens: the policy is MixedPrecisionPolicy(bf16, reduce_dtype=bf16, output_dtype=bf16). A model that computes
# its own loss, as those of transformers do, has its loss rounded to bf16 (steps of 0.004 at 0.69). And `reduce_dtype`
# is also the precision in which micro-batches add up: the error of the gradient is more than four times that under DDP.
#
# Output (2026-11-30):
#     DDP    loss 0.690378 torch.float32  gradient torch.float32, error 0.007
#     FSDP2  loss 0.691406 torch.bfloat16  gradient torch.float32, error 0.032
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 \
    transformers==5.23.0 2>/dev/null
cd "$folder"
cat > strategies.py <<'PYTHON'
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification

MICRO_BATCHES = 64
accelerator = Accelerator(cpu=True, mixed_precision="bf16")


def gradient(kind):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    tokens = torch.randint(500, (MICRO_BATCHES, 2, 4, 32))[:, accelerator.process_index]
    labels = torch.randint(2, (MICRO_BATCHES, 2, 4))[:, accelerator.process_index]
    if kind == "float32":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "DDP":
        model = accelerator.prepare(model)
    else:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        plugin.set_mixed_precision("bf16")
        policy = plugin.mixed_precision_policy
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)), mp_policy=policy)
    for index in range(MICRO_BATCHES):
        is_last = index == MICRO_BATCHES - 1
        if kind == "FSDP2":
            model.set_requires_gradient_sync(is_last)
        else:
            model.require_backward_grad_sync = is_last
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float32"):
            loss = model(input_ids=tokens[index], labels=labels[index]).loss
        (loss / MICRO_BATCHES).backward()
    weights = [weight.grad.full_tensor() if kind == "FSDP2" else weight.grad for weight in model.parameters()]
    return loss, torch.cat([weight.flatten() for weight in weights])


right = gradient("float32")[1]
for kind in ("DDP", "FSDP2"):
    loss, given = gradient(kind)
    if accelerator.is_main_process:
        error = (given - right).norm() / right.norm()
        print(f"{kind:6} loss {loss.item():.6f} {loss.dtype}  gradient {given.dtype}, error {error:.3f}")
dist.barrier()
dist.destroy_process_group()
PYTHON
env -i PATH="$PATH" HOME="$folder" OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true \
    "$folder/venv/bin/torchrun" --nproc-per-node 2 strategies.py 2>/dev/null | tee seen
awk '{ dtype[$1] = $4; error[$1] = $NF }
     END { exit !(dtype["DDP"] == "torch.float32" && dtype["FSDP2"] == "torch.bfloat16" &&
                  error["FSDP2"] > 3 * error["DDP"]) }' seen
