"""The caches of reviews and tokens: other content is read anew, damage is mended, a full disk is named."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pandas as pd
import pytest
from conftest import PROJECT, run_here

import data
from suite.common.hub import explained
from suite.reviews import sources
from suite.reviews.caches import cached
from utils import UserError, load_config

SWAPPED = {"good": "bad", "bad": "good"}


def as_file(folder: Path, table: pd.DataFrame) -> Path:
    table.to_csv(folder / "some.csv", index=False)
    return folder / "some.csv"


def as_folder(folder: Path, table: pd.DataFrame) -> Path:
    (folder / "many").mkdir(exist_ok=True)
    table.to_parquet(folder / "many" / "train.parquet")
    return folder / "many"


KINDS = [as_file, as_folder]


@pytest.fixture
def table(reviews_file) -> pd.DataFrame:
    return pd.read_csv(reviews_file)


@pytest.fixture
def prepare(tmp_path, overrides, monkeypatch):
    """prepare(dataset): its classes and tokens, with an empty cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def prepared(dataset: Path) -> tuple[list, list]:
        config = load_config(PROJECT / "config.yaml", [*overrides, f"data_config.dataset={dataset}"])
        train = data.prepare_data(config).splits["train"]
        return [train.text(i) for i in train.ids], train.labels.tolist(), train.tokens.tolist()

    return prepared


@pytest.mark.parametrize("write", KINDS)
def test_other_content_of_the_same_size_and_time_is_read(tmp_path, table, prepare, write):
    path = write(tmp_path, table)
    [file] = [path] if path.is_file() else path.iterdir()
    texts, labels, _ = prepare(path)
    before = file.stat()
    write(tmp_path, table.assign(verdict=table.verdict.map(SWAPPED)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    other_texts, other_labels, _ = prepare(path)
    first, second = dict(zip(texts, labels, strict=True)), dict(zip(other_texts, other_labels, strict=True))
    both = first.keys() & second.keys()
    assert both
    assert all(first[text] != second[text] for text in both)


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = [flip, lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: os.truncate(path, 0), os.remove]
PARTS = ["reviews-*/**/*.arrow", "reviews-*/**/dataset_info.json", "reviews-*/**/sums.json", "windows-*/tokens.arrow",
         "windows-*/sums.json"]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_cache_is_built_again(tmp_path, table, prepare, capsys, write, part):
    path = write(tmp_path, table)
    whole = prepare(path)
    for spoil in DAMAGE[:3 if part.endswith("sums.json") else 4]:  # a table without sums is trusted
        [file] = (tmp_path / "cache").glob(part)
        spoil(file)
        capsys.readouterr()
        assert prepare(path) == whole
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(str(file.parent))
        assert "is damaged" in line
    prepare(path)
    assert "damaged" not in capsys.readouterr().out


def test_a_table_without_sums_is_built_again(tmp_path, table, prepare):
    path = as_folder(tmp_path, table)
    whole = prepare(path)
    for sums in (tmp_path / "cache").rglob("sums.json"):  # as a kill between the table and its sums leaves it
        sums.unlink()
    for arrow in (tmp_path / "cache").rglob("*.arrow"):
        os.truncate(arrow, arrow.stat().st_size // 2)
    assert prepare(path) == whole
    assert len(list((tmp_path / "cache").rglob("sums.json"))) == 2


def test_a_table_of_another_program_is_used_and_gets_its_sums(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def load(folder: Path) -> datasets.Dataset:
        return datasets.load_dataset("csv", data_files=str(tmp_path / "some.csv"), cache_dir=str(folder))["train"]

    (tmp_path / "some.csv").write_text("text\nfine\n")
    load(tmp_path / "theirs")
    arrow, = tmp_path.glob("theirs/**/*.arrow")
    before = arrow.stat().st_mtime_ns
    assert cached("theirs", load, shared=True)["text"][:] == ["fine"]
    assert arrow.stat().st_mtime_ns == before
    assert (arrow.parent / "sums.json").exists()


def test_a_cache_that_cannot_be_marked_is_used(tmp_path, table, prepare, monkeypatch):
    def refuse(path, value):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("suite.reviews.caches.write_json", refuse)
    path = as_file(tmp_path, table)
    assert prepare(path) == prepare(path)


def test_one_builds_while_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    building, most = [], []

    def build(folder: Path) -> datasets.Dataset:
        building.append(folder)
        time.sleep(0.05)
        most.append(len(building))
        building.pop()
        return datasets.Dataset.from_dict({"a": [1]})

    with ThreadPoolExecutor(4) as pool:  # the lock is one of files, so it keeps threads apart like processes
        assert len(list(pool.map(lambda _: cached("reviews-1", build), range(4)))) == 4
    assert most == [1, 1, 1, 1]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", [(sources, "_labelled_rows"), (data.Encode, "__call__")], ids=["reviews", "tokens"])
def test_the_full_disk_of_the_cache_is_named(tmp_path, table, overrides, monkeypatch, place):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(*place, full)
    result = run_here(*overrides, f"data_config.dataset={as_file(tmp_path, table)}")
    assert result.returncode == 2
    assert f"error: {tmp_path / 'cache'}: its disk is full" in result.stderr
    assert "set HF_HOME to another disk" in result.stderr


def test_the_full_disk_of_downloaded_models_is_named():
    with pytest.raises(UserError, match=r"hub: its disk is full.* set HF_HOME"), explained("model_name", "owner/model"):
        full()
