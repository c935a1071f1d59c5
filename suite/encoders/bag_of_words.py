"""A bag of words: Naive-Bayes-weighted n-grams of up to three words, and a logistic regression on them (Wang and
Manning 2012, "Baselines and Bigrams: Simple, Good Sentiment and Topic Classification").

    best/
        config.json          model_type, version, classes, line_breaks, and a temperature if it is calibrated
        vocabulary.json      the words, in the order of their code points: the first columns
        words.safetensors    ngrams: int64 (pairs and triples of words,), see `codes` of NGrams
                             ratios, coefficients: float64 (1 or classes, columns); intercept: (1 or classes,)

It trains in seconds and reads all of a review, so it tells whether an encoder is worth its price. No pickle is written
or read. Equal reviews give equal bits: the solver runs in one thread, with a seed of its own.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from scipy.special import log_expit

from suite.common.storage import MANIFEST, atomic_write, read_json, refuse_damage, write_json
from suite.encoders.tokenizers import LINE_BREAKS
from utils import BAG_OF_WORDS, UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

VERSION = 2  # 1 was TF-IDF of words and pairs of words
TOKENS = r"<[^<>]*>|\w+(?:'\w+)?|[^\w\s]"  # a tag such as <br />, a word, or a punctuation mark: "!" says something
MOST_WORDS = 3  # of an n-gram
MIN_REVIEWS = 3  # of training: without the rarer n-grams, a review is judged no worse (docs/experiments.md)
SMOOTHING = 3  # reviews that are added to the count of each n-gram in each class, so that no ratio is infinite
INVERSE_REGULARIZATION, MOST_ITERATIONS = 10, 1000  # C and max_iter of the logistic regression
AT_A_TIME = 2000  # reviews: what a matrix of more would take is memory, and no bit depends on it


class NGrams:
    """Which n-grams a text has, as a sparse matrix: the columns are the words, then the pairs, then the triples.

    `codes`: int64, one for each pair and triple, ascending: (column of the n-gram without its last word) x len(words)
    + (column of its last word). So a pair's column is below every triple's.
    """

    def __init__(self, words: list[str], codes: np.ndarray):
        self.words, self.codes = words, codes
        self.column_of = {word: column for column, word in enumerate(words)}

    @classmethod
    def of(cls, texts: list[list[str]]) -> tuple[NGrams, csr_matrix]:
        """Those that stand in at least MIN_REVIEWS of these texts, which are lists of words; and their matrix."""
        reviews_with = Counter(word for text in texts for word in set(text))
        ngrams = cls(sorted(word for word, count in reviews_with.items() if count >= MIN_REVIEWS),
                     np.empty(0, np.int64))
        return ngrams, ngrams.matrix(texts, learn=True)

    def __len__(self) -> int:
        return len(self.words) + len(self.codes)

    def name(self, column: int) -> str:
        """The n-gram of a column, its words separated by spaces."""
        if column < len(self.words):
            return self.words[column]
        before, last = divmod(int(self.codes[column - len(self.words)]), len(self.words))
        return f"{self.name(before)} {self.words[last]}"

    def matrix(self, texts: list[list[str]], learn: bool = False) -> csr_matrix:
        """(texts, columns) float64: 1 where a text has an n-gram. `learn`: add its frequent pairs and triples first."""
        from scipy.sparse import csr_matrix  # here, because no other model needs it

        text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])  # (words of all texts,)
        words = np.fromiter((self.column_of.get(word, -1) for text in texts for word in text), np.int64, len(text_of))
        left, found = words, [(text_of << 32 | words)[words >= 0]]  # a text and a column in one number: sorted fast
        for length in range(2, MOST_WORDS + 1):
            # Each place where an n-gram of length - 1 words starts, and a known word of the same text follows it.
            last = words[length - 1:]
            places = np.flatnonzero((left[:len(last)] >= 0) & (last >= 0)
                                    & (text_of[:len(last)] == text_of[length - 1:]))
            codes = left[places] * len(self.words) + last[places]
            if learn:
                self.codes = np.append(self.codes, _frequent(codes, text_of[places]))
            at = np.searchsorted(self.codes, codes)
            is_known = np.append(self.codes, -1)[at] == codes
            places, columns = places[is_known], at[is_known] + len(self.words)
            found.append(text_of[places] << 32 | columns)
            left = np.full_like(words, -1)
            left[places] = columns
        found = np.concatenate(found)
        found.sort()
        found = found[_is_new(found)]
        starts = np.searchsorted(found, np.arange(len(texts) + 1) << 32)
        columns = (found & 0xFFFFFFFF).astype(np.int32)
        return csr_matrix((np.ones(len(found)), columns, starts), shape=(len(texts), len(self)))


class BagOfWords:
    """With two classes, the regression has one row of coefficients, for class 1; with more, one for each class against
    the rest.

    `arrays`: see the top of this file. `ratios`: each n-gram's log-count ratio. `coefficients`: the regression's, times
    the ratios.
    """

    def __init__(self, config: dict[str, Any], ngrams: NGrams, arrays: dict[str, np.ndarray]):
        self.config, self.ngrams, self.arrays = config, ngrams, arrays
        self.data_fingerprint = config["data_fingerprint"]
        self.label_names = [config["id2label"][str(label)] for label in range(len(config["id2label"]))]

    @property
    def temperature(self) -> float:
        """What the logits are divided by, if they are calibrated."""
        return self.config.get("temperature", 1.0)

    def logits(self, texts: list[str]) -> np.ndarray:
        """(texts, classes) float64."""
        return np.concatenate([self.logits_of(self.features(texts[start:start + AT_A_TIME]))
                               for start in range(0, max(len(texts), 1), AT_A_TIME)])

    def features(self, texts: list[str]) -> csr_matrix:
        """(texts, columns) float64, see NGrams.matrix."""
        return self.ngrams.matrix(split_words(texts, self.config["line_breaks"]))

    def logits_of(self, features: csr_matrix) -> np.ndarray:
        """(texts, classes) float64."""
        scores = features @ self.arrays["coefficients"].T / self._lengths(features) + self.arrays["intercept"]
        # Softmax makes of these the shares of the probabilities of each class against the rest.
        return class_logits(scores if scores.shape[1] == 1 else log_expit(scores)) / self.temperature

    def _lengths(self, features: csr_matrix) -> np.ndarray:
        """(texts, 1 or classes): by what the regression divides a text's ratios; 1 for a text without n-grams."""
        lengths = np.sqrt(features @ np.square(self.arrays["ratios"]).T)
        return np.where(lengths, lengths, 1)

    def speaking_for(self, classes: np.ndarray, others: np.ndarray, features: csr_matrix, most: int
                     ) -> list[list[str]]:
        """For each text, up to `most` n-grams that speak for its class in `classes` against that in `others`, the
        strongest first: they raise the score of the one above the score of the other.

        `classes`, `others`: (texts,) int64; `features`: (texts, columns).
        """
        found = []
        for row, lengths in enumerate(self._lengths(features)):
            columns = features.indices[features.indptr[row]:features.indptr[row + 1]]
            scores = class_logits(self.arrays["coefficients"][:, columns].T / lengths)  # (columns, classes)
            added = scores[:, classes[row]] - scores[:, others[row]]
            strongest = np.argsort(-added, kind="stable")[:most]
            found.append([self.ngrams.name(columns[place]) for place in strongest if added[place] > 0])
        return found

    def save(self, folder: Path) -> None:
        write_json(folder / "vocabulary.json", self.ngrams.words)
        with atomic_write(folder / "words.safetensors", "wb") as file:
            file.write(safetensors.numpy.save(self.arrays | {"ngrams": self.ngrams.codes}))
        write_json(folder / "config.json", self.config)


