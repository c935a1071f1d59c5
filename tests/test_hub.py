"""The Hub: the real download path against a stand-in, and what happens without it."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import SHARED, bits_of, run_script, train


@pytest.mark.skipif(not SHARED.exists(), reason="needs the stand-in for the Hub")
def test_the_unchanged_config_through_the_hubs_own_protocol(tmp_path):
    port = "8917"
    model, imdb = SHARED / "models/all-MiniLM-L6-v2", SHARED / "data/imdb"
    server = subprocess.Popen([sys.executable, SHARED / "tools/local_hub.py", "--port", port,
                               "--model", f"google-bert/bert-base-uncased={model}",
                               "--alias", "bert-base-uncased=google-bert/bert-base-uncased",
                               "--dataset", f"stanfordnlp/imdb={imdb}"], stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
               "HF_HUB_OFFLINE": "0"}
        arguments = ["data_config.limit=100", "train_config.epochs=1", f"output_dir={tmp_path}"]
        train(*arguments, environment=hub, timeout=300)
        run = tmp_path / "bert-base-uncased-len128-bs64-seed42"
        before = bits_of(run)
        cached = max((tmp_path / "hf/datasets").glob("reviews-*/**/*.arrow"), key=lambda path: path.stat().st_size)
        os.truncate(cached, 1000)
        assert f"{cached}: this file of the cache is damaged" in train(
            *arguments, "--mode", "test", environment=hub).stdout
        assert bits_of(run) == before
        result = train(*arguments, "run_name=new", "model_config.model_name=nobody/nothing", environment=hub, code=2)
        assert "nobody/nothing is neither a folder here nor a name on the Hugging Face Hub" in result.stderr
    finally:
        server.kill()
        server.wait()
    # The Hub is gone: what is cached goes on, what is not is said.
    assert "does not answer" in train(*arguments, "--mode", "test", environment=hub).stdout
    assert bits_of(run) == before
    result = train(*arguments, "run_name=new", "model_config.model_name=nobody/nothing", environment=hub, code=2)
    assert "cannot be reached" in result.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="needs the stand-in for the Hub")
def test_texts_of_the_hub_are_what_its_files_say_with_and_without_the_hub(tmp_path):
    """The datasets library would read NA as nothing, and "007" beside numbers as 7."""
    texts = ["NA", "007", 3, "null", "2020-01-02", *(f"film {number}" for number in range(35))]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.json").write_text(json.dumps([{"text": text, "label": row % 2}
                                                               for row, text in enumerate(texts)]))
    port = "8918"
    server = subprocess.Popen([sys.executable, SHARED / "tools/local_hub.py", "--port", port,
                               "--dataset", f"somebody/films={tmp_path / 'files'}",
                               "--dataset", f"somebody/two={tmp_path / 'two'}"], stdout=subprocess.PIPE)
    for name in ("first", "second"):  # two configurations
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "train.csv").write_text("text,label\n" + "".join(
            f"{name} {row},{row % 2}\n" for row in range(40)))
    (tmp_path / "two" / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/*.csv\n" for name in ("first", "second")) + "---\n")
    code = ("import data, utils; read = lambda *more: data.load_split(utils.load_config('config.yaml', more))"
            ".reviews.table['text'][:]; print(read('data_config.dataset=somebody/films')); "
            "print(len(set(read('data_config.dataset=somebody/two', 'data_config.subset=second'))))")
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    try:
        server.stdout.readline()
        read = run_script("-c", code, environment=hub | {"HF_HUB_OFFLINE": "0"})
    finally:
        server.kill()
        server.wait()
    for result in (read, run_script("-c", code, environment=hub)):
        assert result.stdout.splitlines()[-2:] == [str(list(map(str, texts))), "40"], result.stderr


def test_without_the_hub_one_line_says_the_ways_on_within_20_seconds(tmp_path):
    started = time.perf_counter()
    with socket.socket() as silent:  # it takes connections and never answers: the slowest way for a network to be gone
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        result = train(f"output_dir={tmp_path}", code=2, environment={
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf")})
    assert time.perf_counter() - started < 20
    assert result.stderr.startswith("error:")
    assert result.stderr.count("\n") == 1
    assert all(way in result.stderr for way in ("connect to the internet", "local folder", "demo.yaml"))
    assert not any(tmp_path.glob("*/metrics.json"))
