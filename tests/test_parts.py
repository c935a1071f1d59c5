"""--mode predict goes on with its own parts and no others: the output is that of a job that nothing disturbed, even if
parts are damaged; another input, model or setting is refused. And a column of any Arrow type comes back as it was."""

import csv
import datetime
import decimal
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import PROJECT, content_of, expect, run_here, train_here, write_reviews

from suite.inference import classifier, labelling, parts
from utils import load_config


@pytest.fixture(scope="module")
def model(tmp_path_factory, encoder_folder):
    """The folder of a model that was trained for two steps."""
    folder = tmp_path_factory.mktemp("model")
    train_here(f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
               f"data_config.dataset={write_reviews(folder / 'reviews.csv')}", "data_config.text_column=review",
               "data_config.label_column=verdict", "data_config.max_len=32", "train_config.max_steps=2",
               "train_config.device=cpu", "train_config.mixed_precision=no", "log_config.wandb_mode=disabled")
    return folder / "run" / "best"


@pytest.fixture
def predict(model, tmp_path, monkeypatch):
    """predict(input, name of the output, exit code) -> (result, output), in chunks of 16 rows."""
    monkeypatch.setattr(labelling, "CHUNK_ROWS", 16)
    return lambda source, name, code=0: (expect(code, predict_here(model, source, tmp_path / name)), tmp_path / name)


def predict_here(model, source, output, *overrides):
    return run_here("data_config.text_column=review", "train_config.device=cpu", "train_config.mixed_precision=no",
                    *overrides, mode="predict", model=str(model), input=str(source), output=str(output))


