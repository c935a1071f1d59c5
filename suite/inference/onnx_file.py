"""A classifier as an ONNX file, in float32 or in 8 bits, and ONNX Runtime in the place of the model it was made from.

    input_ids, attention_mask: (batch, tokens) int64  ->  logits: (batch, num_labels) float32

For a model of windows, a row is a window, and the reader takes the mean over the windows of a review.

In 8 bits (`--int8`) means ONNX Runtime's dynamic quantization: weights are rounded once, one scale for each column;
activations in each call, one scale for the whole batch. So a review's logits depend a little on what else is in its
batch. The head keeps its float32 weights. Some models lose too much by it, so the file stays only if it labels
validation reviews as the original does.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from suite.inference.classifier import Classifier
from suite.reviews.splitting import load_split
from utils import Config, UserError, brief, say

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FEWEST, MOST = 500, 1000  # validation reviews that are compared
ALONE = 100  # of these are also labelled one at a time
SAME_LABELS = 0.99  # at least this share has to keep its label
ACCURACY_LOST = 0.005  # at most


def refuse_missing_packages() -> None:
    """Raises UserError if ONNX files can be neither written nor read here."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--mode export needs {', '.join(missing)}: pip install -r requirements-onnx.txt")


def write_onnx(model: nn.Module, path: Path) -> None:
    """Write an eval-mode classifier that is on the CPU in float32. Raises UserError if torch cannot export it.

    The weights are in the same file, unless it would exceed the 2 GB that protobuf allows.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # onnxscript brings it

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
        # It says of each node's origin: lines of code, with paths of this machine.
        ClearMetadataAndDocStringPass()(program.model)
        program.save(path)


@contextmanager
def quiet():
    """Hide the exporter's remarks about its own deprecations and about operators that are not used here."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


class OnnxModel(nn.Module):
    """The file `path` in ONNX Runtime on the CPU, called like the model it was made from, whose configuration is
    `config`."""

    def __init__(self, path: Path, config: PreTrainedConfig):
        import onnxruntime

        super().__init__()
        self.config, options = config, onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """`logits` (batch, num_labels) float32."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits, = self.session.run(["logits"], {"input_ids": input_ids.cpu().numpy(),
                                                "attention_mask": mask.cpu().numpy()})
        return SequenceClassifierOutput(logits=torch.from_numpy(logits).to(input_ids.device))


# ---------------------------------------------------------------------------------------------------------------------
# In 8 bits


def load_validation(config: Config, classifier: Classifier) -> tuple[list[str], np.ndarray]:
    """The first of the run's validation reviews, and their labels (n,) int64. Raises UserError if these are too few, or
    not the model's own."""
    say(f"--int8: reading the validation reviews of {config.data_config.dataset}")
    split = load_split(config)
    if classifier.data_fingerprint != split.fingerprint:
        raise UserError(f"{config.data_config.dataset} is not what {classifier.folder} was trained on, or is split in "
                        "another way, so --int8 could be checked on training reviews: give the data of its run")
    texts, labels = split.texts_and_labels("valid")
    if len(texts) < FEWEST:
        raise UserError(f"--int8 is checked on at least {FEWEST} validation reviews, and this run has {len(texts):,}: "
                        "export without --int8, or train with a larger data_config.split or data_config.limit")
    return texts[:MOST], labels[:MOST]


def write_int8(source: Path, target: Path, classifier: Classifier, texts: list[str], labels: np.ndarray) -> str:
    """Quantize the ONNX file `source` and compare both on validation reviews; returns what the comparison found.

    Raises UserError if it loses more than the guard allows.
    """
    quantize(source, target)
    in_float, in_int8 = (OnnxModel(path, classifier.model.config) for path in (source, target))
    expected, found = (probabilities_of(model, classifier, texts) for model in (in_float, in_int8))
    alone = np.concatenate([probabilities_of(in_int8, classifier, [text]) for text in texts[:ALONE]])
    same = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    before, after = ((values.argmax(axis=1) == labels).mean() for values in (expected, found))
    changed, by_batch = np.abs(found - expected).max(), np.abs(found[:ALONE] - alone).max()
    result = (f"on {len(found):,} validation reviews, {same:.1%} have the same label as in float32; accuracy "
              f"{after:.4f}, before {before:.4f}; a probability changes by at most {changed:.3f}, and between a review "
              f"alone and in a batch by at most {by_batch:.3f} ({len(alone)} reviews)")
    if same < SAME_LABELS or before - after > ACCURACY_LOST:
        raise UserError(f"--int8 costs this model too much: {result}; at least {SAME_LABELS:.0%} and a loss of at most "
                        f"{ACCURACY_LOST} are asked for: export it without --int8")
    return result


def probabilities_of(model: nn.Module, classifier: Classifier, texts: list[str]) -> np.ndarray:
    """(texts, classes) of `model` in the place of the classifier's own."""
    own, classifier.model = classifier.model, model
    try:
        return classifier.probabilities(texts)
    finally:
        classifier.model = own


def quantize(source: Path, target: Path) -> None:
    """Write the quantized file. Raises RuntimeError if the last layer was quantized, too."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, shape_inference

    with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        prepared = Path(folder, "prepared.onnx")
        shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)  # torch has named the shapes
        head = matrix_products(onnx.load(prepared, load_external_data=False).graph)[-1]
        # Before it quantizes, ONNX Runtime splits a Gemm into a MatMul of this name and an Add.
        heads = [head, f"{head}_MatMul"]
        quantize_dynamic(prepared, target, weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=heads)
    if not set(heads) & set(matrix_products(onnx.load(target, load_external_data=False).graph)):
        raise RuntimeError(f"ONNX Runtime has quantized the head, {head}, which was to stay in float32")


def matrix_products(graph: Any) -> list[str]:
    """The names of an ONNX graph's nodes that multiply floating-point matrices, in the order of the computation."""
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm")]
