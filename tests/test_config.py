"""The configuration and the command line: documented defaults, and one clear line for everything that cannot work.

The promise: wrong settings end in one line with the fix and exit code 2, before work is lost, all of them at once.
"""

import ast
import pkgutil
import re
import resource
import shlex
from pathlib import Path

import pytest
from conftest import PROJECT, run_script, write_reviews

import utils
from suite.common import checks, cli
from suite.common.run_folder import read_saved_config, save_config
from utils import UserError, choices, config_fields, load_config, settings_table

MANY = "9" * 400


def error_of(*overrides: str, path=PROJECT / "config.yaml") -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(monkeypatch, *arguments: str) -> cli.Command:
    monkeypatch.setattr("sys.argv", ["main.py", *arguments])
    return cli.read_command("", accumulates=False)


# ---------------------------------------------------------------------------------------------------------------------
# Defaults and documentation


def test_config_yaml_is_experiment_1_and_states_every_key_with_its_default(tmp_path):
    config = load_config(PROJECT / "config.yaml")
    assert (config.model_config.model_name, config.data_config.dataset) == ("bert-base-uncased", "stanfordnlp/imdb")
    assert (config.data_config.max_len, config.data_config.split) == (128, [0.8, 0.1, 0.1])
    train = config.train_config
    assert (train.epochs, train.optimizer, train.learning_rate, train.scheduler, train.seed) == (
        5, "adam", 5e-5, "constant", 42)
    assert config.run_name == "bert-base-uncased-len128-bs64-seed42"
    assert {key for key, _ in utils.leaves(utils.read_yaml(PROJECT / "config.yaml"))} == set(config_fields())
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == config


def test_the_docs_list_every_key_and_config_yaml_every_choice():
    text = (PROJECT / "docs" / "settings.md").read_text(encoding="utf-8")
    table = text.partition("<!-- settings -->\n")[2].partition("\n<!-- /settings -->")[0]
    assert table == settings_table(), "replace it with the output of: python utils.py"
    assert table.count("\n") == 1 + len(config_fields())
    text = (PROJECT / "config.yaml").read_text(encoding="utf-8")
    for key, field in config_fields().items():
        if words := choices(field):
            [comment] = re.findall(rf"^  {key.rpartition('.')[2]}:.*?#(.*)$", text, re.MULTILINE)
            assert all(re.search(rf"\b{choice}\b", comment) for choice in words), key


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_misspelt_keys_are_refused_with_the_right_suggestion():
    known = config_fields()
    for key in known:
        section, _, leaf = key.rpartition(".")
        for place in range(len(leaf)):
            for changed in (leaf[:place] + leaf[place + 1:], leaf[:place] + leaf[place] + leaf[place:],
                            leaf[:place] + "q" + leaf[place + 1:]):
                misspelt = f"{section}.{changed}".lstrip(".")
                assert misspelt in known or checks.suggestion(misspelt, known) == f"; did you mean {key}?", misspelt


@pytest.mark.parametrize(("override", "words"), [
    ("epochs=3", "unknown key epochs; did you mean train_config.epochs?"),
    ("train_config.epochs=many", "train_config.epochs is many: it must be a valid integer"),
    ("train_config.epochs=1.5", "must be a valid integer"),
    ("train_config.epochs=1:30", "must be a valid integer"),
    ("train_config.epochs=null", "must be a valid integer"),
    ("train_config.epochs=0", "train_config.epochs is 0: it must be at least 1"),
    ("train_config.epochs=${run_name}", "train_config.epochs is text: it must be a valid integer"),
    ("data_config.truncation=${train_config.seed}", "data_config.truncation is 42: it must be 'head'"),
    ("train_config.seed=${nothing}", "train_config.seed: Interpolation key 'nothing' not found"),
    (f"data_config.limit={MANY}", "it must be at most 9007199254740992"),
    ("data_config.num_workers=5000", "it must be at most 256"),
    ("train_config.learning_rate=nan", "it must be a finite number"),
    (f"train_config.learning_rate={MANY}", "it must be a finite number"),
    ("train_config.compile=perhaps", "true or false"),
    ("train_config.optimizer=adamm", "it must be 'adam', 'adamw' or 'sgd'; did you mean adam?"),
    ("model_config.dropout_rate=1", "below 1"),
    ("data_config.text_column=''", "at least 1 character"),
    ("data_config.label_column=text", "are both 'text': name two columns"),
    ("data_config.split=[0.8,0.1,0.2]", "sum to 1.1"),
    ("data_config.split=[0.9,0.1,0]", "between 0 and 1"),
    (f"data_config.split=[{MANY}, 1, 1]", "between 0 and 1"),
    ("data_config.split=oficial", "or official"),
    ("run_name=../x", "folder's name"),
    ("run_name=..", "folder's name"),
    ("run_name=.zz.lock", "does not begin with a dot"),
    ("model_config=bert", "it is a section: set one of its keys, such as model_config.model_name"),
    ("train_config.effective_batch_size=100", "such as 64 or 128"),
    ("nonsense", "section.key=value"),
])
def test_impossible_values(override, words):
    message = error_of("run_name=text", override)
    assert message.startswith("command line:")
    assert words in message
    assert len(message) < 300


