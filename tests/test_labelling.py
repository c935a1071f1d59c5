"""The labelling of a file, with a model that costs nothing: no row is lost, the order stays, a broken row is set aside
with its reason, and a job that is stopped at any moment ends with the same bytes when the same command is given again.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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
    left, whole = ({path.name.removeprefix(name): path.read_bytes() for path in output.parent.glob(f"{name}*")}
                   for name in (output.name, "whole.csv"))
    return left == whole


@pytest.mark.parametrize(("content", "rejected", "words", "texts"), [
    pytest.param(b"review,n\none,1\ntwo,2,3\nthree,3\n", [2], ["quotes around"], ["one", "three"], id="many fields"),
    pytest.param(b'review,n\none,1\n"two,2\nthree,3\n"four",4\n', [2], ["correct the quotes"], ["one", "three", "four"],
                 id="a quote that is never closed"),
    pytest.param(b'review,n\none,1\n"two,2\nthree,3\n', [2], ["correct the quotes"], ["one", "three"], id="to the end"),
    pytest.param(b"review,n\none,1\ntw\xf6,2\nthree,3\n", [2], ["line 3 is not UTF-8"], ["one", "three"], id="UTF-8"),
    pytest.param(b"review,n\n,1\n\ntwo,2\n ,3\n", [1, 3], ["no text", "no text"], ["two"], id="two of them")])
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


@pytest.mark.parametrize("last_row", ["", ",empty\n"], ids=["all rows are whole", "one is broken"])
def test_killed_before_any_rename_or_removal(label, tmp_path, monkeypatch, last_row):
    """A job may be killed at any moment: the same command ends with the same bits in both files, and leaves no folder,
    also if only the empty one was left."""
    source = write_reviews(tmp_path / "many.csv", 20, seed=3)
    with open(source, "a") as file:
        file.write(last_row)
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
        Path(f"{output}.rejected.csv").unlink(missing_ok=True)
    assert is_as_whole(output)
    assert point > 10


def test_parts_of_another_job_are_not_mixed_in(label, many, tmp_path, monkeypatch):
    """Another input or model for the same output is refused in one line, whatever the sizes and times of the files."""
    source, model = many[0], tmp_path / "model" / "weights"
    folder = label(source, until=3).with_name("out.csv.parts")

    def refused_for(what: str, *changed: Path, column: str = "review") -> None:
        before = content_of(folder)
        with pytest.raises(UserError, match=f"an interrupted job with another {what}: .* or remove this folder$"):
            label(*changed or [source], column=column)
        assert content_of(folder) == before

    content, times = source.read_bytes(), source.stat()
    source.write_bytes(content.replace(b"number 60", b"number 06"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    refused_for("content")
    source.write_bytes(content)
    model.write_text("2")
    refused_for("model")
    model.write_text("1")
    refused_for("text_column", column="verdict")
    other = write_reviews(tmp_path / "other.csv", 70, seed=4)
    refused_for("input, content", other)
    with monkeypatch.context() as patch:  # killed when all is joined and only renames are left
        patch.setattr(labelling, "sync_folder", Mock(side_effect=SystemExit(137)))
        patch.setattr(os, "replace", lambda path, place, replace=os.replace: (
            replace(path, place) if Path(place).parent == folder else None))
        label(source, until=9)
    assert not list(folder.glob("0*"))
    refused_for("input, content", other)
    assert is_as_whole(label(source))


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
    source, limits = tmp_path / "many.txt" if kind == "file" else "-", resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        else:  # job.json has less than 1,500 bytes, 16 labelled rows and the copy of standard input have more
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        stdin(lines.encode())
        try:
            with pytest.raises(UserError, match=f"^{tmp_path}: no room to write 1 MB.* another --output$"):
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
