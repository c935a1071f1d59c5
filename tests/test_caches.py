"""The libraries' cache of reviews and tokens: other content is read anew, and neither a kill nor a second process nor a
full disk leaves half a table that would be used."""

import errno
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT, run_here
from datasets.arrow_writer import ArrowWriter

import data
from suite.common.hub import explained
from utils import UserError, load_config

SWAPPED = {"good": "bad", "bad": "good"}


class LengthsOfWords:
    """In the place of a tokenizer, which could not work in a forked process."""

    pause = 0.0

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        time.sleep(self.pause)
        tokens = [[len(word) for word in text.split()] for text in batch["text"]]
        return {"input_ids": tokens, "lengths": [[len(of_text)] for of_text in tokens]}

    def fingerprint(self, digests: np.ndarray) -> str:
        return hashlib.sha256(digests.tobytes()).hexdigest()[:32]


@pytest.fixture
def prepare(tmp_path, overrides, monkeypatch):
    """prepare(dataset): its texts, labels and tokens, with an empty cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def prepared(dataset: Path) -> tuple[list, list, list]:
        split = data.load_split(load_config(PROJECT / "config.yaml", [*overrides, f"data_config.dataset={dataset}"]))
        rows = np.arange(len(split.digests))
        tokens, *_ = data.tokenize(split.reviews.table, rows, split.digests, LengthsOfWords(), [])
        return split.reviews.table["text"][:], split.reviews.labels.tolist(), tokens.tolist()

    return prepared


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_other_content_of_the_same_size_and_time_is_read(tmp_path, reviews_file, prepare, kind):
    """The cache knows a file by its content."""
    table = pd.read_csv(reviews_file)
    (tmp_path / "many").mkdir()
    file = tmp_path / "some.csv" if kind == "file" else tmp_path / "many" / "train.csv"
    place = file if kind == "file" else file.parent
    table.to_csv(file, index=False)
    texts, labels, _ = prepare(place)
    before = file.stat()
    table.assign(verdict=table.verdict.map(SWAPPED)).to_csv(file, index=False)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    other_texts, other_labels, _ = prepare(place)
    assert (other_texts, other_labels) == (texts, [1 - label for label in labels])


def forked(function) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


@pytest.mark.parametrize("table", [1, 2], ids=["reviews", "tokens"])
def test_a_kill_before_a_table_is_whole_leaves_none(tmp_path, reviews_file, prepare, monkeypatch, table):
    """A run may be killed at any moment: the same command ends with the same bits."""
    written = []

    def killed(writer, *arguments, finalize=ArrowWriter.finalize, **options):
        written.append(writer)
        if len(written) == table:
            os.kill(os.getpid(), signal.SIGKILL)
        return finalize(writer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ArrowWriter, "finalize", killed)
        process = forked(lambda: prepare(reviews_file))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = prepare(reviews_file)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    assert found == prepare(reviews_file)


def test_two_processes_that_fill_the_cache_at_the_same_time(tmp_path, reviews_file, prepare, monkeypatch):
    """Both read what one process alone would have read."""
    monkeypatch.setattr(LengthsOfWords, "pause", 0.3)
    processes = [forked(lambda number=number: (tmp_path / f"{number}.txt").write_text(repr(prepare(reviews_file))))
                 for number in (0, 1)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    whole = repr(prepare(reviews_file))
    assert [(tmp_path / f"{number}.txt").read_text() for number in (0, 1)] == [whole, whole]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("table", [1, 2], ids=["reviews", "tokens"])
def test_the_full_disk_of_the_cache_is_named(tmp_path, reviews_file, overrides, monkeypatch, table):
    """A run may run out of disk at any moment; the line names the disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    written = []
    finalize = ArrowWriter.finalize
    monkeypatch.setattr(ArrowWriter, "finalize", lambda *arguments, **options: (
        written.append(1), full() if len(written) == table else finalize(*arguments, **options))[1])
    result = run_here(*overrides)
    assert result.returncode == 2
    assert f"error: {tmp_path / 'cache'}" in result.stderr
    assert "no room to write" in result.stderr
    assert "set HF_HOME to another disk" in result.stderr


def test_the_full_disk_of_downloaded_models_is_named():
    with pytest.raises(UserError, match=r"hub: no room to write.* set HF_HOME"), explained("model_name", "owner/model"):
        full()


def test_a_cache_that_cannot_be_written_is_one_line(overrides, monkeypatch):
    """Wrong surroundings end in one line with the fix."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere/datasets"))
    result = run_here(*overrides)
    assert result.returncode == 2
    assert result.stderr.startswith("error: /proc/nowhere/datasets cannot be written (")
    assert result.stderr.rstrip().endswith("set HF_HOME to a folder that can")
