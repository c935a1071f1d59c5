"""--mode predict with a trained model: one text, and every kind of file; test_labelling.py has the job itself."""

import csv
import datetime
import decimal
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import PROJECT, expect, launch, rows_of, run_here, run_script, write_reviews
from transformers import BertForSequenceClassification

from suite.common import cli
from suite.common.devices import Devices
from suite.encoders.tokenizers import load_tokenizer
from suite.inference import labelling
from suite.inference.classifier import Classifier
from utils import load_config

ADDED = ["predicted", "probability_bad", "probability_good"]


@pytest.fixture
def trained(undisturbed):
    """(overrides, run folder) of a finished run on reviews whose words give their class away."""
    return [*undisturbed[0], "run_name=run"], undisturbed[1]


@pytest.fixture
def predicting(trained, tmp_path, monkeypatch):
    """predicting(input, output) -> the file that is written, in chunks of 16 rows."""
    monkeypatch.setattr(labelling, "CHUNK_ROWS", 16)

    def run(path, name: str = "out.csv") -> Path:
        expect(0, run_here(*trained[0], mode="predict", input=str(path), output=str(tmp_path / name)))
        return tmp_path / name

    return run


def test_one_text(trained):
    printed = expect(0, run_here(*trained[0], mode="predict", text="gripping moving delightful film")).stdout
    label, *probabilities = printed.split("\n")[:3]
    assert label == "good"
    assert [line.split()[0] for line in probabilities] == ["bad", "good"]
    assert sum(float(line.split()[1]) for line in probabilities) == pytest.approx(1, abs=1e-4)


def test_the_input_s_columns_and_order_with_the_probabilities_of_the_test(trained, predicting):
    """No row is lost, and the order stays."""
    folder = trained[1]
    source = folder.parent.parent / "reviews.csv"
    output = predicting(source)
    rows, given = rows_of(output), rows_of(source)
    assert list(rows[0]) == ["review", "verdict", *ADDED]
    assert [(row["review"], row["verdict"]) for row in rows] == [(row["review"], row["verdict"]) for row in given]
    tested = rows_of(folder / "test_predictions.csv")
    assert len(tested) == 20
    for row in tested:  # other reviews share the batch, so sums round in another order
        again = rows[int(row["id"])]
        assert again["predicted"] == row["predicted"]
        assert float(again["probability_good"]) == pytest.approx(float(row["probability_good"]), abs=1e-6)
    assert {path.name for path in output.parent.iterdir()} == {"out.csv"}


def test_a_text_without_a_confident_class_waits_for_a_person(trained, tmp_path):
    """`predicted` stays empty where the class does not reach --min-confidence."""
    texts = [row["review"] for row in rows_of(trained[1].parent.parent / "reviews.csv")]
    pyarrow.parquet.write_table(pa.table({"review": texts}), tmp_path / "in.parquet")

    def label(name: str, **options) -> str:
        return expect(0, run_here(*trained[0], mode="predict", input=str(tmp_path / "in.parquet"),
                                  output=str(tmp_path / name), **options)).stdout

    label("all.csv")
    rows = rows_of(tmp_path / "all.csv")
    confidence = [max(float(row["probability_bad"]), float(row["probability_good"])) for row in rows]
    least = sorted(confidence)[len(rows) // 3]
    expected = [row["predicted"] if value >= least else "" for row, value in zip(rows, confidence, strict=True)]
    assert set(expected) == {"", "bad", "good"}
    for kind, read in {
            "csv": lambda path: [row["predicted"] for row in rows_of(path)],
            "jsonl": lambda path: [json.loads(line)["predicted"] or "" for line in path.read_text().splitlines()],
            "parquet": lambda path: [label or "" for label in pyarrow.parquet.read_table(path)["predicted"].to_pylist()]
            }.items():
        printed = label(f"out.{kind}", min_confidence=least)
        assert f"{expected.count('')} rows have no class, because its probability is below" in printed
        assert read(tmp_path / f"out.{kind}") == expected
    unsure = texts[expected.index("")]
    printed = expect(0, run_here(*trained[0], mode="predict", text=unsure, min_confidence=least)).stdout
    assert printed.startswith("undecided: below the probability of ")


def test_every_kind_of_file_says_the_same(trained, predicting, stdin, tmp_path):
    rows = rows_of(trained[1].parent.parent / "reviews.csv")[:50]
    texts = [row["review"] for row in rows]
    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row | {"n": {"at": i}} if i else row) + "\n"
                                               for i, row in enumerate(rows)))
    pyarrow.parquet.write_table(pa.table({"review": texts}), tmp_path / "in.parquet")
    (tmp_path / "in.txt").write_text("".join(text + "\n" for text in texts))

    expected = [{name: row[name] for name in ADDED} for row in rows_of(predicting(tmp_path / "in.csv"))]
    for source, target in (("in.jsonl", "a.csv"), ("in.parquet", "b.csv"), ("in.txt", "c.csv")):
        found = rows_of(predicting(tmp_path / source, target))
        assert list(found[0])[-3:] == ADDED
        assert [{name: row[name] for name in ADDED} for row in found] == expected
    lines = predicting(tmp_path / "in.jsonl", "out.jsonl").read_text().splitlines()
    assert json.loads(lines[7])["n"] == {"at": 7}
    assert json.loads(lines[7])["predicted"] == expected[7]["predicted"]
    found = pyarrow.parquet.read_table(predicting(tmp_path / "in.parquet", "out.parquet"))
    assert [str(p) for p in found.column("probability_good").to_pylist()] == [row[ADDED[2]] for row in expected]

    shutil.copy(tmp_path / "in.jsonl", tmp_path / "in.ndjson")
    printed = expect(0, run_here(*trained[0], mode="predict", input=str(tmp_path / "in.ndjson"))).stdout
    assert printed.splitlines() == lines
    stdin((tmp_path / "in.txt").read_bytes())
    printed = list(csv.DictReader(io.StringIO(expect(0, run_here(*trained[0], mode="predict", input="-")).stdout)))
    assert [{name: row[name] for name in ADDED} for row in printed] == expected
    stdin((tmp_path / "in.txt").read_bytes())
    assert rows_of(predicting("-", "d.csv")) == printed


