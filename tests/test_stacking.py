"""ensemble.py: the weights are those of a fit by hand, the stack needs none of its members' folders, is labelled with,
tested and compared like any run, and what does not belong together is refused in one line. Every figure of a run is
in the one table of them.
"""

import csv
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT, content_of, expect, metrics_of, run_here, train_here, write_reviews
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from test_baseline import ENCODER, error_of, rows_of, settings_of

import ensemble
from suite.common import cli
from suite.common.figures import FIGURES, MEASURED, figures_table, on_card
from suite.common.run_folder import read_saved_config, without_encoder
from suite.comparison import stacking
from suite.comparison.results import group_by_setting, read_result
from suite.comparison.stacking import stack_runs
from utils import load_config


@pytest.fixture(scope="module")
def members(tmp_path_factory, encoder_folder):
    """(overrides, folders of a bag of words and an encoder): on reviews of which every sixth has a wrong label."""
    folder = tmp_path_factory.mktemp("members")
    with open(write_reviews(folder / "clean.csv", rows=400), newline="") as file:
        rows = list(csv.reader(file))
    generator = random.Random(1)
    with open(folder / "reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([text, name if generator.random() > 1 / 6 else "bad"]
                                               for text, name in rows[1:])])
    overrides = [*settings_of(folder / "runs", folder / "reviews.csv"), "data_config.split=[0.6,0.2,0.2]"]
    train_here(*overrides, mode="baseline")
    train_here(*overrides, *ENCODER, "run_name=encoder-seed7", "train_config.seed=7",
               f"model_config.model_name={encoder_folder('bert')}")
    return overrides, [folder / "runs" / "bag-of-words", folder / "runs" / "encoder-seed7"]


@pytest.fixture(scope="module")
def stacked(members):
    """The run folder of their stack."""
    output = members[1][0].parent / "stack"
    stack_runs(members[1], output)
    return output


