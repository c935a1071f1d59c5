"""Whatever is wrong with the input: exit code 2, one line that names file, row or value and the fix, nothing written.

Each row of the table goes through the real main.main in this process; its run folder holds a run already, which must
stay as it is to the last byte.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ENCODERS, PROJECT, run_here, run_script, write_reviews
from transformers import AutoTokenizer, GPT2Config, T5Config, ViTConfig

import data
from suite.common import cli, hub
from suite.common.storage import room_for
from suite.reviews import sources
from suite.training import run
from utils import DataConfig, UserError, load_config

GOOD = "".join(f"a fine film number {row},good\na dull film number {row},bad\n" for row in range(20))


def lines(text: str, header: str = "review,verdict\n"):
    """A writer of reviews.csv with this text."""
    return lambda folder: (folder / "reviews.csv").write_text(header + text)


def raw(content: bytes, name: str):
    return lambda folder: (folder / name).write_bytes(content)


def table(records: list[dict]):
    return lambda folder: pyarrow.parquet.write_table(pa.Table.from_pylist(records), folder / "reviews.parquet")


def tree(**files: str):
    """A writer of the dataset folder `many`; in names, __ stands for the dot."""
    def write(folder: Path):
        (folder / "many").mkdir()
        for name, text in files.items():
            (folder / "many" / name.replace("__", ".")).write_text(text)
    return write


def dangling(folder: Path):
    (folder / "reviews.csv").symlink_to(folder / "gone.csv")


HEADED = "review,verdict\n"
CSV, PARQUET, JSONL, MANY = "reviews.csv", "reviews.parquet", "reviews.jsonl", "many"
BAD_DATA = [  # (name, what writes it, the dataset's name, words of the message)
    ("no file", lambda folder: None, CSV, "no such file or folder: {}"),
    ("a dangling link", dangling, CSV, "no such file or folder: {}"),
    ("an empty file", lines("", header=""), CSV, "{}: holds no labelled rows"),
    ("a header only", lines(""), CSV, "{}: holds no labelled rows"),
    ("an empty folder", tree(), MANY, "{}"),
    ("a folder named .csv", lambda folder: (folder / CSV).mkdir(), CSV, "{}"),
    ("no text column", lines(GOOD, header="text,verdict\n"), CSV, "no column 'review'; found text, verdict"),
    ("no label column", lines(GOOD, header="review,label\n"), CSV, "set data_config.text_column and data_config.label"),
    ("an empty text", lines(GOOD + " ,good\n"), CSV, "{}: row 41 has no text"),
    ("a missing text", raw(b'{"review": null, "verdict": 1}\n', JSONL), JSONL, "{}: row 1 has no text"),
    ("a list as text", raw(b'{"review": ["a"], "verdict": 1}\n', JSONL), JSONL, "{}: row 1 holds list"),
    ("numbers as text", table([{"review": b"\xff", "verdict": 1}]), PARQUET, "{}: row 1 holds bytes"),
    ("no label", lines(GOOD + "so so,\n"), CSV, "{}: row 41 has no label"),
    ("a label too large", lines("fine,0\nbleak,1\nodd,7\n"), CSV, "{}: row 3 has the label 7"),
    ("a negative label", lines("fine,0\nbleak,1\nodd,-1\n"), CSV, "{}: row 3 has the label -1"),
    ("a fraction as label", lines("fine,0\nbleak,0.5\n"), CSV, "{}"),
    ("one class", lines("fine,good\nnice,good\n"), CSV, "set model_config.num_labels=1"),
    ("a class with one row", lines("a,good\nb,good\nc,good\nd,bad\n"), CSV, "the class 'bad' has 1 rows"),
    ("too few to split", lines("a,x\nb,x\nc,x\nd,y\ne,y\nf,y\n"), CSV, "6 rows, 3 of them of the rarest class"),
    ("a broken parquet", raw(b"PAR1 and no more", PARQUET), PARQUET, "{}: not a readable parquet file"),
    ("half a parquet", lambda folder: (table([{"review": "a", "verdict": 1}] * 999)(folder), os.truncate(
        folder / PARQUET, 700)), PARQUET, "{}: not a readable parquet file"),
    ("bad UTF-8", raw(HEADED.encode() + b"fine,good\nbl\xffeak,bad\n", CSV), CSV, "{}: line 3 is not UTF-8"),
    ("a comma too many", lines("fine,good\nso, so,bad\n"), CSV, "{}: row 2 (line 3) has 3 fields"),
    ("an open quote", lines('fine,good\n"so so,bad\n'), CSV, "{}: line"),
    ("bad JSON", raw(b'{"review": "a", "verdict": 1}\n{"review": \n', JSONL), JSONL, "{}: line 2 is not JSON"),
    ("text that is not UTF-8 in parquet", lambda folder: pyarrow.parquet.write_table(pa.table({
        "review": pa.array([b"\xff", b"b"]).view(pa.string()), "verdict": [0, 1]}), folder / PARQUET), PARQUET, "{}"),
    ("no data in a folder", tree(README__md="---\n: [\n---\n"), MANY, "holds no .csv, .jsonl or .parquet files"),
    ("a broken README", tree(README__md="---\na: [\n---\n", train__parquet=""), MANY, "{}"),
    ("half a character", raw(b'{"review": "a \\uD83D", "verdict": 1}\n', JSONL), JSONL, "{}: line 1 holds half of a"),
    ("two labels for a text", lines(GOOD + "a dull film number 3,good\n"), CSV, "{}: rows 8 and 41 are the same text"),
    ("another file type", raw(b"text", "reviews.txt"), "reviews.txt", "a file must end in .csv, .jsonl, .parquet"),
    ("mixed types", tree(train__csv=HEADED + GOOD, more__jsonl="{}"), MANY, "{} holds .csv and .jsonl files"),
    ("labels only in a folder", tree(train__csv="verdict\n1\n2\n"), MANY, "train.csv: row 1 has no column 'review'"),
    ("an odd row in a folder", tree(train__csv=HEADED + GOOD, test__csv=HEADED + "a,b,c\n"), MANY,
     "test.csv: row 1 (line 2) has 3 fields"),
    ("an empty text in a folder", tree(train__csv=HEADED + GOOD, test__csv=HEADED + "fine,good\n,bad\n"), MANY,
     "test.csv: row 2 has no text"),
    ("two labels in a folder", tree(train__csv=HEADED + GOOD, test__csv=HEADED + "a dull film number 3,good\n"), MANY,
     "test.csv: row 1 are the same text with different labels"),
    ("a broken parquet in a folder", tree(train__parquet="PAR1"), MANY, "train.parquet: not a readable parquet file"),
]


def encoder(folder: Path, name: str = "bert", tokenizer: bool = True, **changes) -> Path:
    """A folder with a tiny encoder's config.json, `changes` made, and a tokenizer; no weights."""
    settings = ENCODERS[name].to_dict() | changes
    (folder / "encoder").mkdir()
    (folder / "encoder/config.json").write_text(json.dumps(settings))
    if tokenizer:
        AutoTokenizer.from_pretrained(PROJECT / "demo/bert").save_pretrained(folder / "encoder")
    return folder / "encoder"


