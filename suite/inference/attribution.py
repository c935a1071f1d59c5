"""Computes what each word adds to a classifier's decision, by integrated gradients (Sundararajan et al. 2017, Captum).

The score that is explained is the logit of the predicted class minus the mean logit of the others: the log-odds, if
there are two classes. The path leads in a straight line from a review of padding tokens, with the special tokens in
place, to the real review. A token's attribution is the gradient of the score, averaged along the path, times the change
of the token's embedding, summed over its dimensions. The attributions of all tokens add up to the difference between
the scores of the two reviews if the path has enough steps. The path of a review that is read in windows leads through
all of them at once, to their mean logits. Everything is computed in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from data import pad, truncate
from model import mean_over_windows
from suite.encoders.placement import encoder_of
from suite.inference.classifier import Classifier
from utils import UserError

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
    encode, tokenizer, device = classifier.encode, classifier.tokenizer, classifier.devices.device
    model = classifier.model.requires_grad_(False)
    if not tokenizer.is_fast:
        raise UserError(f"{classifier.folder}: its tokenizer, {type(tokenizer).__name__}, does not say where its "
                        "tokens stand in the text, so no word can be marked")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets, word_ids = encoded["offset_mapping"], encoded.word_ids()
    # Gemma's tokenizer takes all of a text for one word, so a blank begins one, too.
    blanks = list(itertools.accumulate(any(map(str.isspace, text[max(0, start - 1):start + 1]))
                                       for start, _ in offsets))
    windows = truncate(list(range(len(offsets))), encode.room, encode.truncation, encode.max_windows)
    kept = list(itertools.chain.from_iterable(windows))
    cut = sorted(set(range(len(offsets))) - set(kept))  # one stretch without gaps
    input_ids, mask = (part.to(device) for part in pad(encode.windows([text])[0], tokenizer.pad_token_id))
    baseline = [encode.prefix + [tokenizer.pad_token_id] * len(window) + encode.suffix for window in windows]
    baseline = pad(baseline, tokenizer.pad_token_id)[0].to(device)

    def logits(copies: int) -> torch.Tensor:
        """(copies, num_labels): the means over the windows of as many copies of the review."""
        masks = None if mask.all() else mask.repeat(copies, 1)
        of_windows = model(input_ids.repeat(copies, 1), attention_mask=masks).logits
        return mean_over_windows(of_windows, torch.full((copies,), len(input_ids), device=device))

    with torch.no_grad():
        probabilities = logits(1)[0].softmax(dim=0)
    predicted = int(probabilities.argmax())
    of_tokens, (baseline_score, score), is_complete = integrated_gradients(model, logits, input_ids, baseline,
                                                                           predicted)
    of_content = [value for values, window in zip(of_tokens, windows, strict=True)
                  for value in values[len(encode.prefix):len(encode.prefix) + len(window)]]
    # With its window and the side of the cut: a word that was cut in the middle counts as two words.
    ids = [(word_ids[place], blanks[place], number, bool(cut) and place > cut[0])
           for number, window in enumerate(windows) for place in window]
    words = merge(text, [offsets[place] for place in kept], ids, of_content)
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


def integrated_gradients(model: nn.Module, logits: Callable[[int], torch.Tensor], input_ids: torch.Tensor,
                         baseline: torch.Tensor, predicted: int
                         ) -> tuple[list[list[float]], tuple[float, float], bool]:
    """(attribution of each token of each window, (score of `baseline`, score of the review), whether the attributions
    add up to the difference within TOLERANCE). The scores are in logits.

    `input_ids`, `baseline`: (windows, tokens) int64. `logits`: see `attribute`.

    The path starts after the embeddings' layer norm. Before the norm it could start at zeros, DeBERTa's embedding of
    padding; there the norm would make nearly the whole change happen in the first steps. Both ends of the path have
    the positions of the real tokens, because RoBERTa would count other positions for padding tokens.
    """
    from captum.attr import IntegratedGradients  # takes half a second, because it imports matplotlib

    encoder = encoder_of(model)
    words = encoder.get_input_embeddings()
    layer = getattr(encoder, "embeddings", words)  # word and position embeddings, and their layer norm

    def embed(ids: torch.Tensor) -> torch.Tensor:
        """(windows, tokens) -> (1, windows, tokens, width), at the positions of `input_ids`."""
        replacement, seen = words(ids), []
        with (words.register_forward_hook(lambda *_: replacement),
              layer.register_forward_hook(lambda *call: seen.append(call[-1]))):
            logits(1)
        return seen[0].unsqueeze(0)

    def score(embeddings: torch.Tensor) -> torch.Tensor:
        """(batch, windows, tokens, width) -> (batch,): the predicted class's logit minus the mean of the others'."""
        with layer.register_forward_hook(lambda *_: embeddings.flatten(0, 1)):
            of_classes = logits(len(embeddings))
        own = of_classes[:, predicted]
        return own - (of_classes.sum(dim=1) - own) / max(1, of_classes.shape[1] - 1)

    with torch.no_grad():
        start, end = embed(baseline), embed(input_ids)
        scores = float(score(start)), float(score(end))
    steps, batch = FEWEST_STEPS, max(1, PASS_TOKENS // input_ids.numel())
    while True:
        gradients = IntegratedGradients(score).attribute(end, start, n_steps=steps, internal_batch_size=batch)
        of_tokens = gradients[0].double().sum(dim=2)  # (windows, tokens)
        error = abs(of_tokens.sum().item() - (scores[1] - scores[0]))
        is_complete = error <= TOLERANCE * of_tokens.abs().sum().item()
        if is_complete or steps == MOST_STEPS:
            return of_tokens.tolist(), scores, is_complete
        steps *= 2
