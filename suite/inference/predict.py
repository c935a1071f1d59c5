"""--mode predict: label new reviews with a trained model."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

from suite.encoders.loading import best_model
from suite.inference.classifier import Classifier
from suite.inference.labelling import Job, cells, label, read_windows
from utils import say


def predict(command: Any, devices: Any) -> None:
    """Label `command.text`, or the rows of the file `command.input`."""
    config = command.config
    folder = Path(command.model) if command.model else best_model(config.run_folder)
    classifier = Classifier(folder, config, devices)
    classifier.cast_weights()
    if command.text is not None:
        show(classifier, command.text)
    elif command.output is None:
        print_rows(classifier, command.input, config.data_config.text_column)
    else:
        Job(command.input, Path(command.output), classifier, config).run()


def show(classifier: Classifier, text: str) -> None:
    """Print the label of a text and the probability of each class."""
    row = classifier.columns(classifier.probabilities([text])[0])
    width = max(map(len, classifier.label_names))
    say(row["predicted"])
    for name in classifier.label_names:
        say(f"  {name:{width}}  {row[f'probability_{name}']:.4f}")


def print_rows(classifier: Classifier, path: str, column: str) -> None:
    """To standard output as they come: as JSON lines if the input is .jsonl, else as CSV."""
    writer, broken = None, 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # as in a file
    try:
        for window in read_windows(path, column, classifier.added):
            for row in window:
                if row.problem:
                    broken += 1
                    print(f"left out: {row.problem}", file=sys.stderr)
            for values in label(classifier, window):
                if Path(path).suffix == ".jsonl":
                    print(json.dumps(values, ensure_ascii=False))
                    continue
                if writer is None:
                    writer = csv.DictWriter(sys.stdout, list(values))
                    writer.writeheader()
                writer.writerow(cells(values))
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does the interpreter write at its end
    if broken:
        print(f"{broken:,} broken rows were left out", file=sys.stderr)