def of_config(config):
    return lambda folder: config.save_pretrained(folder / "encoder")


def other_shape(folder: Path):
    encoder(folder, hidden_size=16)
    shutil.copy(Path(folder / "whole" / "model.safetensors"), folder / "encoder")


def no_padding(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo/bert")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(encoder(folder, tokenizer=False))


def planted_pickle(folder: Path):
    torch.save({}, encoder(folder) / "pytorch_model.bin")


TINY = {"vocab_size": 2500, "bos_token_id": 2, "eos_token_id": 3}
BAD_MODELS = [
    ("no folder", lambda folder: None, "cannot be reached and"),  # taken for a Hub name, and the tests are offline
    ("an empty folder", lambda folder: (folder / "encoder").mkdir(), "{} cannot be loaded"),
    ("no weights", encoder, "{} cannot be loaded (Error no file named model.safetensors"),
    ("a pickle for weights", planted_pickle, "{} cannot be loaded (Error no file named model.safetensors"),
    ("weights of another shape", other_shape, "the weights in {} are not of the model in its config.json"),
    ("no padding token", no_padding, "{} has no padding token"),
    ("GPT-2", of_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, **TINY)), "{} is a gpt2 model, not a text encoder"),
    ("T5", of_config(T5Config(d_model=8, num_layers=1, num_heads=2, **TINY)), "{} is a t5 model, not a text encoder"),
    ("ViT", of_config(ViTConfig(num_hidden_layers=1)), "{} is a vit model, not a text encoder"),
    ("no token types", lambda folder: encoder(folder, type_vocab_size=0), "token_type_embeddings.weight would be emp"),
    ("a negative width", lambda folder: encoder(folder, hidden_size=-8), "config.json of {}"),
    ("a word as width", lambda folder: encoder(folder, hidden_size="wide"), "{} cannot be loaded"),
    ("heads that do not divide", lambda folder: encoder(folder, num_attention_heads=5), "not a multiple"),
    ("an unknown activation", lambda folder: encoder(folder, hidden_act="swish-bang"), "swish-bang"),
    ("an unknown architecture", lambda folder: encoder(folder, model_type="nonsense"), "nonsense"),
    ("no JSON", lambda folder: (encoder(folder) / "config.json").write_text("{"), "{} cannot be loaded (Expecting"),
    ("no tokenizer", lambda folder: encoder(folder, tokenizer=False), "{} cannot be loaded"),
    ("half a tokenizer", lambda folder: os.truncate(encoder(folder) / "tokenizer.json", 900), "{} cannot be loaded"),
]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path, overrides):
    """refused(*more overrides): the one line of a run that must not start, over a run folder that must stay."""
    occupied = tmp_path / "runs" / "run"
    (occupied / "best").mkdir(parents=True)
    (occupied / "best" / "model.safetensors").write_bytes(b"precious")

    def attempt(*more: str) -> str:
        before, started = content_of(occupied), time.perf_counter()
        result = run_here(*overrides, "train_config.resume=never", *more)
        assert time.perf_counter() - started < 5
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.returncode, len(errors)) == (2, 1), result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.rstrip().endswith(errors[0]), result.stderr  # one line, however long
        assert content_of(occupied) == before
        return errors[0]

    return attempt