def test_all_problems_are_reported_at_once():
    message = error_of("train_config.epoch=3", "train_config.seed=x", "data_config.max_len=1")
    assert message.startswith("3 problems: ")
    assert all(key in message for key in ("train_config.epochs?", "train_config.seed", "data_config.max_len"))


@pytest.mark.parametrize(("words", "overrides"), [
    ("a CPU cannot train in", ["train_config.mixed_precision=fp16", "train_config.device=cpu"]),
    ("set one of them to false", ["train_config.gradient_checkpointing=true", "train_config.compile=true"]),
    ("give only one", ["train_config.effective_batch_size=256", "train_config.gradient_accumulation_steps=2"])])
def test_settings_that_contradict_each_other(words, overrides):
    assert words in error_of(*overrides)


@pytest.mark.parametrize(("name", "limit"), [("bert", 66), ("roberta", 64), ("deberta-v3", None)])
def test_max_len_above_what_the_encoder_takes(encoder_folder, name, limit):
    assert checks.max_positions(encoder_folder(name)) == limit
    if limit:
        message = error_of(f"model_config.model_name={encoder_folder(name)}", f"data_config.max_len={limit + 1}")
        assert f"takes at most {limit} tokens" in message


@pytest.mark.parametrize(("content", "words"), [
    ("train_config:\n  seed: [1, 2\n", "line 3: not valid YAML"),
    ("- a\n- b\n", "expected sections"),
    ("train_config:\n  seed: 1\n  seed: 2\n", "line 2: not valid YAML: duplicate key seed"),
    ("train_config: !!python/object/apply:os.system [id]\n", "not valid YAML"),
    ("a: &a [*a]\n", "not valid YAML"),
    ("\0", "cannot be read"),
])
def test_broken_files(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    message = error_of(path=path)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "no such file" in error_of(path="absent.yaml")


def test_errors_come_before_torch_and_within_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time, because other programs may be busy
    result = run_script("main.py", "train_config.epoch=3", fresh=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: command line: unknown key train_config.epoch; did you mean train_config.epochs?\n"


# ---------------------------------------------------------------------------------------------------------------------
# What values mean


def test_a_word_is_what_its_key_takes_it_for(tmp_path):
    """`no` is a precision here and false there; a number may be written in any of YAML's ways."""
    (tmp_path / "my.yaml").write_text("train_config:\n  mixed_precision: no\n  compile: no\n  learning_rate: 1e-3\n"
                                      "  epochs: 010\n  max_steps: ${train_config.epochs}\n"
                                      "run_name: ${train_config.seed}\ndata_config:\n  subset: null\n")
    config = load_config(tmp_path / "my.yaml", ["data_config.subset=no"])
    train = config.train_config
    assert (train.mixed_precision, train.compile, train.learning_rate) == ("no", False, 1e-3)
    assert (train.epochs, train.max_steps) == (10, 10)
    assert (config.run_name, config.data_config.subset) == ("42", "no")
    assert load_config(tmp_path / "my.yaml", ["data_config.subset=null"]).data_config.subset is None
    save_config(config, tmp_path / "saved.yaml")
    assert read_saved_config(tmp_path / "saved.yaml") == config


def test_the_two_ways_to_ask_for_a_batch_agree():
    steps = load_config(PROJECT / "config.yaml", ["train_config.gradient_accumulation_steps=4"])
    assert steps == load_config(PROJECT / "config.yaml", ["train_config.effective_batch_size=256"])


def test_paths_are_found_from_the_configurations_folder_and_from_home(tmp_path, monkeypatch):
    assert load_config(PROJECT / "demo.yaml").data_config.dataset == "demo/reviews.csv"
    monkeypatch.chdir(tmp_path)
    config = load_config(PROJECT / "demo.yaml")
    assert (config.data_config.dataset, config.model_config.model_name) == (
        str(PROJECT / "demo/reviews.csv"), str(PROJECT / "demo/bert"))
    assert config.run_name.startswith("DEMO-")
    assert load_config(PROJECT / "demo.yaml", ["data_config.dataset=x.csv"]).data_config.dataset == "x.csv"
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(PROJECT / "config.yaml", ["output_dir=~/runs", "data_config.dataset=~/reviews.csv"])
    assert (config.output_dir, config.data_config.dataset) == ("/home/somebody/runs", "/home/somebody/reviews.csv")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("script", ["main.py", "main_accumulation.py"])
def test_help_shows_every_command_mode_and_option(script):
    result = run_script(script, "--help")
    assert result.returncode == 0
    for words in ("python main", "section.key=value", "accelerate launch", *cli.MODES,
                  *(f"--{how.get('flag', name)}" for name, how in cli.OPTIONS.items())):
        assert words in result.stdout


def test_every_mode_has_its_function_and_every_option_its_modes():
    import main

    assert main.MODES.keys() == {name for name, mode in cli.MODES.items() if mode.function is None}
    assert all(callable(pkgutil.resolve_name(mode.function)) for mode in cli.MODES.values() if mode.function)
    assert all(set(how["modes"]) <= set(cli.MODES) for how in cli.OPTIONS.values())


@pytest.mark.parametrize(("command", "words"), [
    ("--mode tset", "invalid choice: 'tset' (choose from"),
    ("--confg x.yaml", "--confg is not an override"),
    ("train_config.gradient_accumulation_steps=4", "run main_accumulation.py"),
    ("--text film", "--text is for --mode predict, explain, not for train: leave it out"),
    ("--mode predict --text ' '", "--text: it is empty"), ("--mode predict --text a --text b", "--text is given twice"),
    ("--mode predict --text film --model /nowhere", "no such folder"),
    ("--mode predict", "either --text"), ("--mode predict --text film --input IN", "either --text"),
    ("--mode predict --text film --output OUT.csv", "the label of --text is printed"),
    ("--mode predict --input none.csv", "no such file"),
    ("--mode predict --input config.yaml", "must end in"),
    ("--mode predict --input EMPTY", "is a folder without .txt files"),
    ("--mode predict --input IN --output IN", "exists already"),
    ("--mode predict --input IN --output OUT.parquet", "must end in .csv, .jsonl"),
    ("--mode predict --input IN --output /nowhere/OUT.csv", "no such folder"),
    ("--mode publish", "no repository: name one on the Hub, as OWNER/NAME"),
    ("--mode publish ''", "no repository"),
    ("--mode publish name", "name: name one on the Hub, as OWNER/NAME"),
    ("--mode publish a/b c/d", "c/d"),
    ("--mode export --yes", "--yes is for --mode publish, not for export: leave it out"),
    ("--mode export --format ''", "'' is not one of onnx, transformers"),
    ("--mode export --format onnx,tflite", "'tflite' is not one of onnx, transformers"),
    ("--mode export --format transformers --int8", "--int8 is made of the ONNX"),
    ("--mode explain --output page.txt", "must end in .html"),
    ("--mode explain --output /nowhere/page.html", "no such folder"),
])
def test_wrong_command_lines(tmp_path, monkeypatch, capsys, command, words):
    """Wrong settings end in one line with the fix and exit code 2, before anything is loaded."""
    (tmp_path / "empty").mkdir()
    places = {"IN": write_reviews(tmp_path / "in.csv", 6), "EMPTY": tmp_path / "empty"}
    with pytest.raises(SystemExit) as left:
        read(monkeypatch, *(str(places.get(word, word)) for word in shlex.split(command)))
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_the_last_override_counts_wherever_an_option_stands(monkeypatch):
    command = read(monkeypatch, "train_config.epochs=2", "--mode", "predict", "train_config.epochs=3", "--text", "a")
    assert (command.config.train_config.epochs, command.text, command.formats) == (3, "a", ("onnx",))


def test_formats_that_are_given_apart_are_all_exported(monkeypatch):
    assert read(monkeypatch, "--mode", "export", "--format", "onnx", "--format", "transformers,web").formats == [
        "onnx", "transformers", "web"]


def test_a_dash_stands_for_standard_input_and_output(monkeypatch):
    command = read(monkeypatch, "--mode", "predict", "--input", "-", "--output", "-")
    assert (command.input, command.output) == ("-", None)


@pytest.mark.parametrize("mode", ["test", "predict", "explain", "export"])
def test_only_training_needs_main_accumulation_for_accumulated_batches(monkeypatch, mode):
    options = ["--text", "a film"] if mode in ("predict", "explain") else []
    steps = "train_config.gradient_accumulation_steps=4"
    assert read(monkeypatch, "--mode", mode, *options, steps).config.train_config.gradient_accumulation_steps == 4


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


def imports_of(module: str, found: set[str]) -> set[str]:
    """What is imported together with a module: its own imports outside functions, and theirs, if they are ours."""
    path = Path(PROJECT, *module.split(".")).with_suffix(".py")
    if module not in found:
        found.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for name in [*names, *([node.module] if isinstance(node, ast.ImportFrom) else [])]:
                imports_of(name, found)
    return found


def test_labelling_a_review_does_not_wait_for_what_other_modes_need():
    found = {name.partition(".")[0] for module in ("main", "suite.inference.predict")
             for name in imports_of(module, set())}
    assert "torch" in found
    assert not found & {"sklearn", "datasets", "matplotlib", "pandas", "captum", "wandb"}
