"""Tokenizers from the Hub and from folders, and what is said of one that does not fit its files, its encoder or the
reviews."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from suite.common.hub import explained
from suite.encoders.checkpoints import file_of, remark
from utils import UserError, say

MANY_WORDS = 0.05  # of a vocabulary; one that was made of texts in lower case has none, or the 26 letters
COMPARED_TEXTS, COMPARED_CHARACTERS = 100, 2000  # of the data, and of each text: enough to see a difference
LINE_BREAKS = r"(\s*<[bB][rR]\s*/?>\s*)+"  # for JavaScript, too, which knows no (?i)


def load_tokenizer(name: str, key: str = "model_config.model_name", line_breaks: str = "keep",
                   texts: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The encoder's tokenizer, from the Hub or a folder, as `key` gives it. Raises UserError if it cannot pad.

    With line_breaks="space" it reads `<br />` as a space, also wherever it is loaded from a trained model's folder.
    `texts`: some of those that it will read, which `compare_with_file` compares.
    """
    with explained(key, name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("its tokenizer has no words: the files are missing, such as tokenizer.json, or empty")
        compare_with_file(tokenizer, name, key, texts)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}: the tokenizer of {name} has no padding token: set pad_token in its "
                        "tokenizer_config.json")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.normalizer and len(set(map(
            backend.normalizer.normalize_str, ("a<br />b", "a b")))) == 1:  # it was saved with its rule
        if line_breaks == "keep" and texts:
            say(f"{name}: its tokenizer reads <br /> as a space, as in its own training, although "
                "data_config.line_breaks is 'keep'")
    elif line_breaks == "space":
        if backend is None:
            raise UserError(f"data_config.line_breaks is 'space', but the tokenizer of {name} cannot be told so: set "
                            "data_config.line_breaks=keep")
        replace = normalizers.Replace(Regex(LINE_BREAKS), " ")
        backend.normalizer = normalizers.Sequence([replace, backend.normalizer]) if backend.normalizer else replace
    return tokenizer


def compare_with_file(tokenizer: PreTrainedTokenizerBase, name: str, key: str, texts: Sequence[str]) -> None:
    """Say where transformers reads texts in another way than the tokenizer's files: a class such as BertTokenizer is
    built anew from the vocabulary, lower-cases where its configuration does not forbid it, and ignores the normalizer
    and the pre-tokenizer of tokenizer.json. Training goes on, because others who load the model get the same class.
    """
    words, known = words_never_read(tokenizer), len(tokenizer)
    if len(words) > MANY_WORDS * known:
        remark(key, f"{name}: its tokenizer reads every text in lower case, so {len(words):,} of its {known:,} words "
                    f"are never found, such as {words[0]}: if the model is a cased one, write "
                    '{"do_lower_case": false} into its tokenizer_config.json')
    path = texts and file_of(name, "tokenizer.json")
    if path:
        of_file = Tokenizer.from_file(path)
        of_file.no_truncation()
        of_file.no_padding()
        texts = [text[:COMPARED_CHARACTERS] for text in texts]
        read, in_file = tokenizer(texts, verbose=False)["input_ids"], of_file.encode_batch(texts)
        if differing := sum(tokens != other.ids for tokens, other in zip(read, in_file, strict=True)):
            remark(key, f"{name}: transformers builds a {type(tokenizer).__name__} in place of its tokenizer.json, and "
                        f"{differing:,} of the first {len(texts):,} texts get other tokens: if the file is right, set "
                        '"tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json')


def words_never_read(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of its vocabulary with capitals, if the tokenizer lower-cases every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None or backend.normalizer.normalize_str("A") != "a":
        return []
    words = tokenizer.batch_decode([[token] for token in set(tokenizer.get_vocab().values())
                                    - set(tokenizer.added_tokens_decoder)])
    return sorted((word for word in words if any(map(str.isupper, word))), key=len, reverse=True)


def refuse_foreign_tokens(key: str, name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError if the tokenizer gives tokens that its encoder, of `vocab_size` embeddings, does not have."""
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UserError(f"{key}: the tokenizer of {name} gives token {largest}, but its encoder only knows "
                        f"{vocab_size}: take a model whose files belong together")


def refuse_unknown_words(key: str, name: str, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> None:
    """Raises UserError if most of the words in reviews are unknown to the tokenizer. `tokens`: the ids of the reviews,
    one after the other.

    A tokenizer that reads bytes has no token for an unknown word, and leaves nothing to be noticed.
    """
    is_unknown = np.isin(tokens, unknown_tokens(tokenizer))
    words = np.count_nonzero(is_unknown | ~np.isin(tokens, tokenizer.all_special_ids))
    share = np.count_nonzero(is_unknown) / max(words, 1)
    if words == 0 or share > 0.5:
        problem = f"does not know {share:.0%} of the words" if words else "finds no word"
        raise UserError(f"{key}: the tokenizer of {name} {problem} in the reviews: give reviews in the language of "
                        "this model, or name another one")


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand for an unknown word."""
    found = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # where it names another one, that is the true one
        of_nothing = backend.model.tokenize("\ue000")  # a character without meaning; read as bytes, it is several
        found += [token.id for token in of_nothing if len(of_nothing) == 1]
    return found
