"""A model on its device: moving it there, what a pass costs, and its logits for batches of reviews."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from model import EncoderForClassification, mean_over_windows
from suite.common.devices import Devices
from suite.encoders.cpu_kernels import keep_freed_memory, use_cpu_kernels
from suite.encoders.evaluation_pass import packed_layers
from suite.encoders.masked_lm import MaskedLanguageModel
from utils import UserError

# `id` and `labels` (batch,); the model's inputs (windows, tokens); `windows` (batch,), unless each review is one window
Batch = dict[str, torch.Tensor]

# What a forward and backward pass costs apart from its tokens (launching kernels, reading all weights), in FLOPs that
# the device could do in that time. The CPU's was fitted to MiniLM on two cores; a GPU's is an estimate, not measured.
PASS_FLOPS = {"cpu": 6e9, "mps": 3e10, "cuda": 2e12}

# Families whose encoder computes in fp32 under autocast, too: transformers 5.23.0 fills DeBERTa's masked scores, which
# are in half precision there, with a number that only fp32 can hold.
FP32_FAMILIES = ("deberta",)


def place_model(model: nn.Module, device: torch.device, compiled: bool = False, by_numba: bool = False) -> None:
    """Move a model to its device, and use the faster kernels of this project on a CPU unless it will be compiled.
    `by_numba`: where it is trained, also those that numba compiles, see `Devices.has_numba_kernels`."""
    model.to(device)
    if needs_fp32(model):
        encoder = encoder_of(model)
        encoder.forward = torch.autocast(device.type, enabled=False)(encoder.forward)
    if device.type == "cpu" and isinstance(model, EncoderForClassification | MaskedLanguageModel) and not compiled:
        use_cpu_kernels(model)
        keep_freed_memory(model)
        if by_numba:
            from suite.encoders.numba_layers import use_numba_kernels

            use_numba_kernels(model)


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a model of this project, or of one of transformers' own classifiers."""
    return getattr(model, "encoder", None) or model.base_model


def needs_fp32(model: nn.Module) -> bool:
    """Whether the encoder can compute in fp32 alone."""
    return encoder_of(model).config.model_type in FP32_FAMILIES


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Let the encoder keep no more than each layer's input, and compute the layer again when its gradient is due.

    The random generator is set back for it, so dropout is drawn as before. The last layer of the first-token fast path
    has a `forward` of its own and keeps everything: it would be computed again at once, before anything is freed.
    Raises UserError if the architecture of the encoder `name` cannot do this.
    """
    try:
        model.encoder.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise UserError(f"train_config.gradient_checkpointing is true, but transformers cannot do this for {name}, a "
                        f"{model.encoder.config.model_type} model: set it to false, and a smaller "
                        "data_config.batch_size") from None


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The encoder's layers that multiply every token by a matrix, with their names."""
    return [(name, module) for name, module in encoder_of(model).named_modules() if isinstance(module, nn.Linear)]


def layer_classes(model: nn.Module) -> list[str]:
    """The names of the classes of the encoder's layers, such as BertLayer. A family that shares its layers has none."""
    depth = model.encoder.config.num_hidden_layers
    return sorted({type(layer).__name__ for layers in model.encoder.modules()
                   if isinstance(layers, nn.ModuleList) and len(layers) == depth for layer in layers})


def pass_tokens(model: nn.Module, device: torch.device) -> float:
    """How many tokens cost as much as starting one more forward and backward pass: see `PASS_FLOPS`."""
    weights = sum(layer.weight.numel() for _, layer in linear_layers(model)) or 1  # I-BERT's are of another class
    return PASS_FLOPS[device.type] / (6 * weights)  # 6 FLOPs a weight and token, see `training_flops`


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """(ids, labels, the model's inputs) of a batch, copied without waiting."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return moved.pop("id"), moved.pop("labels"), moved


@torch.inference_mode()
def compute_logits(model: nn.Module, batches: Iterable[Batch], reviews: int, devices: Devices
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids (reviews,), labels (reviews,), logits (reviews, num_labels) float32) of batches that hold so many reviews.

    Results stay on the device until the end, because reading them would wait for each batch. They get their place
    before the first one: small tensors that live among a batch's large ones would leave a CPU's heap full of holes.
    """
    ids, labels = torch.empty(2, reviews, dtype=torch.int64, device=devices.device)
    logits = torch.empty(reviews, devices.unwrap(model).config.num_labels, device=devices.device)
    start = 0
    with packed_layers(devices.unwrap(model), devices):
        for batch in batches:
            batch_ids, batch_labels, inputs = to_device(batch, devices.device)
            with devices.autocast():
                windows = inputs.pop("windows", None)  # classifiers of others know nothing of windows
                batch_logits = mean_over_windows(model(**inputs).logits, windows)
            place = slice(start, start := start + len(batch_ids))
            ids[place], labels[place], logits[place] = batch_ids, batch_labels, batch_logits
    return ids.cpu().numpy(), labels.cpu().numpy(), logits.cpu().numpy()