@pytest.mark.parametrize(("write", "name", "words"), [row[1:] for row in BAD_DATA], ids=[row[0] for row in BAD_DATA])
def test_bad_data(tmp_path, refused, monkeypatch, write, name, words):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    monkeypatch.setattr(run, "new_model", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "data" / name
    assert words.format(path) in refused(f"data_config.dataset={path}")


@pytest.mark.parametrize(("write", "words"), [row[1:] for row in BAD_MODELS], ids=[row[0] for row in BAD_MODELS])
def test_bad_models(tmp_path, refused, encoder_folder, monkeypatch, write, words):
    (tmp_path / "whole").symlink_to(encoder_folder("bert"))
    write(tmp_path)
    monkeypatch.chdir(tmp_path)  # `encoder` without a path could be a name on the Hub
    name = "encoder" if words.startswith("cannot be reached") else str(tmp_path / "encoder")
    error = refused(f"model_config.model_name={name}")
    assert words.format(name) in error
    assert "model_config.model_name" in error


def test_a_review_of_100_000_words_is_only_truncated(tmp_path, overrides):
    path = write_reviews(tmp_path / "long.csv")
    with open(path, "a") as file:
        file.write(" ".join(["gripping"] * 100_000) + ",good\n")
    config = load_config(PROJECT / "config.yaml", [*overrides, f"data_config.dataset={path}"])
    prepared = data.prepare_data(config)
    assert max(dataset.lengths.max() for dataset in prepared.splits.values()) == 32


def test_a_folder_of_csv_files_is_read_like_the_files(tmp_path):
    tree(train__csv=HEADED + GOOD, test__csv=HEADED + "NA,good\n")(tmp_path)
    config = DataConfig(dataset=str(tmp_path / MANY), text_column="review", label_column="verdict")
    reviews = sources.load_reviews(config, num_labels=2)
    assert reviews.split_names.tolist() == ["train"] * 40 + ["test"]
    assert reviews.table[40]["text"] == "NA"


@pytest.mark.parametrize("drop", ["true", "false"])
def test_copies_count_towards_the_limit(tmp_path, overrides, drop):
    (tmp_path / "twice.csv").write_text(HEADED + GOOD + GOOD)
    config = load_config(PROJECT / "config.yaml", [
        *overrides, f"data_config.dataset={tmp_path / 'twice.csv'}", "data_config.limit=30",
        f"data_config.drop_duplicates={drop}"])
    prepared = data.prepare_data(config)
    assert sum(len(dataset) for dataset in prepared.splits.values()) == 30
    texts = [{dataset.text(i) for i in dataset.ids} for dataset in prepared.splits.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_fp16_on_a_cpu_that_nobody_named_is_refused(refused, monkeypatch):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    assert "a CPU cannot train in" in refused("train_config.mixed_precision=fp16", "train_config.device=auto")


@pytest.mark.parametrize(("error", "stays"), [
    (TypeError("a bug"), True), (KeyError("a bug"), True), (AttributeError("a bug"), True), (RuntimeError("bug"), True),
    (OSError("no such file"), False), (ValueError("a bad value"), False), (UserError("said already"), False)])
def test_only_errors_about_the_input_are_explained(error, stays):
    with pytest.raises(type(error) if stays else UserError), hub.explained("data_config.dataset", "./reviews"):
        raise error


def test_a_bug_in_the_reader_of_a_file_keeps_its_traceback(reviews_file, monkeypatch):
    monkeypatch.setattr(sources, "as_text", lambda value: value.bug())
    with pytest.raises(Exception, match="generating the dataset") as caught:
        sources.load_reviews(DataConfig(dataset=str(reviews_file), text_column="review", label_column="verdict"), 2)
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(("override", "key"), [
    ("train_config.epochs=${run_name}", "train_config.epochs"),
    ("train_config.seed=${nothing}", "train_config.seed"),
    ("data_config.limit=${oc.env:HOME}", "data_config.limit")])
def test_an_interpolation_of_a_wrong_type_names_its_key(override, key):
    with pytest.raises(UserError, match=f"command line: {key}: "):
        load_config(PROJECT / "config.yaml", [override, "run_name=text"])


def test_the_last_override_counts_wherever_mode_stands(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "train_config.epochs=2", "--mode", "test", "train_config.epochs=3"])
    assert cli.read_command("", accumulates=False).config.train_config.epochs == 3


@pytest.mark.parametrize(("overrides_of_it", "words"), [
    (["data_config.dataset=absent.csv"], "error: data_config.dataset: no such file or folder: absent.csv"),
    (["data_config.max_len=67"], "takes at most 66 tokens")])
def test_the_real_script(overrides, tmp_path, overrides_of_it, words):
    result = run_script("main.py", *overrides, *overrides_of_it)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "run").exists()


def test_an_output_dir_that_cannot_be(overrides, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/nowhere", str(tmp_path / "file")):
        result = run_here(*overrides, f"output_dir={folder}")
        assert result.returncode == 2
        assert folder in result.stderr
        assert "set output_dir" in result.stderr


@pytest.mark.parametrize(("fix", "words"), [
    ({}, "set output_dir to another disk"), ({"fix": "choose another --output"}, "choose another --output")])
def test_a_full_disk_names_the_fix(tmp_path, fix, words):
    with (pytest.raises(UserError, match=f"{tmp_path}: no room to write .*same command again.*{words}$"),
          room_for(tmp_path, needed=1e18, **fix)):
        pytest.fail("there is no such disk")
