"""The Hub: the libraries' own download against a stand-in on this machine, and one line for what cannot be loaded."""

import importlib.util
import json
import socket
import threading
import time
from http.server import ThreadingHTTPServer

import datasets
import huggingface_hub
import pandas as pd
import pytest
import torch
from conftest import PROJECT, SHARED, SMALL, bits_of, expect, run_here, train_here
from transformers import AutoTokenizer, BertConfig, BertModel

import data
from suite.common import hub as hub_of_suite
from utils import load_config

CLASSES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
TEXTS = ["NA", "007", "3", "null", "2020-01-02", *(f"film {number}" for number in range(35))]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A folder with what the stand-in serves: an encoder under BERT's name, IMDB's layout of files, and others."""
    folder = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL | {"max_position_embeddings": 130})).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(PROJECT / "demo" / "bert").save_pretrained(folder / "bert")
    for split, rows in (("train", 60), ("test", 60), ("unsupervised", 20)):
        place = folder / "imdb" / "plain_text"
        place.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": [f"{split} film {row}" for row in range(rows)],
                                    "label": [-1 if split == "unsupervised" else row % 2 for row in range(rows)]},
                                   CLASSES).to_parquet(place / f"{split}-00000-of-00001.parquet")
    (folder / "films").mkdir()
    (folder / "films" / "train.json").write_text(json.dumps([
        {"text": 3 if text == "3" else text, "label": row % 2} for row, text in enumerate(TEXTS)]))
    for name in ("first", "second"):  # two configurations
        (folder / "two" / name).mkdir(parents=True)
        pd.DataFrame({"text": [f"{name} {row}" for row in range(40)], "label": [row % 2 for row in range(40)]}).to_csv(
            folder / "two" / name / "train.csv", index=False)
    (folder / "two" / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/*.csv\n" for name in ("first", "second")) + "---\n")
    (folder / "empty").mkdir()
    (folder / "empty" / "README.md").write_text("nothing")
    return folder


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    """The stand-in, where the libraries look for the Hub, with an empty cache; `hub.shutdown()` and it is gone."""
    if not SHARED.exists():
        pytest.skip("needs the stand-in for the Hub")
    spec = importlib.util.spec_from_file_location("local_hub", SHARED / "tools" / "local_hub.py")
    local_hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local_hub)

    class Hub(local_hub.Hub):
        repos = {(kind, name): local_hub.Repo(kind, name, repositories / folder) for kind, name, folder in (
            ("models", "google-bert/bert-base-uncased", "bert"), ("datasets", "stanfordnlp/imdb", "imdb"),
            ("datasets", "somebody/films", "films"), ("datasets", "somebody/two", "two"),
            ("models", "somebody/empty", "empty"))}
        aliases = {"bert-base-uncased": "google-bert/bert-base-uncased"}

        def missing(self, code):
            if "/gated" in self.path:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return super().missing(code)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        look_for_the_hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        yield server
        server.shutdown()


def look_for_the_hub_at(address: str, tmp_path, monkeypatch) -> None:
    constants = huggingface_hub.constants
    for module, name, value in (
            (constants, "ENDPOINT", address), (datasets.config, "HF_ENDPOINT", address),
            (huggingface_hub.hf_api.api, "endpoint", address), (constants, "HF_HUB_OFFLINE", False),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
            (datasets.config, "HUB_DATASETS_URL", address + "/datasets/{repo_id}/resolve/{revision}/{path}"),
            (constants, "HF_HUB_DISABLE_XET", True), (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
            (datasets.config, "HF_HUB_OFFLINE", False), (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")):
        monkeypatch.setattr(module, name, value)


def test_the_unchanged_config_through_the_hubs_own_protocol(hub, tmp_path):
    """Trained and tested with the Hub, and tested again from the cache when it is gone."""
    arguments = ["train_config.epochs=1", f"output_dir={tmp_path}", "train_config.mixed_precision=no"]
    train_here(*arguments, "log_config.wandb_mode=disabled")
    run = tmp_path / "bert-base-uncased-len128-bs64-seed42"
    before = bits_of(run)
    hub.shutdown()
    hub.server_close()
    again = expect(0, run_here(*arguments, mode="test"))
    assert ("The Hugging Face Hub does not answer: bert-base-uncased and stanfordnlp/imdb must be in the local cache."
            in again.stdout.splitlines())
    assert bits_of(run) == before
    absent = expect(2, run_here(*arguments, "run_name=new", "model_config.model_name=nobody/nothing"))
    assert "nobody/nothing is not completely in the local cache" in absent.stderr
    assert absent.stderr.count("\n") == 1


@pytest.mark.parametrize(("override", "reason"), [
    ("model_config.model_name=nobody/nothing", "is neither a folder here nor a name on the Hugging Face Hub"),
    ("data_config.dataset=nobody/nothing", "is neither a folder here nor a name on the Hugging Face Hub"),
    ("model_config.model_name=somebody/gated", "is gated: ask for access on its page on the Hub, and log in"),
    ("data_config.dataset=somebody/gated", "is gated: ask for access on its page on the Hub, and log in"),
    ("model_config.model_name=somebody/empty", "cannot be loaded")])
def test_what_the_hub_does_not_give_is_one_line(hub, tmp_path, override, reason):
    """Wrong settings end in one line with the fix."""
    result = expect(2, run_here(f"output_dir={tmp_path}", "run_name=new", override))
    assert result.stderr.startswith(f"error: {override.replace('=', ': ')} {reason}")
    assert result.stderr.count("\n") == 1


def test_texts_of_the_hub_are_what_its_files_say_with_and_without_the_hub(hub):
    """The datasets library would read NA as nothing, and "007" beside numbers as 7."""
    def read(*overrides: str) -> list[str]:
        return data.load_split(load_config(PROJECT / "config.yaml", overrides)).reviews.table["text"][:]

    for is_there in (True, False):
        if not is_there:
            hub.shutdown()
            hub.server_close()
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        assert read("data_config.dataset=somebody/films") == TEXTS
        assert read("data_config.dataset=somebody/two", "data_config.subset=second")[39] == "second 39"


def test_without_the_hub_one_line_says_the_ways_on(tmp_path, monkeypatch):
    """The slowest way for a network to be gone is one that takes connections and never answers."""
    monkeypatch.setattr(hub_of_suite, "PROBE_SECONDS", 0.5)
    started = time.perf_counter()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        look_for_the_hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, monkeypatch)
        result = expect(2, run_here(f"output_dir={tmp_path}"))
    assert time.perf_counter() - started < 60  # the libraries alone would wait for minutes
    assert result.stderr.startswith("error:")
    assert result.stderr.count("\n") == 1
    assert all(way in result.stderr for way in ("connect to the internet", "local folder", "demo.yaml"))
    assert not any(tmp_path.glob("*/metrics.json"))