def class_logits(scores: np.ndarray) -> np.ndarray:
    """(n, classes) from what a logistic regression of scikit-learn decides by: one column, for class 1, with two
    classes; one for each class with more."""
    return np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores


def fit(texts: list[str], labels: np.ndarray, label_names: list[str], line_breaks: str, data_fingerprint: str
        ) -> tuple[BagOfWords, int]:
    """The bag of words that these reviews, with labels (reviews,) int64, teach; and the iterations of the solver.

    Raises UserError if no word stands in enough of them.
    """
    ngrams, features = NGrams.of(split_words(texts, line_breaks))
    return fit_features(ngrams, features, labels, label_names, line_breaks, data_fingerprint)


def fit_features(ngrams: NGrams, features: csr_matrix, labels: np.ndarray, label_names: list[str], line_breaks: str,
                 data_fingerprint: str) -> tuple[BagOfWords, int]:
    """As `fit`, from the features (reviews, columns) of the reviews.

    Where `ngrams` were learnt from more reviews, those that stand in fewer than MIN_REVIEWS of these get no weight. So
    the logits are, to the last bit, those of `fit` on these reviews.
    """
    known = features.getnnz(axis=0) >= MIN_REVIEWS
    if not known.any():
        raise UserError(f"no word stands in {MIN_REVIEWS} of the {features.shape[0]:,} training reviews: raise "
                        "data_config.limit or add rows")
    classes = [1] if len(label_names) == 2 else range(len(label_names))
    fits = [_fit_class(features, known, labels == label) for label in classes]
    ratios, coefficients, intercept, iterations = zip(*fits, strict=True)
    config = {"model_type": BAG_OF_WORDS, "version": VERSION,
              "id2label": {str(i): name for i, name in enumerate(label_names)},
              "line_breaks": line_breaks, "data_fingerprint": data_fingerprint}
    arrays = {"ratios": np.stack(ratios), "coefficients": np.stack(coefficients), "intercept": np.array(intercept)}
    return BagOfWords(config, ngrams, arrays), int(max(iterations))


