"""The export in the real transformers.js: the same probabilities in Node as in Python.

    npm install --ignore-scripts --prefix FOLDER @huggingface/transformers
    NODE_PATH=FOLDER/node_modules python -m pytest tests/test_transformers_js.py -n 0
"""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import PROJECT, node_package, train_here, write_reviews

from suite.common.devices import Devices
from suite.inference.classifier import Classifier
from suite.inference.onnx_file import OnnxModel, probabilities_of
from utils import load_config

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or node_package("@huggingface/transformers") is None,
    reason="Node and @huggingface/transformers are not at hand")
pytest.importorskip("onnxscript")

SCRIPT = """
const { env, pipeline, AutoTokenizer, AutoModelForSequenceClassification, Tensor, softmax } =
    require("@huggingface/transformers");
const [folder, name, dtype, max_len, texts] = process.argv.slice(2).map((each, i) => i < 3 ? each : JSON.parse(each));
env.allowRemoteModels = false;
env.localModelPath = folder;
DOCUMENTED
(async () => {
  const classify = await pipeline("text-classification", name, { dtype });
  const whole = [];
  for (const text of texts) {
    const scores = await classify(text, { top_k: null });
    whole.push(Object.fromEntries(scores.map(({ label, score }) => [label, score])));
  }
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForSequenceClassification.from_pretrained(name, { dtype });
  const long = texts.join(" ");
  const logits = (await model(inputsOf(tokenizer, long, max_len))).logits.tolist()[0];
  console.log(JSON.stringify({ whole, long: softmax(logits) }));
})();
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    """(the run's folder, its model in Python, 20 reviews)"""
    folder = tmp_path_factory.mktemp("js")
    overrides = [f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={write_reviews(folder / 'reviews.csv', rows=1200)}",
                 "data_config.text_column=review", "data_config.label_column=verdict", "data_config.max_len=64",
                 "data_config.split=[0.4,0.45,0.15]", "train_config.learning_rate=0.01", "train_config.epochs=2",
                 "data_config.line_breaks=space", "model_config.pooling=mean", "train_config.mixed_precision=no",
                 "train_config.device=cpu", "log_config.wandb_mode=disabled"]
    for options in ({}, {"mode": "export", "int8": True}):
        train_here(*overrides, **options)
    words = "gripping moving delightful dull dreary pointless".split()
    texts = [f"The film: {' '.join(words[number % 4:number % 7])},<BR /><br>nº {number} – café!"
             for number in range(20)]
    config = load_config(PROJECT / "config.yaml", overrides)
    return folder / "run", Classifier(folder / "run" / "best", config, Devices(config)), texts


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("q8", 1e-3)])
def test_transformers_js_computes_the_same_probabilities(run, tmp_path, dtype, tolerance):
    folder, classifier, texts = run
    quantized = OnnxModel(folder / "export" / "onnx" / "model_quantized.onnx", classifier.model.config)
    model = classifier.model if dtype == "fp32" else quantized
    *expected, long = (probabilities_of(model, classifier, [text])[0] for text in [*texts, " ".join(texts)])
    documentation = (PROJECT / "docs" / "inference.md").read_text(encoding="utf-8")
    documented = re.search(r"^function inputsOf.*?^}", documentation, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "script.cjs").write_text(SCRIPT.replace("DOCUMENTED", documented), encoding="utf-8")
    done = subprocess.run(["node", tmp_path / "script.cjs", str(folder), "export", dtype, "64", json.dumps(texts)],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    probabilities = np.array([[scores["bad"], scores["good"]] for scores in found["whole"]])
    assert np.ptp(expected, axis=0).min() > 0.5
    np.testing.assert_allclose(probabilities, expected, atol=tolerance)
    np.testing.assert_allclose(found["long"], long, atol=tolerance)