def test_the_run_s_text_column_is_read(trained):
    overrides, folder = trained
    without = [item for item in overrides if "text_column" not in item]
    named = [item for item in without if "output_dir" not in item and "run_name" not in item]
    for arguments, model in ((without, None), (named, str(folder)), (named, str(folder / "best"))):
        config = cli.config_for("predict", PROJECT / "config.yaml", arguments, model)
        assert config.data_config.text_column == "review"
    for override in ("data_config.text_column=body", "data_config={text_column: body}"):
        chosen = cli.config_for("predict", PROJECT / "config.yaml", [*without, override])
        assert chosen.data_config.text_column == "body"


def test_any_model_folder(trained, encoder_folder, tmp_path):
    said = [expect(0, run_here(mode="predict", text="dull dreary film", model=str(folder))).stdout
            for folder in (trained[1], trained[1] / "best", shutil.copytree(trained[1] / "best", tmp_path / "copy"))]
    assert said[0] == said[1] == said[2]
    assert said[0].startswith("bad\n")
    torch.manual_seed(0)
    foreign = BertForSequenceClassification.from_pretrained(
        encoder_folder("bert"), id2label={0: "no", 1: "yes", 2: "?"}, label2id={"no": 0, "yes": 1, "?": 2})
    foreign.save_pretrained(tmp_path / "foreign")
    load_tokenizer(encoder_folder("bert")).save_pretrained(tmp_path / "foreign")
    said = expect(0, run_here("data_config.max_len=32", mode="predict", text="a film", model=str(tmp_path / "foreign")))
    assert {line.split()[0] for line in said.stdout.splitlines()} == {"no", "yes", "?"}
    assert f"{tmp_path / 'foreign'} does not say how a long review is cut: data_config.max_len=32" in said.stderr
    bare = expect(2, run_here("data_config.max_len=32", mode="predict", text="a film", model=encoder_folder("bert")))
    assert "no weights for classifier" in bare.stderr


def test_a_review_s_probabilities_do_not_depend_on_what_shares_its_chunk(trained):
    overrides, folder = trained
    config = load_config(PROJECT / "config.yaml", overrides)
    model = Classifier(folder / "best", config, Devices(config))
    texts = [row["review"] for row in rows_of(folder.parent.parent / "reviews.csv")]
    alone = np.concatenate([model.probabilities([text]) for text in texts[:20]])
    np.testing.assert_allclose(model.probabilities(texts)[:20], alone, atol=1e-6)


def test_a_job_knows_the_settings_that_its_model_uses(trained, tmp_path):
    """Another setting is another job; one that changes nothing is not: the model's config.json says how it cuts."""
    def described(*more: str) -> dict:
        config = load_config(PROJECT / "config.yaml", [*trained[0], *more])
        model = Classifier(trained[1] / "best", config, Devices(config))
        source = str(trained[1].parent.parent / "reviews.csv")
        return labelling.Job(source, tmp_path / "out.csv", model, config).describe()

    said = described()
    assert (said["max_len"], said["truncation"], said["eval_batch_size"], "max_windows" in said) == (
        32, "head", 256, False)
    assert described("data_config.max_len=16", "data_config.truncation=tail", "data_config.max_windows=2") == said
    assert described("data_config.eval_batch_size=7") == said | {"eval_batch_size": 7}


