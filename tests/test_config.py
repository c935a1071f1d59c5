"""The configuration: the documented defaults, and one clear error for everything that cannot work."""

import re
import resource
import subprocess
import sys

import pytest
from conftest import PROJECT, SHARED, run_script

import utils
from suite.common import checks, cli
from suite.common.run_folder import save_config
from suite.common.settings_table import settings_table
from utils import UserError, config_fields, load_config


def error_of(*overrides: str, path=PROJECT / "config.yaml") -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_config_yaml_is_experiment_1_and_states_every_key():
    config = load_config(PROJECT / "config.yaml")
    assert (config.model_config.model_name, config.data_config.dataset) == ("bert-base-uncased", "stanfordnlp/imdb")
    assert (config.data_config.max_len, config.data_config.split) == (128, [0.8, 0.1, 0.1])
    train = config.train_config
    assert (train.epochs, train.optimizer, train.learning_rate, train.scheduler, train.seed) == (
        5, "adam", 5e-5, "constant", 42)
    assert config.run_name == "bert-base-uncased-len128-bs64-seed42"
    written = {key for key, _ in utils.leaves(utils.read_yaml(PROJECT / "config.yaml"))}
    assert written == {key for key, _ in config_fields()}


def test_every_default_of_config_yaml_is_the_default(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == load_config(PROJECT / "config.yaml")


def test_the_table_of_settings_is_the_one_that_is_generated():
    text = (PROJECT / "docs" / "settings.md").read_text(encoding="utf-8")
    table = text.partition("<!-- settings -->\n")[2].partition("\n<!-- /settings -->")[0]
    assert table == settings_table(), "replace it with the output of: python -m suite.common.settings_table"
    assert table.count("\n") == 1 + sum(1 for _ in config_fields())


def misspellings():
    for key, _ in config_fields():
        section, _, leaf = key.rpartition(".")
        for position in range(len(leaf)):
            for changed in (leaf[:position] + leaf[position + 1:], leaf[:position] + leaf[position] + leaf[position:],
                            leaf[:position] + "q" + leaf[position + 1:]):
                yield key, f"{section}.{changed}".lstrip(".")


def test_misspelt_keys_are_refused_with_the_right_suggestion():
    known = dict(config_fields())
    for key, misspelt in misspellings():
        assert misspelt in known or utils.suggest(misspelt, known) == f"; did you mean {key}?", misspelt


def test_a_key_without_its_section_is_found():
    assert "did you mean train_config.epochs?" in error_of("epochs=3")


@pytest.mark.parametrize(("override", "words"), [
    ("train_config.epochs=many", "train_config.epochs must be an integer, got 'many'"),
    ("train_config.epochs=1.5", "must be an integer"),
    ("train_config.epochs=null", "must be an integer, got null"),
    ("train_config.epochs=0", "at least 1"),
    ("train_config.learning_rate=.nan", "finite"),
    ("train_config.compile=perhaps", "true or false"),
    ("train_config.optimizer=adamm", "did you mean adam?"),
    ("model_config.dropout_rate=1", "below 1"),
    ("data_config.split=[0.8,0.1,0.2]", "sum to 1.1"),
    ("data_config.split=[0.9,0.1,0]", "between 0 and 1"),
    ("data_config.split=oficial", "or official"),
    ("run_name=../x", "folder's name"),
    ("run_name=..", "folder's name"),
    ("model_config=bert", "it is a section"),
    ("train_config.effective_batch_size=100", "such as 64 or 128"),
    ("nonsense", "section.key=value"),
])
def test_impossible_values(override, words):
    message = error_of(override)
    assert words in message
    assert message.startswith("command line:")


def test_all_problems_are_reported_at_once():
    message = error_of("train_config.epoch=3", "train_config.seed=x", "data_config.max_len=1")
    assert message.startswith("3 problems: ")
    assert all(key in message for key in ("train_config.epochs?", "train_config.seed", "data_config.max_len"))


def test_precision_no_is_not_yaml_false(tmp_path):
    (tmp_path / "no.yaml").write_text("train_config:\n  mixed_precision: no\n")
    assert load_config(tmp_path / "no.yaml").train_config.mixed_precision == "no"


def test_fp16_on_a_cpu_is_refused():
    assert "a CPU cannot train in" in error_of("train_config.mixed_precision=fp16", "train_config.device=cpu")


@pytest.mark.parametrize(("name", "limit"), [("bert", 66), ("roberta", 64), ("deberta-v3", None)])
def test_max_len_above_what_the_encoder_takes(encoder_folder, name, limit):
    assert checks.max_positions(encoder_folder(name)) == limit
    if limit:
        message = error_of(f"model_config.model_name={encoder_folder(name)}", f"data_config.max_len={limit + 1}")
        assert f"takes at most {limit} tokens" in message


@pytest.mark.parametrize(("content", "words"), [
    ("train_config: [1, 2", "line 2: not valid YAML"),
    ("- a list", "expected sections"),
    ("train_config:\n  seed: 1\n  seed: 2\n", "duplicate"),
    ("\x00", "not valid YAML|cannot be read"),
])
def test_broken_files(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    message = error_of(path=path)
    assert str(path) in message
    assert re.search(words, message)


def test_a_missing_file():
    assert "no such file" in error_of(path="absent.yaml")


def test_errors_come_before_torch_and_within_two_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time, because other programs may be busy
    result = run_script("main.py", "train_config.epoch=3", fresh=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: command line: unknown key train_config.epoch; did you mean train_config.epochs?\n"
    code = "import sys, utils; utils.load_config('config.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


@pytest.mark.parametrize("script", ["main.py", "main_accumulation.py"])
def test_help_shows_every_command(script):
    result = run_script(script, "--help")
    assert result.returncode == 0
    for words in ("python main", "--mode test", "section.key=value", "accelerate launch"):
        assert words in result.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["--mode", "tset"], "choose one of train, test"),
    (["--confg", "x.yaml"], "'--confg' is not an override"),
    (["train_config.gradient_accumulation_steps=4"], "run main_accumulation.py"),
])
def test_wrong_command_lines(arguments, words):
    result = run_script("main.py", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", ["test", "predict", "explain", "export"])
def test_only_training_needs_main_accumulation_for_accumulated_batches(monkeypatch, mode):
    options = ["--text", "a film"] if mode in ("predict", "explain") else []
    steps = "train_config.gradient_accumulation_steps=4"
    monkeypatch.setattr("sys.argv", ["main.py", "--mode", mode, *options, steps])
    assert cli.read_command("", accumulates=False).config.train_config.gradient_accumulation_steps == 4
    monkeypatch.setattr("sys.argv", ["main.py", steps])
    with pytest.raises(SystemExit):
        cli.read_command("", accumulates=False)


def test_mode_test_takes_the_configuration_that_the_run_has_saved(tmp_path, monkeypatch):
    path, named = PROJECT / "config.yaml", [f"output_dir={tmp_path}", "run_name=quick"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    trained = load_config(path, [*named, "data_config.limit=600", "train_config.gradient_accumulation_steps=3"])
    assert trained.train_config.effective_batch_size == 384
    trained.train_config.auto_micro_batch = True  # it is for one process, and so is no obstacle to testing on five
    (tmp_path / "quick").mkdir()
    save_config(trained, tmp_path / "quick" / "config.yaml")
    for processes in ("1", "5"):  # 384 reviews in micro-batches of 64 cannot be shared by five
        monkeypatch.setenv("WORLD_SIZE", processes)
        config = cli.config_for("test", path, named)
        assert (config.data_config.limit, config.train_config.effective_batch_size) == (600, 384)
        assert config.run_folder == tmp_path / "quick"
    assert cli.config_for("test", path, [*named, "data_config.limit=500"]).data_config.limit == 500
    assert cli.config_for("train", path, named).data_config.limit is None
    assert cli.config_for("test", path, [named[0], "run_name=other"]).data_config.limit is None


def test_the_two_ways_to_ask_for_a_batch_agree():
    steps = load_config(PROJECT / "config.yaml", ["train_config.gradient_accumulation_steps=4"])
    size = load_config(PROJECT / "config.yaml", ["train_config.effective_batch_size=256"])
    assert steps == size
    assert "give only one" in error_of("train_config.effective_batch_size=256",
                                       "train_config.gradient_accumulation_steps=2")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the MiniLM encoder")
def test_max_len_of_a_real_encoder():
    assert checks.max_positions(str(SHARED / "models/all-MiniLM-L6-v2")) == 512


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(PROJECT / "config.yaml", ["output_dir=~/runs", "data_config.dataset=~/reviews.csv"])
    assert config.output_dir == "/home/somebody/runs"
    assert config.data_config.dataset == "/home/somebody/reviews.csv"


def test_the_comments_of_config_yaml_list_the_choices():
    text = (PROJECT / "config.yaml").read_text(encoding="utf-8")
    for key, entry in config_fields():
        if choices := entry.metadata.get("choices"):
            [comment] = re.findall(rf"^  {key.rpartition('.')[2]}:.*?#(.*)$", text, re.MULTILINE)
            assert all(re.search(rf"\b{choice}\b", comment) for choice in choices), key