@pytest.fixture(scope="module")
def interrupted(model, tmp_path_factory):
    """A folder with in.csv, whole.csv, and what a job leaves that was stopped after three of five chunks. The first and
    the second chunk have broken rows."""
    folder = tmp_path_factory.mktemp("interrupted")
    rows = [["" if row in (3, 20) else f"a moving film number {row}", row] for row in range(70)]
    with open(folder / "in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["review", "n"], *rows])
    calls, label = [], classifier.Classifier.probabilities

    def stopping(self, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise SystemExit(130)
        return label(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "CHUNK_ROWS", 16)
        expect(0, predict_here(model, folder / "in.csv", folder / "whole.csv"))
        patch.setattr(classifier.Classifier, "probabilities", stopping)
        expect(130, predict_here(model, folder / "in.csv", folder / "out.csv"))
    return folder


@pytest.fixture
def stopped(interrupted, tmp_path):
    """(input, folder of parts of out.csv, undisturbed output)"""
    folder = shutil.copytree(interrupted / "out.csv.parts", tmp_path / "out.csv.parts")
    return interrupted / "in.csv", folder, interrupted / "whole.csv"


def part(folder, number: int):
    [path] = folder.glob(f"{number:08d}-*.jsonl")
    return path


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {  # name: (what is done to the folder of parts, whether a line says so)
    "truncated": (lambda folder: os.truncate(part(folder, 2), part(folder, 2).stat().st_size - 1), True),
    "emptied": (lambda folder: os.truncate(part(folder, 2), 0), True),
    "a bit flipped": (lambda folder: flip_bit(part(folder, 2)), True),
    "two of them": (lambda folder: (flip_bit(part(folder, 1)), flip_bit(part(folder, 3))), True),
    "not written": (lambda folder: part(folder, 2).unlink(), False),
    "half-written": (lambda folder: (folder / f".{'0' * 16}.tmp").write_text("half"), False),
}


def is_undisturbed(output, whole) -> bool:
    assert output.read_bytes() == whole.read_bytes()
    assert len(output.read_text().splitlines()) == 1 + 68
    rejected = [path.with_name(f"{path.name}.rejected.csv").read_bytes() for path in (output, whole)]
    return rejected[0] == rejected[1] and not output.with_name("out.csv.parts").exists()


@pytest.mark.parametrize(("damage", "is_said"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_parts_are_labelled_again(predict, stopped, damage, is_said):
    """A truncated or bit-flipped part is noticed when it is read."""
    source, folder, whole = stopped
    damage(folder)
    result, output = predict(source, "out.csv")
    assert ("labelled again" in result.stdout) == is_said
    assert is_undisturbed(output, whole)


@pytest.mark.parametrize("name", ["truncated", "emptied", "a bit flipped"])
def test_parts_that_are_damaged_while_the_job_runs(predict, stopped, monkeypatch, name):
    """A truncated or bit-flipped part is noticed when it is joined, too."""
    source, folder, whole = stopped
    join = parts.Parts.join
    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "join", lambda *arguments: (DAMAGE[name][0](folder), join(*arguments)))
        result, output = predict(source, "out.csv", code=2)
    assert "was damaged while this job ran: give the same command again" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()
    predict(source, "out.csv")
    assert is_undisturbed(output, whole)


def test_a_second_process_is_refused(predict, stopped):
    """Two processes cannot write one labelled file at the same time."""
    source, folder, whole = stopped
    holding = "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen([sys.executable, "-c", holding, folder / ".job.lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        before = content_of(folder)
        result, output = predict(source, "out.csv", code=2)
        assert f"error: {folder} is in use by another process" in result.stderr
        assert content_of(folder) == before
        other.communicate("\n")
    predict(source, "out.csv")
    assert is_undisturbed(output, whole)


def test_an_input_of_the_same_size_and_time_is_another_input(predict, stopped):
    """Another input for the same output is refused in one line."""
    source, _, _ = stopped
    status, content = source.stat(), source.read_bytes()
    source.write_bytes(content.replace(b"number 60", b"number 06"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "an interrupted job with another content" in predict(source, "out.csv", code=2)[0].stderr
    source.write_bytes(content)


def test_rows_of_an_input_that_changes_meanwhile_are_not_mixed(predict, stopped, monkeypatch):
    """Another input for the same output is refused, also one that comes while the job runs and goes again."""
    source, _, whole = stopped
    content, finish = source.read_bytes(), labelling.Job.finish
    with monkeypatch.context() as patch:
        patch.setattr(labelling.Job, "finish", lambda *rest: (source.write_bytes(content + b"more,7"), finish(*rest)))
        result, output = predict(source, "out.csv", code=2)
    assert f"error: {source}, or the model, has changed while it was labelled" in result.stderr
    source.write_bytes(content)
    assert "going on" not in predict(source, "out.csv")[0].stdout
    assert is_undisturbed(output, whole)


def test_only_settings_that_the_model_uses_make_another_job(predict, stopped, model):
    """Another setting is refused; one that changes nothing is not: the model's own config.json says how to cut."""
    source, folder, whole = stopped
    said = json.loads((folder / "job.json").read_text())
    assert (said["max_len"], said["truncation"], said["eval_batch_size"]) == (32, "head", 256)
    assert "max_windows" not in said
    output = folder.with_suffix("")
    refused = predict_here(model, source, output, "data_config.eval_batch_size=7")
    assert "with another eval_batch_size:" in expect(2, refused).stderr
    unused = ["data_config.max_len=16", "data_config.truncation=tail", "data_config.max_windows=2"]
    assert "going on: 3 chunks" in expect(0, predict_here(model, source, output, *unused)).stdout
    assert is_undisturbed(output, whole)


def test_a_job_is_known_by_all_files_of_its_model_and_its_input(tmp_path):
    """Another model for the same output is refused: a stack's members have folders of their own in its folder."""
    for name in ("stack/member-1", "texts/pos", "texts/neg"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stack" / "member-1" / "weights").write_text("1")
    (tmp_path / "texts" / "pos" / "1.txt").write_text("a film")
    stack = SimpleNamespace(folder=tmp_path / "stack", settings={}, added=[], devices=None)
    job = labelling.Job(str(tmp_path / "texts"), tmp_path / "out.csv", stack, load_config(PROJECT / "config.yaml", []))
    first = job.describe()
    assert job.describe() == first
    (tmp_path / "stack" / "member-1" / "weights").write_text("2")
    assert {key for key, value in job.describe().items() if value != first[key]} == {"model"}
    (tmp_path / "texts" / "pos" / "1.txt").rename(tmp_path / "texts" / "neg" / "1.txt")
    assert {key for key, value in job.describe().items() if value != first[key]} == {"model", "content"}


@pytest.mark.parametrize("name", ["n" * 250 + ".csv", "ä" * 120 + ".csv", "n" * 239 + ".jsonl"])
def test_a_name_that_leaves_no_room_for_those_beside_it(model, name, tmp_path):
    from suite.common.cli import check_files
    from utils import UserError

    (tmp_path / "in.csv").write_text("review\none\n")
    with pytest.raises(UserError, match=r"--output: the file name in .*\.rejected\.csv has .* choose a shorter name"):
        check_files(str(tmp_path / "in.csv"), str(tmp_path / name))


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


def test_every_arrow_type_comes_back_as_it_was(predict, tmp_path):
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

    found = pyarrow.parquet.read_table(predict(tmp_path / "in.parquet", "out.parquet")[1])
    assert found.column_names == [*table.column_names, "predicted", "probability_bad", "probability_good"]
    for name in expected.column_names:
        assert found.schema.field(name).equals(expected.schema.field(name), check_metadata=True), name
        assert found[name].combine_chunks().equals(expected[name].combine_chunks()), name

    lines = predict(tmp_path / "in.parquet", "out.jsonl")[1].read_text().split("\n")
    row = json.loads(lines[0])
    shown = {"time64": "00:02:03.456789", "lists": [["00:02:03.456789", None]], "uint64": 2**64 - 1,
             "map": [["key", "00:02:03.456789"]], "decimal128": "1.230"}
    assert {name: row[name] for name in shown} == shown
    assert all("123456789" in row[name] for name in ("timestamp", "timestamp with zone", "duration"))
