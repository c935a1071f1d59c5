"""Whatever is wrong with the data: exit code 2, one line that names file, row or value and the fix, nothing written.

Each row of the table goes through the real main.main in this process; its run folder holds a run already, which must
stay as it is to the last byte.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import PROJECT, write_reviews

import data
from suite.reviews import classes, sources
from suite.training import run
from utils import DataConfig, load_config

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


def card(yaml: str):
    """A writer of the folder `many` with a good table and a README.md that declares `yaml` about it."""
    def write(folder: Path):
        tree(README__md=f"---\n{yaml}\n---\n")(folder)
        table([{"review": f"film {row}", "verdict": row % 2} for row in range(40)])(folder)
        (folder / PARQUET).rename(folder / MANY / "train.parquet")
    return write


HEADED = "review,verdict\n"
CSV, PARQUET, JSONL, MANY = "reviews.csv", "reviews.parquet", "reviews.jsonl", "many"
BAD_DATA = [  # (name, what writes it, the dataset's name, words of the message)
    ("no file", lambda folder: None, CSV, "no such file or folder: {}"),
    ("an empty file", lines("", header=""), CSV, "{}: holds no labelled rows"),
    ("a header only", lines(""), CSV, "{}: holds no labelled rows"),
    ("no text column", lines(GOOD, header="text,verdict\n"), CSV, "no column 'review'; found text, verdict"),
    ("no label column", lines(GOOD, header="review,label\n"), CSV, "no column 'verdict'; found review, label: set "),
    ("an empty text", lines(GOOD + " ,good\n"), CSV, "{}: row 41 has no text"),
    ("a missing text", raw(b'{"review": null, "verdict": 1}\n', JSONL), JSONL, "{}: row 1 has no text"),
    ("a list as text", raw(b'{"review": ["a"], "verdict": 1}\n', JSONL), JSONL, "{}: row 1 holds list"),
    ("numbers as text", table([{"review": b"\xff", "verdict": 1}]), PARQUET, "{}: row 1 holds bytes"),
    ("no label", lines(GOOD + "so so,\n"), CSV, "{}: row 41 has no label"),
    ("a label too large", lines("fine,0\nbleak,1\nodd,7\n"), CSV, "the rarest class is '7' ({}: row 3)"),
    ("a negative label", lines("fine,0\nbleak,1\nbleak 2,1\nfine 2,0\nodd,-1\n"), CSV,
     "3 classes (-1, 0, 1), but model_config.num_labels is 2: set model_config.num_labels=3, or correct the data; the "
     "rarest class is '-1' ({}: row 5)"),
    ("a fraction as label", lines("fine,0\nbleak,0.5\n"), CSV, "{}"),
    ("one class", lines("fine,good\nnice,good\n"), CSV, "{}: all rows have the label 'good' in the column"),
    ("a class with one text", lines("a,good\nb,good\nc,good\n" + "d,bad\n" * 5), CSV,
     "{}: the class 'bad' has too few different texts (1)"),
    ("too few to split", lines("a,x\nb,x\nc,x\nd,y\ne,y\nf,y\n"), CSV, "6 rows that are to be divided, 3 of the"),
    ("a broken parquet", raw(b"PAR1 and no more", PARQUET), PARQUET, "{}: not a readable parquet file"),
    ("bad UTF-8", raw(HEADED.encode() + b"fine,good\nbl\xffeak,bad\n", CSV), CSV, "{}: line 3 is not UTF-8"),
    ("an open quote", lines('fine,good\n"so so,bad\n'), CSV, "{}: line"),
    ("two rows in one object", raw(b'{"review": "a", "verdict": 1, "review": "b", "verdict": 0}\n', JSONL), JSONL,
     "{}: line 1 is not JSON: the key 'review' comes twice"),
    ("bad JSON", raw(b'{"review": "a", "verdict": 1}\n{"review": \n', JSONL), JSONL, "{}: line 2 is not JSON"),
    ("no data in a folder", tree(README__md="---\n: [\n---\n"), MANY, "{} holds no .csv, .tsv, .jsonl, "),
    ("half a character", raw(b'{"review": "a \\uD83D", "verdict": 1}\n', JSONL), JSONL, "{}: line 1 holds half of a"),
    ("another file type", raw(b"text", "reviews.txt"), "reviews.txt",
     "a file must end in .csv, .tsv, .jsonl, .ndjson, .json, .parquet, or one of them and .gz"),
    ("mixed types", tree(train__csv=HEADED + GOOD, more__jsonl="{}"), MANY, "{} holds .csv and .jsonl files"),
    ("an odd row in a folder", tree(train__csv=HEADED + GOOD, test__csv=HEADED + "a,b,c\n"), MANY,
     "test.csv: row 1 (line 2) has 3 fields"),
    ("two labels in a folder", tree(train__csv=HEADED + GOOD, test__csv=HEADED + "a dull film number 3,good\n"), MANY,
     "test.csv: row 1 has the same text as {}/train.csv: row 8, and another label: correct"),
    ("a script beside data", tree(train__csv=HEADED + GOOD, many__py=""), MANY, "scripts are no longer supported"),
    ("an archive beside data", tree(some__csv=HEADED + GOOD, data__zip="PK"), MANY, "{} holds .csv and .zip files"),
    ("a broken archive", tree(data__zip="PK"), MANY, "{} cannot be loaded (BadZipFile: File is not a zip"),
    ("a README that is no YAML", tree(train__csv=HEADED + GOOD, README__md="---\na: [\n---\n"), MANY,
     "{} with its README.md cannot be loaded"),
    ("declared files that are missing", card("configs: [{config_name: default, data_files: gone.parquet}]"), MANY,
     "gone.parquet"),
    ("other columns in a file", lambda folder: (card("")(folder), table([{"text": 1}])(folder), os.rename(
        folder / PARQUET, folder / MANY / "test.parquet")), MANY, "test.parquet: no column 'review'; found text"),
    ("a huge field", lines("a" * (1 << 24) + "a,good\n"), CSV, "{}: line 2: field larger than field limit"),
]


@pytest.mark.parametrize(("write", "name", "words"), [row[1:] for row in BAD_DATA], ids=[row[0] for row in BAD_DATA])
def test_bad_data(tmp_path, refused, monkeypatch, write, name, words):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    monkeypatch.setattr(run, "new_model", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "data" / name
    assert words.replace("{}", str(path)) in refused(f"data_config.dataset={path}")


def test_a_reader_of_the_library_is_no_dataset(refused, reviews_file, monkeypatch):
    monkeypatch.chdir(reviews_file.parent)  # the library would take whatever lies here
    assert "no such file or folder: csv" in refused("data_config.dataset=csv")


ODD_FOLDERS = [  # (name, what writes `many`)
    ("a foreign script and a byte order mark", tree(train__csv="\ufeff" + HEADED + GOOD, loader__py="1 / 0")),
    ("control characters", tree(train__csv=HEADED + GOOD.replace("good", "\x1b[31m\0"))),
    ("a label of 400 digits", tree(train__csv=HEADED + GOOD.replace("good", "9" * 400))),
    ("features of other data", card("dataset_info: {features: [{name: other, dtype: string}]}")),
    ("numbers as names", card("dataset_info: {features: [{name: review, dtype: string}, {name: verdict, dtype: "
                              "{class_label: {names: [3, 4]}}}]}")),
]


@pytest.mark.parametrize("write", [row[1] for row in ODD_FOLDERS], ids=[row[0] for row in ODD_FOLDERS])
def test_odd_but_good_folders(tmp_path, write):
    write(tmp_path)
    config = DataConfig(dataset=str(tmp_path / MANY), text_column="review", label_column="verdict")
    reviews = classes.load_reviews(config, num_labels=2)
    assert np.bincount(reviews.labels).tolist() == [20, 20]
    assert all(isinstance(name, str) for name in reviews.label_names)


def test_a_review_of_100_000_words_is_only_truncated(tmp_path, overrides):
    path = write_reviews(tmp_path / "long.csv")
    with open(path, "a") as file:
        file.write(" ".join(["gripping"] * 100_000) + ",good\n")
    config = load_config(PROJECT / "config.yaml", [*overrides, f"data_config.dataset={path}"])
    prepared = data.prepare_data(config)
    assert max(dataset.lengths.max() for dataset in prepared.splits.values()) == 32


def test_a_bug_in_the_reader_of_a_file_keeps_its_traceback(reviews_file, monkeypatch):
    monkeypatch.setattr(sources, "as_text", lambda value: value.bug())
    with pytest.raises(AttributeError):
        classes.load_reviews(DataConfig(dataset=str(reviews_file), text_column="review", label_column="verdict"), 2)
