"""--mode predict: no row of a file is lost, the order stays, broken rows are set aside with their reason; and a job
that is stopped at any moment ends with the same bytes when the same command is given again."""

import csv
import io
import json
import os
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import PROJECT, expect, run_here, run_script, train_here, write_reviews
from test_accumulation import launch
from transformers import BertForSequenceClassification

from suite.common import cli
from suite.encoders.tokenizers import load_tokenizer
from suite.inference import classifier, labelling, parts
from suite.training.devices import SingleDevice
from utils import load_config

ADDED = ["predicted", "probability_bad", "probability_good"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_folder):
    """(overrides, run folder) of a finished run on reviews whose words give their class away."""
    folder = tmp_path_factory.mktemp("trained")
    write_reviews(folder / "reviews.csv")
    overrides = [
        f"output_dir={folder / 'runs'}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
        "model_config.pooling=mean", f"data_config.dataset={folder / 'reviews.csv'}",
        "data_config.text_column=review", "data_config.label_column=verdict", "data_config.max_len=32",
        "data_config.batch_size=16", "train_config.epochs=3", "train_config.learning_rate=0.01",
        "train_config.mixed_precision=no", "train_config.device=cpu", "log_config.wandb_mode=disabled"]
    train_here(*overrides)
    return overrides, folder / "runs" / "run"


@pytest.fixture
def predicting(trained, tmp_path, monkeypatch):
    """predicting(input, output) -> the rows that are written, with chunks of 16 rows."""
    monkeypatch.setattr(labelling, "CHUNK_ROWS", 16)

    def run(path, name: str = "out.csv", code: int = 0, **options):
        result = expect(code, run_here(*trained[0], mode="predict", input=str(path), output=str(tmp_path / name),
                                       **options))
        return result, tmp_path / name

    return run


