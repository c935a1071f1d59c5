"""The labelling of a file, with a model that costs nothing: no row is lost, the order stays, a broken row is set aside
with its reason, and a job that is stopped at any moment ends with the same bytes when the same command is given again.
"""

import contextlib
import datetime
import decimal
import functools
import itertools
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import PROJECT, content_of, rows_of, write_reviews

from suite.common.devices import Devices
from suite.inference import labelling
from suite.inference.classifier import Labeller
from utils import UserError, load_config

ADDED = ["predicted", "probability_bad", "probability_good"]


@functools.cache
def config_of(column: str = "review"):
    return load_config(PROJECT / "config.yaml", [f"data_config.text_column={column}", "train_config.device=cpu"])


class LengthOfText(Labeller):
    """Labels a text by its length. After `until` chunks it stops as a signal would stop it."""

    label_names, data_fingerprint = ["bad", "good"], None

    def __init__(self, folder: Path, until: int | None = None):
        self.folder, self.devices, self.until, self.chunks = folder, Devices(config_of()), until, 0

    def logits(self, texts: list[str]) -> np.ndarray:
        if self.chunks == self.until:
            raise SystemExit(130)
        self.chunks += 1
        return np.array([[len(text) / 7, 1.0] for text in texts])


@pytest.fixture
def label(tmp_path, monkeypatch):
    """label(input, name of the output, ...) -> the output; chunks have 16 rows, the text column is `review`."""
    monkeypatch.setattr(labelling, "CHUNK_ROWS", 16)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")

    def run(source, name: str = "out.csv", until: int | None = None, column: str = "review") -> Path:
        job = labelling.Job(str(source), tmp_path / name, LengthOfText(tmp_path / "model", until), config_of(column))
        with pytest.raises(SystemExit) if until is not None else monkeypatch.context():
            job.run()
        return tmp_path / name

    return run


@pytest.fixture
def many(label, tmp_path) -> tuple[Path, Path]:
    """(input of 5 chunks, two rows of which are broken; its output)"""
    source = write_reviews(tmp_path / "many.csv", 70, seed=3)
    with open(source, "a") as file:
        file.write('"never closed,bad\n,empty\n')
    return source, label(source, "whole.csv")


def is_as_whole(output: Path) -> bool:
    """Whether a job left the same bytes as one that nothing disturbed, and nothing else."""
    whole = output.with_name("whole.csv")
    return (output.read_bytes() == whole.read_bytes() and not output.with_name(f"{output.name}.parts").exists()
            and Path(f"{output}.rejected.csv").read_bytes() == Path(f"{whole}.rejected.csv").read_bytes())


BROKEN = [  # name, file, rejected rows, words of their problems, texts that stay
    ("too many fields", b"review,n\none,1\ntwo,2,3\nthree,3\n", [2], ["quotes around"], ["one", "three"]),
    ("empty text", b"review,n\none,1\n ,2\n", [2], ["no text"], ["one"]),
    ("quote never closed", b'review,n\none,1\n"two,2\nthree,3\n"four",4\n', [2], ["mend the quotes"],
     ["one", "three", "four"]),
    ("quote never closed, to the end", b'review,n\none,1\n"two,2\nthree,3\nfour,4\n', [2], ["mend the quotes"],
     ["one", "three", "four"]),
    ("not UTF-8", b"review,n\none,1\ntw\xf6,2\nthree,3\n", [2], ["line 3 is not UTF-8"], ["one", "three"]),
    ("two of them", b"review,n\n,1\n\ntwo,2\n,3\n", [1, 3], ["no text", "no text"], ["two"])]


@pytest.mark.parametrize(("content", "rejected", "words", "texts"), [row[1:] for row in BROKEN],
                         ids=[row[0] for row in BROKEN])
