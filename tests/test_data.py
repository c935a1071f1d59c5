"""Sources, splits, tokens and batches: no text on both sides, no review lost or doubled, no padding that counts."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import PROJECT, SHARED, write_reviews
from transformers import AutoTokenizer

import data
from suite.reviews import sampling, splitting
from suite.reviews.sampling import StepSampler
from utils import DataConfig, UserError, load_config

CPU = torch.device("cpu")


@pytest.fixture
def configured(overrides):
    """configured(*more overrides): the configuration of a run of seconds."""
    return lambda *more: load_config(PROJECT / "config.yaml", [*overrides, *more])


@pytest.fixture
def config(configured):
    return configured()


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_the_split_is_8_1_1_stratified_complete_and_that_of_its_seed_alone(configured, encoder_folder):
    splits = data.prepare_data(configured()).splits
    assert {name: len(dataset) for name, dataset in splits.items()} == {"train": 160, "valid": 20, "test": 20}
    assert sorted(np.concatenate([dataset.ids for dataset in splits.values()])) == list(range(200))
    assert all(dataset.labels.mean() == 0.5 for dataset in splits.values())

    def ids_with(*changes: str) -> dict[str, list[int]]:
        return {name: ids.tolist() for name, ids in data.load_split(configured(*changes)).ids_of.items()}

    expected = {name: dataset.ids.tolist() for name, dataset in splits.items()}
    assert ids_with("train_config.seed=7", "data_config.batch_size=3", "data_config.max_len=9",
                    f"model_config.model_name={encoder_folder('modernbert')}") == expected
    assert ids_with("data_config.split_seed=1") != expected
    assert [len(ids) for ids in ids_with("data_config.limit=50").values()] == [40, 5, 5]


@pytest.mark.parametrize(("drop", "limit", "rows"), [
    ("true", "null", 200), ("false", "null", 250), ("true", 30, 30), ("false", 30, 30)])
def test_no_text_stands_in_two_splits_and_duplicates_are_counted(configured, reviews_file, capsys, drop, limit, rows):
    lines = reviews_file.read_text().splitlines()
    reviews_file.write_text("\n".join(lines + lines[1:101:2]) + "\n")  # 50 of them twice
    split = data.load_split(configured(f"data_config.drop_duplicates={drop}", f"data_config.limit={limit}"))
    texts = [{split.text(i) for i in ids} for ids in split.ids_of.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))
    assert sum(map(len, split.ids_of.values())) == rows
    assert "50 exact duplicates" in capsys.readouterr().out


@pytest.mark.parametrize("drop", ["true", "false"])
def test_train_limit_draws_nested_strata_and_leaves_valid_and_test_alone(configured, reviews_file, drop):
    header, *lines = write_reviews(reviews_file, rows=300).read_text().splitlines()
    lines = [line for place, line in enumerate(lines) if place % 4]  # 75 of the one class, 150 of the other
    reviews_file.write_text("\n".join([header, *lines, *lines[:100:2]]) + "\n")  # 50 of them twice

    def split_with(limit) -> splitting.Split:
        return data.load_split(configured(f"data_config.drop_duplicates={drop}", f"data_config.train_limit={limit}"))

    whole, before = split_with("null"), set()
    assert split_with(10_000).fingerprint == whole.fingerprint
    for limit in (4, 5, 31, 90, 150):
        split = split_with(limit)
        drawn = set(split.ids_of["train"].tolist())
        assert before <= drawn < set(whole.ids_of["train"].tolist())
        assert len(drawn) == limit or drop == "false" and abs(len(drawn) - limit) <= 1  # copies are drawn together
        assert abs(split.reviews.labels[sorted(drawn)].sum() - limit * 2 / 3) <= 2
        assert [split.ids_of[name].tolist() for name in ("valid", "test")] == [
            whole.ids_of[name].tolist() for name in ("valid", "test")]
        assert split.record == {"train": len(drawn), "held_out": whole.record["held_out"]}
        assert split.fingerprint != whole.fingerprint
        before = drawn
    with pytest.raises(UserError, match="train_limit=1 is too few for 2 classes: no row to train on has the class"):
        split_with(1)


def test_the_draw_of_train_limit_does_not_depend_on_the_order_of_rows():
    """Nor on the numbers of the classes. The official validation split leaves nothing else to draw."""
    generator, digests = np.random.default_rng(0), np.array([f"{text:016d}".encode() for text in range(300)], "V16")
    names, labels = np.repeat(["train", "validation", "test"], 100), np.arange(300) % 3
    config = DataConfig(split="official", train_limit=20)
    drawn = splitting.split_reviews(digests, labels, names, config)["train"]
    order = generator.permutation(300)
    again = splitting.split_reviews(digests[order], 2 - labels[order], names[order], config)["train"]
    assert set(order[again]) == set(drawn)


def test_without_train_limit_the_split_is_that_of_earlier_versions():
    """What a run of theirs was trained and tested on must not change: their fingerprint, on the demo's reviews."""
    assert data.load_split(load_config(PROJECT / "demo.yaml")).fingerprint == (
        "2770d3f5bf505cc0cd515097439015db97b9a6343dd7b398bf6ee59200f0a041")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.fixture
