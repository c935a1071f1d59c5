"""The built-in demo: its files are the generator's, word counting is not enough for it, and it reaches 0.90."""

import csv
import json
import shutil

import pytest
from conftest import PROJECT, run_script
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

DEMO = PROJECT / "demo"


@pytest.fixture(scope="module")
def reviews() -> list[dict[str, str]]:
    with open(DEMO / "reviews.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_files_are_what_the_generator_writes(tmp_path):
    shutil.copy(DEMO / "generate.py", tmp_path)
    result = run_script(str(tmp_path / "generate.py"), environment={"PYTHONHASHSEED": "1"})
    assert result.returncode == 0, result.stderr
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


@pytest.mark.parametrize("encoder", ["bert", pytest.param("modernbert", marks=pytest.mark.long)])
def test_the_demo_learns_in_about_a_minute(tmp_path, encoder):
    result = run_script("main.py", "--config", "demo.yaml", f"model_config.model_name=demo/{encoder}",
                        f"output_dir={tmp_path}", timeout=600)
    assert result.returncode == 0, result.stderr
    run = tmp_path / f"DEMO-{encoder}-len64-bs32-seed42"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.90
    assert metrics["test"]["n"] == 600
    assert result.stdout.count("DEMO (generated reviews, not IMDB)") == 3
    assert "DEMO" in (run / "best" / "README.md").read_text()
