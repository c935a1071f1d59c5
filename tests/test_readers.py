"""The code of docs/inference.md, 'Other readers', run as it stands there: each computes the suite's own probabilities.

    pip install -r requirements-readers.txt && python -m pytest tests/test_readers.py -n 0
"""

import re

import numpy as np
import pytest
from conftest import PROJECT, train_here, write_reviews
from scipy.special import softmax

from suite.common.devices import Devices
from suite.inference.classifier import Classifier
from utils import load_config

pytest.importorskip("onnxscript")

WORDS = "gripping moving delightful dull dreary pointless".split()
TEXTS = [f"The film: {' '.join(WORDS[number % 6:number % 6 + 3])}, nº {number} – café!" for number in range(19)]
TEXTS.append(" ".join(TEXTS))  # far longer than max_len, and than all positions


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    """(export, the suite's probabilities of TEXTS) of a trained model whose head transformers can write, too."""
    folder = tmp_path_factory.mktemp("readers")
    overrides = [f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={write_reviews(folder / 'reviews.csv')}", "data_config.text_column=review",
                 "data_config.label_column=verdict", "data_config.max_len=32", "data_config.batch_size=16",
                 "train_config.learning_rate=0.003", "train_config.mixed_precision=no", "train_config.device=cpu",
                 "log_config.wandb_mode=disabled"]
    for options in ({}, {"mode": "export", "formats": ("onnx", "transformers")}):
        train_here(*overrides, **options)
    config = load_config(PROJECT / "config.yaml", overrides)
    classifier = Classifier(folder / "run" / "best", config, Devices(config))
    return folder / "run" / "export", classifier.probabilities(TEXTS)


def documented(module: str) -> str:
    """The code block of docs/inference.md that imports this module first."""
    text = (PROJECT / "docs" / "inference.md").read_text(encoding="utf-8")
    [code] = re.findall(rf"```python\n(import {module}\b.*?|from {module}\b.*?)```", text, re.DOTALL)
    return code


@pytest.mark.parametrize("module", ["onnxruntime", "openvino", "tract", "ctranslate2", "curated_transformers",
                                    "sentence_transformers", "mlflow", pytest.param("torch", marks=pytest.mark.long)])
def test_another_program_computes_the_same_probabilities(run, tmp_path, monkeypatch, module):
    pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)  # some write a model of their own
    folder, expected = run
    found = {"folder": str(folder), "texts": TEXTS}
    exec(re.sub("^(folder|texts) = .*", "", documented("json"), flags=re.MULTILINE), found)  # as for ONNX Runtime
    if module != "onnxruntime":
        found.pop("logits")
        exec(documented(module), found)
    if "rows" in found:
        probabilities = [[row[name] for name in ("bad", "good")] for row in found["rows"]]
    else:
        probabilities = softmax(np.asarray(found["logits"], np.float64), axis=1)
    assert np.ptp(expected, axis=0).min() > 0.5
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_the_table_names_the_versions_of_the_requirements():
    table = (PROJECT / "docs" / "inference.md").read_text(encoding="utf-8").lower()
    for pin in (PROJECT / "requirements-readers.txt").read_text().split():
        assert f"| {pin.replace('==', ' ').replace('-skinny', '')}" in table, pin
