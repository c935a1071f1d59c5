"""--mode predict: label new reviews with a trained model."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from suite.common.cli import Command, drop_output
from suite.common.protocols import Devices
from suite.common.run_folder import best_model
from suite.inference.classifier import Labeller
from suite.inference.labelling import Job, label, read_chunks
from suite.inference.opening import open_classifier
from suite.inference.parts import cells
from utils import file_kind, printable, say


def model_folder(command: Command) -> Path:
    """The folder of the model that the command names, itself or by its run, or of the run's best model."""
    folder = Path(command.model or command.config.run_folder)
    return folder if command.model and not (folder / "config.yaml").is_file() else best_model(folder)


def predict(command: Command, devices: Devices) -> None:
    """Label `command.text`, or the rows of the file `command.input`."""
    classifier = open_classifier(model_folder(command), command.config, devices)
    classifier.cast_weights()
    if command.text is not None:
        show(classifier, command.text)
    elif command.output is None:
        print_rows(classifier, command.input, command.config.data_config.text_column)
    else:
        Job(command.input, Path(command.output), classifier, command.config).run()


def show(classifier: Labeller, text: str) -> None:
    """Print the label of a text and the probability of each class."""
    row = classifier.columns(classifier.probabilities([text])[0])
    width = max(len(printable(name)) for name in classifier.label_names)
    say(printable(row["predicted"]))
    for name in classifier.label_names:
        say(f"  {printable(name):{width}}  {row[f'probability_{name}']:.4f}")


def print_rows(classifier: Labeller, path: str, column: str) -> None:
    """Print the rows of a file chunk by chunk: as JSON lines if the input is .jsonl, else as CSV."""
    writer, broken = None, 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # the same bytes as in a file
    try:
        for chunk in read_chunks(path, column, classifier.added, classifier.gives_tokens):
            for problem in (row.problem for row in chunk if row.problem):
                broken += 1
                print(f"skipped: {printable(problem)}", file=sys.stderr)
            for values in label(classifier, chunk):
                if file_kind(path) in (".jsonl", ".json"):
                    print(json.dumps(values, ensure_ascii=False))
                    continue
                if writer is None:
                    writer = csv.DictWriter(sys.stdout, list(values))
                    writer.writeheader()
                writer.writerow(cells(values))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted
        drop_output()
    if broken:
        print(f"broken rows that were skipped: {broken:,}", file=sys.stderr)
