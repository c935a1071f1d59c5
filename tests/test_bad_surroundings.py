"""Whatever is wrong around a run, its values, disks and environment: one line, and nothing is lost."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, run_here, run_script

from suite.common import cli, hub
from suite.common.storage import room_for
from utils import UserError, load_config, say

MANY = "9" * 400
BAD_VALUES = [  # (an override, words of the message)
    ("output_dir=~nosuchuser/runs", "output_dir is '~nosuchuser/runs': there is no such user"),
    ("data_config.dataset=~nosuchuser", "there is no such user"),
    ("run_name=.zz.lock", "does not begin with a dot"),
    ("run_name=..", "does not begin with a dot"),
    ("run_name=a/b", "for a folder's name"),
    ("train_config.seed=010", "YAML reads 010 as 8"),
    ("train_config.epochs=1:30", "YAML reads 1:30 as 90"),
    ("data_config.limit=[1, 190:20:30]", "YAML reads 190:20:30 as 685230"),
    (f"data_config.limit={MANY}", "it must be at most 9007199254740992"),
    (f"train_config.seed={MANY}", "it must be at most"),
    (f"train_config.learning_rate={MANY}", "train_config.learning_rate must be a number"),
    (f"data_config.split=[{MANY}, 1, 1]", "each share must lie between 0 and 1"),
    ("data_config.num_workers=5000", "it must be at most 256"),
    ("train_config.seed=" + "[" * 1000 + "]" * 1000, "more than 50 brackets are nested"),
    ('model_config.model_name="a\\0b"', "it holds a character that no text has"),
    ('data_config.text_column="a\\0b"', "it holds a character that no text has"),
    ('output_dir="a\\0b"', "it holds a character that no text has"),
    ('run_name="a\\0b"', "for a folder's name"),
]
BAD_FILES = [  # (content of a configuration, words of the message)
    ("train_config:\n  epochs: 1:30\n", "YAML reads 1:30 as 90"),
    ("train_config:\n  seed: 010\n", "YAML reads 010 as 8"),
    ("train_config: " + "[" * 1000 + "]" * 1000, "more than 50 brackets are nested"),
    ("train_config: " + "{a: " * 100_000 + "}" * 100_000, "more than 50 brackets are nested"),
    ("".join(f"{' ' * depth}a:\n" for depth in range(99)), "more than 50 brackets are nested"),
    ("train_config: !!python/object/apply:os.system [id]\n", "not valid YAML"),
    ("a: &a [*a]\n", "recursive aliases are not supported"),
    ("\0", "cannot be read"),
    ("- a\n- b\n", "expected sections"),
]
BAD_ENVIRONMENTS = [  # (variables, words of the message)
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', not a number"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ({"WORLD_SIZE": "0"}, "contradict each other"),
    ({"RANK": ""}, "RANK is '', not a number"),
    ({"RANK": "-1"}, "RANK is '-1', not a number"),
    ({"RANK": "1"}, "contradict each other"),
    ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', not a number"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a port"),
]


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


@pytest.mark.parametrize(("override", "words"), BAD_VALUES, ids=[override[:40] for override, _ in BAD_VALUES])
def test_bad_values(override, words):
    with pytest.raises(UserError) as caught:
        load_config(PROJECT / "config.yaml", [override])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("content", "words"), BAD_FILES, ids=[content[:30] for content, _ in BAD_FILES])
def test_bad_configuration_files(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "bad.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'bad.yaml'}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(("variables", "words"), BAD_ENVIRONMENTS, ids=[str(case) for case, _ in BAD_ENVIRONMENTS])
def test_bad_environments(monkeypatch, capsys, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        cli.new_parser("")
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_arguments_and_paths_that_are_not_of_the_encoding(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main.py", os.fsdecode(b"run_name=\xff")])
    with pytest.raises(SystemExit):
        cli.read_command("", accumulates=False)
    assert "is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")  # what PYTHONUTF8=0 LC_ALL=C can lead to
    with pytest.raises(UserError, match="the file system's encoding here, ascii, lacks a character"):
        load_config(PROJECT / "config.yaml", ["data_config.dataset=Bücher.csv"])


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a trained model whose classes have odd names."""
    runs = tmp_path_factory.mktemp("trained")
    rows = "".join(f"a {word} film number {row},{name}\n" for row in range(30)
                   for word, name in (("fine", "go\x1b[31mod"), ("dull", '"ba\nd"')))
    (runs / "reviews.csv").write_text("text,label\n" + rows)
    result = run_here(f"output_dir={runs}", "run_name=run", f"data_config.dataset={runs / 'reviews.csv'}",
                      f"model_config.model_name={PROJECT / 'demo/bert'}", "model_config.pretrained=false",
                      "train_config.max_steps=1", "log_config.wandb_mode=disabled", "train_config.mixed_precision=no",
                      "train_config.device=cpu")
    assert result.returncode == 0
    return str(runs / "run/best")


