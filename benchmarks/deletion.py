"""Are the explanations faithful? What the words that --mode explain names are worth to the model, by taking them out.

    python -m benchmarks.deletion --model checkpoints/RUN/best --input reviews.parquet      some seconds a review

Of random reviews, or rather of the part that the model reads, a share of the words is removed: those with the largest
attributions, as many at random, or those with the least. Printed is a Markdown table of what that costs the class that
was predicted: log-odds of its probability, the mean with its standard error, and how many predictions change. Words
whose attributions mean nothing would cost what random ones do.
"""

import argparse
import math
import random
import statistics
from pathlib import Path

from suite.common.devices import Devices
from suite.common.hub import quiet_libraries
from suite.inference.attribution import Word, attribute
from suite.inference.classifier import Classifier
from suite.reviews.rows import read_rows
from utils import load_config

SHARES = (0.05, 0.1, 0.2)


def orders(words: list[Word], generator: random.Random) -> dict[str, list[Word]]:
    strongest = sorted(words, key=lambda word: -word.attribution)
    return {"with the largest attributions": strongest, "at random": generator.sample(words, len(words)),
            "with the least": strongest[::-1]}


def without(text: str, words: list[Word]) -> str:
    for word in sorted(words, key=lambda word: -word.start):
        text = text[:word.start] + text[word.end:]
    return text


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--input", required=True, metavar="FILE", help=".csv, .jsonl or .parquet with a column `text`")
    parser.add_argument("--reviews", type=int, default=100)
    arguments = parser.parse_args()
    quiet_libraries()
    generator = random.Random(0)
    texts = generator.sample([row.values["text"] for row in read_rows(arguments.input)], arguments.reviews)
    config = load_config(Path(__file__).resolve().parents[1] / "config.yaml", [
        "train_config.device=cpu", "train_config.mixed_precision=no"])
    classifier = Classifier(Path(arguments.model), config, Devices(config))
    costs, flips = {}, {}
    for text in texts:
        explanation = attribute(classifier, text)
        unread = [Word(*explanation.unread, 0.0)] if explanation.unread else []
        predicted = classifier.label_names.index(explanation.predicted)
        cases = {(order, share): without(text, unread + words[:max(1, round(share * len(words)))])
                 for order, words in orders(explanation.words, generator).items() for share in SHARES}
        before, *after = classifier.probabilities([without(text, unread), *cases.values()])
        for case, probabilities in zip(cases, after, strict=True):
            costs.setdefault(case, []).append(log_odds(before[predicted]) - log_odds(probabilities[predicted]))
            flips.setdefault(case, []).append(int(probabilities.argmax() != predicted))
    print(f"| of {len(texts)} reviews, words removed | share | log-odds lost | predictions changed |")
    print("| --- | --- | --- | --- |")
    for (order, share), values in costs.items():
        error = statistics.stdev(values) / math.sqrt(len(values))
        print(f"| {order} | {share:.0%} | {statistics.mean(values):+.2f} (standard error {error:.2f}) | "
              f"{statistics.mean(flips[order, share]):.0%} |")


if __name__ == "__main__":
    main()
