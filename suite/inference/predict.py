"""--mode predict: label new reviews with a trained model."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from suite.common.cli import Command
from suite.common.devices import Devices
from suite.inference.classifier import Labeller, chosen_model, open_classifier
from utils import file_kind, printable, say


def predict(command: Command, devices: Devices) -> None:
    """Label `command.text`, or the rows of the file `command.input`."""
    classifier = open_classifier(chosen_model(command), command.config, devices)
    classifier.cast_weights()
    classifier.min_confidence = command.min_confidence
    if command.text is not None:
        print_label(classifier, command.text)
    elif command.output is None:
        print_rows(classifier, command.input, command.config.data_config.text_column)
    else:
        from suite.inference.labelling import Job

        Job(command.input, Path(command.output), classifier, command.config).run()


def print_label(classifier: Labeller, text: str) -> None:
    """Print the label of a text and the probability of each class."""
    columns = classifier.columns(classifier.probabilities([text])[0])
    width = max(len(printable(name)) for name in classifier.label_names)
    say(printable(columns["predicted"] or f"undecided: below the probability of {classifier.min_confidence:g}"))
    if classifier.threshold is not None:
        say(f"  {printable(classifier.label_names[1])} from a probability of {classifier.threshold:.4g} on")
    for name in classifier.label_names:
        say(f"  {printable(name):{width}}  {columns[f'probability_{name}']:.4f}")


def print_rows(classifier: Labeller, path: str, column: str) -> None:
    """Print the rows of a file chunk by chunk: as JSON lines if the input is .jsonl or .json, else as CSV."""
    from suite.inference.labelling import cells, label, read_chunks

    writer, broken, undecided = None, 0, 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # the same bytes as in a file
    for chunk in read_chunks(path, column, classifier):
        for problem in (row.problem for row in chunk if row.problem):
            broken += 1
            print(f"skipped: {printable(problem)}", file=sys.stderr)
        for values in label(classifier, chunk):
            undecided += values["predicted"] is None
            if file_kind(path) in (".jsonl", ".ndjson", ".json"):
                print(json.dumps(values, ensure_ascii=False))
                continue
            if writer is None:
                writer = csv.DictWriter(sys.stdout, list(values))
                writer.writeheader()
            writer.writerow(cells(values))
        sys.stdout.flush()
    if broken:
        print(f"broken rows that were skipped: {broken:,}", file=sys.stderr)
    if undecided:
        print(f"rows without a class, which wait for a person: {undecided:,}", file=sys.stderr)