@pytest.fixture
def stdin(monkeypatch):
    """stdin(bytes): what standard input holds from now on."""
    return lambda content: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def rows_of(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_text(trained):
    printed = expect(0, run_here(*trained[0], mode="predict", text="gripping moving delightful film")).stdout
    label, *probabilities = printed.split("\n")[:3]
    assert label == "good"
    assert [line.split()[0] for line in probabilities] == ["bad", "good"]
    assert sum(float(line.split()[1]) for line in probabilities) == pytest.approx(1, abs=1e-4)


def test_the_input_s_columns_and_order_with_the_probabilities_of_the_test(trained, predicting):
    overrides, folder = trained
    source = folder.parent.parent / "reviews.csv"
    _, output = predicting(source)
    rows, given = rows_of(output), rows_of(source)
    assert list(rows[0]) == ["review", "verdict", *ADDED]
    assert [(row["review"], row["verdict"]) for row in rows] == [(row["review"], row["verdict"]) for row in given]
    tested = rows_of(folder / "test_predictions.csv")
    assert len(tested) == 20
    for row in tested:  # other reviews share the batch, so sums round in another order
        again = rows[int(row["id"])]
        assert again["predicted"] == row["predicted"]
        assert float(again["probability_good"]) == pytest.approx(float(row["probability_good"]), abs=1e-6)
    assert not list(output.parent.glob("*rejected*"))
    assert not list(output.parent.glob("*.parts"))


def test_every_kind_of_file_says_the_same(trained, predicting, stdin, tmp_path):
    rows = rows_of(trained[1].parent.parent / "reviews.csv")[:50]
    texts = [row["review"] for row in rows]
    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row | {"n": {"at": i}} if i else row) + "\n"
                                               for i, row in enumerate(rows)))
    table = pa.table({"review": texts, "n": pa.array(range(50), pa.int16()), "when": pa.array(range(50), pa.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "in.txt").write_text("".join(text + "\n" for text in texts))

    expected = [{name: row[name] for name in ADDED} for row in rows_of(predicting(tmp_path / "in.csv")[1])]
    for source, target in (("in.jsonl", "a.csv"), ("in.parquet", "b.csv"), ("in.txt", "c.csv")):
        found = rows_of(predicting(tmp_path / source, target)[1])
        assert list(found[0])[-3:] == ADDED
        assert [{name: row[name] for name in ADDED} for row in found] == expected
    lines = predicting(tmp_path / "in.jsonl", "out.jsonl")[1].read_text().splitlines()
    assert json.loads(lines[7])["n"] == {"at": 7}
    assert json.loads(lines[7])["predicted"] == expected[7]["predicted"]
    found = pyarrow.parquet.read_table(predicting(tmp_path / "in.parquet", "out.parquet")[1])
    assert found.schema.field("when").type == pa.date32()
    assert found.schema.field("n").type == pa.int16()
    assert found.column("when").to_pylist() == table.column("when").to_pylist()
    assert [str(p) for p in found.column("probability_good").to_pylist()] == [row[ADDED[2]] for row in expected]

    stdin((tmp_path / "in.txt").read_bytes())
    printed = list(csv.DictReader(io.StringIO(expect(0, run_here(*trained[0], mode="predict", input="-")).stdout)))
    assert [{name: row[name] for name in ADDED} for row in printed] == expected
    stdin((tmp_path / "in.txt").read_bytes())
    assert rows_of(predicting("-", "d.csv")[1]) == printed


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
def test_broken_rows_are_put_aside_and_nothing_else(predicting, tmp_path, content, rejected, words, texts):
    (tmp_path / "in.csv").write_bytes(content)
    result, output = predicting(tmp_path / "in.csv")
    assert [row["review"] for row in rows_of(output)] == texts
    aside = rows_of(f"{output}.rejected.csv")
    assert [int(row["row"]) for row in aside] == rejected
    assert all(word in row["problem"] for word, row in zip(words, aside, strict=True))
    assert words[0] in result.stdout
    assert f"the broken rows, {len(rejected)}, were skipped" in result.stdout


def test_broken_json_lines(predicting, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"review": "one"}\n{"review": \n\n["x"]\n{"text": "y"}\n{"review": ["z"]}\n'
                                        b'{"review": null}\n{"review": "\\ud83d"}\n\xff\n' + b"[" * 100_000
                                        + b'\n{"review": 5}\n'
                                        b'{"review": "x", "predicted": "mine"}\n')
    _, output = predicting(tmp_path / "in.jsonl", "out.jsonl")
    assert [json.loads(line)["review"] for line in output.read_text().splitlines()] == ["one", 5]
    aside = rows_of(f"{output}.rejected.csv")
    assert [int(row["row"]) for row in aside] == [*range(2, 10), 11]
    for row, word in zip(aside, ("not JSON", "not a JSON object", "no column 'review'", "holds list", "no text",
                                 "half of", "not UTF-8", "not JSON", "has a column 'predicted'"),
                         strict=True):
        assert word in row["problem"]
    assert aside[2]["content"] == '{"text": "y"}'


def test_the_run_s_text_column_is_read(trained):
    overrides, folder = trained
    without = [item for item in overrides if "text_column" not in item]
    named = [item for item in without if "output_dir" not in item and "run_name" not in item]
    for arguments, model in ((without, None), (named, str(folder))):
        config = cli.config_for("predict", PROJECT / "config.yaml", arguments, model)
        assert config.data_config.text_column == "review"
    chosen = cli.config_for("predict", PROJECT / "config.yaml", [*without, "data_config.text_column=body"])
    assert chosen.data_config.text_column == "body"


def test_a_file_without_the_column_or_with_the_added_ones_is_refused(predicting, tmp_path):
    (tmp_path / "in.csv").write_text("text,n\none,1\n")
    result, output = predicting(tmp_path / "in.csv", code=2)
    assert result.stderr == (f"error: {tmp_path / 'in.csv'}: no column 'review'; found text, n: set "
                             "data_config.text_column\n")
    assert not output.exists()
    (tmp_path / "in.csv").write_text("review,predicted\none,1\n")
    assert "has a column 'predicted' already" in predicting(tmp_path / "in.csv", "b.csv", code=2)[0].stderr


@pytest.fixture
def interrupted(trained, predicting, tmp_path, monkeypatch):
    """(input, number of chunks that were labelled before the stop) of a job that was stopped in its fourth chunk."""
    source = write_reviews(tmp_path / "many.csv", 200, seed=3)
    with open(source, "a") as file:
        file.write('"never closed,bad\n,empty\n')
    calls, whole = Counter(), classifier.Classifier.probabilities

    def stopping(self, texts):
        calls["chunks"] += 1
        if calls["chunks"] == 4:
            raise SystemExit(130)
        return whole(self, texts)

    monkeypatch.setattr(classifier.Classifier, "probabilities", stopping)
    result, _ = predicting(source, "stopped.csv", code=130)
    assert "the same command goes on" in result.stdout
    assert not (tmp_path / "stopped.csv").exists()
    return source, calls


def test_a_stopped_job_goes_on_where_it_stopped(predicting, interrupted, tmp_path):
    source, calls = interrupted
    result, output = predicting(source, "stopped.csv")
    assert "going on: 3 chunks of 16 rows" in result.stdout
    assert calls["chunks"] == 4 + 10  # of 13 chunks, the first three are not labelled again
    _, whole = predicting(source, "whole.csv")
    assert output.read_bytes() == whole.read_bytes()
    assert len(rows_of(whole)) == 200
    assert (tmp_path / "stopped.csv.rejected.csv").read_bytes() == (tmp_path / "whole.csv.rejected.csv").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


POINTS = 15  # renames and removals after the last row is labelled, in the job below


@pytest.mark.parametrize("point", range(1, POINTS + 2))
def test_stopped_at_any_point_of_the_joining(predicting, tmp_path, monkeypatch, point):
    """A job may be killed at any moment: the same command ends with the same bytes in both files."""
    source = write_reviews(tmp_path / "many.csv", 40, seed=3)
    with open(source, "a") as file:
        file.write(",empty\n")
    _, whole = predicting(source, "whole.csv")
    reached = Counter()

    def stopping(function):
        def called(*arguments, **settings):
            reached["calls"] += bool(reached["joining"])
            if reached["calls"] == point:
                raise SystemExit(143)
            return function(*arguments, **settings)
        return called

    def joining(*arguments, finish=labelling.Job.finish):
        reached["joining"] = 1
        finish(*arguments)
        reached["joining"] = 0

    with monkeypatch.context() as patch:
        patch.setattr(labelling.Job, "finish", joining)
        for module, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
            patch.setattr(module, name, stopping(getattr(module, name)))
        predicting(source, "stopped.csv", code=143 if point <= POINTS else 0)
    if point < POINTS:
        predicting(source, "stopped.csv")
    elif point == POINTS:  # only the empty folder is left, and the job is as done as one that nothing stopped
        assert "stopped.csv exists already" in predicting(source, "stopped.csv", code=2)[0].stderr
    assert (tmp_path / "stopped.csv").read_bytes() == whole.read_bytes()
    assert (tmp_path / "stopped.csv.rejected.csv").read_bytes() == (tmp_path / "whole.csv.rejected.csv").read_bytes()
    assert point == POINTS or not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("changed", ["input", "setting", "damaged", "tokenizer"])
def test_what_another_job_has_left_is_not_mixed_in(predicting, interrupted, trained, tmp_path, changed):
    """Another input, model or setting for the same output is refused in one line."""
    (source, _), options = interrupted, {}
    if changed == "input":
        source.write_text(source.read_text() + "one more,good\n")
    elif changed == "setting":
        trained = ([*trained[0], "data_config.eval_batch_size=7"], trained[1])
    elif changed == "tokenizer":
        model = shutil.copytree(trained[1] / "best", tmp_path / "model")
        (model / "manifest.json").unlink()
        (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text().replace("gripping", "gropping"))
        options["model"] = str(model)
    else:
        (tmp_path / "stopped.csv.parts" / "job.json").write_text("{")
    before = sorted(path.name for path in (tmp_path / "stopped.csv.parts").iterdir())
    result = expect(2, run_here(*trained[0], mode="predict", input=str(source), output=str(tmp_path / "stopped.csv"),
                                **options))
    assert "remove this folder" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "stopped.csv.parts").iterdir()) == before