def test_a_reader_that_leaves_ends_the_command_without_a_word(model, tmp_path):
    """As `| head` does. `true` is gone before anything is printed."""
    (tmp_path / "reviews.csv").write_text("text\nfine\ndull\n")
    predict = ["main.py", "--mode", "predict", "--model", model, "--input", str(tmp_path / "reviews.csv")]
    say = ["-c", "from suite.common import cli; cli.run(lambda: print('more', flush=True))"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for arguments, code in ((predict, 0), (say, 141)):
        command = shlex.join([sys.executable, *arguments])
        result = subprocess.run(["bash", "-c", f"{command} | true; exit $PIPESTATUS"], cwd=PROJECT, env=buffered,
                                capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (code, "")


def test_a_name_that_the_terminal_cannot_show_ends_nothing(monkeypatch):
    """A run that says such a name must come to its end: it would fail again whenever it went on."""
    written = io.BytesIO()
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.begin()
    say("the class schön")
    assert written.getvalue() == b"the class sch\\xf6n\n"


def test_a_read_only_disk_or_a_file_in_place_of_a_folder_is_one_line(capsys):
    def work():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/run/last")

    with pytest.raises(SystemExit) as left:
        cli.run(work)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: runs/run/last: Read-only file system: ")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_memory_that_runs_out_names_the_keys(capsys, error):
    def work():
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run(work)
    assert left.value.code == 2
    assert "out of memory: set a smaller data_config.batch_size" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(model, capsys):
    for mode in ("predict", "explain"):
        shown = run_here(mode=mode, model=model, text="a fine film").stdout
        assert "\x1b" not in shown
        assert "ba\\nd" in shown or "go\\x1b[31mod" in shown
    say("a\x07b\n\x9bc")
    assert capsys.readouterr().out == "a\\x07b\n\\x9bc\n"


# ---------------------------------------------------------------------------------------------------------------------
# Paths, and unforeseen errors


def test_paths_in_a_configuration_are_found_beside_it(tmp_path, monkeypatch):
    assert load_config(PROJECT / "demo.yaml").data_config.dataset == "demo/reviews.csv"
    monkeypatch.chdir(tmp_path)
    config = load_config(PROJECT / "demo.yaml")
    assert (config.data_config.dataset, config.model_config.model_name) == (
        str(PROJECT / "demo/reviews.csv"), str(PROJECT / "demo/bert"))
    assert config.run_name.startswith("DEMO-")
    assert load_config(PROJECT / "demo.yaml", ["data_config.dataset=x.csv"]).data_config.dataset == "x.csv"


@pytest.mark.parametrize(("mode", "overrides"), [
    ("train", ["data_config.dataset=absent.csv"]), ("train", ["model_config.model_name=./absent"]), ("test", []),
    ("train", ["train_config.resume=must"])])
def test_nothing_is_made_for_wrong_input(tmp_path, monkeypatch, mode, overrides):
    monkeypatch.chdir(tmp_path)
    result = run_here("log_config.wandb_mode=disabled", f"model_config.model_name={PROJECT / 'demo/bert'}",
                      f"data_config.dataset={PROJECT / 'demo/reviews.csv'}", *overrides, mode=mode)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("a bug"), OSError("a bug")])
def test_an_unforeseen_error_keeps_its_traceback(error):
    """One line is for what the user can mend; Python shows the rest, and ends with exit code 1."""
    def work():
        raise error

    with pytest.raises(type(error)) as caught:
        cli.run(work)
    assert caught.value is error
