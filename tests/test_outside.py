"""What the world does to a run: no home, no matplotlib, no wandb, a Hub that breaks off, foreign code, secrets."""

import json
import shutil
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import PROJECT, SHARED, metrics_of, run_script, train_here

from suite.training import tracking
from utils import load_config


@pytest.fixture
def short(overrides) -> list[str]:
    return [*overrides, "train_config.max_steps=4"]


SECRETS = {"WANDB_API_KEY": "5ec2e7" * 6 + "abcd", "HF_TOKEN": "hf_" + "5ec2e7" * 6}


def test_a_home_that_cannot_be_written_and_secrets_that_nobody_may_read(short, tmp_path):
    nowhere = dict.fromkeys(["HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME",
                             "XDG_STATE_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"], "/proc/nowhere")
    result = run_script("main.py", *short, "log_config.wandb_mode=offline",
                        environment={
        **nowhere, **SECRETS, "HF_HOME": str(tmp_path / "hf"), "WANDB_MODE": "offline"})
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert metrics_of(tmp_path / "runs/run")["train"]["optimizer_steps"] == 4
    plots = list((tmp_path / "runs/run/plots").iterdir())
    assert len(plots) == 4
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert [path for path in written if path.suffix == ".wandb"], result.stdout
    for secret in SECRETS.values():
        assert secret not in result.stdout + result.stderr
        assert [path for path in written if secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("error", [ImportError("no fonts"), FileNotFoundError("mpl-data/fonts")])
def test_without_matplotlib_only_the_plots_are_missing(short, tmp_path, monkeypatch, error):
    class Broken:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "matplotlib":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "suite.training.plots", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert train_here(*short).stdout.count("plots: left out") == 1
    assert metrics_of(tmp_path / "runs/run")["test"]["n"] == 20


TRACKED = """
from suite.common import hub
from suite.training.tracking import Tracker
from utils import load_config

hub.PROBE_SECONDS = 0.5  # in place of six, for the test
tracker = Tracker(load_config("config.yaml", ["output_dir={folder}", "run_name=run", "log_config.wandb_mode=online"]))
tracker.log({{"step": 1, "epoch": 0.5, "train/loss": 0.5}})
tracker.finish()
"""


def test_a_silent_wandb_server_costs_seconds_not_the_run(tmp_path):
    with socket.socket() as silent:  # it takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        started = time.perf_counter()
        result = run_script("-c", TRACKED.format(folder=tmp_path), environment={
            "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path),
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"})
    assert result.returncode == 0, result.stderr
    assert "wandb: the server cannot be reached" in result.stdout
    assert "wandb sync" in result.stdout
    assert time.perf_counter() - started < 85  # wandb alone would wait for 90 at the start, on a quiet machine


@pytest.mark.parametrize("failing", ["", "start", "log", "report", "finish"])
def test_another_tracker_is_a_class_and_an_entry_and_no_failure_of_one_ends_a_run(monkeypatch, capsys, failing):
    diary = Mock(id="an-id")
    start = Mock(return_value=diary)
    for name, method in {"start": start, "log": diary.log, "report": diary.report, "finish": diary.finish}.items():
        method.side_effect = RuntimeError("no paper left") if name == failing else None
    monkeypatch.setattr(tracking, "TRACKERS", {"diary": start})
    config = load_config(PROJECT / "config.yaml")
    config.log_config.tracker = "diary"
    tracker = tracking.Tracker(config, "an-id", step=7)
    start.assert_called_once_with(config, "an-id", "train", 7)
    assert tracker.run_id == (None if failing == "start" else "an-id")
    tracker.log({})
    tracker.report({}, [], None, [], [])
    tracker.finish()
    called = ["start", *(name for name, _, _ in diary.method_calls)]
    everything = ["start", "log", "report", "finish"]
    assert called == everything[:everything.index(failing or "finish") + 1]  # nothing after the first failure
    assert capsys.readouterr().out == ("diary: left out of this run (RuntimeError: no paper left); the run folder has "
                                       "everything\n" if failing else "")


@pytest.mark.long
@pytest.mark.skipif(not SHARED.exists(), reason="needs the stand-in for the Hub")
def test_a_hub_that_breaks_off_in_the_middle_of_a_file(tmp_path):
    server = subprocess.Popen([sys.executable, SHARED / "tools/local_hub.py", "--port", "8931", "--fail-after", "4",
                               "--model", f"somebody/encoder={SHARED / 'models/all-MiniLM-L6-v2'}",
                               "--dataset", f"stanfordnlp/imdb={SHARED / 'data/imdb'}"], stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        result = run_script("main.py", "model_config.model_name=somebody/encoder", f"output_dir={tmp_path}",
                            "data_config.limit=100", timeout=240, environment={
                                "HF_ENDPOINT": "http://127.0.0.1:8931", "HF_HUB_DISABLE_XET": "1",
                                "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")})
    finally:
        server.kill()
        server.wait()
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    assert "somebody/encoder" in errors[0] or "stanfordnlp/imdb" in errors[0]
    assert not any(path.is_dir() for path in tmp_path.iterdir() if path.name != "hf")


# ---------------------------------------------------------------------------------------------------------------------
# Security


@pytest.fixture
def encoder(tmp_path, encoder_folder):
    """A folder with an encoder, into which a test puts what must not run."""
    return shutil.copytree(encoder_folder("bert"), tmp_path / "encoder")


def test_code_in_a_model_folder_does_not_run(overrides, tmp_path, encoder):
    (encoder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Model", None]}
    for kind in ("bert", "evil"):  # known, it is read with transformers' own code; unknown, it is refused
        for name in ("config.json", "tokenizer_config.json"):
            settings = json.loads((encoder / name).read_text()) | {"auto_map": auto_map}
            (encoder / name).write_text(json.dumps(settings | {"model_type": kind} if name == "config.json" else
                                                   settings))
        arguments = [*overrides, "train_config.max_steps=2", f"run_name={kind}", f"model_config.model_name={encoder}"]
        train_here(*arguments, code=0 if kind == "bert" else 2)
    assert not (tmp_path / "ran").exists()


def test_a_planted_adapter_or_pickle_beside_the_weights_is_not_read(overrides, tmp_path, encoder):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        torch.save(Bomb(), encoder / name)
    train_here(*overrides, "train_config.max_steps=2", f"model_config.model_name={encoder}")
    (encoder / "model.safetensors").unlink()
    train_here(*overrides, "run_name=without", f"model_config.model_name={encoder}", code=2)
    assert not (tmp_path / "ran").exists()