@pytest.mark.parametrize("kind", ["file", "standard input"])
@pytest.mark.parametrize("moment", ["before", "while labelling"])
def test_a_full_disk_is_named_by_the_output_and_the_job_goes_on(predicting, stdin, tmp_path, monkeypatch, kind, moment):
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
            error = predicting(source, code=2)[0].stderr
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.startswith(f"error: {tmp_path}: no room to write 1 MB")
    assert error.rstrip().endswith("make room or choose another --output")
    assert "output_dir" not in error
    stdin(lines.encode())
    assert len(rows_of(predicting(source)[1])) == 100


def test_other_texts_on_standard_input_are_a_new_job(predicting, interrupted, stdin, tmp_path):
    stdin(b"one\n" * 20)
    error = predicting("-", "stopped.csv", code=2)[0].stderr  # a file's job is not standard input's
    assert "an interrupted job with another input, content" in error
    calls = interrupted[1]
    calls["chunks"] = 2
    stdin(b"one\n" * 40)
    predicting("-", "stdin.csv", code=130)
    stdin(b"two\n" * 20)
    calls["chunks"] = 2
    predicting("-", "stdin.csv", code=130)
    stdin(b"two\n" * 20)
    result, output = predicting("-", "stdin.csv")
    assert "going on: 1 chunks" in result.stdout  # the same texts again
    assert [row["text"] for row in rows_of(output)] == ["two"] * 20


