"""The built-in demo: its files are the generator's, word counting is not enough for it, and it reaches 0.90."""

import csv
import shutil

import pytest
from conftest import PROJECT, expect, metrics_of, run_script, train
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from suite.reviews.splitting import load_split
from utils import load_config

DEMO = PROJECT / "demo"


@pytest.fixture(scope="module")
def reviews() -> list[dict[str, str]]:
    with open(DEMO / "reviews.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_files_are_what_the_generator_writes(tmp_path):
    shutil.copy(DEMO / "generate.py", tmp_path)
    expect(0, run_script(str(tmp_path / "generate.py"), environment={"PYTHONHASHSEED": "1"}))
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) == 8
    for path in written:
        assert (tmp_path / path).read_bytes() == (DEMO / path).read_bytes(), path


def test_the_reviews_are_many_distinct_and_balanced(reviews):
    assert len({review["text"] for review in reviews}) == len(reviews) >= 4000
    assert sum(review["label"] == "positive" for review in reviews) == len(reviews) / 2


def test_counting_words_is_not_enough(reviews):
    texts, labels = ([review[column] for review in reviews] for column in ("text", "label"))
    train, test, train_labels, test_labels = train_test_split(texts, labels, random_state=0)
    words = TfidfVectorizer().fit(train)
    classifier = LogisticRegression(max_iter=1000).fit(words.transform(train), train_labels)
    assert 0.6 < classifier.score(words.transform(test), test_labels) < 0.85


def test_its_split_is_the_one_of_every_earlier_version():
    """Figures of the demo can be compared, and no text is trained on here and tested on there."""
    split = load_split(load_config(PROJECT / "demo.yaml"))
    assert split.fingerprint == "2770d3f5bf505cc0cd515097439015db97b9a6343dd7b398bf6ee59200f0a041"
    assert [len(split.ids_of[name]) for name in ("train", "valid", "test")] == [4800, 600, 600]


@pytest.mark.parametrize(("encoder", "limits"), [
    ("bert", ["train_config.max_steps=20"]), pytest.param("bert", [], marks=pytest.mark.long),
    pytest.param("modernbert", [], marks=pytest.mark.long)])
def test_the_demo_says_what_it_is_and_learns_in_about_a_minute(tmp_path, encoder, limits):
    printed = train("--config", "demo.yaml", f"model_config.model_name=demo/{encoder}", f"output_dir={tmp_path}",
                    *limits, timeout=600).stdout
    run = tmp_path / f"DEMO-{encoder}-len64-bs32-seed42"
    assert metrics_of(run)["test"]["n"] == 600
    assert limits or metrics_of(run)["test"]["accuracy"] >= 0.90
    assert printed.count("DEMO (generated reviews, not IMDB)") == 4
    assert "DEMO" in (run / "best" / "README.md").read_text()