def dataset_folder(tmp_path):
    """A folder in the Hub's layout: train, test, and an unlabelled split with label -1 throughout."""
    folder = tmp_path / "imdb"
    folder.mkdir()
    for split, count, offset in (("train", 60, 0), ("test", 40, 1000), ("unsupervised", 30, 2000)):
        records = [{"text": f"review {offset + i}", "label": i % 2 if offset < 2000 else -1} for i in range(count)]
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), folder / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: plain_text\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {split}-*\n" for split in ("train", "test", "unsupervised")) + "---\n")
    return folder


COLUMNS = ["data_config.text_column=text", "data_config.label_column=label"]


def test_the_unlabelled_split_is_never_used(dataset_folder, configured, capsys):
    splits = data.prepare_data(configured(*COLUMNS, f"data_config.dataset={dataset_folder}")).splits
    numbers = [int(dataset.text(i).split()[1]) for dataset in splits.values() for i in dataset.ids]
    assert sorted(numbers) == [*range(60), *range(1000, 1040)]
    assert "the split unsupervised has no labels and is not used (30 rows)" in capsys.readouterr().out


def test_the_official_test_split(dataset_folder, configured):
    split = data.load_split(configured(*COLUMNS, f"data_config.dataset={dataset_folder}", "data_config.split=official"))
    assert {name: len(ids) for name, ids in split.ids_of.items()} == {"train": 54, "valid": 6, "test": 40}
    assert {int(split.text(i).split()[1]) // 1000 for i in split.ids_of["test"]} == {1}


@pytest.mark.parametrize("drop", [True, False])
def test_the_official_test_split_stays_whole_and_is_not_trained_on(drop, capsys):
    # Texts 0 to 29 in train, of which 5 stand there twice; 25 to 44 in test, of which 1 stands there twice.
    texts = [*range(30), *range(5), *range(25, 45), 44]
    digests = np.array([f"{text:016d}".encode() for text in texts], dtype="V16")
    labels, names = np.array(texts) % 2, np.array(["train"] * 35 + ["test"] * 21)
    splits = splitting.split_reviews(digests, labels, names, DataConfig(split="official", drop_duplicates=drop))
    assert splits["test"].tolist() == list(range(35, 56))
    trained = [texts[row] for row in [*splits["train"], *splits["valid"]]]
    assert sorted(set(trained)) == list(range(25))
    assert len(trained) == (25 if drop else 30)
    assert not {texts[row] for row in splits["train"]} & {texts[row] for row in splits["valid"]}
    assert "5 rows repeat a text of the official test split" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_texts_are_cut_at_either_end_or_in_the_middle(encoder_folder, name):
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(name))
    text = " ".join("the film was dull but the end is good and not bad at all".split() * 3)
    whole, texts = tokenizer(text)["input_ids"], ["A gripping film.", text, "x"]

    def cut(truncation: str, max_len: int = 11) -> list[list[int]]:
        return data.Encode(tokenizer, max_len, truncation)({"text": texts})["input_ids"]

    assert cut("head") == tokenizer(texts, truncation=True, max_length=11)["input_ids"]
    assert cut("tail")[1] == [whole[0], *whole[-10:-1], whole[-1]]
    assert cut("head_tail")[1] == [*whole[:5], *whole[-6:]]
    assert cut("tail", 500)[1] == whole


