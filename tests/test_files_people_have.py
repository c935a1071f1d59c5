"""Data as people have it is read as it is: all kinds of files say the same, each text is the one that the file holds,
labels of any kind are classes, no text of a cache stands in two splits, and problems are counted, not told one by one.
"""

import csv
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import PROJECT, expect, run_here

from suite.reviews import rows, splitting
from suite.reviews.classes import load_reviews
from utils import ROW_FILES, DataConfig, UserError, file_kind, load_config

# What readers like to take for a missing value, a number, a date or a truth value
ODD = ["NA", "null", "nan", "None", "007", "1e5", "1.50", "2020-01-02", "true", "so, so", 'a "quote"', "two\nlines",
       "naïve film", " a blank first"]
RECORDS = [{"text": text, "label": ("neg", "pos")[place % 2]} for place, text in
           enumerate([*ODD, *(f"film number {number}" for number in range(26))])]


def write_table(path: Path, records: list[dict], delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def write(path: Path, records: list[dict]) -> Path:
    """A file of the kind that its name says."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), records)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif (kind := file_kind(path)) == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    elif kind in (".csv", ".tsv"):
        write_table(path, records, "\t" if kind == ".tsv" else ",")
    elif kind in (".jsonl", ".ndjson") or "lines" in path.name:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def reviews_of(path, num_labels: int = 2, **settings):
    return load_reviews(DataConfig(dataset=str(path), **settings), num_labels)


def split_of(path, num_labels: int = 2, **settings) -> splitting.Split:
    return splitting.load_split(load_config(PROJECT / "config.yaml", [
        f"data_config.dataset={path}", f"model_config.num_labels={num_labels}",
        *(f"data_config.{key}={value}" for key, value in settings.items())]))


def refusal(*arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
        split_of(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def films(count: int, labels: Sequence = (0, 1), name: str = "film") -> list[dict]:
    """So many rows, whose labels come again and again."""
    return [{"text": f"{name} {row}", "label": labels[row % len(labels)]} for row in range(count)]


def declaring(names: list[str], records: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(records, datasets.Features({
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}))


@pytest.fixture
def many(tmp_path) -> Path:
    (tmp_path / "many").mkdir()
    return tmp_path / "many"


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of files. Promise: wrong data ends in one line, and right data is read, through every door alike.

NAMES = ["r.csv", "R.CSV", "r.tsv", "r.jsonl", "r.ndjson", "r.json", "lines.json", "r.parquet", "r.csv.gz", "r.tsv.gz",
         "r.jsonl.gz", "r.json.gz"]


def test_one_table_names_the_kinds_and_what_reads_them():
    assert set(rows.KINDS) | {".parquet"} == set(ROW_FILES)
    assert {file_kind(name) for name in NAMES} | {".txt"} == set(ROW_FILES)
    assert [file_kind(name) for name in ("r.parquet.gz", "r.zip", "csv", "r.gz", "imdb")] == [""] * 5


@pytest.mark.parametrize(("name", "is_folder"), [  # in a folder, the library wants small letters
    (name, is_folder) for name in NAMES for is_folder in (False, True) if not (is_folder and name == "R.CSV")])
def test_a_file_and_a_folder_of_it_give_the_texts_that_are_in_it(many, name, is_folder):
    path = write(many / name, RECORDS)
    reviews = reviews_of(path.parent if is_folder else path)
    assert reviews.table["text"][:] == [record["text"] for record in RECORDS]
    assert [reviews.label_names[label] for label in reviews.labels] == [record["label"] for record in RECORDS]


@pytest.mark.parametrize("name", NAMES)
def test_prediction_reads_what_training_reads(tmp_path, name):
    path = write(tmp_path / name, RECORDS)
    found = list(rows.read_rows(str(path), ["text"]))
    assert [row.problem for row in found] == [None] * len(RECORDS)
    assert [row.values for row in found] == RECORDS
    assert found[-1].position == rows.size_of(str(path))  # where the progress bar ends


@pytest.mark.parametrize("labels", [
    pa.array([0.0, 1.0]), pa.array([0, 1]).cast(pa.decimal128(19, 0)), pa.array([0, 1], pa.uint8()),
    pa.array(["0", "1"], pa.large_string()),
    pa.array(["0", "1"]).dictionary_encode()], ids=lambda labels: str(labels.type))
def test_types_of_a_table(many, labels):
    labels = labels.take(pa.array([0, 1] * 20))
    texts = pa.array([f"film {number}" for number in range(40)], pa.string_view())
    pyarrow.parquet.write_table(pa.table({"text": texts, "label": labels}), many / "train.parquet")
    for path in (many, many / "train.parquet"):
        reviews = reviews_of(path)
        assert reviews.table["text"][:] == texts.to_pylist()
        assert reviews.labels.tolist() == [0, 1] * 20
        assert reviews.label_names == ["0", "1"]


def test_json_numbers_and_texts_in_one_column_stay_what_they_are(many):
    texts = [0, "1", 2, "007", "null", 1.5, "2020-01-02", *(f"film {number}" for number in range(13))]
    write(many / "train.json", [{"text": text, "label": row % 2} for row, text in enumerate(texts)])
    assert reviews_of(many).table["text"][:] == [str(text) for text in texts]


@pytest.fixture
def acl_imdb(tmp_path):
    """A folder as the original IMDB has it, with files beside that are no reviews."""
    folder = tmp_path / "aclImdb"
    for split, first in (("train", 0), ("test", 100)):
        for name in ("neg", "pos", "unsup")[:3 if split == "train" else 2]:
            (folder / split / name).mkdir(parents=True)
            for number in range(first, first + 20):
                (folder / split / name / f"{number}_7.txt").write_text(f"a {name} film, number {number}")
        (folder / split / "urls_pos.txt").write_text("http://example.org\n" * 20)
    (folder / "imdb.vocab").write_text("film\n")
    (folder / "imdbEr.txt").write_text("0.1\n")
    return folder


def test_a_folder_with_a_text_file_for_each_review(acl_imdb, capsys):
    reviews = reviews_of(acl_imdb)
    assert reviews.label_names == ["neg", "pos"]
    assert sorted(set(reviews.split_names)) == ["test", "train"]
    assert [len(part.table) for part in reviews.unlabelled] == [20]
    for text, label in zip(reviews.table["text"], reviews.labels, strict=True):
        assert text.startswith(f"a {reviews.label_names[label]} film, number ")
    assert "3 .txt files that lie in no class's folder are not read" in capsys.readouterr().out
    sizes = {name: len(ids) for name, ids in split_of(acl_imdb, split="official").ids_of.items()}
    assert sizes == {"train": 36, "valid": 4, "test": 40}
    (acl_imdb / "test" / "neg" / "105_7.txt").write_text(" ")
    assert f"{acl_imdb}/test/neg/105_7.txt has no text" in refusal(acl_imdb)
    assert "put the texts of each class into a folder" in refusal(acl_imdb / "test" / "neg")


def test_files_that_change_their_folder_change_their_label(acl_imdb):
    before = reviews_of(acl_imdb).labels
    for split in ("train", "test"):
        for old, new in (("neg", "other"), ("pos", "neg"), ("other", "pos")):
            (acl_imdb / split / old).rename(acl_imdb / split / new)
    assert reviews_of(acl_imdb).labels.tolist() == before.tolist()  # sorted by class, and now with the others' texts
    assert reviews_of(acl_imdb).table[0]["text"].startswith("a pos film")


# ---------------------------------------------------------------------------------------------------------------------
# A dataset's folder is more than its data. Promise: no text stands in two splits.


@pytest.mark.parametrize("is_dict", [True, False])
def test_a_saved_dataset_is_read_without_the_caches_beside_it(tmp_path, is_dict):
    tables = {split: declaring(["bad", "good"], films(40, name=f"Film {split}")) for split in ("train", "test")}
    (datasets.DatasetDict(tables) if is_dict else tables["train"]).save_to_disk(str(tmp_path / "saved"))
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: {"text": row["text"].lower()})
    assert list((tmp_path / "saved").rglob("cache-*.arrow"))
    reviews = reviews_of(tmp_path / "saved")
    assert reviews.label_names == ["bad", "good"]
    texts = tables["train"]["text"][:] + (tables["test"]["text"][:] if is_dict else [])
    assert reviews.table["text"][:] == texts
    assert sorted(set(reviews.split_names)) == (["test", "train"] if is_dict else ["train"])


@pytest.mark.parametrize("validation", ["val", "dev", "valid", "validation"])
def test_the_official_validation_rows_are_not_trained_on_whatever_their_split_is_called(many, validation, capsys):
    for split, count in (("train", 40), (validation, 20), ("test", 20), ("extra", 10)):
        write(many / f"{split}.csv", films(count, name=split))
    (many / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {split}.csv\n" for split in ("train", validation, "test", "extra")) + "---\n")
    split = split_of(many, split="official")
    assert {name: {split.text(row).split()[0] for row in ids} for name, ids in split.ids_of.items()} == {
        "train": {"train"}, "valid": {validation}, "test": {"test"}}
    assert "the split extra is none of train, validation, test" in capsys.readouterr().out


def test_files_that_belong_to_no_split_are_named(many, capsys):
    for name in ("train.csv", "test.csv", "heldout.csv"):
        write(many / name, films(20, name=name))
    assert len(reviews_of(many).table) == 40
    assert (f"{many}: 1 file(s) not read, such as {many / 'heldout.csv'}, because their names tell none of the splits "
            "train, test\n") in capsys.readouterr().out
    snapshot = many.with_name("snapshot")  # as the Hub's cache has it: links to files that lie elsewhere
    snapshot.mkdir()
    for name in ("train.csv", "test.csv"):
        (snapshot / name).symlink_to(many / name)
    assert len(reviews_of(snapshot).table) == 40
    assert "not read" not in capsys.readouterr().out


def test_shards_of_a_split_may_differ_in_columns_that_nobody_asked_for(many):
    write(many / "train-00000-of-00002.parquet", films(20, name="a"))
    write(many / "train-00001-of-00002.parquet", [
        {"text": f"b{row}", "lang": "en", "label": row % 2, "__index_level_0__": row} for row in range(20)])
    assert len(reviews_of(many).table) == 40


# ---------------------------------------------------------------------------------------------------------------------
# Labels. Promise: what is refused is refused with a way that works.


@pytest.mark.parametrize("values", [
    [0, 4], [-1, 1], [-1, 0, 1], ["-1", "+1"], [".5", "2.", "+10"], [1, 2, 3, 4, 7, 8, 9, 10], [0.5, 1, 10],
    ["no", "yes"], ["1e3", "on"], ["--1", "9" * 5000]])
def test_as_many_values_as_classes_are_the_classes(tmp_path, values):
    path = write(tmp_path / "r.csv", films(20 * len(values), values))
    for given in (2, 5, 8):
        if given != len(values):
            assert f"set model_config.num_labels={len(values)}" in refusal(path, given)
    reviews = reviews_of(path, len(values))
    assert reviews.label_names == list(map(str, values))  # in their order: 10 comes after 9
    assert reviews.labels.tolist() == list(range(len(values))) * 20


def test_one_number_written_in_several_ways_is_one_class(many):
    write(many / "train.csv", films(40, ["0", "1"], name="a"))
    write(many / "test.csv", films(40, ["0.0", "1.0", "01", "00"], name="b"))
    reviews = reviews_of(many)
    assert reviews.label_names == ["0", "1"]
    assert reviews.labels.tolist() == [0, 1] * 20 + [0, 1, 1, 0] * 10


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.parquet"])
def test_a_declared_name_comes_before_a_declared_number(many, name):
    """The classes are called 1, 2 and 3. A text is a name; a number counts the classes from 0."""
    numbers = [0, 1, 2] if name == "r.parquet" else [1, 2, 3]
    values = [str(number) if name == "r.jsonl" else number for number in numbers]
    write(many / name, films(60, values))
    (many / "README.md").write_text(STARS)
    reviews = reviews_of(many, 3)
    assert reviews.label_names == ["1", "2", "3"]
    assert reviews.labels.tolist() == [0, 1, 2] * 20


def card_of(names: list[str]) -> str:
    return ("---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: label\n    dtype:\n"
            f"      class_label: {{names: {json.dumps(dict(enumerate(names)))}}}\n---\n")


STARS = card_of(["1", "2", "3"])


@pytest.mark.parametrize("names", [["-1", "0", "1"], ["3", "4", "5"]])
def test_a_number_of_no_declared_class_is_not_a_name(many, names):
    write(many / "train.jsonl", films(60, list(map(int, names))))
    (many / "README.md").write_text(card_of(names))
    assert f"labels such as 'number {names[0]}'" in refusal(many, 3)


@pytest.mark.parametrize(("kind", "values", "reason"), [
    ("csv", [0, 1, 2], None), ("jsonl", ["0", "1", "2"], None), ("jsonl", [0, 1, 2], None),
    ("csv", [1, 2, 0, 3], "the label '1' is the name of one of the classes 1, 2, 3 and the number of another"),
    ("jsonl", [1, 2, 3], "labels such as 'number 3', and the dataset declares the classes 1, 2, 3")])
def test_numbers_of_declared_classes_are_never_taken_for_their_names(many, kind, values, reason):
    """Two classes would become one. The classes are called 1, 2 and 3, and a column holds all names or all numbers."""
    write(many / f"train.{kind}", films(60, values))
    (many / "README.md").write_text(STARS)
    if reason:
        assert reason in refusal(many, 3)
    else:
        assert reviews_of(many, 3).labels.tolist() == [0, 1, 2] * 20


def test_minus_one_is_a_class_wherever_it_stands_unless_a_split_holds_nothing_else(tmp_path, many, capsys):
    for shard, label in enumerate((-1, 0, 1)):  # sorted by label, as some programs write them
        write(many / f"train-{shard:05}-of-00003.csv", films(20, [label], name=label))
    assert reviews_of(many, 3).label_names == ["-1", "0", "1"]
    path = write(tmp_path / "r.csv", films(20, [-2, -1]))
    assert reviews_of(path).label_names == ["-2", "-1"]
    write(tmp_path / "secret" / "train.csv", films(20, name="a"))
    write(tmp_path / "secret" / "test.csv", films(20, [-1], name="b"))
    reviews = reviews_of(tmp_path / "secret")
    assert (len(reviews.table), [part.split for part in reviews.unlabelled]) == (20, ["test"])


@pytest.mark.parametrize("rows_of_classes", [[0, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]])
def test_declared_classes_without_rows_are_left_out_with_one_line(many, capsys, rows_of_classes):
    names, left = ["joy", "anger", "fear", "calm"], [label for label in range(4) if rows_of_classes[label]]
    declaring(names, films(20 * len(left), left)).to_parquet(str(many / "train.parquet"))
    assert f"set model_config.num_labels={len(left)}" in refusal(many, 4)
    capsys.readouterr()
    for path in (many, many / "train.parquet"):  # its names are declared in the file itself
        reviews = reviews_of(path, len(left))
        assert reviews.label_names == [names[label] for label in left]
        assert reviews.labels.tolist() == list(range(len(left))) * 20
        [line] = capsys.readouterr().out.splitlines()
        assert line.endswith("which the dataset declares: it is left out")
        assert all((name in line) == (label not in left) for label, name in enumerate(names))


def test_files_that_declare_other_classes_do_not_share_their_numbers(many):
    for split, names in (("train", ["bad", "good"]), ("test", ["good", "bad"])):
        declaring(names, films(20, name=split)).to_parquet(str(many / f"{split}.parquet"))
    assert "one number would mean two classes" in refusal(many)


def test_a_class_that_is_only_trained_on_is_no_obstacle_to_an_official_split(many):
    write(many / "train.csv", films(40, ["bad", "good"], name="a") + films(2, ["so"], name="so"))
    write(many / "validation.csv", films(20, ["bad", "good"], name="b"))
    write(many / "test.csv", films(20, ["bad", "good"], name="c"))
    split = split_of(many, 3, split="official")
    assert {name: len(ids) for name, ids in split.ids_of.items()} == {"train": 42, "valid": 20, "test": 20}
    assert "the class 'so' has too few different texts (2)" in refusal(many, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Counts. Promise: all problems of a kind are counted at once.


COUNTED = [  # (how every seventh row is spoiled, what is said of them)
    ({"text": "film 0"}, "{}: rows 4, 18, 32 and 19 more have the same texts as earlier rows, the first as {}: row 1"),
    ({"text": " "}, "{}: rows 4, 11, 18 and 40 more have no text"),
    ({"label": " "}, "{}: rows 4, 11, 18 and 40 more have no label"),
    ({"label": "1,,"}, "{}: row 4 (line 5) has 4 fields, the header has 2"),
    ({"label": "1,,"}, "42 more cannot be read, such as row 11, 18, 25"),
]


@pytest.mark.parametrize(("change", "words"), COUNTED)
def test_rows_with_the_same_problem_are_counted(tmp_path, change, words):
    records = films(300)
    for row in range(3, 300, 7):
        records[row] |= change
    path = tmp_path / "r.csv"
    path.write_text("text,label\n" + "".join(f"{record['text']},{record['label']}\n" for record in records))
    assert words.replace("{}", str(path)) in refusal(path)


def test_unknown_labels_are_counted(many):
    declaring(["bad", "good"], films(40, [0, 1, -1, 1])).to_parquet(str(many / "train.parquet"))
    assert "rows 3, 7, 11 and 7 more have labels such as '-1', and the dataset declares the classes bad, good" in (
        refusal(many))


# ---------------------------------------------------------------------------------------------------------------------
# Headers, separators, encodings, configurations. Promise: one line with the fix.


def test_columns_without_a_name_do_not_matter_and_are_kept(tmp_path):
    path = tmp_path / "spam.csv"
    path.write_text("v1,v2,,,\n" + "".join(f"{('ham', 'spam')[row % 2]},film {row},x,,\n" for row in range(40)))
    reviews = reviews_of(path, text_column="v2", label_column="v1")
    assert reviews.label_names == ["ham", "spam"]
    assert next(rows.read_rows(str(path), ["v2"])).values == {
        "v1": "ham", "v2": "film 0", "column 3": "x", "column 4": "", "column 5": ""}


@pytest.mark.parametrize("encoding", ["WINDOWS-1252", "UTF-16"])
def test_the_encoding_is_named_with_its_fix(tmp_path, encoding):
    path = tmp_path / "spam.csv"
    path.write_text("text,label\n" + "".join(f"£{row} won,{row % 2}\n" for row in range(40)), encoding=encoding)
    message = refusal(path)
    assert "is not UTF-8: it is probably " + encoding in message
    fix = message.partition("convert the file with ")[2].partition(" > NEW_FILE")[0].partition(";")[0]
    assert fix == f"iconv -f {encoding} -t UTF-8 FILE"


@pytest.mark.parametrize(("header", "row"), [
    ("text;label", '"film; {}";{}'), ("text\tlabel", "film {}\t{}"), ("text|label", "film {}|{}"),
    ('"text";"label"', '"film {}";"{}"'), ("text, label", '"film, {}", {}'), (" text ,label", "film {},{}"),
    ("sep=;\ntext;label", '"film; {}";{}'), ("sep=^\ntext^label", "film {}^{}")])
def test_the_separator_is_the_one_under_which_the_columns_are_there(tmp_path, header, row):
    path = tmp_path / "r.csv"
    path.write_text(f"{header}\n" + "".join(row.format(number, number % 2) + "\n" for number in range(40)))
    reviews = reviews_of(path)
    assert reviews.labels.tolist() == [0, 1] * 20
    assert reviews.table[7]["text"] in ("film; 7", "film 7", "film, 7")
    assert rows.columns_of(str(path), ["text"]) == ["text", "label"]


def test_a_question_with_a_semicolon_is_one_column(tmp_path):
    (tmp_path / "survey.csv").write_text("What was good; and why?\nacting; it moved me\nnothing; dull\n")
    found = rows.read_rows(str(tmp_path / "survey.csv"), ["What was good; and why?"])
    assert [list(row.values.values()) for row in found] == [["acting; it moved me"], ["nothing; dull"]]


def test_quotes_do_not_swallow_the_rows_of_a_file_that_was_written_without_any(tmp_path):
    """Promise: no row of a labelled file is lost; a broken one is set aside with its reason."""
    path = tmp_path / "r.tsv"
    path.write_text('text\tlabel\n"I loved it.\t1\nso so\t0\nIt was great."\t1\n"two\nlines"\t0\nbleak\t0\n')
    found = list(rows.read_rows(str(path), ["text", "label"]))
    assert [row.values.get("text") for row in found] == [None, "so so", 'It was great."', "two\nlines", "bleak"]
    assert "line 2: the quotes would make one text of this row and the 2 below it" in found[0].problem
    assert found[0].content == '"I loved it.\t1'


def test_columns_of_the_same_name_matter_only_if_they_are_asked_for(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("text,label,note,note\n" + "".join(f"film {row},{row % 2},a,b\n" for row in range(40)))
    assert len(reviews_of(path).table) == 40
    assert next(rows.read_rows(str(path), ["text"])).values == {
        "text": "film 0", "label": "0", "note": "a", "note (column 4)": "b"}
    assert "two columns are called 'note'" in refusal(path, label_column="note")


def test_what_rows_of_json_leave_out_is_missing(tmp_path):
    records = films(40)
    del records[5]["text"], records[8]["text"]
    path = write(tmp_path / "r.jsonl", records)
    assert f"{path}: rows 6, 9 have no text" in refusal(path)
    assert "no column 'body'; found text, label: set data_config.text_column" in refusal(path, text_column="body")


def test_a_configuration_is_chosen_by_a_key_and_the_message_lists_them(many):
    for name in ("movies", "books"):
        write(many / f"{name}.csv", films(40, name=name))
    (many / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("movies", "books")) + "---\n")
    for subset in ("null", "music"):
        assert "set data_config.subset to one of movies, books" in refusal(many, subset=subset)
    assert reviews_of(many, subset="books").table[0]["text"] == "books 0"


def test_a_competition_s_test_file_has_no_labels_and_the_message_names_the_other(many):
    write(many / "train.csv", films(40))
    write(many / "test.csv", [{"id": row, "text": f"film {row}"} for row in range(9)])
    assert f"data_config.dataset={many / 'train.csv'}" in refusal(many)


# ---------------------------------------------------------------------------------------------------------------------
# A text setting is the text that was typed. Promise: two runs do not write one folder.


@pytest.mark.parametrize("text", ["2026_11_29", "1_2", "on", "no", "1e3", "0", "1:30", "010", "null", "~x", "a: b",
                                  "reviews [final], v2.csv", "{x}.csv", "it's.csv", "a#b", "2026-11-29"])
def test_texts_stay_as_they_are_typed(text, tmp_path):
    key = "data_config.text_column"
    typed = load_config(PROJECT / "config.yaml", [f"{key}={text}"])
    assert typed.data_config.text_column == text
    (tmp_path / "my.yaml").write_text(f"data_config:\n  text_column: {json.dumps(text)}\n")
    assert load_config(tmp_path / "my.yaml").data_config.text_column == text
    if text not in ("null", "a: b", "reviews [final], v2.csv", "{x}.csv"):  # a file's own null, mapping or list
        (tmp_path / "my.yaml").write_text(f"data_config:\n  text_column: {text}\n")
        assert load_config(tmp_path / "my.yaml").data_config.text_column == text


def test_run_names_that_yaml_reads_as_one_number_are_two_folders(tmp_path):
    names = [load_config(PROJECT / "config.yaml", [f"run_name={text}"]).run_folder.name for text in ("1_2", "12")]
    assert names == ["1_2", "12"]
    assert load_config(PROJECT / "config.yaml", ["data_config={dataset: 2026_11}"]).data_config.dataset == "2026_11"


def test_what_a_file_and_a_folder_hold_is_labelled(acl_imdb, overrides, tmp_path):
    """Promise: no row of a labelled file is lost, the order stays; a broken one is set aside with its reason."""
    columns = ["data_config.text_column=text", "data_config.label_column=label", "train_config.max_steps=1",
               "train_config.test=false"]
    overrides = [*overrides, *columns, f"data_config.dataset={write(tmp_path / 'train.json', RECORDS)}"]
    expect(0, run_here(*overrides))
    for name in ("r.csv.gz", "r.json", "r.tsv"):
        source, output = write(tmp_path / name, RECORDS), tmp_path / f"{name}.csv"
        expect(0, run_here(*overrides, mode="predict", input=str(source), output=str(output)))
        with open(output, newline="", encoding="utf-8") as file:
            assert [row["text"] for row in csv.DictReader(file)] == [record["text"] for record in RECORDS]
    shutil.rmtree(acl_imdb / "train")
    (acl_imdb / "test" / "neg" / "107_7.txt").write_bytes(b"na\xefve")
    expect(0, run_here(*overrides, mode="predict", input=str(acl_imdb / "test"), output=str(tmp_path / "out.csv")))
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 40  # urls_pos.txt, and all but the broken one
    assert {"file": "neg/106_7.txt", "text": "a neg film, number 106"}.items() <= found[6].items()
    assert "neg/107_7.txt is not UTF-8" in (tmp_path / "out.csv.rejected.csv").read_text()
    assert np.isin([row["predicted"] for row in found], ["neg", "pos"]).all()


@pytest.mark.parametrize("content", [b"not gzip", b"\x1f\x8b\x08"])
@pytest.mark.parametrize("read", [lambda *given: list(rows.read_rows(*given)), rows.columns_of])
def test_a_gz_file_that_is_none_or_cut_in_its_header_is_one_line(tmp_path, content, read):
    """Wrong data end in one line, wherever the file is looked at first."""
    (tmp_path / "r.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match="r.csv.gz: not a readable .gz file"):
        read(str(tmp_path / "r.csv.gz"), ["text"])
