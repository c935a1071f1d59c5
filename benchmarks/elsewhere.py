"""Does an exported model label as the original, in other programs and at other precisions?

    python main.py --mode export --format onnx,transformers --int8 run_name=RUN
    python -m benchmarks.elsewhere checkpoints/RUN                  minutes with MiniLM on two CPU cores

500 test reviews of the run are labelled by transformers' `pipeline` from the run's export, in float32, bfloat16 and
float16, and by the suite's own model, whose weights are cast in the same way. Printed is a Markdown table: the labels
that differ from those of the suite in float32, and by how much a probability does at most. ONNX Runtime's files are
compared as well, read by the suite.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from transformers import pipeline

from data import pad
from suite.common.devices import Devices
from suite.common.hub import quiet_libraries
from suite.common.run_folder import read_saved_config
from suite.inference.classifier import Classifier
from suite.inference.export import INT8, ONNX
from suite.inference.onnx_file import OnnxModel, probabilities_of
from suite.reviews.splitting import load_split
from utils import Config, TrainConfig

REVIEWS, BATCH = 500, 32


def by_pipeline(folder: Path, texts: list[str], names: list[str], dtype: torch.dtype) -> np.ndarray:
    """(texts, classes) of transformers' own program."""
    classify = pipeline("text-classification", model=str(folder), dtype=dtype, device="cpu")
    answers = classify(texts, truncation=True, batch_size=BATCH, top_k=None)
    return np.array([[scores[name] for name in names] for scores in
                     ({each["label"]: each["score"] for each in answer} for answer in answers)])


@torch.inference_mode()
def by_cast_weights(classifier: Classifier, texts: list[str], dtype: torch.dtype) -> np.ndarray:
    """(texts, classes) of the suite's model with its weights cast, in the same batches as the pipeline's."""
    model, rows = classifier.model.to(dtype), [windows[0] for windows in classifier.encode.windows(texts)]
    batches = [pad(rows[start:start + BATCH], classifier.tokenizer.pad_token_id)
               for start in range(0, len(rows), BATCH)]
    logits = torch.cat([model(input_ids, mask).logits for input_ids, mask in batches])
    classifier.model.float()
    return softmax(logits.double().numpy(), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run with its export")
    run = parser.parse_args().run
    quiet_libraries()
    texts = load_split(read_saved_config(run / "config.yaml")).texts_and_labels("test")[0][:REVIEWS]
    config = Config(train_config=TrainConfig(device="cpu", mixed_precision="no"))
    classifier = Classifier(run / "best", config, Devices(config))
    exact, names = classifier.probabilities(texts), classifier.label_names
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        found[f"`pipeline`, {name}"] = by_pipeline(run / "export", texts, names, dtype)
        if dtype != torch.float32:
            found[f"the suite's model, weights cast to {name}"] = by_cast_weights(
                Classifier(run / "best", config, Devices(config)), texts, dtype)
    for path in (ONNX, INT8):
        if (run / "export" / path).is_file():
            model = OnnxModel(run / "export" / path, classifier.model.config)
            found[f"`{path}`"] = probabilities_of(model, classifier, texts)
    print(f"| {len(texts)} reviews, against the suite in float32 | other labels | largest change of a probability |")
    print("| --- | --- | --- |")
    for name, probabilities in found.items():
        print(f"| {name} | {(probabilities.argmax(axis=1) != exact.argmax(axis=1)).sum()} | "
              f"{np.abs(probabilities - exact).max():.1e} |")


if __name__ == "__main__":
    main()
