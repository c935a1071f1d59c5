"""With data_config.group_column, no group stands in two parts of the split, in any mode and whatever the file looks
like. The shares come out as asked for, or are refused. Neither the names of classes nor the order of rows matter.
All of it holds promise 4: no text stands in two splits, and with a group column no group either.
"""

import json
import random
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
from conftest import PROJECT, expect, run_here, train_here
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from sklearn.model_selection import PredefinedSplit
from test_baseline import ENCODER, rows_of, settings_of
from test_files_people_have import write

from suite.common.run_folder import read_saved_config
from suite.comparison import stacking
from suite.comparison.report import show_baseline
from suite.comparison.results import group_by_setting, read_result, refuse_different_tests
from suite.comparison.significance import compare
from suite.comparison.stacking import stack_runs
from suite.comparison.summary import summarize
from suite.encoders.loading import TRAINED_TEXTS, trained_texts
from suite.reviews import splitting
from suite.reviews.grouping import draw_units, group_digests
from suite.reviews.splitting import load_split, split_reviews
from suite.training.evaluation import Predictions, share_interval
from suite.training.pretraining import choose
from utils import DataConfig, UserError, load_config


def digests(names) -> np.ndarray:
    return np.array([f"{name:016d}".encode() for name in names], "V16")


def parts_of(texts, films, labels, seed: int = 0, **options) -> dict[str, np.ndarray]:
    split_names = np.array(options.pop("split_names", ["train"] * len(texts)))
    config = DataConfig(dataset="films.csv", group_column="film", split_seed=seed, **options)
    return splitting.split_reviews(digests(texts), np.array(labels), split_names, config, groups=digests(films))


def stands_once(names, *parts) -> bool:
    found = [{names[row] for row in rows} for rows in parts]
    return sum(map(len, found)) == len(set().union(*found))


# ---------------------------------------------------------------------------------------------------------------------
# The draw


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), films=st.integers(20, 60), classes=st.integers(2, 4), copies=st.integers(0, 12),
       drop=st.booleans(), limit=st.sampled_from([None, 150]))
def test_no_film_and_no_text_is_on_two_sides_whatever_names_and_order_are(seed, films, classes, copies, drop, limit):
    """Copies that are kept join films, so that the films of a text are on one side, too. The same reviews in another
    order, with other names of films, and with classes that are numbered in another way, are drawn alike."""
    generator = np.random.default_rng(seed)
    film = np.repeat(np.arange(films), generator.integers(1, 20, films))
    label = generator.integers(0, classes, len(film))
    label[:classes * 20:20] = range(classes)
    text = np.arange(len(film))
    for row, original in generator.integers(0, len(film), (copies, 2)):
        text[row], label[row] = text[original], label[original]
    _, text = np.unique(text, return_inverse=True)
    label = np.array([label[np.flatnonzero(text == number)[0]] for number in text])  # equal texts, equal classes
    options = {"seed": seed, "drop_duplicates": drop, "limit": limit}
    try:
        parts = parts_of(text, film, label, **options)
    except UserError as error:
        note(str(error))
        assume(False)
    assert stands_once(text, *parts.values())
    assert stands_once(film, *parts.values())
    if limit is None:
        assert sum(map(len, parts.values())) == (len(set(text)) if drop else len(text))
    order = generator.permutation(len(text))
    again = parts_of(text[order], 999 - film[order], (classes - 1 - label)[order], **options)
    for name, rows in parts.items():
        assert sorted(text[rows]) == sorted(text[order][again[name]]), name


@pytest.mark.parametrize(("sizes", "shares", "most"), [
    ([200] * 4 + [1] * 200, [0.2] * 5, 0),  # scikit-learn's StratifiedGroupKFold makes 240, 240, 240, 240 and 40 of it
    ([900, *[10] * 10], [0.9, 0.05, 0.05], 0), (range(1, 41), [0.8, 0.1, 0.1], 0.01),
    ([1] * 600, [0.8, 0.1, 0.1], 0.002)])
def test_the_shares_are_met_as_well_as_groups_allow_and_seeds_differ(sizes, shares, most):
    units = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.arange(len(units)) % 2
    drawn = [draw_units(units, labels, shares, seed) for seed in range(20)]
    for parts in drawn:
        np.testing.assert_allclose(np.bincount(parts) / len(parts), shares, atol=most + 1e-9)
        assert all(abs(labels[parts == part].mean() - 0.5) < 0.05 for part in range(len(shares)))
    assert len({parts.tobytes() for parts in drawn}) >= 15