def test_broken_rows_are_set_aside_and_nothing_else(label, tmp_path, capsys, content, rejected, words, texts):
    """A broken row is set aside with its reason, and no other row is lost."""
    (tmp_path / "in.csv").write_bytes(content)
    output = label(tmp_path / "in.csv")
    assert [row["review"] for row in rows_of(output)] == texts
    aside = rows_of(f"{output}.rejected.csv")
    assert [int(row["row"]) for row in aside] == rejected
    assert all(word in row["problem"] for word, row in zip(words, aside, strict=True))
    printed = capsys.readouterr().out
    assert words[0] in printed
    assert f"the broken rows, {len(rejected)}, were skipped" in printed


def test_broken_json_lines(label, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"review": "one"}\n{"review": \n\n["x"]\n{"text": "y"}\n{"review": ["z"]}\n'
                                        b'{"review": null}\n{"review": "\\ud83d"}\n\xff\n{"review": 5}\n'
                                        b'{"review": "x", "predicted": "mine"}\n')
    output = label(tmp_path / "in.jsonl", "out.jsonl")
    assert [json.loads(line)["review"] for line in output.read_text().splitlines()] == ["one", 5]
    aside = rows_of(f"{output}.rejected.csv")
    assert [int(row["row"]) for row in aside] == [*range(2, 9), 10]
    for row, word in zip(aside, ("not JSON", "not a JSON object", "no column 'review'", "holds list", "no text",
                                 "half of", "not UTF-8", "has a column 'predicted'"), strict=True):
        assert word in row["problem"]
    assert aside[2]["content"] == '{"text": "y"}'


def test_a_file_without_the_column_or_with_the_added_ones_is_refused(label, tmp_path):
    """Wrong data end in one line before work is lost, and the mended command is no other job."""
    (tmp_path / "in.csv").write_text("text,n\none,1\n")
    with pytest.raises(UserError, match="in.csv: no column 'review'; found text, n: set data_config.text_column$"):
        label(tmp_path / "in.csv")
    assert not list(tmp_path.glob("out.csv*"))
    assert len(rows_of(label(tmp_path / "in.csv", column="text"))) == 1
    (tmp_path / "in.csv").write_text("review,predicted\none,1\n")
    with pytest.raises(UserError, match="has a column 'predicted' already"):
        label(tmp_path / "in.csv", "b.csv")


def test_without_rows_the_columns_stay(label, tmp_path):
    (tmp_path / "in.csv").write_text("review,n\n")
    assert label(tmp_path / "in.csv").read_text().split() == [",".join(["review", "n", *ADDED])]
    pyarrow.parquet.write_table(pa.table({"review": pa.array([], pa.string()), "n": pa.array([], pa.int16())}),
                                tmp_path / "in.parquet")
    found = pyarrow.parquet.read_table(label(tmp_path / "in.parquet", "out.parquet"))
    assert (found.num_rows, found.column_names) == (0, ["review", "n", *ADDED])


def test_a_stopped_job_goes_on_where_it_stopped(label, many, tmp_path, capsys):
    """A job may be stopped at any moment: the same command ends with the same bits, and labels no row twice."""
    output = label(many[0], until=2)
    assert f"the same command goes on from {output}.parts" in capsys.readouterr().out
    assert not output.exists()
    half_written = Path(f"{output}.parts") / ".00000003.jsonl.tmp"  # as a kill leaves it
    half_written.write_text("half")
    label(many[0], until=2)
    assert "going on: 2 chunks of 16 rows" in capsys.readouterr().out
    label(many[0])
    printed = capsys.readouterr().out
    assert "going on: 4 chunks" in printed
    assert f"{output}: 70 rows" in printed
    assert is_as_whole(output)