@pytest.mark.long
def test_labelling_a_text_imports_no_library_that_it_does_not_use():
    code = ("import sys, main, suite.inference.predict; "
            "print(*{'datasets', 'sklearn', 'pandas', 'matplotlib', 'captum'} & set(sys.modules))")
    assert expect(0, run_script("-c", code)).stdout == "\n"


@pytest.mark.long
def test_several_processes_write_the_same_file(trained, tmp_path):
    source = write_reviews(tmp_path / "many.csv", 5000, seed=4)  # three chunks, the last one shorter
    expect(0, launch(2, "main_accumulation.py", *trained[0], "--mode", "predict", "--input", str(source), "--output",
                     str(tmp_path / "two.csv")))
    expect(0, run_here(*trained[0], mode="predict", input=str(source), output=str(tmp_path / "one.csv")))
    assert len(rows_of(tmp_path / "one.csv")) == 5000
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Arrow's types

TIME, BIG = pa.time64("ns"), 10**18 + 123456789
COLUMNS = {
    "time64": pa.array([123456789123, 1, None], TIME),
    "timestamp": pa.array([BIG, 1, None], pa.timestamp("ns")),
    "timestamp with zone": pa.array([BIG, 1, None], pa.timestamp("ns", "Europe/Vienna")),
    "duration": pa.array([BIG, 1, None], pa.duration("ns")),
    "decimal128": pa.array([decimal.Decimal("1.230"), None, None], pa.decimal128(30, 3)),
    "decimal256": pa.array([decimal.Decimal("1" * 60), None, None], pa.decimal256(70, 3)),
    "large_string": pa.array(["a", "\u2028", None], pa.large_string()),
    "binary": pa.array([b"\x00\xff", b"", None]),
    "dictionary": pa.array(["x", "y", None]).dictionary_encode(),
    "lists": pa.array([[[123456789123, None]], [[]], None], pa.list_(pa.list_(TIME))),
    "structs": pa.array([{"a": 123456789123, "b": [{"c": 5}]}, {"a": None, "b": None}, None], pa.struct(
        [("a", TIME), ("b", pa.list_(pa.struct([("c", pa.duration("ns"))])))])),
    "map": pa.array([[("key", 123456789123)], [], None], pa.map_(pa.string(), TIME)),
    "lists of one size": pa.array([[1, 2], [3, None], None], pa.list_(pa.int8(), 2)),
    "float16": pa.array([np.float16(1.5), np.float16("inf"), None], pa.float16()),
    "uint64": pa.array([2**64 - 1, 0, None], pa.uint64()),
    "date64": pa.array([datetime.date(2020, 1, 1), datetime.date(1, 1, 1), None], pa.date64()),
    "null": pa.nulls(3)}


def test_every_arrow_type_comes_back_as_it_was(predicting, tmp_path):
    rows = 40  # three chunks; the eleventh row is broken
    texts = pa.array([f"a film number {row}" if row != 10 else "" for row in range(rows)])
    places = pa.array(np.arange(rows) % 3)
    table = pa.table({"review": texts, **{name: column.take(places) for name, column in COLUMNS.items()}})
    text, time, *others = table.schema
    fields = [text.with_nullable(False), time.with_metadata({"unit": "ns"}), *others]
    table = pa.Table.from_arrays(table.columns, schema=pa.schema(fields))
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    expected = pyarrow.parquet.read_table(tmp_path / "in.parquet")
    expected = pa.concat_tables([expected.slice(0, 10), expected.slice(11)])

    found = pyarrow.parquet.read_table(predicting(tmp_path / "in.parquet", "out.parquet"))
    assert found.column_names == [*table.column_names, *ADDED]
    for name in expected.column_names:
        assert found.schema.field(name).equals(expected.schema.field(name), check_metadata=True), name
        assert found[name].combine_chunks().equals(expected[name].combine_chunks()), name

    row = json.loads(predicting(tmp_path / "in.parquet", "out.jsonl").read_text().split("\n")[0])
    shown = {"time64": "00:02:03.456789", "lists": [["00:02:03.456789", None]], "uint64": 2**64 - 1,
             "map": [["key", "00:02:03.456789"]], "decimal128": "1.230"}
    assert {name: row[name] for name in shown} == shown
    assert all("123456789" in row[name] for name in ("timestamp", "timestamp with zone", "duration"))