def test_films_of_one_class_each_are_stratified():
    units = np.repeat(np.arange(200), 5)
    parts = draw_units(units, units % 4, [0.8, 0.1, 0.1], seed=1)
    assert [np.bincount((units % 4)[parts == part]).tolist() for part in range(3)] == [[200] * 4, [25] * 4, [25] * 4]


def test_texts_that_many_films_share_do_not_join_them(capsys):
    """A text such as "great", once for each film, would make one group of all; all copies but one are dropped."""
    film, text = np.repeat(np.arange(100), 6), np.arange(600)
    text[::6] = 0
    parts = parts_of(text, film, np.arange(600) // 6 % 2)
    assert [len(rows) for rows in parts.values()] == [401, 50, 50]
    assert stands_once(film, *parts.values())
    assert stands_once(text, *parts.values())
    with pytest.raises(UserError, match=r"1 group\(s\) cannot be divided"):
        parts_of(text, film, np.arange(600) // 6 % 2, drop_duplicates=False)


def test_a_limit_draws_whole_films(capsys):
    film = np.repeat(np.arange(100), 6)
    parts = parts_of(range(600), film, np.arange(600) % 2, limit=300)
    used = np.concatenate(list(parts.values()))
    assert len(used) == 300
    assert set(np.bincount(film[used])) == {0, 6}
    assert ("films.csv: each film stands in one part: train 240 rows (80.0%) of 40 groups, valid 30 rows (10.0%) of 5 "
            "groups, test 30 rows (10.0%) of 5 groups\n") in capsys.readouterr().out


def test_train_limit_draws_whole_films_whatever_names_and_order_are():
    film, text, generator = np.repeat(np.arange(120), 5), np.arange(600), np.random.default_rng(0)
    label = (film % 4 == 0).astype(int)  # films of one class each
    whole, before = parts_of(text, film, label), set()
    for limit in (20, 100, 300):
        parts = parts_of(text, film, label, train_limit=limit)
        drawn = set(parts["train"])
        assert before <= drawn <= set(whole["train"])
        assert all(parts[name].tolist() == whole[name].tolist() for name in ("valid", "test"))
        assert len(drawn) == limit
        assert set(np.bincount(film[parts["train"]])) == {0, 5}
        assert abs(label[parts["train"]].sum() - limit / 4) <= 5
        order = generator.permutation(600)
        again = parts_of(text[order], 999 - film[order], (1 - label)[order], train_limit=limit)
        assert set(text[order][again["train"]]) == drawn
        before = drawn
    with pytest.raises(UserError, match="train_limit=2 comes to 5 training rows, because groups and copies"):
        parts_of(text, film, label, train_limit=2)


def test_a_class_that_a_part_lacks_is_named(capsys):
    """A class of one film: the groups do not allow more. And a class that is rare beside small shares."""
    film = np.repeat(np.arange(100), 6)
    parts_of(range(600), film, np.where(film == 7, 2, np.arange(600) % 2), seed=3)
    printed = capsys.readouterr().out
    assert all(f"no row of {split} has the class 2: its figures" in printed for split in ("valid", "test"))
    config = DataConfig(dataset="rare", split=[0.98, 0.01, 0.01])
    labels = (np.arange(1000) < 20).astype(int)
    split_reviews(digests(range(1000)), labels, np.full(1000, "train"), config)
    assert "rare: no row of test has the class 1: its figures" in capsys.readouterr().out


@pytest.mark.parametrize(("film", "options", "said"), [
    (np.repeat([0, *range(1, 51)], [550, *[1] * 50]), {},
     "asks for 480 : 60 : 60 rows, and whole groups of data_config.group_column=film come to 550 : "),
    (np.repeat([0, 1, 2], 200), {}, "come to 200 : 200 : 200, one of them less than half or more than twice"),
    (np.repeat([0, 1], 300), {}, "2 group(s) cannot be divided into 3 parts"),
    (np.repeat(range(6), 100), {"limit": 30}, "data_config.limit=30 asks for 30 : 570 rows")])
def test_groups_that_come_far_from_the_shares_are_refused(film, options, said):
    """Promise 3, too: one line with the figures and the fix, before any training."""
    with pytest.raises(UserError) as caught:
        parts_of(range(600), film, np.arange(600) % 2, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("validation", [False, True])
def test_the_official_halves_share_no_film(validation, capsys):
    """The official test and validation splits stay whole, and what shares a film with them is not trained on."""
    film = np.repeat(np.arange(60), 5)
    names = np.where(np.arange(300) < 200, "train", "test").astype("U10")
    film[:6] = 50  # of the test
    text = np.arange(300)
    text[10] = text[290]  # a text of the test
    if validation:
        names[150:200], film[100:103] = "validation", 35
    labels = np.arange(300) % 2
    parts = parts_of(text, film, labels, split="official", split_names=names)
    assert parts["test"].tolist() == list(range(200, 300))
    assert not validation or parts["valid"].tolist() == list(range(150, 200))
    assert stands_once(film, *parts.values())
    assert stands_once(text, *parts.values())
    assert len(parts["train"]) + len(parts["valid"]) == 200 - 6 - 1 - 3 * validation
    assert f"{7 + 3 * validation} rows repeat a text or film of the official test" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Files


def films(rows: int = 240, per_film: int = 6, first: int = 0) -> list[dict]:
    """Reviews whose words give their class away, of so many films."""
    generator = random.Random(first)
    filler = "the film was a story of this and that with some people".split()
    return [{"text": " ".join([*generator.choices(filler, k=6), ("dull", "moving")[row % 2], f"number {first + row}"]),
             "label": ("bad", "good")[row % 2], "film": f"film {row // per_film}"} for row in range(rows)]


def split_of(path, *more: str) -> splitting.Split:
    return load_split(load_config(PROJECT / "config.yaml", [f"data_config.dataset={path}",
                                                            "data_config.group_column=film", *more]))


def test_every_kind_of_file_gives_the_same_split(tmp_path):
    records = films()
    for number, record in enumerate(records):
        record["film"] = number // 6 + 0.0  # a .csv shows 1.0 as it is, and .parquet as a number
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    places = [write(tmp_path / name, records) for name in ("a.csv", "a.jsonl", "a.parquet")]
    found = [{name: rows.tolist() for name, rows in split_of(place).ids_of.items()}
             for place in (*places, tmp_path / "saved")]
    assert found[0] == found[1] == found[2] == found[3]
    assert list(map(len, found[0].values())) == [192, 24, 24]


@pytest.mark.parametrize(("change", "more", "said"), [
    (lambda row: {"film": ""} if row % 100 == 3 else {}, [], "films.csv: rows 4, 104, 204 have no group: fill them"),
    (lambda row: {}, ["data_config.group_column=movie"],
     "no column 'movie'; found text, label, film: set data_config.group_column"),
    (lambda row: {}, ["data_config.group_column=label"],
     "data_config.group_column is 'label', the column of the texts or the classes")])
def test_what_is_no_group_is_refused_and_counted(tmp_path, change, more, said):
    """Promise 3. A film that nobody named may be any film, so it is not one of its own."""
    path = write(tmp_path / "films.csv", [record | change(row) for row, record in enumerate(films())])
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        split_of(path, *more)


def test_blanks_around_a_group_do_not_count_and_a_text_is_no_group(tmp_path):
    records = films()
    for number, record in enumerate(records):
        record["film"] += " " * (number % 2)
    records[0]["text"] = records[200]["film"]  # a review that says nothing but the name of another film
    split = split_of(write(tmp_path / "films.jsonl", records))
    films_of = [records[row]["film"].strip() for row in range(len(records))]
    assert stands_once(films_of, *split.ids_of.values())
    assert not np.isin(split.digests, split.groups).any()


def test_copies_that_are_kept_count_as_one(tmp_path):
    """With a group column, so do groups that share a text; where copies are dropped, groups are as they are named."""
    records = films()
    path = write(tmp_path / "films.jsonl", records + records[:2] + [records[12] | {"film": records[0]["film"]}])
    assert records[12]["film"] != records[0]["film"]
    kept = ["data_config.drop_duplicates=false"]
    alone = load_split(load_config(PROJECT / "config.yaml", [f"data_config.dataset={path}", *kept])).units
    assert [np.flatnonzero(alone == alone[row]).tolist() for row in (0, 5, 12)] == [[0, 240], [5], [12, 242]]
    joined, named = split_of(path, *kept).units, split_of(path).units
    assert (joined[0] == joined[12], named[0] == named[12], len(np.unique(joined)) + 1) == (True, False, 40)
    found = Predictions(np.array([240, 3, 0]), np.zeros(3, int), np.zeros((3, 2))).in_groups(alone).groups
    assert found.tolist() == [0, 3, 0]


def test_a_number_that_pandas_wrote_as_a_float_is_the_same_group():
    found = group_digests(datasets.Dataset.from_dict({"group": ["7", "7.0", " 7.00", "70", "7.5", "v1.0", "1.0.0"]}))
    assert [int(np.flatnonzero(found == digest)[0]) for digest in found] == [0, 0, 0, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Every mode


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_folder):
    """(overrides, the records, the folder of the runs) of an encoder and a bag of words on one file of films."""
    folder = tmp_path_factory.mktemp("grouped")
    path = write(folder / "films.csv", films())
    overrides = [*settings_of(folder / "runs", path), "data_config.text_column=text", "data_config.label_column=label",
                 "data_config.split=[0.6,0.2,0.2]", "data_config.group_column=film"]
    for mode, more in (("baseline", ()), ("train", (*ENCODER, "run_name=encoder",
                                                    f"model_config.model_name={encoder_folder('bert')}"))):
        assert "each film stands in one part" in train_here(*overrides, *more, mode=mode).stdout
    return overrides, films(), folder / "runs"


def test_a_model_that_has_read_films_of_the_test_without_knowing_it_is_refused(tmp_path):
    """Its run had no group column. What it read of these films is in no part of the split that has one."""
    for name, first, count in (("train", 0, 40), ("validation", 40, 8), ("test", 30, 10)):
        records = [record | {"film": f"film {first + row // 6}", "text": f"{name} {record['text']}"}
                   for row, record in enumerate(films(6 * count))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "model").mkdir()
    settings = [f"data_config.dataset={tmp_path}", "data_config.split=official",
                f"model_config.model_name={tmp_path / 'model'}"]
    config = load_config(PROJECT / "config.yaml", settings)
    with_films = split_of(tmp_path, "data_config.split=official")
    for more, fails in ((with_films, False), (load_split(config), True)):
        np.save(tmp_path / "model" / TRAINED_TEXTS, more.digests_of("train"))
        with pytest.raises(UserError, match="was trained on 60 groups or texts") if fails else nullcontext():
            trained_texts(config.model_config, with_films.held_out_anywhere)


def films_in(folder, records, part: str) -> set[str]:
    return {records[int(row["id"])]["film"] for row in rows_of(folder / f"{part}_predictions.csv")}


@pytest.mark.parametrize("run", ["bag-of-words", "encoder"])
def test_a_run_validates_and_tests_on_films_of_its_own(trained, run):
    overrides, records, runs = trained
    valid, test = (films_in(runs / run, records, part) for part in ("valid", "test"))
    assert (len(valid), len(test), len(valid | test)) == (8, 8, 16)  # of 40, so the other 24 are trained on
    assert len(rows_of(runs / run / "valid_predictions.csv")) == len(rows_of(runs / run / "test_predictions.csv")) == 48
    assert "each film in one part" in (runs / run / "best" / "README.md").read_text()
    predictions = rows_of(runs / run / "test_predictions.csv")
    assert all(records[int(row["id"])]["film"] == records[int(row["group"])]["film"] for row in predictions)
    metrics = json.loads((runs / run / "metrics.json").read_text())
    is_right, film = (np.array([value(row) for row in predictions]) for value in (
        lambda row: row["label"] == row["predicted"], lambda row: row["group"]))
    assert metrics["valid"]["groups"] == metrics["test"]["groups"] == len(set(film)) == 8
    assert metrics["test"]["accuracy_ci95"] == pytest.approx(share_interval(is_right, film))
    before = (runs / run / "test_predictions.csv").read_bytes()
    expect(0, run_here(f"output_dir={runs}", f"run_name={run}", mode="test"))
    assert (runs / run / "test_predictions.csv").read_bytes() == before
    refused = run_here(f"output_dir={runs}", f"run_name={run}", "data_config.group_column=null", mode="test")
    assert (refused.returncode, "data_config.group_column: film -> None" in refused.stderr) == (2, True)


def test_a_stack_is_cross_fitted_and_tested_by_films(trained, monkeypatch):
    overrides, records, runs = trained
    folds = []
    monkeypatch.setattr(stacking, "PredefinedSplit", lambda fold_of: folds.append(fold_of) or PredefinedSplit(fold_of))
    stack_runs([runs / "bag-of-words", runs / "encoder"], runs / "stack")
    assert read_saved_config(runs / "stack" / "config.yaml").data_config.group_column == "film"
    ids = [int(row["id"]) for row in rows_of(runs / "stack" / "valid_predictions.csv")]
    fold_of = {(records[row]["film"], fold) for row, fold in zip(ids, folds[0], strict=True)}
    assert len(fold_of) == 8  # each film in one fold
    assert len({fold for _, fold in fold_of}) == 5
    assert not films_in(runs / "stack", records, "valid") & films_in(runs / "stack", records, "test")


def test_runs_are_compared_by_films(trained, capsys):
    _, _, runs = trained
    results = [read_result(runs / name) for name in ("bag-of-words", "encoder")]
    summary, film = summarize(group_by_setting(results), "films"), results[0].predictions.groups
    assert "The reviews are of 8 groups." in "\n".join(summary["notes"])
    expected = compare("AB", [run.correct[None] for run in results], film)[0]
    pair = summary["pairs"][0]
    assert (pair["interval"], pair["p_value"], pair["groups"]) == (expected.interval, expected.p_value, 8)
    assert "at 48 reviews of 8 groups and 1 seed each" in pair["sentence"]
    show_baseline(results[1].config)  # what a training ends with
    assert capsys.readouterr().out.endswith(pair["sentence"].replace("bert0", "encoder") + "\n")
    for result in results:  # as an earlier version has written them
        result.predictions.groups = None
    assert "test the runs again with --mode test" in "\n".join(summarize(group_by_setting(results), "films")["notes"])


def test_runs_with_and_without_the_column_are_not_compared(trained):
    overrides, _, runs = trained
    train_here(*overrides, "data_config.group_column=null", "run_name=alone", mode="baseline")
    with pytest.raises(UserError, match="data_config.group_column: film and None"):
        refuse_different_tests([read_result(runs / "bag-of-words"), read_result(runs / "alone")])


def test_a_model_that_has_read_a_film_is_not_tested_on_it(trained, tmp_path):
    """The reviews are others, and only their films give the leak away."""
    overrides, _, runs = trained
    path = write(tmp_path / "others.csv", films(first=1000))
    going_on = [*overrides, *ENCODER, f"model_config.model_name={runs / 'encoder' / 'best'}", "run_name=second",
                f"data_config.dataset={path}", "data_config.split_seed=1"]
    refused = run_here(*going_on)
    assert refused.returncode == 2
    assert "groups or texts that are validated or tested on here" in refused.stderr
    train_here(*going_on, "data_config.group_column=null")


@pytest.mark.parametrize("limit", [None, 40])
def test_pretraining_reads_no_film_that_is_held_out(limit, capsys):
    """Rows 0 to 79 are labelled, 20 films of four; 60 to 79 are held out. The unlabelled rows 80 to 199 are of the
    films 0 to 29, four each, and the first repeats a text of film 1."""
    film = np.concatenate([np.repeat(np.arange(20), 4), np.repeat(np.arange(30), 4)])
    text = np.arange(200)
    text[80] = text[5]
    all_texts, all_films = digests(text), digests(film + 10**6)
    held_out = np.concatenate([all_texts[60:80], all_films[60:80]])
    train, valid = choose(np.arange(60), np.arange(80, 200), all_texts, held_out,
                          DataConfig(limit=limit, group_column="film"), all_films)
    rows = np.concatenate([train, valid])
    assert stands_once(text, train, valid)
    assert stands_once(film, train, valid)
    assert not set(film[rows]) & set(film[60:80])
    assert set(rows) >= set(range(60))
    unlabelled = rows[rows >= 80]
    assert len(unlabelled) == 99 if limit is None else 36 <= len(unlabelled) <= 44
    assert set(np.bincount(film[unlabelled])) <= {0, 3, 4}  # whole films, one of them less the text that is a copy


def test_pretraining_runs_and_its_model_knows_the_films(tmp_path, encoder_folder):
    """The unlabelled reviews have the column, too, and what starts from the model is checked for their films."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "unsupervised")) + "---\n")
    unlabelled = [record | {"label": -1} for record in films(120, first=500)]
    for name, records in (("train", films()), ("unsupervised", unlabelled)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [*settings_of(tmp_path / "runs", tmp_path / "data"), "data_config.text_column=text",
                 "data_config.label_column=label", "data_config.group_column=film", *ENCODER,
                 f"model_config.model_name={encoder_folder('bert')}"]
    train_here(*arguments, "run_name=read", mode="pretrain")
    best = tmp_path / "runs" / "read" / "best"
    seen, split = np.load(best / "pretraining_texts.npy"), load_split(load_config(PROJECT / "config.yaml", arguments))
    assert np.isin(split.digests_of("train"), seen).all()
    assert not np.isin(split.held_out, seen).any()
    assert len(split.held_out) > sum(len(split.ids_of[name]) for name in ("valid", "test"))  # groups are among them
    train_here(*arguments, f"model_config.model_name={best}", "run_name=tuned")
    unlabelled[0]["film"] = ""
    path = tmp_path / "data" / "unsupervised.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in unlabelled))
    refused = run_here(*arguments, "run_name=other", mode="pretrain")
    assert "row 1 has no group: fill it or remove the row" in refused.stderr