def test_killed_before_any_rename_or_removal(label, tmp_path, monkeypatch):
    """A job may be killed at any moment: the same command ends with the same bits in both files, and leaves no folder,
    also if only the empty one was left."""
    source = write_reviews(tmp_path / "many.csv", 20, seed=3)
    with open(source, "a") as file:
        file.write(",empty\n")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it costs most of the time
    label(source, "whole.csv")

    def attempt(point: int) -> bool:
        """Whether the job ends before that many renames and removals."""
        calls = itertools.count(1)

        def stopping(function):
            def called(*arguments, **settings):
                if next(calls) >= point:  # what a killed process would do afterwards is not done, either
                    raise SystemExit(137)
                return function(*arguments, **settings)
            return called

        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
                patch.setattr(module, name, stopping(getattr(module, name)))
            try:
                label(source)
            except SystemExit:
                return False
        return True

    output, points = tmp_path / "out.csv", itertools.count(1)
    while not attempt(point := next(points)):
        with contextlib.suppress(UserError):  # out.csv exists already, as after any job that is done
            label(source)
        assert is_as_whole(output), point
        output.unlink()
        Path(f"{output}.rejected.csv").unlink()
    assert is_as_whole(output)
    assert point > 10


def test_parts_of_another_job_are_not_mixed_in(label, many, tmp_path):
    """Another input or model for the same output is refused in one line, whatever the sizes and times of the files."""
    source, _ = many
    folder = label(source, until=3).with_name("out.csv.parts")
    before, content, times = content_of(folder), source.read_bytes(), source.stat()
    source.write_bytes(content.replace(b"number 60", b"number 06"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="an interrupted job with another content: .* or remove this folder$"):
        label(source)
    source.write_bytes(content)
    (tmp_path / "model" / "weights").write_text("2")
    with pytest.raises(UserError, match="with another model: "):
        label(source)
    (tmp_path / "model" / "weights").write_text("1")
    with pytest.raises(UserError, match="with another text_column: "):
        label(source, column="verdict")
    assert content_of(folder) == before
    assert is_as_whole(label(source))


def test_what_another_job_has_joined_is_not_taken(label, many, monkeypatch):
    """Killed when all is joined and only renames are left, a job is still another one than that of another input."""
    def killed(job):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(labelling.Job, "finish", killed)
        with pytest.raises(SystemExit):
            label(many[0])
    other = write_reviews(many[0].with_name("other.csv"), 70, seed=4)
    with pytest.raises(UserError, match="an interrupted job with another input, content"):
        label(other)
    assert is_as_whole(label(many[0]))


def test_a_job_is_known_by_all_files_of_its_model_and_its_input(tmp_path):
    """A stack's members have folders of their own in its folder, and a folder's texts have names."""
    for name in ("stack/member-1", "texts/pos", "texts/neg"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stack" / "member-1" / "weights").write_text("1")
    (tmp_path / "texts" / "pos" / "1.txt").write_text("a film")
    job = labelling.Job(str(tmp_path / "texts"), tmp_path / "out.csv", LengthOfText(tmp_path / "stack"),
                        config_of())
    first = job.describe()
    assert job.describe() == first
    (tmp_path / "stack" / "member-1" / "weights").write_text("2")
    assert {key for key, value in job.describe().items() if value != first[key]} == {"model"}
    (tmp_path / "texts" / "pos" / "1.txt").rename(tmp_path / "texts" / "neg" / "1.txt")
    assert {key for key, value in job.describe().items() if value != first[key]} == {"model", "content"}


def test_other_texts_on_standard_input_are_a_new_job(label, stdin, tmp_path, capsys):
    stdin(b"one\n" * 40)
    label("-", until=1)
    stdin(b"two\n" * 20)
    label("-", until=1)
    assert "going on" not in capsys.readouterr().out
    stdin(b"two\n" * 20)
    assert [row["text"] for row in rows_of(label("-"))] == ["two"] * 20
    assert "going on: 1 chunks" in capsys.readouterr().out  # the same texts again


@pytest.mark.parametrize("kind", ["file", "standard input"])
@pytest.mark.parametrize("moment", ["before", "while labelling"])
def test_a_full_disk_is_named_by_the_output_and_the_job_goes_on(label, stdin, tmp_path, monkeypatch, kind, moment):
    """A job may run out of disk at any moment."""
    lines = "".join(f"a gripping film number {number}\n" for number in range(100))
    (tmp_path / "many.txt").write_text(lines)
    source = tmp_path / "many.txt" if kind == "file" else "-"
    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if moment == "before" else 1500, limits[1]))
        stdin(lines.encode())
        try:  # job.json has less than 1,500 bytes, 16 labelled rows and the copy of standard input have more
            with pytest.raises(UserError, match=f"^{tmp_path}: no room to write 1 MB.* make room or choose another "
                                                "--output$"):
                label(source)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stdin(lines.encode())
    assert len(rows_of(label(source))) == 100