def test_an_output_that_appears_meanwhile_is_not_written_over(predicting, tmp_path, monkeypatch):
    source, join = write_reviews(tmp_path / "few.csv", 6), parts.Parts.join
    monkeypatch.setattr(parts.Parts, "join", lambda job, *rest: (job.output.write_text("mine"), join(job, *rest)))
    assert "out.csv exists already" in predicting(source, code=2)[0].stderr
    assert (tmp_path / "out.csv").read_text() == "mine"
    (tmp_path / "out.csv").unlink()
    monkeypatch.setattr(parts.Parts, "join", join)
    assert len(rows_of(predicting(source)[1])) == 6


def test_a_mended_mistake_is_no_other_job(predicting, trained, tmp_path):
    source, output = write_reviews(tmp_path / "few.csv", 6), tmp_path / "out.csv"
    wrong = run_here(*trained[0], "data_config.text_column=other", mode="predict", input=str(source),
                     output=str(output))
    assert "no column 'other'" in wrong.stderr
    assert len(rows_of(predicting(source)[1])) == 6


def test_without_rows_the_columns_stay(predicting, tmp_path):
    (tmp_path / "in.csv").write_text("review,n\n")
    assert predicting(tmp_path / "in.csv")[1].read_text().split() == [",".join(["review", "n", *ADDED])]
    table = pa.table({"review": pa.array([], pa.string()), "n": pa.array([], pa.int16())})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    found = pyarrow.parquet.read_table(predicting(tmp_path / "in.parquet", "out.parquet")[1])
    assert (found.num_rows, found.column_names) == (0, ["review", "n", *ADDED])


def test_several_processes_write_the_same_file(trained, tmp_path):
    source = write_reviews(tmp_path / "many.csv", 5000, seed=4)  # three chunks, the last one shorter
    expect(0, launch(2, "main_accumulation.py", *trained[0], "--mode", "predict", "--input", str(source), "--output",
                     str(tmp_path / "two.csv")))
    expect(0, run_here(*trained[0], mode="predict", input=str(source), output=str(tmp_path / "one.csv")))
    assert len(rows_of(tmp_path / "one.csv")) == 5000
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_any_model_folder(trained, encoder_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.symlink_to(trained[1] / "best")
    said = [expect(0, run_here(mode="predict", text="dull dreary film", model=str(folder))).stdout
            for folder in (trained[1] / "best", copy)]
    assert said[0] == said[1]
    assert said[0].startswith("bad\n")
    torch.manual_seed(0)
    foreign = BertForSequenceClassification.from_pretrained(
        encoder_folder("bert"), id2label={0: "no", 1: "yes", 2: "?"}, label2id={"no": 0, "yes": 1, "?": 2})
    foreign.save_pretrained(tmp_path / "foreign")
    load_tokenizer(encoder_folder("bert")).save_pretrained(tmp_path / "foreign")
    said = expect(0, run_here("data_config.max_len=32", mode="predict", text="a film", model=str(tmp_path / "foreign")))
    assert {line.split()[0] for line in said.stdout.splitlines()} == {"no", "yes", "?"}
    bare = run_here("data_config.max_len=32", mode="predict", text="a film", model=encoder_folder("bert"))
    assert bare.returncode == 2
    assert "no weights for classifier" in bare.stderr
    assert "no such folder" in refusal("--mode", "predict", "--text", "x", "--model", str(tmp_path / "nowhere"))


def refusal(*arguments: str) -> str:
    result = expect(2, run_script("main.py", *arguments))
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_options_that_do_not_fit_are_refused(tmp_path):
    source = str(write_reviews(tmp_path / "in.csv", 6))
    (tmp_path / "there.csv").touch()
    for words, arguments in [
            ("either --text", ()), ("either --text", ("--text", "a", "--input", source)), ("is empty", ("--text", " ")),
            ("no such file", ("--input", str(tmp_path / "none.csv"))), ("must end in", ("--input", "config.yaml")),
            ("exists already", ("--input", source, "--output", str(tmp_path / "there.csv"))),
            ("must end in .csv, .jsonl", ("--input", source, "--output", "out.parquet")),
            ("no such folder", ("--input", source, "--output", str(tmp_path / "no" / "out.csv")))]:
        assert words in refusal("--mode", "predict", *arguments)
    assert "is for --mode predict, explain, not for train" in refusal("--text", "a")


def test_a_review_s_probabilities_do_not_depend_on_what_shares_its_chunk(trained):
    overrides, folder = trained
    config = load_config(PROJECT / "config.yaml", overrides)
    model = classifier.Classifier(folder / "best", config, SingleDevice(config))
    texts = [row["review"] for row in rows_of(folder.parent.parent / "reviews.csv")]
    alone = np.concatenate([model.probabilities([text]) for text in texts[:20]])
    np.testing.assert_allclose(model.probabilities(texts)[:20], alone, atol=1e-6)
