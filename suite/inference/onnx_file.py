"""A classifier as an ONNX file, and ONNX Runtime in the place of the model that the file was made from.

    input_ids, attention_mask: (batch, tokens) int64  ->  logits: (batch, num_labels) float32

For a model of windows, a row is a window, and the reader takes the mean over the windows of a review.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from utils import UserError, brief

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def refuse_missing_packages() -> None:
    """Raises UserError if ONNX files can be neither written nor read here."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--mode export needs {', '.join(missing)}: pip install -r requirements-onnx.txt")


def write_onnx(model: nn.Module, path: Path) -> None:
    """Write an eval-mode classifier that is on the CPU in float32. Raises UserError if torch cannot export it.

    The weights are in the same file, unless it would exceed the 2 GB that protobuf allows.
    """
    input_ids = torch.ones(2, 8, dtype=torch.int64)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    axes = {0: "batch", 1: "tokens"}
    with quiet():
        try:
            program = torch.onnx.export(model, kwargs=inputs, dynamo=True, input_names=list(inputs),
                                        output_names=["logits"], dynamic_shapes=dict.fromkeys(inputs, axes),
                                        verbose=False)
        except torch.onnx.OnnxExporterError as error:
            kind = getattr(model.config, "encoder", model.config).model_type
            raise UserError(f"torch {torch.__version__} cannot export a {kind} model "
                            f"({brief(error.__cause__ or error)}): use it in PyTorch, or train another "
                            "encoder") from error
        forget_traces(program.model.graph)
        program.save(path)


def forget_traces(graph: Any) -> None:
    """Remove what the exporter says of each node's origin: lines of code, with paths of this machine."""
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()


@contextmanager
def quiet():
    """Hide the exporter's remarks about its own deprecations and about operators that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def session(path: Path) -> Any:
    """An onnxruntime.InferenceSession on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OnnxModel(nn.Module):
    """The file `path`, called like the model it was made from, whose configuration is `config`."""

    def __init__(self, path: Path, config: PreTrainedConfig):
        super().__init__()
        self.session, self.config = session(path), config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """`logits` (batch, num_labels) float32."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits, = self.session.run(["logits"], {"input_ids": input_ids.cpu().numpy(),
                                                "attention_mask": mask.cpu().numpy()})
        return SequenceClassifierOutput(logits=torch.from_numpy(logits).to(input_ids.device))
