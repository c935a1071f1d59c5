"""--mode baseline: a bag of words predicts as its formulas, written out, say; has a run folder like any other, holds no
pickle, starts again after a kill, and stands beside the figure of an encoder at the end of its training.
"""

import csv
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import content_of, expect, metrics_of, run_here, train_here, write_reviews
from scipy.optimize import minimize
from scipy.special import expit, log_expit, softmax

from suite.common.run_folder import read_saved_config
from suite.common.storage import seal
from suite.comparison import report
from suite.comparison.results import group_by_setting, read_result
from suite.comparison.stacking import stack_runs
from suite.encoders import bag_of_words
from suite.encoders.bag_of_words import load_bag_of_words
from suite.reviews.splitting import load_split
from suite.training import baseline
from utils import UserError

ENCODER = ("model_config.pooling=mean", "data_config.max_len=32", "data_config.batch_size=16", "train_config.epochs=1",
           "train_config.learning_rate=0.01", "train_config.mixed_precision=no", "train_config.device=cpu")


def settings_of(folder, reviews) -> list[str]:
    return [f"output_dir={folder}", f"data_config.dataset={reviews}", "data_config.text_column=review",
            "data_config.label_column=verdict", "log_config.wandb_mode=disabled"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(overrides, run folder) of a bag of words on reviews whose words give their class away."""
    folder = tmp_path_factory.mktemp("baseline")
    overrides = settings_of(folder / "runs", write_reviews(folder / "reviews.csv"))
    train_here(*overrides, mode="baseline")
    return overrides, folder / "runs" / "bag-of-words"


def rows_of(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def error_of(result) -> str:
    assert result.returncode == 2, result.stdout + result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


C = 10
TOLERANCE = 1e-3  # of a probability: the two solvers stop at other places


def by_hand(train: list[str], labels: np.ndarray, tested: list[str]) -> tuple[set[str], np.ndarray]:
    """(n-grams, probabilities (tested, classes)): dense, in float64, another way to cut and another solver."""
    def ngrams_of(text: str) -> set[str]:
        words = re.findall(r"<[^<>]*>|\w+(?:'\w+)?|[^\w\s]", text.lower())
        return {" ".join(words[start:start + n]) for n in (1, 2, 3) for start in range(len(words) - n + 1)}

    def features_of(texts: list[str]) -> np.ndarray:
        return np.array([[name in found for name in names] for found in map(ngrams_of, texts)], dtype=np.float64)

    counts = Counter(name for text in train for name in ngrams_of(text))
    names = sorted(name for name, count in counts.items() if count >= 3)
    features, other = features_of(train), features_of(tested)
    positive = []
    for label in range(labels.max() + 1):
        p, q = (3 + features[rows].sum(axis=0) for rows in (labels == label, labels != label))
        ratios = np.log((p / p.sum()) / (q / q.sum()))
        inputs, seen = (np.hstack([rows * ratios / np.maximum(np.linalg.norm(rows * ratios, axis=1, keepdims=True),
                                                              1e-300), np.ones((len(rows), 1))])
                        for rows in (features, other))
        signs = np.where(labels == label, 1, -1)

        def loss(weights, inputs=inputs, signs=signs):
            scores = signs * (inputs @ weights)
            return (weights @ weights / 2 - C * log_expit(scores).sum(),
                    weights - C * inputs.T @ (signs * expit(-scores)))

        found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, options={"gtol": 1e-7})
        positive.append(expit(seen @ found.x))
    shares = np.stack(positive, axis=1)
    return set(names), shares / shares.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("names", "line_breaks"), [(("bad", "good"), "keep"), (("bad", "fair", "good"), "space")])
def test_its_predictions_are_those_of_the_formulas_written_out(tmp_path, monkeypatch, names, line_breaks):
    """Naive-Bayes-weighted n-grams; two classes and three; line breaks kept and not; the same bits in any batch."""
    write_reviews(tmp_path / "reviews.csv", names=names)
    text = (tmp_path / "reviews.csv").read_text().replace(" the ", " the<BR />").replace(" was ", " wasn't! ")
    (tmp_path / "reviews.csv").write_text(text)
    train_here(*settings_of(tmp_path, tmp_path / "reviews.csv"), "run_name=words", "data_config.limit=150",
               f"model_config.num_labels={len(names)}", f"data_config.line_breaks={line_breaks}", mode="baseline")
    split = load_split(read_saved_config(tmp_path / "words" / "config.yaml"))
    (train, labels), (valid, _), (test, _) = (split.texts_and_labels(name) for name in ("train", "valid", "test"))
    if line_breaks == "space":
        train, valid, test = ([text.replace("<BR />", " ") for text in texts] for texts in (train, valid, test))
    words = load_bag_of_words(tmp_path / "words" / "best")
    found = list(map(words.ngrams.name, range(len(words.ngrams))))
    assert ("<br />" in found, "wasn't !" in found) == (line_breaks == "keep", True)
    for name, texts in (("valid", valid), ("test", test)):
        ngrams, expected = by_hand(train, labels, [*texts, "", "unheard"])
        assert (set(found), len(found)) == (ngrams, len(ngrams))
        logits = words.logits([*texts, "", "unheard"])
        np.testing.assert_allclose(softmax(logits, axis=1), expected, rtol=0, atol=TOLERANCE)
        with monkeypatch.context() as patch:
            patch.setattr(bag_of_words, "AT_A_TIME", 7)
            assert words.logits([*texts, "", "unheard"]).tobytes() == logits.tobytes()
        rows = rows_of(tmp_path / "words" / f"{name}_predictions.csv")
        assert [int(row["id"]) for row in rows] == split.ids_of[name].tolist()
        saved = [[float(row[f"probability_{name}"]) for name in names] for row in rows]
        np.testing.assert_allclose(saved, softmax(logits, axis=1)[:-2], atol=1e-8)
        assert metrics_of(tmp_path / "words")[name]["accuracy"] == np.mean(
            logits[:-2].argmax(axis=1) == split.reviews.labels[split.ids_of[name]])


def test_its_run_folder_is_like_any_other(finished):
    overrides, folder = finished
    assert set(metrics_of(folder)) == {"train", "valid", "test", "data", "environment"}
    assert metrics_of(folder)["train"]["optimizer_steps"] > 0
    for name in ("misclassified.csv", "history.jsonl", "best/README.md", "best/manifest.json",
                 "plots/learning_curves.png", "plots/confusion_matrix.png", "plots/reliability.png"):
        assert (folder / name).is_file(), name
    assert {path.suffix for path in (folder / "best").iterdir()} == {".json", ".md", ".safetensors"}
    before = content_of(folder)
    again = train_here(*overrides, *ENCODER, "model_config.model_name=other", mode="baseline")  # shapes no words
    assert "nothing was done again" in again.stdout
    assert content_of(folder) == before
    assert "holds a finished run" in error_of(run_here(*overrides, "train_config.resume=never", mode="baseline"))
    train_here(*overrides, "train_config.resume=never", "train_config.overwrite=true", mode="baseline")
    same = content_of(folder)
    assert {name for name in same if same[name] != before[name]} <= {"metrics.json", "config.yaml"}  # seconds; resume


def test_mode_test_gives_the_same_figures(finished):
    overrides, folder = finished
    before, rows = metrics_of(folder), (folder / "test_predictions.csv").read_bytes()
    (folder / "test_predictions.csv").unlink()
    train_here(*overrides, "run_name=bag-of-words", mode="test")
    assert metrics_of(folder)["test"] == before["test"]
    assert (folder / "test_predictions.csv").read_bytes() == rows


@pytest.mark.parametrize("named", ["run_name=bag-of-words", "{}", "{}/best"])
def test_it_labels_as_it_was_tested(finished, tmp_path, named):
    overrides, folder = finished
    overrides, model = [*overrides, named], None
    if named.startswith("{}"):
        overrides, model = finished[0], named.format(folder)
    source = str(folder.parent.parent / "reviews.csv")
    expect(0, run_here(*overrides, mode="predict", input=source, output=str(tmp_path / "out.csv"), model=model))
    labelled = rows_of(tmp_path / "out.csv")
    for row in rows_of(folder / "test_predictions.csv"):
        found = labelled[int(row.pop("id"))]
        row.pop("label")
        assert row.items() <= found.items()
    assert run_here(*overrides, mode="predict", text="gripping and moving", model=model).stdout.startswith("good\n")


@pytest.mark.parametrize(("mode", "more", "options", "reason"), [
    ("explain", ["run_name=bag-of-words"], {"text": "good"}, "but not be explained or exported"),
    ("export", ["run_name=bag-of-words"], {}, "but not be explained or exported"),
    ("train", ["run_name=bag-of-words"], {}, "model_config.model_name: bag-of-words -> bert-base-uncased"),
    ("train", ["model_config.model_name=bag-of-words"], {}, "with --mode baseline"),
    ("test", ["run_name=bag-of-words", "data_config.split_seed=43"], {}, "data_config.split_seed: 42 -> 43"),
    ("test", ["run_name=bag-of-words", "model_config.model_name=x"], {}, "model_config.model_name: bag-of-words -> x"),
    ("train", ["run_name=new", "model_config.model_name={}/best"], {}, "a bag-of-words model, not a text encoder"),
    ("train", ["run_name=new", "model_config.model_name={}"], {}, "is a run folder: name the model in it"),
    ("baseline", ["data_config.line_breaks=space"], {}, "data_config.line_breaks: keep -> space"),
    ("baseline", ["run_name=new", "train_config.resume=must"], {}, "no saved state to continue from"),
    ("baseline", ["run_name=new", "data_config.text_column=verdict", "data_config.label_column=review",
                  "model_config.num_labels=200"], {}, "have the same texts as earlier rows")])
def test_what_cannot_be_is_refused_in_one_line(finished, mode, more, options, reason):
    overrides, folder = finished
    before = content_of(folder)
    line = error_of(run_here(*overrides, *(item.format(folder) for item in more), mode=mode, **options))
    assert reason in line
    assert content_of(folder) == before
    assert not (folder.parent / "new").exists()


def test_too_few_words_and_several_processes_are_refused_in_one_line(finished, tmp_path, monkeypatch):
    with open(tmp_path / "few.csv", "w") as file:
        file.writelines(["review,verdict\n", *(f"word{row},{row % 2}\n" for row in range(40))])
    few = [*finished[0], f"data_config.dataset={tmp_path / 'few.csv'}", f"output_dir={tmp_path / 'runs'}"]
    assert "no word stands in 3 of the 32 training reviews" in error_of(
        run_here(*few, mode="baseline"))
    assert not (tmp_path / "runs" / "bag-of-words").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the work of one process" in error_of(run_here(*finished[0], mode="baseline"))


def test_a_damaged_model_is_refused_in_one_line(finished, tmp_path):
    """A truncated or bit-flipped model is noticed when it is read."""
    shutil.copytree(finished[1] / "best", tmp_path / "model")
    (tmp_path / "model" / "words.safetensors").write_bytes(b"no tensors")
    assert str(tmp_path) in error_of(run_here(mode="predict", model=str(tmp_path / "model"), text="good"))


def test_a_model_of_another_version_is_refused_in_one_line(finished, tmp_path):
    """Wrong data end in one line with the fix, and a stack that nobody could open is not written."""
    shutil.copytree(finished[1], tmp_path / "old")
    best = tmp_path / "old" / "best"
    config = json.loads((best / "config.json").read_text())
    del config["version"]  # as the first version wrote it
    (best / "config.json").write_text(json.dumps(config))
    seal(best)
    message = "another version of this project: train it again, with --mode baseline"
    assert message in error_of(run_here(mode="predict", model=str(tmp_path / "old"), text="good"))
    with pytest.raises(UserError, match=message):
        stack_runs([tmp_path / "old", finished[1]], tmp_path / "stack")
    assert not (tmp_path / "stack").exists()


@pytest.mark.parametrize("place", ["predictions_of", "write_results"])
def test_the_same_command_starts_again_after_a_kill(finished, monkeypatch, tmp_path, place):
    overrides, folder = finished
    mine = [*overrides, f"output_dir={tmp_path}"]

    def killed(*arguments, **options):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(baseline, place, killed)
        assert run_here(*mine, mode="baseline").returncode == 137
    train_here(*mine, mode="baseline")
    for name in ("valid_predictions.csv", "test_predictions.csv", "best/words.safetensors", "history.jsonl"):
        assert (tmp_path / "bag-of-words" / name).read_bytes() == (folder / name).read_bytes()


def test_its_figure_stands_beside_the_encoder_s(finished, encoder_folder, tmp_path):
    overrides, folder = finished
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs / "words")
    encoder = [*overrides, *ENCODER, f"output_dir={runs}", "run_name=encoder",
               f"model_config.model_name={encoder_folder('bert')}"]
    printed = train_here(*encoder).stdout
    line, pair = printed.splitlines()[-2:]
    assert line.startswith(f"a bag of words on the same reviews, {runs / 'words'}: test accuracy "
                           f"{metrics_of(folder)['test']['accuracy']:.4f} (95 % interval")
    assert "bag-of-words and encoder" in pair
    assert "20 reviews and 1 seed each" in pair
    assert train_here(*encoder).stdout.endswith(f"{line}\n{pair}\n")  # when the finished run is shown again

    report.compare_runs([runs / "words", runs / "encoder"], tmp_path / "report", "a comparison")
    results = [read_result(runs / name) for name in ("words", "encoder", "encoder")]
    name = results[1].config.model_config.model_name.rpartition("/")[2]
    assert [setting.label for setting in group_by_setting(results[:2])] == ["bag-of-words", name]
    results[2].config.data_config.max_len = 16
    assert [setting.label for setting in group_by_setting(results)] == [
        "bag-of-words", f"{name}, len 32", f"{name}, len 16"]
    smaller = train_here(*encoder, "run_name=smaller", "data_config.train_limit=100").stdout
    assert "a bag of words on" not in smaller  # which was trained on more reviews

    path = runs / "words" / "test_predictions.csv"
    path.write_text(path.read_text()[:-30])  # a damaged sibling fails no training run
    assert "a bag of words on" not in train_here(*encoder).stdout


def test_it_can_leave_the_test_split_alone_until_later(finished):
    overrides, folder = finished
    untested, arguments = folder.with_name("untested"), [*overrides, "run_name=untested"]
    assert "validation accuracy" in train_here(*arguments, "train_config.test=false", mode="baseline").stdout
    assert metrics_of(untested).keys() == {"train", "valid", "data", "environment"}
    assert "test accuracy" in train_here(*arguments, mode="baseline").stdout
    assert metrics_of(untested)["test"] == metrics_of(folder)["test"]
