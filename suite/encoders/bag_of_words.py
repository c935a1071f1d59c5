"""A bag of words: TF-IDF of words and pairs of words, and a logistic regression on them, both scikit-learn's.

    best/
        config.json          model_type, classes, line_breaks, and how words become numbers
        vocabulary.json      the words and pairs, in the order of the columns
        words.safetensors    float64: idf (words,), coefficients (1 or classes, words), intercept (1 or classes,)

It trains in seconds and reads all of a review, so it tells whether an encoder is worth its price. No pickle is written
or read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from suite.common.storage import MANIFEST, atomic_write, read_json, refuse_damage, write_json
from suite.encoders.tokenizers import LINE_BREAKS
from utils import BAG_OF_WORDS, UserError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

WORDS = {"ngram_range": [1, 2], "sublinear_tf": True}  # pairs catch "not good"; a word's tenth mention says little more
MIN_REVIEWS = 2  # a word of a single training review says nothing about others, and half of all words are such
INVERSE_REGULARIZATION, MOST_ITERATIONS = 30, 1000  # C and max_iter of the logistic regression


class BagOfWords:
    """With two classes, the regression has one row of coefficients, for class 1; with more, one for each class."""

    def __init__(self, config: dict[str, Any], vocabulary: list[str], arrays: dict[str, np.ndarray]):
        self.config, self.vocabulary, self.arrays = config, vocabulary, arrays
        self.data_fingerprint = config["data_fingerprint"]
        self.label_names = [config["id2label"][str(label)] for label in range(len(config["id2label"]))]
        self.vectorizer = new_vectorizer(config["words"], vocabulary=vocabulary)
        self.vectorizer.idf_ = arrays["idf"]

    def logits(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64."""
        features = self.vectorizer.transform(_read(texts, self.config["line_breaks"]))
        return class_logits(features @ self.arrays["coefficients"].T + self.arrays["intercept"])

    def save(self, folder: Path) -> None:
        write_json(folder / "vocabulary.json", self.vocabulary)
        with atomic_write(folder / "words.safetensors", "wb") as file:
            file.write(safetensors.numpy.save({name: np.ascontiguousarray(array)  # it would mix up the axes of others
                                               for name, array in self.arrays.items()}))
        write_json(folder / "config.json", self.config)


def class_logits(scores: np.ndarray) -> np.ndarray:
    """(n, classes) from what a logistic regression of scikit-learn decides by: one column, for class 1, with two
    classes; one for each class with more."""
    return np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores


def fit(texts: list[str], labels: np.ndarray, label_names: list[str], line_breaks: str, data_fingerprint: str
        ) -> tuple[BagOfWords, int]:
    """The bag of words that these reviews, with labels (reviews,) int64, teach; and the iterations of the solver.

    Raises UserError if they have too few words.
    """
    from sklearn.linear_model import LogisticRegression

    vectorizer = new_vectorizer(WORDS, min_df=MIN_REVIEWS)
    regression = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=MOST_ITERATIONS)
    try:
        features = vectorizer.fit_transform(_read(texts, line_breaks))
    except ValueError:
        raise UserError(f"no word of two letters or more stands in {MIN_REVIEWS} of the {len(texts):,} training "
                        "reviews: raise data_config.limit or add rows") from None
    regression.fit(features, labels)
    config = {"model_type": BAG_OF_WORDS, "id2label": {str(i): name for i, name in enumerate(label_names)},
              "words": WORDS, "line_breaks": line_breaks, "data_fingerprint": data_fingerprint}
    arrays = {"idf": vectorizer.idf_, "coefficients": regression.coef_, "intercept": regression.intercept_}
    words = BagOfWords(config, vectorizer.get_feature_names_out().tolist(), arrays)
    return words, int(regression.n_iter_.max())


def load_bag_of_words(folder: Path) -> BagOfWords:
    """Raises UserError if a file of a saved folder is missing or has changed."""
    if (folder / MANIFEST).exists():
        refuse_damage(folder)
    return BagOfWords(read_json(folder / "config.json"), read_json(folder / "vocabulary.json"),
                      safetensors.numpy.load_file(folder / "words.safetensors"))


def new_vectorizer(words: dict[str, Any], **options: Any) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer  # here, because no other model needs scikit-learn

    return TfidfVectorizer(**words | {"ngram_range": tuple(words["ngram_range"])}, **options)


def _read(texts: list[str], line_breaks: str) -> list[str]:
    return [re.sub(LINE_BREAKS, " ", text) for text in texts] if line_breaks == "space" else texts
