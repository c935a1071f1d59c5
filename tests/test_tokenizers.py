"""Tokenizers as people have them: where transformers reads a text in another way than the model's files, a line says
so; a tokenizer without special tokens trains, and loses no row when it labels."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, expect, run_here, train_here
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data import Encode, prepare_data
from suite.encoders.tokenizers import load_tokenizer
from utils import load_config

SHORT = ("train_config.max_steps=1", "train_config.test=false")
NOTHING = "\u200b\u200b"  # characters of no width, which a normalizer removes


def rewritten(encoder: str, folder: Path, changes: dict | None = None, **settings) -> Path:
    """The encoder's folder with `changes` in tokenizer.json and `settings` in tokenizer_config.json."""
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    for name, values in (("tokenizer.json", changes or {}), ("tokenizer_config.json", settings)):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))
    return folder


def vocabulary_alone(encoder: str, folder: Path, cased: bool) -> Path:
    """The encoder with a vocab.txt and no other file of a tokenizer, as the first BERTs are published."""
    shutil.copytree(encoder, folder)
    words = sorted(AutoTokenizer.from_pretrained(encoder).get_vocab().items(), key=lambda item: item[1])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    words = [word.capitalize() if cased and number % 4 == 0 and word[0] not in "[#" else word
             for number, (word, _) in enumerate(words)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def said(overrides, capsys):
    """said(folder, *more overrides): what a run with this model prints before it trains."""
    def prepared(folder: Path, *more: str) -> str:
        prepare_data(load_config(PROJECT / "config.yaml", [*overrides, f"model_config.model_name={folder}", *more]))
        return capsys.readouterr().out
    return prepared


def test_the_cache_knows_the_settings_of_a_tokenizer_in_python(tmp_path):
    """BERTweet's has no tokenizer.json: a word of its own for @names is a matter of a setting and of its merges."""
    found = []
    for number, (normalization, merges) in enumerate([(False, ""), (True, ""), (True, "a b 1\n")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vocab.txt").write_text("a 1\nb 1\n@USER 1\nHTTPURL 1\n")
        (folder / "bpe.codes").write_text("#version: 0.2\n" + merges)
        (folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "BertweetTokenizer", "normalization": normalization}))
        encode = Encode(AutoTokenizer.from_pretrained(folder), 16, "head")
        found.append((encode.fingerprint(np.zeros(1, "V16")), encode.windows(["a @someone"])))
        assert encode.fingerprint(np.zeros(1, "V16")) == found[-1][0]
    assert found[0][1] != found[1][1]
    assert len({fingerprint for fingerprint, _ in found}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Promise: the model that is trained is the checkpoint's, and so are the words that it reads


def test_a_cased_vocabulary_that_is_read_in_lower_case_is_said_in_one_line(said, encoder_folder, tmp_path):
    for cased, lines in ((True, 1), (False, 0)):
        folder = vocabulary_alone(encoder_folder("bert"), tmp_path / f"cased-{cased}", cased)
        out = said(folder)
        found = [line for line in out.splitlines() if str(folder) in line and "lower case" in line]
        assert len(found) == lines, out
    (tmp_path / "cased-True/tokenizer_config.json").write_text('{"do_lower_case": false}')  # as the line says
    assert "lower case" not in said(tmp_path / "cased-True")


OWN_NORMALIZER = {"normalizer": {"type": "Sequence", "normalizers": [
    {"type": "Replace", "pattern": {"String": "film"}, "content": "movie"}, {"type": "Lowercase"}]}}


@pytest.mark.parametrize(("tokenizer_class", "lines"), [("BertTokenizer", 1), ("PreTrainedTokenizerFast", 0)])
@pytest.mark.parametrize("line_breaks", ["keep", "space"])
def test_a_tokenizer_that_is_built_anew_is_compared_with_its_file(said, encoder_folder, tmp_path, tokenizer_class,
                                                                  lines, line_breaks):
    cuts = {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "[PAD]"}}  # what the file says about lengths does not count
    folder = rewritten(encoder_folder("bert"), tmp_path / "model", OWN_NORMALIZER | cuts,
                       tokenizer_class=tokenizer_class)
    out = said(folder, f"data_config.line_breaks={line_breaks}")
    found = [line for line in out.splitlines() if "in place of its tokenizer.json" in line]
    assert len(found) == lines, out
    assert all("PreTrainedTokenizerFast" in line and "of the first 100 texts" in line for line in found)


def test_without_such_a_normalizer_the_class_reads_as_its_file(said, encoder_folder, tmp_path):
    assert "tokenizer" not in said(rewritten(encoder_folder("bert"), tmp_path / "model",
                                             tokenizer_class="BertTokenizer"))


def test_the_same_is_said_of_a_classifier_of_others_beside_its_labels(encoder_folder, tmp_path):
    folder = rewritten(encoder_folder("bert"), tmp_path / "model", OWN_NORMALIZER, tokenizer_class="BertTokenizer")
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    (tmp_path / "in.txt").write_text("a film\nthe story of a film\n")
    result = expect(0, run_here("data_config.max_len=32", mode="predict", input=str(tmp_path / "in.txt"),
                                model=str(folder)))
    assert result.stderr.count("in place of its tokenizer.json") == 1
    assert [row["text"] for row in csv.DictReader(result.stdout.splitlines())] == ["a film", "the story of a film"]


# ---------------------------------------------------------------------------------------------------------------------
# Promises: wrong data end in one line that counts all of a kind; no row of a labelled file is lost


@pytest.fixture
def without_specials(encoder_folder, tmp_path) -> Path:
    """An encoder whose tokenizer puts nothing around a text."""
    return rewritten(encoder_folder("bert"), tmp_path / "no_specials", {"post_processor": None})


def test_without_a_first_token_cls_is_refused_and_mean_trains(overrides, without_specials, refused):
    model = f"model_config.model_name={without_specials}"
    error = refused(model, "model_config.pooling=cls")
    assert "set model_config.pooling=mean" in error
    train_here(*overrides, model, "run_name=mean", *SHORT)


def test_texts_without_a_token_are_counted_and_named(overrides, without_specials, refused, reviews_file):
    with open(reviews_file, "a", encoding="utf-8") as file:
        file.writelines(f"{NOTHING * number},good\n" for number in range(1, 4))
    error = refused(f"model_config.model_name={without_specials}")
    assert f"{reviews_file}: rows 201, 202, 203 give no token: remove them" in error
    train_here(*overrides, "run_name=with_specials", *SHORT)  # where [CLS] stands for such a text


def test_a_row_without_a_token_is_set_aside_with_its_reason(overrides, without_specials, tmp_path):
    train_here(*overrides, f"model_config.model_name={without_specials}", "run_name=run", *SHORT)
    best, source, output = tmp_path / "runs/run/best", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["a film", NOTHING, "the story"]
    source.write_text("".join(json.dumps({"review": text}) + "\n" for text in texts))
    expect(0, run_here(*overrides, mode="predict", input=str(source), output=str(output), model=str(best)))
    assert [json.loads(line)["review"] for line in output.read_text().splitlines()] == ["a film", "the story"]
    [rejected] = tmp_path.glob("out*reject*")
    assert "row 2 has a text of which the model's tokenizer makes no token" in rejected.read_text()
    shown = expect(0, run_here(*overrides, mode="predict", input=str(source), model=str(best)))
    assert len(shown.stdout.splitlines()) == 2
    assert "row 2 has a text" in shown.stderr
    for mode in ("predict", "explain"):
        refusal = expect(2, run_here(*overrides, mode=mode, text=NOTHING, model=str(best)))
        assert "finds no word" in refusal.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Promise: the words are read as the checkpoint's own SentencePiece model reads them


def test_a_deberta_with_spm_model_alone_trains_and_predicts(overrides, encoder_folder, reviews_file, tmp_path):
    """DeBERTa-v3 is published without tokenizer.json. What is trained has one, and needs no SentencePiece any more."""
    folder, model, texts = tmp_path / "deberta-v3", io.BytesIO(), reviews_file.read_text().splitlines()[1:]
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, vocab_size=60, pad_id=0, bos_id=1,
                               eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
                               unk_piece="[UNK]", minloglevel=2)
    shutil.copytree(encoder_folder("deberta-v3"), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "spm.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    train_here(*overrides, f"model_config.model_name={folder}", *SHORT)
    best, original = tmp_path / "runs/run/best", SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = load_tokenizer(str(best), "--model")
    for text in (*texts[:20], "Numbers  and \u00e9 new words", "dull, dreary"):
        assert tokenizer(text)["input_ids"] == [1, *original.encode(text), 2], text
    code = ("import sys; sys.modules['sentencepiece'] = None; sys.path.insert(0, sys.argv[2]); "
            "from suite.encoders.tokenizers import load_tokenizer as load; print(load(sys.argv[1], '--model')('dull'))")
    child = subprocess.run([sys.executable, "-c", code, best, PROJECT], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
