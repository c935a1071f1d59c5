"""Whatever is wrong around a run, its values, streams, disks and environment: one line, and nothing is lost."""

import pytest
import torch
from conftest import PROJECT, run_here, run_script

from suite.common import cli, hub
from suite.common.storage import room_for
from utils import UserError, load_config


def test_fp16_on_a_cpu_that_nobody_named_is_refused(refused, monkeypatch):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    assert "a CPU cannot train in" in refused("train_config.mixed_precision=fp16", "train_config.device=auto")


@pytest.mark.parametrize(("error", "stays"), [
    (TypeError("a bug"), True), (KeyError("a bug"), True), (AttributeError("a bug"), True), (RuntimeError("bug"), True),
    (OSError("no such file"), False), (ValueError("a bad value"), False), (UserError("said already"), False)])
def test_only_errors_about_the_input_are_explained(error, stays):
    with pytest.raises(type(error) if stays else UserError), hub.explained("data_config.dataset", "./reviews"):
        raise error


@pytest.mark.parametrize(("override", "key"), [
    ("train_config.epochs=${run_name}", "train_config.epochs"),
    ("train_config.seed=${nothing}", "train_config.seed"),
    ("data_config.limit=${oc.env:HOME}", "data_config.limit")])
def test_an_interpolation_of_a_wrong_type_names_its_key(override, key):
    with pytest.raises(UserError, match=f"command line: {key}: "):
        load_config(PROJECT / "config.yaml", [override, "run_name=text"])


def test_the_last_override_counts_wherever_mode_stands(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "train_config.epochs=2", "--mode", "test", "train_config.epochs=3"])
    assert cli.read_command("", accumulates=False).config.train_config.epochs == 3


@pytest.mark.parametrize(("overrides_of_it", "words"), [
    (["data_config.dataset=absent.csv"], "error: data_config.dataset: no such file or folder: absent.csv"),
    (["data_config.max_len=67"], "takes at most 66 tokens")])
def test_the_real_script(overrides, tmp_path, overrides_of_it, words):
    result = run_script("main.py", *overrides, *overrides_of_it)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "run").exists()


def test_an_output_dir_that_cannot_be(overrides, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/nowhere", str(tmp_path / "file")):
        result = run_here(*overrides, f"output_dir={folder}")
        assert result.returncode == 2
        assert folder in result.stderr
        assert "set output_dir" in result.stderr


@pytest.mark.parametrize(("fix", "words"), [
    ({}, "set output_dir to another disk"), ({"fix": "choose another --output"}, "choose another --output")])
def test_a_full_disk_names_the_fix(tmp_path, fix, words):
    with (pytest.raises(UserError, match=f"{tmp_path}: no room to write .*same command again.*{words}$"),
          room_for(tmp_path, needed=1e18, **fix)):
        pytest.fail("there is no such disk")