def by_hand(folders, split: str, names: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The log-odds against the first class, member by member, and the labels, from the members' files."""
    columns = []
    for folder in folders:
        rows = rows_of(folder / f"{split}_predictions.csv")
        columns += [[np.log(max(float(row[f"probability_{name}"]), 1e-9) / max(float(row[f"probability_{names[0]}"]),
                                                                               1e-9)) for row in rows]
                    for name in names[1:]]
    return np.array(columns).T, np.array([names.index(row["label"]) for row in rows])


def saved(folder, split: str, names: tuple) -> np.ndarray:
    return np.array([[float(row[f"probability_{name}"]) for name in names]
                     for row in rows_of(folder / f"{split}_predictions.csv")])


def is_fit_by_hand(folders, output, names) -> None:
    regression = LogisticRegression(max_iter=1000)
    features, labels = by_hand(folders, "valid", names)
    crossed = cross_val_predict(regression, features, labels, method="predict_proba",
                                cv=StratifiedKFold(5, shuffle=True, random_state=0))
    np.testing.assert_allclose(saved(output, "valid", names), crossed, atol=1e-6)
    regression.fit(features, labels)
    values = json.loads((output / "best" / "config.json").read_text())
    np.testing.assert_allclose(values["weights"], regression.coef_, atol=1e-6)
    np.testing.assert_allclose(values["intercept"], regression.intercept_, atol=1e-6)
    tested, labels = by_hand(folders, "test", names)
    np.testing.assert_allclose(saved(output, "test", names), regression.predict_proba(tested), atol=1e-6)
    assert metrics_of(output)["test"]["accuracy"] == regression.score(tested, labels)
    assert metrics_of(output)["valid"]["accuracy"] == np.mean(crossed.argmax(axis=1) == by_hand(
        folders, "valid", names)[1])


def test_the_weights_are_those_of_a_fit_by_hand(members, stacked):
    is_fit_by_hand(members[1], stacked, ("bad", "good"))
    assert len(json.loads((stacked / "best" / "config.json").read_text())["weights"][0]) == 2  # and a bias


def test_three_classes_and_two_bags_of_words(tmp_path):
    names = ("bad", "fair", "good")
    write_reviews(tmp_path / "reviews.csv", names=names)
    for line_breaks in ("keep", "space"):
        train_here(*settings_of(tmp_path, tmp_path / "reviews.csv"), "model_config.num_labels=3",
                   f"run_name={line_breaks}", f"data_config.line_breaks={line_breaks}", mode="baseline")
    stack_runs([tmp_path / "keep", tmp_path / "space"], tmp_path / "stack")
    is_fit_by_hand([tmp_path / "keep", tmp_path / "space"], tmp_path / "stack", names)
    expect(0, run_here(mode="predict", model=str(tmp_path / "stack"), text="good"))


def test_it_labels_as_it_was_tested_without_its_members_folders(members, stacked, tmp_path):
    overrides, _ = members
    shutil.copytree(stacked, tmp_path / "elsewhere")
    for number, model in enumerate((tmp_path / "elsewhere", tmp_path / "elsewhere" / "best")):
        output = tmp_path / f"{number}.csv"
        expect(0, run_here(*overrides, "train_config.mixed_precision=no", "output_dir=gone", mode="predict",
                           input=str(stacked.parent.parent / "reviews.csv"), output=str(output), model=str(model)))
        labelled = rows_of(output)
        for row in rows_of(stacked / "test_predictions.csv"):
            found = labelled[int(row["id"])]
            assert found["predicted"] == row["predicted"]
            assert float(found["probability_good"]) == pytest.approx(float(row["probability_good"]), abs=1e-6)


def test_it_is_a_run_like_any_other(members, stacked):
    overrides, folders = members
    config = read_saved_config(stacked / "config.yaml")
    assert (config.model_config.model_name, config.train_config.seed) == ("stack of bag-of-words, encoder", 7)
    measured = metrics_of(stacked)
    costs = [metrics_of(folder)["train"]["seconds"] for folder in folders]
    assert sum(costs) < measured["train"]["seconds"] < sum(costs) + 5
    for name in ("misclassified.csv", "history.jsonl", "best/README.md", "best/manifest.json",
                 "best/member-2/model.safetensors"):
        assert (stacked / name).is_file(), name
    wrong = rows_of(stacked / "misclassified.csv")
    reviews = rows_of(stacked.parent.parent / "reviews.csv")
    assert wrong
    assert all(row["text"] == reviews[int(row["id"])]["review"] for row in wrong)
    assert [setting.label for setting in group_by_setting([read_result(folder) for folder in (*folders, stacked)])] == [
        "bag-of-words", read_saved_config(folders[1] / "config.yaml").model_config.model_name.rpartition("/")[2],
        "stack of bag-of-words, encoder"]
    train_here(*overrides, "run_name=stack", mode="test")
    assert metrics_of(stacked)["test"]["accuracy"] == measured["test"]["accuracy"]
    assert metrics_of(stacked)["test"]["loss"] == pytest.approx(measured["test"]["loss"], abs=1e-6)
    assert "but not be explained or exported" in error_of(run_here(*overrides, "run_name=stack", mode="export"))


def test_a_stack_can_be_stacked_again(members, stacked, tmp_path):
    stack_runs([stacked, members[1][0]], tmp_path / "again")
    assert expect(0, run_here(mode="predict", model=str(tmp_path / "again"), text="gripping and moving")).stdout


def of(section: str) -> set[str]:
    return {name for name, figure in FIGURES.items() if section in figure.section}


def test_each_figure_of_a_run_is_in_the_table_that_cards_console_and_docs_are_made_of(members):
    run = members[1][1]
    measured = metrics_of(run)
    assert of(MEASURED) - {"groups"} == measured["test"].keys()
    # The one is a pretraining run's, the other a calibrated one's.
    assert of("valid") - {"perplexity", "temperature", "groups"} == measured["valid"].keys()
    assert of("train") == measured["train"].keys()
    page = (PROJECT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page.partition("<!-- figures -->\n")[2].partition("\n<!-- /figures -->")[0] == figures_table()
    card = (run / "best" / "README.md").read_text()
    assert all(f"| {name} | {text} |" in card for name, text in on_card(measured["test"]))
    assert f"| accuracy | {measured['test']['accuracy']:.4f} (95 % interval " in card


@pytest.mark.parametrize(("names", "seeds", "kinds", "expected"), [
    (["bert-seed42", "bert-seed43"], [42, 43], ["bert", "bert"], ("stack of bert, bert", 42)),
    (["words", "bert-len128-seed43"], [42, 43], ["bag-of-words", "bert"], ("stack of words, bert-len128", 43)),
    (["DEMO-a_seed1", "b-seed1-x"], [1, 1], ["bert", "bert"], ("stack of DEMO-a, b-x", 1)),
    (["w-train_limit=None", "b-seed1-train_limit=500-0123abcd"], [1, 1], ["bert", "bert"], ("stack of w, b", 1))])
def test_a_stack_is_called_after_its_members(tmp_path, names, seeds, kinds, expected):
    runs = []
    for name, seed, kind in zip(names, seeds, kinds, strict=True):
        config = load_config(PROJECT / "demo.yaml", [f"run_name={name}", f"train_config.seed={seed}",
                                                     f"model_config.model_name={kind}"])
        runs.append(SimpleNamespace(config=config, seed=seed, folder=tmp_path / name))
    config = stacking.configuration(runs, tmp_path / "stack")
    assert (config.model_config.model_name, config.train_config.seed) == expected
    assert config.demo_mark
    assert without_encoder(config, "stack of others").demo_mark


def refusal(capsys, *arguments) -> str:
    """The one line of a stack that must not be."""
    with pytest.raises(SystemExit) as left:
        cli.run_with_exit_code(lambda: stack_runs(*arguments))
    assert left.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def change(name: str, edit):
    """A function that edits this file of a run's folder."""
    return lambda folder: (folder / name).write_text(edit((folder / name).read_text()))


def without(name: str):
    return lambda folder: shutil.rmtree(folder / name) if name == "best" else (folder / name).unlink()


@pytest.mark.parametrize(("spoil", "reason"), [
    (without("best"), "no trained model there"),
    (change("metrics.json", lambda text: text.replace('"test"', '"other"')), "was not measured on its test reviews"),
    (change("config.yaml", lambda text: text.replace("split_seed: 42", "split_seed: 43")),
     "data_config.split_seed: 42 and 43"),
    (change("best/config.json", lambda text: text.replace('"data_fingerprint": "', '"data_fingerprint": "0')),
     "with different contents"),
    (change("best/config.json", lambda text: text + " "), "it has changed since it was saved"),
    (without("valid_predictions.csv"), "valid_predictions.csv is missing: train the run")])
def test_runs_that_cannot_be_combined_are_refused_in_one_line(members, tmp_path, capsys, spoil, reason):
    _, (words, encoder) = members
    shutil.copytree(encoder, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    line = refusal(capsys, [words, tmp_path / "spoiled"], tmp_path / "stack")
    assert reason in line
    assert str(tmp_path / "spoiled") in line
    assert not (tmp_path / "stack").exists()


def test_what_is_asked_wrongly_is_refused_in_one_line(members, stacked, tmp_path, capsys, monkeypatch):
    runs, before = members[1], content_of(stacked)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis").write_text("mine")
    for output, reason in ((stacked, "exists already"), (tmp_path / "others", "exists already"),
                           (tmp_path / ".hidden", "does not begin with a dot")):
        assert reason in refusal(capsys, runs, output)
    assert content_of(stacked) == before
    overrides = [*members[0], "data_config.train_limit=50", "run_name=smaller"]
    train_here(*overrides, mode="baseline")
    smaller = runs[0].parent / "smaller"
    assert "(data_config.train_limit: None and 50)" in refusal(capsys, [*runs, smaller], tmp_path / "new")
    monkeypatch.setattr(stacking, "load_split", lambda config: SimpleNamespace(fingerprint="other"))
    assert "has changed since" in refusal(capsys, runs, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("sys.argv", ["ensemble.py", str(runs[0])])
    with pytest.raises(SystemExit) as left:
        ensemble.read_command()
    assert left.value.code == 2
    assert "name two or more folders, as in checkpoints/NAME, and --output FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["write_stack", "write_results"])
def test_the_same_command_starts_again_after_a_kill(members, stacked, monkeypatch, tmp_path, place):
    def killed(*arguments, **options):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(stacking, place, killed)
        with pytest.raises(SystemExit):
            stack_runs(members[1], tmp_path / "stack")
    (tmp_path / "begun").mkdir()  # a kill before the first file
    stack_runs(members[1], tmp_path / "begun")
    stack_runs(members[1], tmp_path / "stack")
    for name in ("valid_predictions.csv", "best/config.json", "history.jsonl"):
        assert (tmp_path / "stack" / name).read_bytes() == (stacked / name).read_bytes()
