"""--mode audit finds labels that were changed on purpose, those of training rows, too, by models that have seen neither
them nor their copies. What it writes leads back to the rows of the file, and its figures are those of the formulas
written out. Wrong options and files are refused in one line, before any work.
"""

import csv
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import content_of, expect, rows_of, run_here, train_here, write_reviews
from scipy.special import logit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from test_baseline import ENCODER, error_of, settings_of

from suite.common import cli
from suite.comparison.audit import cross_fitted, draw_folds
from suite.comparison.confident_learning import class_thresholds, expected_flags, flagged
from suite.comparison.stacking import stack_runs
from suite.encoders.bag_of_words import fit
from suite.reviews.grouping import draw_units
from suite.reviews.splitting import load_split
from suite.training.evaluation import wilson_interval
from utils import load_config


def change_labels(path: Path, count: int, names: tuple = ("bad", "good")) -> set[int]:
    """Gives so many rows the next class, and returns their numbers, from 1."""
    rows = rows_of(path)
    changed = set(random.Random(1).sample(range(1, len(rows) + 1), count))
    for number in changed:
        rows[number - 1]["verdict"] = names[(names.index(rows[number - 1]["verdict"]) + 1) % len(names)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["review", "verdict"])
        writer.writeheader()
        writer.writerows(rows)
    return changed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(overrides, numbers of the rows with changed labels): 20 of 400."""
    folder = tmp_path_factory.mktemp("audit")
    path = write_reviews(folder / "reviews.csv", rows=400)
    changed = change_labels(path, 20)
    return settings_of(folder / "runs", path), changed


@pytest.fixture(scope="module")
def bag_of_words(data) -> Path:
    train_here(*data[0], mode="baseline")
    return Path(data[0][0].partition("=")[2]) / "bag-of-words"


def suspects_of(overrides: list[str], output: Path, **options) -> tuple[list[dict], str]:
    result = expect(0, run_here(*overrides, mode="audit", output=str(output), **options))
    return rows_of(output), result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_changed_labels_come_first_those_of_training_rows_too(data, tmp_path):
    overrides, changed = data
    rows, printed = suspects_of(overrides, tmp_path / "out.csv")
    first = {int(row["row"]) for row in rows[:20]}
    assert len(first & changed) >= 18
    split = load_split(load_config("config.yaml", overrides))
    trained_on = set((split.ids_of["train"] + 1).tolist())
    assert len(first & changed & trained_on) >= 0.9 * len(changed & trained_on) > 10
    assert "400 labels compared with the predictions of bags of words" in printed
    assert f"flagged as probably wrong: {sum(row['flagged'] == 'yes' for row in rows)} " in printed
    assert len({int(row["row"]) for row in rows if row["flagged"] == "yes"} & changed) >= 15


def test_what_is_written_leads_back_to_the_rows(data, tmp_path):
    overrides, _ = data
    source = overrides[1].partition("=")[2]
    reviews = rows_of(source)
    rows, _ = suspects_of(overrides, tmp_path / "out.csv")
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    probabilities = [float(row["probability_of_label"]) for row in rows]
    assert probabilities == sorted(probabilities)
    for row in rows:
        assert (row["split"], int(row["id"])) == ("train", int(row["row"]) - 1)
        assert row["where"] == f"{source}: row {row['row']}"
        assert {"review": row["text"], "verdict": row["label"]} == reviews[int(row["row"]) - 1]
        assert {row["label"], row["suggested"]} == {"bad", "good"}
    telling = {"bad": "dull dreary pointless".split(), "good": "gripping moving delightful".split()}
    words = rows[0]["words_against_label"].split(" | ")
    assert 1 <= len(words) <= 5
    assert set(words[0].split()) & set(telling[rows[0]["suggested"]])
    assert all(word in rows[0]["text"] for word in words)


def test_the_page_marks_the_words_and_shows_texts_as_texts(data, tmp_path):
    overrides, _ = data
    path = write_reviews(tmp_path / "reviews.csv", rows=100)
    path.write_text(path.read_text().replace("number 7 ", "<b>number</b> & 7 ").replace(" number 7,",
                                                                                        " <b>number</b> & 7,"))
    rows = rows_of(path)
    rows[7]["verdict"], rows[7]["review"] = "bad", rows[7]["review"] + " <script>Gripping</script>"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["review", "verdict"])
        writer.writeheader()
        writer.writerows(rows)
    found, _ = suspects_of([*overrides, f"data_config.dataset={path}"], tmp_path / "out.csv")
    assert int(found[0]["row"]) == 8
    page = (tmp_path / "out.html").read_text()
    assert "<script>" not in page
    assert re.search(r"&lt;script&gt;.*<mark>[^<]*Gripping", page)
    assert f"1. {path}: row 8: labelled bad, suggested good" in page
    assert page.count("<h2>") == len(found)


def test_more_classes(tmp_path):
    names = ("bad", "fair", "good")
    path = write_reviews(tmp_path / "reviews.csv", rows=450, names=names)
    changed = change_labels(path, 15, names)
    rows, _ = suspects_of([*settings_of(tmp_path, path), "model_config.num_labels=3"], tmp_path / "out.csv")
    assert len({int(row["row"]) for row in rows[:15]} & changed) >= 13
    for row in rows[:15]:
        if int(row["row"]) in changed:
            assert row["suggested"] == names[(names.index(row["label"]) - 1) % 3]


# ---------------------------------------------------------------------------------------------------------------------
# Who judges


@pytest.mark.parametrize("grouped", [False, True])
def test_no_row_is_judged_by_a_model_that_has_seen_it_its_copy_or_its_group(tmp_path, grouped):
    """Each fold's logits are, to the last bit, those of a bag of words that `fit` makes of the other folds' texts."""
    rows = rows_of(write_reviews(tmp_path / "reviews.csv", rows=120))
    films = np.concatenate([np.arange(120) // 4, np.arange(0, 120, 3) // 4 ^ 1])  # copies join the films 0 and 1, ...
    rows += rows[::3]
    with open(tmp_path / "reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict", "film"])
        writer.writerows([row["review"], row["verdict"], f"film {film}"]
                         for row, film in zip(rows, films, strict=True))
    config = load_config("config.yaml", [*settings_of(tmp_path, tmp_path / "reviews.csv"),
                                         "data_config.drop_duplicates=false",
                                         *["data_config.group_column=film"] * grouped])
    split = load_split(config)
    check = cross_fitted(split, "keep")
    assert len(check.ids) == 160
    fold_of = draw_folds(split, check.ids)
    texts = np.array([split.text(review) for review in check.ids])
    assert sorted(set(fold_of)) == [0, 1, 2, 3, 4]
    for fold in range(5):
        inside = fold_of == fold
        assert not set(texts[inside]) & set(texts[~inside])
        assert not grouped or not set(films[inside]) & set(films[~inside])
        model, _ = fit(list(texts[~inside]), check.labels[~inside], split.label_names, "keep", "")
        assert model.logits(list(texts[inside])).tobytes() == check.predictions.logits[inside].tobytes()


def test_a_run_judges_the_reviews_that_it_has_not_seen_together_with_bags_of_words(
        data, bag_of_words, encoder_folder, tmp_path):
    """A bag of words, an encoder, and the stack of them: by the formulas written out, and without computing again."""
    overrides, changed = data
    runs = bag_of_words.parent
    train_here(*overrides, *ENCODER, "run_name=encoder", f"model_config.model_name={encoder_folder('bert')}")
    stack_runs([bag_of_words, runs / "encoder"], tmp_path / "stack")
    split = load_split(load_config("config.yaml", overrides))
    ids = np.sort(np.concatenate([split.ids_of["valid"], split.ids_of["test"]]))
    labels = split.reviews.labels[ids]
    bags = cross_fitted(split, "keep")
    of_bags = dict(zip(bags.ids.tolist(), bags.predictions.logits @ [-1, 1], strict=True))
    folds = PredefinedSplit(draw_units(split.digests[ids], labels, [0.2] * 5, seed=0))
    for number, run in enumerate([bag_of_words, bag_of_words / "best", runs / "encoder", tmp_path / "stack"]):
        rows, printed = suspects_of([], tmp_path / f"{number}.csv", model=str(run))  # the run knows its data
        folder = run.parent if run.name == "best" else run
        saved = {int(row["id"]): row for name in ("valid", "test")
                 for row in rows_of(folder / f"{name}_predictions.csv")}
        own = [np.log(float(saved[review]["probability_good"]) / float(saved[review]["probability_bad"]))
               for review in ids]
        together = cross_val_predict(LogisticRegression(), np.c_[own, [of_bags[review] for review in ids.tolist()]],
                                     labels, cv=folds, method="decision_function")
        for_label = np.where(labels == 1, together, -together)
        order = np.argsort(for_label)[:sum(for_label < 0)]
        assert [int(row["id"]) for row in rows] == ids[order].tolist()
        logits = logit([float(row["probability_of_label"]) for row in rows])
        np.testing.assert_allclose(logits / logits[0], for_label[order] / for_label[order][0], rtol=1e-3)
        assert len({int(row["row"]) for row in rows[:4]} & changed) >= 3
        assert any(row["words_against_label"] for row in rows)
        right = sum(row["label"] == row["predicted"] for row in saved.values())
        assert f"80 labels compared with the predictions of {folder}, which has not learnt from them: accuracy " \
               f"{right / 80:.4f} " in printed
        assert f"compared with the predictions of the two together, it and bags of words that were fitted without " \
               f"them: accuracy {1 - len(rows) / 80:.4f} " in printed


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def test_flags_are_those_of_the_formulas():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 2
    labels = np.array([generator.choice(3, p=row) for row in softmax(logits, axis=1)])
    probabilities = softmax(logits, axis=1)
    thresholds = [np.mean([row[label] for row, given in zip(probabilities, labels, strict=True) if given == label])
                  for label in range(3)]
    np.testing.assert_allclose(class_thresholds(probabilities, labels), thresholds)
    found = flagged(probabilities, labels, np.array(thresholds))
    for row, label, is_flagged in zip(probabilities, labels, found, strict=True):
        reaching = [other for other in range(3) if row[other] >= thresholds[other]]
        confident = max(reaching, key=lambda other: row[other], default=label)
        assert is_flagged == (confident != label and row.argmax() != label)
    drawn = [flagged(probabilities, np.array([generator.choice(3, p=row) for row in probabilities]),
                     np.array(thresholds)).sum() for _ in range(5)]
    assert expected_flags(probabilities, np.array(thresholds)) == pytest.approx(np.mean(drawn), rel=0.1)


def test_a_class_without_labels_flags_nothing():
    probabilities = np.array([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1]])
    labels = np.array([0, 0, 1])
    assert not flagged(probabilities, labels, class_thresholds(probabilities, labels)).any()


def test_what_people_said_against_a_computation_by_hand(data, bag_of_words, tmp_path):
    overrides, _ = data
    rows, _ = suspects_of(overrides, tmp_path / "first.csv", model=str(bag_of_words))
    said = [{"split": "train", "row": row["row"], "label": label} for row, label in zip(
        rows, [rows[0]["suggested"], "", rows[2]["label"]], strict=False)]  # corrected, none, confirmed
    path = tmp_path / "said.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["split", "row", "label"])
        writer.writeheader()
        writer.writerows(said)
    _, printed = suspects_of(overrides, tmp_path / "second.csv", model=str(bag_of_words), confirmed=str(path))
    saved = {int(row["id"]): row for name in ("valid", "test")
             for row in rows_of(bag_of_words / f"{name}_predictions.csv")}
    correct = {review for review, row in saved.items() if row["label"] == row["predicted"]}
    corrected, none = (int(row["id"]) for row in rows[:2])
    agreed = len(correct - {corrected, none}) + (corrected not in correct)

    def shown(correct: int, n: int) -> str:
        low, high = wilson_interval(correct / n, n)
        return f"{correct / n:.4f} (95 % interval {low:.4f} to {high:.4f})"

    flags = sum(row["flagged"] == "yes" for row in rows)
    lines = [
        f"labels of the split train of the dataset, and {bag_of_words}, which has not learnt from them: accuracy "
        f"{shown(len(correct), 80)} on all 80, and {shown(agreed, 79)} on the 79 that people confirmed or corrected, "
        "or were not asked about",
        f"people did not confirm 2 labels: 2 of the first {len(rows)}, "
        f"{sum(row['flagged'] == 'yes' for row in rows[:2])} of the {flags} that are flagged"]
    assert all(line in printed and line in (tmp_path / "second.html").read_text() for line in lines)
    # the audit's own file has the format, and confirms every label
    _, printed = suspects_of(overrides, tmp_path / "third.csv", confirmed=str(tmp_path / "first.csv"))
    assert "people did not confirm 0 labels" in printed


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(("lines", "reason"), [
    (["split,row"], "no column 'label'; found split, row: give it the columns split, row and label"),
    (["split,row,label", "test,1,good"], "row 1: no split 'test'; found train"),
    (["split,row,label", "train,401,good", "train,0,good", "train,x,bad"],
     "row 1: no row '401' in the split train: they are 1 to 400; 2 more rows are wrong"),
    (["split,row,label", "train,1,best"], "row 1: no class 'best': give one of bad, good"),
    (["split,row,label", "train,2,good", "train,2,bad"], "row 2: the same label as in row 1"),
    (["split,row,label", "train,2"], "has 2 fields, the header has 3")])
def test_a_wrong_file_of_what_people_said_is_refused_in_one_line(data, tmp_path, monkeypatch, lines, reason):
    path = tmp_path / "said.csv"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("suite.comparison.audit.cross_fitted", None)  # it comes before the work
    line = error_of(run_here(*data[0], mode="audit", output=str(tmp_path / "out.csv"), confirmed=str(path)))
    assert f"--confirmed: {path}" in line
    assert reason in line
    assert not (tmp_path / "out.csv").exists()


def test_a_class_that_no_other_fold_has_is_refused_in_one_line(data, tmp_path):
    with open(tmp_path / "reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict", "film"])
        writer.writerows([f"a review of number {row}", "bad" if row < 190 else "good", max(row, 190) if row >= 190
                          else row // 2] for row in range(200))
        writer.writerows([f"a good review {row}", "fair", "one film"] for row in range(20))
    line = error_of(run_here(*data[0], f"data_config.dataset={tmp_path / 'reviews.csv'}", "model_config.num_labels=3",
                             "data_config.group_column=film", mode="audit", output=str(tmp_path / "out.csv")))
    assert "the class 'fair' has too few different reviews or groups" in line


@pytest.mark.parametrize(("options", "reason"), [
    ([], "give --output FILE.csv"), (["--output", "{}/out.html"], "give --output FILE.csv"),
    (["--output", "{}/there.csv"], "there.csv exists already"),
    (["--output", "{}/page.csv"], "page.html exists already"), (["--output", "{}/no/out.csv"], "no such folder"),
    (["--output", "{}/out.csv", "--confirmed", "{}/no.csv"], "--confirmed: "),
    (["--output", "{}/out.csv", "--model", "{}/model"], "config.yaml is missing: name the run, or its best model, or"),
    (["--output", "{}/out.csv", "--mode", "predict", "--confirmed", "x.csv"], "--confirmed is for --mode audit")])
def test_wrong_options_are_refused_in_one_line(bag_of_words, tmp_path, monkeypatch, capsys, options, reason):
    for name in ("there.csv", "page.html"):
        (tmp_path / name).touch()
    shutil.copytree(bag_of_words / "best", tmp_path / "model")  # without its run
    before = content_of(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py", "--mode", "audit", *(item.format(tmp_path) for item in options)])
    with pytest.raises(SystemExit) as left:
        cli.read_command("", accumulates=False)
    [line] = capsys.readouterr().err.splitlines()
    assert (left.value.code, line.startswith("error: ")) == (2, True)
    assert reason in line
    assert content_of(tmp_path) == before


def test_a_run_of_other_data_is_refused_in_one_line(data, bag_of_words, tmp_path):
    line = error_of(run_here(*data[0], "data_config.split_seed=7", mode="audit", output=str(tmp_path / "out.csv"),
                             model=str(bag_of_words)))
    assert "was trained on other reviews, or another split" in line