def test_tokens_are_cached(config, monkeypatch):
    first = data.prepare_data(config)
    monkeypatch.setattr(data.Encode, "__call__", lambda *_: pytest.fail("tokenized again"))
    again = data.prepare_data(config)
    assert np.array_equal(again.splits["train"].tokens, first.splits["train"].tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_batches_are_the_reviews_padded_to_their_longest(config):
    prepared = data.prepare_data(config)
    tokenizer, dataset, seen = prepared.tokenizer, prepared.splits["train"], []
    for batch in (batch for step in data.train_loader(
            prepared, data.new_sampler(prepared, config), 0, config, CPU) for batch in step.micro_batches):
        lengths = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(dim=1)
        assert batch["input_ids"].shape == (len(batch["id"]), lengths.max())
        assert torch.equal(batch["token_type_ids"], torch.zeros_like(batch["input_ids"]))
        for row, review in enumerate(batch["id"].tolist()):
            expected = tokenizer(dataset.text(review), truncation=True, max_length=32)["input_ids"]
            assert batch["input_ids"][row].tolist() == expected + [0] * (batch["input_ids"].shape[1] - len(expected))
            assert int(lengths[row]) == len(expected)
            assert ("good" if batch["labels"][row] else "bad") == ("good" if review % 2 else "bad")
        seen += batch["id"].tolist()
    assert sorted(seen) == sorted(dataset.ids.tolist())


def test_token_type_ids_only_where_the_encoder_takes_them(configured, encoder_folder):
    config = configured(f"model_config.model_name={encoder_folder('modernbert')}")
    assert "token_type_ids" not in next(iter(data.evaluation_loader(data.prepare_data(config), "valid", config, CPU)))


def test_the_order_is_a_function_of_seed_and_epoch_and_moves_no_other_generator(config):
    prepared = data.prepare_data(config)

    def order(epoch, first_step=0):
        loader = data.train_loader(prepared, data.new_sampler(prepared, config), epoch, config, CPU, first_step)
        return [batch["id"].tolist() for step in loader for batch in step.micro_batches]

    state = torch.get_rng_state()
    assert order(0) == order(0) != order(1)
    assert order(1, first_step=3) == order(1)[3:]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pass_tokens", [math.inf, 100])
@pytest.mark.parametrize(("micro", "processes"), [(64, 1), (32, 1), (8, 1), (13, 1), (64, 2), (5, 3), (64, 3)])
def test_steps_hold_the_same_reviews_however_they_are_cut(micro, processes, pass_tokens):
    lengths = np.random.default_rng(0).integers(3, 128, size=200)
    samplers = [StepSampler(lengths, 64, micro, 1, rank, processes, pass_tokens=pass_tokens)
                for rank in range(processes)]
    reference = StepSampler(lengths, 64, 64, seed=1).effective_batches(0)
    shares = [list(map(sampler.micro_batches, reference)) for sampler in samplers]
    for rows, *cuts in zip(reference, *shares, strict=True):
        assert len(set(map(len, cuts))) == 1  # every process has the same number of micro-batches
        pieces = [piece for pieces in cuts for piece in pieces]
        real = np.concatenate([piece[piece >= 0] for piece in pieces])
        assert sorted(real) == sorted(rows)
        assert max(map(len, pieces)) <= micro
        assert min(map(len, pieces)) > 0  # nobody waits for a process without work
    assert [len(rows) for rows in reference] == [64, 64, 64, 8]


def test_an_effective_batch_is_cut_where_that_saves_most():
    lengths = np.array([9, 38, 11, 40, 8, 39, 7, 12, 37])

    def work(groups):
        return sum(len(group) * lengths[group].max() + 25 for group in groups)

    found = [round_[0] for round_ in sampling.cut(np.arange(9), lengths, 4, 1, pass_tokens=25)]
    order = np.argsort(-lengths)
    every_cut = (np.split(order, [place for place in range(1, 9) if mask >> place & 1]) for mask in range(0, 512, 2))
    cheapest = min((groups for groups in every_cut if max(map(len, groups)) <= 4), key=work)
    assert work(found) == work(cheapest)
    assert work(found) < work(np.array_split(order, 3))
    assert len(sampling.cut(np.arange(9), np.full(9, 7), 4, 1, pass_tokens=25)) == 3  # nothing to save


def test_a_process_without_a_review_gets_one_that_does_not_count(config):
    dataset = data.prepare_data(config).splits["train"]
    [round_] = sampling.cut(np.array([4]), dataset.lengths, 16, 3)
    batches = list(map(dataset.batch, round_))
    assert [batch["labels"].item() == data.IGNORED for batch in batches] == [False, True, True]
    assert [batch["id"].item() for batch in batches][1:] == [-1, -1]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real reviews")
def test_imdb_has_418_duplicates_and_no_leak(configured, capsys):
    split = data.load_split(configured(*COLUMNS, f"data_config.dataset={SHARED / 'data/imdb'}"))
    assert "418 exact duplicates dropped" in capsys.readouterr().out
    assert {name: len(ids) for name, ids in split.ids_of.items()} == {"train": 39666, "valid": 4958, "test": 4958}
    texts = split.reviews.table["text"][:]
    by_split = [{texts[i] for i in ids} for ids in split.ids_of.values()]
    assert len(set.union(*by_split)) == sum(map(len, by_split)) == 50_000 - 418


@pytest.mark.parametrize("kept", [2, 3, 58, 59])
def test_any_limit_keeps_that_many_rows(kept):
    rows, rest = splitting.draw_stratified(np.arange(60), np.arange(60) % 2, kept, DataConfig(limit=kept), "limit")
    assert len(rows) == kept
    assert sorted([*rows, *rest]) == list(range(60))


def test_an_official_split_with_a_class_that_is_not_trained_on_is_refused():
    digests = np.array([bytes([row]) * 16 for row in range(60)], dtype="V16")
    names, labels = np.where(np.arange(60) < 40, "train", "test"), np.where(np.arange(60) < 50, 0, 1)
    with pytest.raises(UserError, match="no row to train on has the class 1"):
        splitting.split_reviews(digests, labels, names, DataConfig(split="official"))
