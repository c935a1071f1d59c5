"""What each word adds to a classifier's decision, by integrated gradients (Sundararajan et al. 2017, Captum).

Attributed is the logit of the predicted class minus the mean of the others': with two classes, the log-odds. Its
gradient with respect to the embeddings is averaged on the straight way from a review of padding tokens, its special
tokens in place, to the real one; times what changed in a token's embedding, and summed, it is the token's attribution.
All of them sum to the difference in logits between the two ends, and as many steps are taken as that needs. Everything
is computed in float32.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from data import truncate
from suite.inference.classifier import Classifier

FEWEST_STEPS, MOST_STEPS = 16, 512  # points between the baseline and the review; MiniLM fine-tuned needs 16
TOLERANCE = 0.02  # of all tokens' attributions without their signs: how far their sum may be from the difference
PASS_TOKENS = 2048  # tokens that are differentiated at once


@dataclass
class Word:
    """`text[start:end]` of a review, and what it adds, in logits."""

    start: int
    end: int
    attribution: float


@dataclass
class Explanation:
    text: str
    predicted: str
    probability: float
    words: list[Word]  # those that were read, in their order
    unread: tuple[int, int] | None  # from where to where the text was cut out, in characters
    baseline: float  # logit of the predicted class minus the others' mean, on padding tokens alone
    score: float  # the same on the review; the attributions sum to the difference
    is_complete: bool  # whether TOLERANCE was reached

    @property
    def error(self) -> float:
        """How far the sum of the attributions is from the difference, in logits."""
        return abs(sum(word.attribution for word in self.words) - (self.score - self.baseline))

    @property
    def total(self) -> float:
        """What is attributed in all, either sign; 1 where nothing is."""
        return sum(abs(word.attribution) for word in self.words) or 1.0

    @property
    def largest(self) -> float:
        """The strongest attribution, either sign; 1 where nothing is attributed."""
        return max((abs(word.attribution) for word in self.words), default=0.0) or 1.0

    def pieces(self) -> list[tuple[str, Word | None, bool]]:
        """(text, its word or None between words, whether it was read): one after the other, they are the text."""
        places = [(word.start, word.end, word) for word in self.words] + ([(*self.unread, None)] if self.unread else [])
        pieces, position = [], 0
        for start, end, word in sorted(places, key=lambda place: place[:2]):
            start, end = max(start, position), max(end, position)  # the cut can go through a character's bytes
            pieces += [(self.text[position:start], None, True), (self.text[start:end], word, word is not None)]
            position = end
        return [piece for piece in [*pieces, (self.text[position:], None, True)] if piece[0]]


def attribute(classifier: Classifier, text: str) -> Explanation:
    """Explain the class that the classifier predicts for a text, cut as in training."""
    encode, model = classifier.encode, classifier.model.requires_grad_(False)
    encoded = classifier.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    kept = truncate(list(range(len(tokens))), encode.room, encode.truncation)
    cut = sorted(set(range(len(tokens))) - set(kept))  # without a gap

    def with_special_tokens(content: list[int]) -> torch.Tensor:
        return torch.tensor([encode.prefix + content + encode.suffix], device=classifier.devices.device)  # (1, tokens)

    input_ids = with_special_tokens([tokens[place] for place in kept])
    baseline = with_special_tokens([classifier.tokenizer.pad_token_id] * len(kept))
    with torch.no_grad():
        probabilities = model(input_ids=input_ids).logits[0].softmax(dim=0)
    predicted = int(probabilities.argmax())
    of_tokens, (baseline_score, score), is_complete = integrated_gradients(model, input_ids, baseline, predicted)
    word_ids = encoded.word_ids()
    sides = [(word_ids[place], bool(cut) and place > cut[0]) for place in kept]  # a word with the cut inside is two
    words = merge(text, [offsets[place] for place in kept], sides,
                  of_tokens[len(encode.prefix):len(encode.prefix) + len(kept)])
    return Explanation(text, classifier.label_names[predicted], float(probabilities[predicted]), words,
                       (offsets[cut[0]][0], offsets[cut[-1]][1]) if cut else None, baseline_score, score, is_complete)


def merge(text: str, offsets: list[tuple[int, int]], word_ids: list, attributions: list[float]) -> list[Word]:
    """The words of a text from its tokens: neighbours with the same word id are one."""
    words: list[Word] = []
    for _, group in itertools.groupby(zip(word_ids, offsets, attributions, strict=True), key=lambda token: token[0]):
        _, spans, values = zip(*group, strict=True)
        start, end = min(start for start, _ in spans), max(end for _, end in spans)
        start += len(text[start:end]) - len(text[start:end].lstrip() or text[start:end])  # some begin with the space
        if words and start < words[-1].end:  # one character that the tokenizer reads as several words
            words[-1] = Word(words[-1].start, max(end, words[-1].end), words[-1].attribution + sum(values))
        else:
            words.append(Word(start, end, sum(values)))
    return words


def integrated_gradients(model: nn.Module, input_ids: torch.Tensor, baseline: torch.Tensor, predicted: int
                         ) -> tuple[list[float], tuple[float, float], bool]:
    """(attribution of each token, the score of `baseline` and of `input_ids`, whether the attributions sum to their
    difference within TOLERANCE). Both inputs: (1, tokens) int64; everything in logits.

    The path lies behind the embeddings' layer norm: before it, from a padding embedding of zeros (DeBERTa's), the norm
    would keep the direction and so nearly all of the change for the path's first steps. Positions are those of the real
    tokens at both ends: RoBERTa's, which are counted from the ids, would be others for padding.
    """
    from captum.attr import IntegratedGradients  # half a second, for it imports matplotlib

    encoder = getattr(model, "encoder", model.base_model)
    words = encoder.get_input_embeddings()
    layer = getattr(encoder, "embeddings", words)  # words and positions, and the norm

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
