"""Computes what each word adds to a classifier's decision, by integrated gradients (Sundararajan et al. 2017, Captum).

The score that is explained is the logit of the predicted class minus the mean logit of the others: the log-odds, if
there are two classes. The path leads in a straight line from a review of padding tokens, with the special tokens in
place, to the real review. A token's attribution is the gradient of the score, averaged along the path, times the change
of the token's embedding, summed over its dimensions. The attributions of all tokens add up to the difference between
the scores of the two reviews if the path has enough steps. Everything is computed in float32.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from data import truncate
from suite.inference.classifier import Classifier

FEWEST_STEPS, MOST_STEPS = 16, 512  # points on the path; a fine-tuned MiniLM needs 16
TOLERANCE = 0.02  # allowed error of the attributions' sum, as a share of their sum without signs
PASS_TOKENS = 2048  # tokens whose gradients are computed in one pass


@dataclass
class Word:
    """`text[start:end]` of a review, and what it adds to the score, in logits."""

    start: int
    end: int
    attribution: float


@dataclass
class Explanation:
    text: str
    predicted: str
    probability: float
    words: list[Word]  # the words that the model read, in the order of the text
    unread: tuple[int, int] | None  # start and end, in characters, of the part that was cut out of the text
    baseline: float  # the score of the review of padding tokens, in logits
    score: float  # the score of the real review; the attributions add up to the difference
    is_complete: bool  # whether they do within TOLERANCE

    @property
    def error(self) -> float:
        """How far the sum of the attributions is from the difference between the scores, in logits."""
        return abs(sum(word.attribution for word in self.words) - (self.score - self.baseline))

    @property
    def total(self) -> float:
        """The sum of all attributions without their signs; 1 if it is 0, because it is divided by."""
        return sum(abs(word.attribution) for word in self.words) or 1.0

    @property
    def largest(self) -> float:
        """The strongest attribution without its sign; 1 if it is 0, because it is divided by."""
        return max((abs(word.attribution) for word in self.words), default=0.0) or 1.0

    def pieces(self) -> list[tuple[str, Word | None, bool]]:
        """(piece of the text, its word or None between words, whether it was read); joined, the pieces are the text."""
        places = [(word.start, word.end, word) for word in self.words] + ([(*self.unread, None)] if self.unread else [])
        pieces, position = [], 0
        for start, end, word in sorted(places, key=lambda place: place[:2]):
            start, end = max(start, position), max(end, position)  # the cut can fall within the bytes of one character
            pieces += [(self.text[position:start], None, True), (self.text[start:end], word, word is not None)]
            position = end
        return [piece for piece in [*pieces, (self.text[position:], None, True)] if piece[0]]


def attribute(classifier: Classifier, text: str) -> Explanation:
    """Explain the class that the classifier predicts for a text, which is truncated as in training."""
    encode, model = classifier.encode, classifier.model.requires_grad_(False)
    encoded = classifier.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    kept = truncate(list(range(len(tokens))), encode.room, encode.truncation)
    cut = sorted(set(range(len(tokens))) - set(kept))  # one stretch without gaps

    def with_special_tokens(content: list[int]) -> torch.Tensor:
        return torch.tensor([encode.prefix + content + encode.suffix], device=classifier.devices.device)  # (1, tokens)

    input_ids = with_special_tokens([tokens[place] for place in kept])
    baseline = with_special_tokens([classifier.tokenizer.pad_token_id] * len(kept))
    with torch.no_grad():
        probabilities = model(input_ids=input_ids).logits[0].softmax(dim=0)
    predicted = int(probabilities.argmax())
    of_tokens, (baseline_score, score), is_complete = integrated_gradients(model, input_ids, baseline, predicted)
    word_ids = encoded.word_ids()  # with the side of the cut: a word that was cut in the middle counts as two words
    words = merge(text, [offsets[place] for place in kept],
                  [(word_ids[place], bool(cut) and place > cut[0]) for place in kept],
                  of_tokens[len(encode.prefix):len(encode.prefix) + len(kept)])
    return Explanation(text, classifier.label_names[predicted], float(probabilities[predicted]), words,
                       (offsets[cut[0]][0], offsets[cut[-1]][1]) if cut else None, baseline_score, score, is_complete)


def merge(text: str, offsets: list[tuple[int, int]], word_ids: list, attributions: list[float]) -> list[Word]:
    """The words of a text: neighbouring tokens with the same word id make up a word."""
    words: list[Word] = []
    for _, group in itertools.groupby(zip(word_ids, offsets, attributions, strict=True), key=lambda token: token[0]):
        _, spans, values = zip(*group, strict=True)
        start, end = min(start for start, _ in spans), max(end for _, end in spans)
        start = end - len(text[start:end].lstrip() or text[start:end])  # a token can begin with the space before it
        if words and start < words[-1].end:  # the tokenizer reads one character as several words
            words[-1] = Word(words[-1].start, max(end, words[-1].end), words[-1].attribution + sum(values))
        else:
            words.append(Word(start, end, sum(values)))
    return words


def integrated_gradients(model: nn.Module, input_ids: torch.Tensor, baseline: torch.Tensor, predicted: int
                         ) -> tuple[list[float], tuple[float, float], bool]:
    """(attribution of each token, (score of `baseline`, score of `input_ids`), whether the attributions add up to the
    difference within TOLERANCE). Both inputs are (1, tokens) int64; attributions and scores are logits.

    The path starts after the embeddings' layer norm. Before the norm it could start at zeros, DeBERTa's embedding of
    padding; there the norm would make nearly the whole change happen in the first steps. Both ends of the path have
    the positions of the real tokens, because RoBERTa would count other positions for padding tokens.
    """
    from captum.attr import IntegratedGradients  # takes half a second, because it imports matplotlib

    encoder = getattr(model, "encoder", model.base_model)
    words = encoder.get_input_embeddings()
    layer = getattr(encoder, "embeddings", words)  # word and position embeddings, and their layer norm

    def embed(ids: torch.Tensor) -> torch.Tensor:
        """(1, tokens) -> (1, tokens, width), at the positions of `input_ids`."""
        replacement, seen = words(ids), []
        with (words.register_forward_hook(lambda *_: replacement),
              layer.register_forward_hook(lambda *call: seen.append(call[-1]))):
            model(input_ids=input_ids)
        return seen[0]

    def score(embeddings: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch,): the predicted class's logit minus the mean of the others'."""
        with layer.register_forward_hook(lambda *_: embeddings):
            logits = model(input_ids=input_ids.expand(len(embeddings), -1)).logits
        own = logits[:, predicted]
        return own - (logits.sum(dim=1) - own) / max(1, logits.shape[1] - 1)

    with torch.no_grad():
        start, end = embed(baseline), embed(input_ids)
        scores = float(score(start)), float(score(end))
    steps, batch = FEWEST_STEPS, max(1, PASS_TOKENS // input_ids.shape[1])
    while True:
        gradients = IntegratedGradients(score).attribute(end, start, n_steps=steps, internal_batch_size=batch)
        of_tokens = gradients[0].double().sum(dim=1).tolist()
        is_complete = abs(sum(of_tokens) - (scores[1] - scores[0])) <= TOLERANCE * sum(map(abs, of_tokens))
        if is_complete or steps == MOST_STEPS:
            return of_tokens, scores, is_complete
        steps *= 2