def _fit_class(features: csr_matrix, known: np.ndarray, is_class: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray, float, int]:
    """(log-count ratios (columns,), coefficients times ratios, intercept, iterations) of one class against the rest.

    A ratio is log((p / |p|) / (q / |q|)); p and q count the reviews with an n-gram, of the class and of the rest. It
    is 0 for an n-gram that is not `known` (columns,).
    """
    from sklearn.linear_model import LogisticRegression  # here, because no other model needs scikit-learn
    from sklearn.preprocessing import normalize

    p, q = (SMOOTHING + np.asarray(features[rows].sum(axis=0)).ravel() for rows in (is_class, ~is_class))
    ratios = np.where(known, np.log(p / p[known].sum()) - np.log(q / q[known].sum()), 0)
    regression = LogisticRegression(C=INVERSE_REGULARIZATION, solver="liblinear", dual=True, random_state=0,
                                    max_iter=MOST_ITERATIONS)
    weighted = features.copy()
    weighted.data *= ratios[weighted.indices]
    regression.fit(normalize(weighted, copy=False), is_class)
    return ratios, ratios * regression.coef_[0], regression.intercept_[0], regression.n_iter_[0]


def load_bag_of_words(folder: Path) -> BagOfWords:
    """Raises UserError if a file of a saved folder is missing or has changed, or if another version wrote it."""
    if (folder / MANIFEST).exists():
        refuse_damage(folder)
    refuse_other_version(folder)
    arrays = safetensors.numpy.load_file(folder / "words.safetensors")
    ngrams = NGrams(read_json(folder / "vocabulary.json"), arrays.pop("ngrams"))
    return BagOfWords(read_json(folder / "config.json"), ngrams, arrays)


def refuse_other_version(folder: Path) -> None:
    if read_json(folder / "config.json").get("version") != VERSION:
        raise UserError(f"{folder} holds a bag of words of another version of this project: train it again, with "
                        "--mode baseline train_config.resume=never train_config.overwrite=true")


def split_words(texts: list[str], line_breaks: str) -> list[list[str]]:
    """The words and marks of each text, in lower case. Equal words are one object: less memory."""
    find, breaks = re.compile(TOKENS).findall, re.compile(LINE_BREAKS)
    return [list(map(sys.intern, find((breaks.sub(" ", text) if line_breaks == "space" else text).lower())))
            for text in texts]


def marked(text: str, ngrams: list[str], line_breaks: str) -> list[tuple[str, bool]]:
    """The text in pieces, and whether each belongs to one of these n-grams."""
    tokens = [token for token in re.finditer(TOKENS, text)
              if line_breaks == "keep" or not re.fullmatch(LINE_BREAKS, token[0])]
    words, is_marked = [token[0].lower() for token in tokens], np.zeros(len(text), bool)
    for length in range(1, MOST_WORDS + 1):
        for place in range(len(words) - length + 1):
            if " ".join(words[place:place + length]) in ngrams:
                is_marked[tokens[place].start():tokens[place + length - 1].end()] = True
    ends = [0, *(np.flatnonzero(is_marked[1:] != is_marked[:-1]) + 1).tolist(), len(text)]
    return [(text[start:end], bool(is_marked[start])) for start, end in itertools.pairwise(ends)]


def _is_new(values: np.ndarray) -> np.ndarray:
    """(n,) bool: whether each of these sorted values differs from the one before."""
    return np.concatenate([[True], values[1:] != values[:-1]])[:len(values)]


def _frequent(codes: np.ndarray, text_of: np.ndarray) -> np.ndarray:
    """The codes that stand in at least MIN_REVIEWS texts, once each, ascending. `text_of`: of each code, ascending."""
    order = np.argsort(codes, kind="stable")
    codes, text_of = codes[order], text_of[order]
    is_new = _is_new(codes)
    reviews_with = np.bincount(np.cumsum(is_new) - 1, weights=is_new | _is_new(text_of))
    return codes[is_new][reviews_with >= MIN_REVIEWS]
