"""Training on explicit data, in this process or in one of several that test_accumulation.py starts.

    torchrun --nproc_per_node 2 tests/accumulation_worker.py ENCODER_FOLDER RESULT_FILE EFFECTIVE_BATCH MICRO_BATCH
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from data import IMDBDataset
from main import train_step
from main_accumulation import AcceleratedDevices
from model import EncoderForClassification
from suite.common.devices import Devices
from suite.encoders.loading import new_model
from suite.reviews.sampling import StepSampler
from suite.training.optimization import AveragedWeights
from utils import Config, ModelConfig, TrainConfig, process_rank

CONFIG = Config(train_config=TrainConfig(device="cpu"))
REVIEWS = 200  # effective batches of 64: three full ones and one of 8


def explicit_data() -> IMDBDataset:
    """Random reviews of 1 to 3 windows of 4 to 30 tokens, without a tokenizer or a file."""
    generator = np.random.default_rng(0)
    windows, lengths = generator.integers(1, 4, REVIEWS), generator.integers(4, 31, REVIEWS)
    offsets = np.concatenate([[0], np.repeat(lengths, windows).cumsum()])
    rows = np.arange(REVIEWS)
    tokens, labels = generator.integers(5, 2500, offsets[-1]), generator.integers(0, 2, REVIEWS)
    return IMDBDataset(tokens, offsets, rows, labels, rows, pad_token_id=0,
                       window_bounds=np.concatenate([[0], windows.cumsum()]))


def build_model(folder: str, dtype: torch.dtype = torch.float32) -> EncoderForClassification:
    torch.manual_seed(0)
    settings = ModelConfig(model_name=folder, pooling="mean", dropout_rate=0.0, encoder_dropout=0.0)
    return new_model(settings).to(dtype).train()


def single_device() -> Devices:
    return Devices(CONFIG)


def train_steps(model, optimizer, devices, dataset, effective_batch: int, micro_batch: int, steps: int | None = None,
                max_grad_norm: float | None = None, class_weights: torch.Tensor | None = None) -> torch.Tensor:
    """The first optimizer `steps` of an epoch (None: all); returns [summed loss, correct] of this process."""
    sampler = StepSampler(dataset.lengths, effective_batch, micro_batch, 3, process_rank(), devices.num_processes,
                          windows=dataset.windows)
    dataset.class_weights = class_weights
    run = SimpleNamespace(model=model, optimizer=optimizer, devices=devices, class_weights=class_weights,
                          scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
                          average=AveragedWeights(model, devices, decay=None),
                          config=Config(train_config=TrainConfig(max_grad_norm=max_grad_norm)))
    return sum(torch.stack(train_step(run, dataset.step(rows, sampler.micro_batches(rows), seed=(0,))))
               for rows in sampler.effective_batches(0)[:steps])


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Relative distance of all parameters, as one vector."""
    difference = sum(((first[name] - second[name]).double() ** 2).sum() for name in first)
    return float((difference / sum((value.double() ** 2).sum() for value in first.values())).sqrt())


def main():
    folder, result, effective_batch, micro_batch = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    class_weights = torch.tensor([float(weight) for weight in sys.argv[5:]]) if sys.argv[5:] else None
    torch.set_num_threads(1)
    devices = AcceleratedDevices(CONFIG)
    model = build_model(folder)
    model, optimizer = devices.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    exchanges = [0]

    def counting(state, bucket):
        exchanges[0] += bucket.is_last()
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counting)
    sums = train_steps(model, optimizer, devices, explicit_data(), effective_batch, micro_batch,
                       class_weights=class_weights)
    totals = devices.total(sums).tolist()
    if devices.is_main:
        torch.save(devices.state_dict(model), result)
        result.with_suffix(".json").write_text(json.dumps({
            "exchanges": exchanges[0], "totals": totals, "processes": devices.num_processes}))
    devices.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
