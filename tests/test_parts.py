"""--mode predict loses no row and no digit: whatever happens to the parts of an interrupted job, the output is the one
of a job that nothing disturbed; and a column of any Arrow type comes back as it was."""

import csv
import datetime
import decimal
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import content_of, expect, run_here, train_here, write_reviews

from suite.inference import classifier, labelling, parts


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


def predict_here(model, source, output):
    return run_here("data_config.text_column=review", "train_config.device=cpu", "train_config.mixed_precision=no",
                    mode="predict", model=str(model), input=str(source), output=str(output))


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


def part(folder, number: int, kind: str = "jsonl"):
    [path] = folder.glob(f"{number:08d}-*.{kind}")
    return path


def cut_line(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def swap(first, second):
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def of_another(folder, job: str = "", rows: str = ""):
    """Make the file of chunk 2 that of another job, or of other rows of the input."""
    path, description = part(folder, 2), json.dumps(json.loads((folder / "job.json").read_text()))
    place = f"{2:08d}-{rows or path.name.split('-')[1]}"
    content = path.read_bytes().replace(b'"predicted": "', b'"predicted": "un')
    maker = parts.Parts("in.csv", folder.with_suffix(""), [], "text")
    maker.job = job or description
    path.unlink()
    (folder / maker.part_name(place, ".jsonl", content)).write_bytes(content)


DAMAGE = {  # name: (what is done to the folder of parts, whether a line says so)
    "a line lost": (lambda folder: cut_line(part(folder, 2)), True),
    "a line more": (lambda folder: part(folder, 2).open("a").write('{"review": "mine", "n": 1}\n'), True),
    "another label": (lambda folder: part(folder, 2).write_text(part(folder, 2).read_text().replace(
        '"predicted": "', '"predicted": "un')), True),
    "of another job": (lambda folder: of_another(folder, job="another"), True),
    "of other rows": (lambda folder: of_another(folder, rows="0123abcd"), False),
    "empty": (lambda folder: part(folder, 2).write_bytes(b""), True),
    "deleted": (lambda folder: part(folder, 2).unlink(), False),
    "renamed": (lambda folder: part(folder, 1).rename(folder / part(folder, 1).name.replace("1-", "9-", 1)), True),
    "named as before": (lambda folder: part(folder, 1).rename(folder / "00000001.jsonl"), True),
    "copied as another chunk": (lambda folder: shutil.copy(part(folder, 1), str(part(folder, 1)).replace("1-", "4-")),
                                True),
    "copied with more zeros": (lambda folder: shutil.copy(part(folder, 1), folder / f"0{part(folder, 1).name}"), True),
    "swapped": (lambda folder: swap(part(folder, 1), part(folder, 2)), True),
    "rows for broken rows": (lambda folder: part(folder, 3).rename(part(folder, 3).with_suffix(".csv")), True),
    "broken rows lost": (lambda folder: part(folder, 1, "csv").unlink(), False),
    "broken rows damaged": (lambda folder: part(folder, 2, "csv").write_text("1,mine,mine\n"), True),
    "half-written files": (lambda folder: (folder / f".{'0' * 16}.tmp").write_text("half"), False),
}


@pytest.mark.parametrize(("damage", "is_said"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_parts_are_labelled_again(predict, stopped, damage, is_said):
    source, folder, whole = stopped
    damage(folder)
    result, output = predict(source, "out.csv")
    assert ("labelled again" in result.stdout) == is_said
    assert output.read_bytes() == whole.read_bytes()
    assert len(output.read_text().splitlines()) == 1 + 68
    assert output.with_name("out.csv.rejected.csv").read_bytes() == whole.with_name(
        "whole.csv.rejected.csv").read_bytes()
    assert not folder.exists()


@pytest.mark.parametrize("damage", [row for name, (row, _) in DAMAGE.items() if name in (
    "a line lost", "deleted", "renamed", "swapped", "broken rows lost", "broken rows damaged")])
def test_parts_that_are_damaged_while_the_job_runs(predict, stopped, monkeypatch, damage):
    source, folder, whole = stopped
    join = parts.Parts.join
    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "join", lambda *arguments: (damage(folder), join(*arguments)))
        result, output = predict(source, "out.csv", code=2)
    assert "damaged or removed while this job ran: give the same command again" in result.stderr
    assert not output.exists()
    predict(source, "out.csv")
    assert output.read_bytes() == whole.read_bytes()


def replaced_by_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "thesis").write_text("mine")


def replaced_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replaced_by_link(path):
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "job.json").write_text("[" * 1000 + "]" * 1000), "job.json is damaged"),
    (lambda folder: (folder / "job.json").write_text("7"), "job.json is damaged"),
    (lambda folder: (folder / "job.json").write_text('"text"'), "job.json is damaged"),
    (lambda folder: (folder / "job.json").write_text('{"model": [1], "chunk_rows": "16"}'), "with another"),
    (lambda folder: (folder / "job.json").write_bytes(b"\xff"), "job.json is damaged"),
    (lambda folder: (folder / "job.json").unlink(), "has no job.json"),
    (lambda folder: replaced_by_folder(folder / "job.json"), "files that no job wrote (job.json)"),
    (lambda folder: replaced_by_folder(folder / "input.txt"), "files that no job wrote (input.txt)"),
    (lambda folder: replaced_by_folder(part(folder, 1)), "files that no job wrote"),
    (lambda folder: replaced_by_fifo(part(folder, 1)), "files that no job wrote"),
    (lambda folder: replaced_by_fifo(folder / "job.json"), "files that no job wrote"),
    (lambda folder: replaced_by_link(part(folder, 1)), "files that no job wrote"),
    (lambda folder: (folder / "thesis.txt").write_text("mine"), "files that no job wrote (thesis.txt)"),
    (lambda folder: (folder / "2024-sales.csv").write_text("mine"), "files that no job wrote (2024-sales.csv)")])
def test_what_is_no_job_s_is_refused_and_stays(predict, stopped, damage, words):
    source, folder, _ = stopped
    damage(folder)
    before = content_of(folder)
    result, output = predict(source, "out.csv", code=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert content_of(folder) == before
    assert not output.exists()


def test_an_input_of_the_same_size_and_time_is_another_input(predict, stopped):
    source, _, _ = stopped
    status, content = source.stat(), source.read_text()
    source.write_text(content.replace("number 60", "number 06"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "an interrupted job with another content" in predict(source, "out.csv", code=2)[0].stderr
    source.write_text(content)


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
    "timestamp beyond 9999": pa.array([10**15, 1, None], pa.timestamp("ms")),
    "date beyond 9999": pa.array([2**30, 1, None], pa.date32()),
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
    shown = {"time64": "00:02:03.456789123", "lists": [["00:02:03.456789123", None]], "uint64": 2**64 - 1,
             "map": [["key", "00:02:03.456789123"]], "date beyond 9999": 2**30, "timestamp beyond 9999": 10**15,
             "decimal128": "1.230"}
    assert {name: row[name] for name in shown} == shown
    assert all("123456789" in row[name] for name in ("timestamp", "timestamp with zone", "duration"))