def test_an_output_that_appears_meanwhile_is_not_written_over(label, many, monkeypatch):
    join = labelling.Job.join
    with monkeypatch.context() as patch:
        patch.setattr(labelling.Job, "join", lambda job, *rest: (job.output.write_text("mine"), join(job, *rest)))
        with pytest.raises(UserError, match="out.csv exists already"):
            label(many[0])
    output = many[1].with_name("out.csv")
    assert output.read_text() == "mine"
    output.unlink()
    assert is_as_whole(label(many[0]))


def test_a_second_process_is_refused(label, many):
    """Two processes cannot write one labelled file at the same time."""
    label(many[0], "other.csv", until=3)
    folder = shutil.copytree(many[1].with_name("other.csv.parts"), many[1].with_name("out.csv.parts"))
    before, processes = content_of(folder), multiprocessing.get_context("fork")
    holds, may_leave = processes.Event(), processes.Event()

    def hold() -> None:
        labelling.lock(folder, "", inside=".job.lock")
        holds.set()
        may_leave.wait(60)

    other = processes.Process(target=hold)
    other.start()
    assert holds.wait(60)
    with pytest.raises(UserError, match=f"^{folder} is in use by another process"):
        label(many[0])
    assert content_of(folder) == before
    may_leave.set()
    other.join()
    assert is_as_whole(label(many[0]))


def test_processes_take_turns_with_the_chunks(label, many, tmp_path, monkeypatch):
    """Two processes, one after the other: each chunk is labelled once, and the joined file is that of one process."""
    monkeypatch.setattr(labelling, "num_processes", lambda: 2)
    jobs = []
    for rank in (0, 1):
        jobs.append(labelling.Job(str(many[0]), tmp_path / "out.csv", LengthOfText(tmp_path / "model"), config_of()))
        jobs[rank].devices.is_main = rank == 0
        monkeypatch.setattr(labelling, "process_rank", lambda rank=rank: rank)
        if rank == 0:
            jobs[0].open()
        result = jobs[rank].label_chunks(set())
    assert [job.classifier.chunks for job in jobs] == [3, 2]
    jobs[0].join(*result)
    jobs[0].finish()
    assert is_as_whole(tmp_path / "out.csv")


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


def test_every_arrow_type_comes_back_as_it_was(label, tmp_path):
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

    found = pyarrow.parquet.read_table(label(tmp_path / "in.parquet", "out.parquet"))
    assert found.column_names == [*table.column_names, *ADDED]
    for name in expected.column_names:
        assert found.schema.field(name).equals(expected.schema.field(name), check_metadata=True), name
        assert found[name].combine_chunks().equals(expected[name].combine_chunks()), name

    row = json.loads(label(tmp_path / "in.parquet", "out.jsonl").read_text().split("\n")[0])
    shown = {"time64": "00:02:03.456789", "lists": [["00:02:03.456789", None]], "uint64": 2**64 - 1,
             "map": [["key", "00:02:03.456789"]], "decimal128": "1.230"}
    assert {name: row[name] for name in shown} == shown
    assert all("123456789" in row[name] for name in ("timestamp", "timestamp with zone", "duration"))
