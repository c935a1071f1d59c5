"""compare.py on run folders with known answers: the table's figures, the reviews in its files, refusals of runs that
were not tested alike, and a web page that shows hostile reviews as text.
"""

import contextlib
import csv
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import PROJECT, expect, metrics_of, run_here, run_script, train_here, write_reviews
from test_baseline import settings_of

import compare
from suite.common import cli
from suite.common.run_folder import save_config
from suite.common.storage import write_json
from suite.comparison.report import compare_runs
from suite.comparison.results import _labels, group_by_setting, read_result, refuse_different_tests
from suite.comparison.summary import _conditions
from suite.training import finish
from suite.training.evaluation import Predictions, compute_metrics, mistakes, write_mistakes, write_predictions
from utils import UserError, load_config

REVIEWS = 400
HOSTILE = ("</script><script>document.title='broken'</script>", "<img src=x onerror=\"document.title='broken'\">",
           "<!-- <script>", "& | $x$ * `", "\u2028 \x1b ]]>", "$title ${reviews}")


def text_of(review: int) -> str:
    return f"review number {review} {HOSTILE[review % len(HOSTILE)]}"


def write_run(folder, accuracy: float, *overrides: str, reviews: int = REVIEWS, fingerprint: str = "same",
              base: str = "config.yaml", split: str = "test", environment: dict | None = None,
              held_out: str | None = "same"):
    """A finished run in `folder` that gets about this share of the split right; returns (folder, predictions)."""
    folder.mkdir(parents=True)
    config = load_config(PROJECT / base, [*overrides, f"run_name={folder.name}"])
    generator = np.random.default_rng([config.train_config.seed, config.train_config.effective_batch_size])
    labels = np.arange(reviews) % 2
    ease = np.random.default_rng(7).random(reviews)  # what is hard for one run is hard for all
    right = 0.7 * ease + 0.3 * generator.random(reviews) < np.quantile(0.7 * ease + 0.15, accuracy)
    scores = np.where(right, 1, -1) * (2 * labels - 1) * generator.uniform(0.1, 3, reviews)
    predictions = Predictions(10 * np.arange(reviews), labels,
                              np.stack([-scores, scores], axis=1).astype(np.float32))
    names = ["negative", "positive"]
    write_predictions(folder / f"{split}_predictions.csv", predictions, names)
    write_mistakes(folder / "misclassified.csv", mistakes(predictions, text_of, names))
    epochs = [{"step": 10 * epoch, "epoch": float(epoch), "train/loss": 0.7 / epoch, "valid/accuracy": 1 - 0.3 / epoch}
              for epoch in (1, 2, 3)]
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in epochs))
    train = {"seconds": 10.0, "optimizer_steps": 30, "peak_memory_mb": None, "samples_per_second": 50.0}
    data = {"data": {"train": config.data_config.train_limit or 8000, "held_out": held_out}} if held_out else {}
    write_json(folder / "metrics.json", {"train": train, split: compute_metrics(predictions), **data,
                                        "environment": environment or {}})
    save_config(config, folder / "config.yaml")
    (folder / "best").mkdir()
    write_json(folder / "best" / "config.json", {"data_fingerprint": fingerprint})
    return folder, predictions


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """({folder: predictions} of two settings with two seeds each, the folder of their report, what was printed)."""
    folder = tmp_path_factory.mktemp("reported")
    runs = dict(write_run(folder / f"batch{batch}-seed{seed}", accuracy, f"train_config.seed={seed}",
                          f"data_config.batch_size={batch}")
                for batch, accuracy in ((64, 0.7), (128, 0.9)) for seed in (1, 2))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare_runs(list(runs), folder / "report", "a comparison")
    return runs, folder / "report", printed.getvalue()


def refusal(capsys, runs, output) -> str:
    """The one line of a refused comparison."""
    with pytest.raises(SystemExit) as left:
        cli.run_with_exit_code(lambda: compare_runs(runs, output, "a comparison"))
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert not output.exists()
    return line


def labels_of(runs) -> list[str]:
    return [setting.label for setting in group_by_setting([read_result(run) for run in runs])]


def test_the_report_says_what_the_runs_say(reported):
    four_runs, output, printed = reported
    summary = json.loads((output / "comparison.json").read_text())
    correct = np.stack([run.predicted == run.labels for run in four_runs.values()])
    first, second = summary["settings"]
    assert [first["setting"], second["setting"]] == ["batch 64", "batch 128"]
    assert first["accuracies"] == correct[:2].mean(axis=1).tolist()
    assert second["accuracy"] == pytest.approx(correct[2:].mean())
    assert second["accuracy_sd"] == pytest.approx(np.std(correct[2:].mean(axis=1), ddof=1))
    assert first["accuracy_ci95"][0] < first["accuracy"] < first["accuracy_ci95"][1]
    assert first["loss"] == pytest.approx(np.mean([compute_metrics(run)["loss"] for run in four_runs.values()][:2]))
    assert (first["optimizer_steps"], first["seconds"], first["peak_memory_mb"]) == (30, 10, None)
    [pair] = summary["pairs"]
    assert pair["difference"] == pytest.approx(correct[2:].mean() - correct[:2].mean())
    assert pair["is_shown"] == (pair["p_holm"] < 0.05 and pair["interval"][0] > 0)

    with open(output / "wrong_in_all_runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wrong = np.flatnonzero(~correct.any(axis=0))
    assert [int(row["id"]) for row in rows] == (10 * wrong).tolist()
    assert len(rows) == summary["wrong_in_all_runs"] > 0
    assert rows[0]["text"] == text_of(10 * wrong[0])
    with open(output / "disagreements.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == (10 * np.flatnonzero((correct != correct[0]).any(axis=0))).tolist()
    run = list(four_runs.values())[3]
    for row in rows:
        place = int(row["id"]) // 10
        column = "batch 128, seed 2: "
        assert row[column + "predicted"] == ("negative", "positive")[run.predicted[place]]
        assert float(row[column + "confidence"]) == pytest.approx(run.confidence[place], abs=1e-6)

    markdown = (output / "report.md").read_text()
    for text in (printed, markdown, (output / "report.html").read_text()):
        assert f"{first['accuracy']:.4f} ± {first['accuracy_sd']:.4f}" in text
        assert f"{first['loss']:.4f}" in text
        assert pair["sentence"] in html.unescape(text)
    pictures = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert len(pictures) == 3
    assert all((output / picture).exists() for picture in pictures)


@pytest.mark.parametrize(("overrides", "others", "reason"), [
    (["data_config.split_seed=43"], {}, "data_config.split_seed: 42 and 43"),
    (["data_config.limit=4000"], {}, "data_config.limit: None and 4000"),
    (["data_config.split=official"], {}, "data_config.split: [0.8, 0.1, 0.1] and official"),
    (["data_config.dataset=other/imdb"], {"fingerprint": "other"}, "stanfordnlp/imdb and other/imdb, with different"),
    ([], {"reviews": 398}, "with different contents")])
def test_runs_that_were_not_tested_on_the_same_reviews_are_refused(tmp_path, capsys, overrides, others, reason):
    first, _ = write_run(tmp_path / "first", 0.8)
    other, _ = write_run(tmp_path / "other", 0.8, "train_config.epochs=3", *overrides, **others)
    line = refusal(capsys, [first, other], tmp_path / "report")
    assert line.startswith("error: ")
    assert reason in line
    assert str(first) in line
    assert str(other) in line


def test_runs_of_other_training_sizes_are_compared_where_they_were_tested_on_the_same_texts(tmp_path, capsys):
    """Their fingerprints of all data differ. Equal ids and labels do not prove equal texts."""
    limit = "data_config.train_limit=500"
    whole, _ = write_run(tmp_path / "whole", 0.9)
    small, _ = write_run(tmp_path / "small", 0.8, limit, fingerprint="of fewer")
    assert labels_of([whole, small]) == ["no train_limit", "train_limit 500"]
    refuse_different_tests([read_result(whole), read_result(small)])
    other, _ = write_run(tmp_path / "other", 0.8, limit, fingerprint="of fewer", held_out="other texts")
    assert "with different contents" in refusal(capsys, [whole, other], tmp_path / "report")
    earlier, _ = write_run(tmp_path / "earlier", 0.8, held_out=None)  # by a version that did not write it
    refuse_different_tests([read_result(whole), read_result(earlier)])
    line = refusal(capsys, [small, earlier], tmp_path / "report")
    assert f"python main.py --mode test output_dir={tmp_path} run_name=earlier" in line


def test_runs_that_were_not_tested_are_compared_on_validation(tmp_path, capsys):
    runs = [write_run(tmp_path / f"rate{rate}", accuracy, f"train_config.learning_rate={rate}", split="valid")[0]
            for rate, accuracy in ((1e-4, 0.7), (2e-4, 0.9))]
    compare_runs(runs, tmp_path / "report", "a search")
    printed = capsys.readouterr().out
    assert "validation accuracy" in printed
    assert "learning_rate 0.0002 is better than learning_rate 0.0001" in printed
    assert f"Of {REVIEWS:,} validation reviews" in printed
    assert "compared on validation" in (tmp_path / "report" / "report.md").read_text()
    assert "test reviews" not in (tmp_path / "report" / "report.html").read_text()
    tested = write_run(tmp_path / "tested", 0.8)[0]  # but never validated, as a run of an earlier version
    assert "tested was not measured on its validation reviews" in refusal(capsys, [runs[0], tested], tmp_path / "other")


def test_what_is_no_finished_run_is_refused(tmp_path, capsys):
    first, second, third = [write_run(tmp_path / f"seed{seed}", 0.8, f"train_config.seed={seed}")[0]
                            for seed in (1, 2, 3)]
    (third / "metrics.json").unlink()
    assert f"{third} holds no finished run" in refusal(capsys, [first, third], tmp_path / "report")
    assert "absent holds no finished run" in refusal(capsys, [first, tmp_path / "absent"], tmp_path / "report")
    shutil.copytree(first, tmp_path / "copy")
    assert "the same setting with the same seed 1" in refusal(capsys, [first, tmp_path / "copy"], tmp_path / "report")
    (second / "test_predictions.csv").unlink()
    line = refusal(capsys, [first, second], tmp_path / "report")
    assert f"is missing: test the run with python main.py --mode test output_dir={second.parent}" in line


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare.py", "checkpoints/one"])
    with pytest.raises(SystemExit) as left:
        compare.read_command()
    assert left.value.code == 2
    assert capsys.readouterr().err == ("error: command line: name two or more different folders, as in "
                                       "checkpoints/NAME; see --help\n")
    result = run_script("-X", "importtime", "compare.py", "--help")
    assert "checkpoints/comparison-report" in result.stdout
    assert not re.search(r"\| *(torch|scipy|sklearn)$", result.stderr, re.MULTILINE)  # so it is fast


def test_a_misclassified_review_may_be_longer_than_the_csv_modules_limit(tmp_path, monkeypatch):
    long = "long " * 30_000
    monkeypatch.setitem(globals(), "text_of", lambda review: f"{long} {review}")
    runs = [write_run(tmp_path / f"seed{seed}", 0.99, f"train_config.seed={seed}")[0] for seed in (1, 2)]
    csv.field_size_limit(131_072)  # the module's default
    compare_runs(runs, tmp_path / "report", "long reviews")
    written = [(tmp_path / "report" / f"{name}.csv").read_text() for name in ("wrong_in_all_runs", "disagreements")]
    assert any(long in text for text in written)
    assert long in (tmp_path / "report" / "report.html").read_text()


def test_a_metric_may_be_new_or_a_list(tmp_path, monkeypatch):
    """Results are read again by later versions: a metric that this one does not know spoils no file."""
    monkeypatch.setattr(finish, "compute_metrics", lambda predictions: compute_metrics(predictions) | {
        "recall_by_class": [0.5, 1.0], "brier": 0.1, "words": "many"})
    reviews = write_reviews(tmp_path / "reviews.csv")
    for name in ("keep", "space"):
        arguments = [*settings_of(tmp_path, reviews), f"run_name={name}", f"data_config.line_breaks={name}"]
        train_here(*arguments, mode="baseline")
        assert "nothing was done again" in train_here(*arguments, mode="baseline").stdout
        train_here(*arguments, mode="test")
        assert metrics_of(tmp_path / name)["test"]["recall_by_class"] == [0.5, 1.0]
    compare_runs([tmp_path / "keep", tmp_path / "space"], tmp_path / "report", "two runs")
    expect(0, run_here(mode="predict", model=str(tmp_path / "keep"), text="gripping"))


def test_auto_is_what_it_was_on_each_machine(tmp_path):
    """Seeds count as one setting only where device and precision were the same."""
    runs = []
    for seed, precision in enumerate(["no", "bf16", "bf16"]):
        place = {"device": "cpu" if precision == "no" else "cuda", "precision": precision}
        runs.append(write_run(tmp_path / f"auto{seed}", 0.8, f"train_config.seed={seed}", environment=place)[0])
    runs.append(write_run(tmp_path / "named", 0.8, "train_config.seed=9", "train_config.mixed_precision=bf16",
                          "train_config.device=cuda", environment=place)[0])
    settings = group_by_setting([read_result(run) for run in runs])
    assert [(setting.label, [run.seed for run in setting.runs]) for setting in settings] == [
        ("device cpu, mixed_precision no", [0]), ("device cuda, mixed_precision bf16", [1, 2, 9])]


def test_seeds_of_a_calibrated_bag_of_words_and_of_another_are_two_settings(tmp_path):
    runs = [write_run(tmp_path / f"words{seed}", 0.8, "model_config.model_name=bag-of-words",
                      f"train_config.seed={seed}", f"train_config.calibrate={seed == 1}")[0] for seed in (1, 2, 3)]
    settings = group_by_setting([read_result(run) for run in runs])
    assert [[run.seed for run in setting.runs] for setting in settings] == [[1], [2, 3]]


def test_students_of_teachers_with_other_seeds_are_one_setting(tmp_path):
    runs = [write_run(tmp_path / f"run{number}", 0.8, f"train_config.seed={seed}", *(
        [] if teacher is None else ["train_config.objective=distillation", f"train_config.teacher=runs/{teacher}"]))[0]
        for number, (seed, teacher) in enumerate([
            (1, "stack-seed1"), (2, "stack-seed2"), (3, "stack-seed2"), (1, "words"), (1, None)])]
    settings = group_by_setting([read_result(run) for run in runs])
    assert [(setting.label, [run.seed for run in setting.runs]) for setting in settings] == [
        ("teacher stack", [1, 2, 3]), ("teacher words", [1]), ("no teacher", [1])]
    runs.append(write_run(tmp_path / "twin", 0.8, "train_config.seed=1", "train_config.objective=distillation",
                          "train_config.teacher=runs/stack-seed2")[0])
    with pytest.raises(UserError, match="the same setting with the same seed 1"):
        group_by_setting([read_result(run) for run in runs])


def test_where_runs_were_trained_and_tested_is_said(tmp_path):
    here = {"device_name": "A", "numba": "0.68.1"}
    runs = [read_result(write_run(tmp_path / name, 0.8, f"train_config.seed={seed}", environment=here)[0])
            for seed, name in enumerate(("first", "second"))]
    runs[1].metrics["tested_on"] = {"device_name": "B"}
    for given, warns in ((runs[:1], False), (runs, True)):
        conditions = "\n".join(_conditions(given, None))
        assert "A (" in conditions
        assert "numba 0.68.1" in conditions
        assert ("; B (" in conditions) == ("machines, versions or precisions" in conditions) == warns


def test_a_stack_of_a_student_and_an_encoder_has_a_name():
    values = {"model_config.model_name": "stack of a and b"}
    assert _labels([{**values, "train_config.teacher": [None, "runs/words"]}, {**values, "train_config.teacher": None}]
                   ) == [f"stack of a and b, {teacher}" for teacher in ("teacher [None, 'words']", "no teacher")]


def test_a_micro_batch_on_two_processes_has_a_name():
    alone = {"model_config.model_name": "bert", "train_config.gradient_accumulation_steps": 1,
             "data_config.batch_size": 64, "train_config.effective_batch_size": 64}
    assert _labels([alone, alone | {"data_config.batch_size": 32}]) == ["micro-batch 64", "micro-batch 32"]
    twice = alone | {"data_config.batch_size": 128, "train_config.effective_batch_size": 128}
    assert _labels([alone, twice]) == ["batch 64", "batch 128"]


def test_settings_are_named_by_what_tells_them_apart(tmp_path):
    """And the same data in two places is the same data."""
    runs = [write_run(tmp_path / name, 0.8, *overrides)[0] for name, overrides in {
        "a": ["model_config.model_name=some/folder/bert"], "b": ["model_config.model_name=some/folder/roberta"],
        "c": ["model_config.model_name=some/folder/bert", "train_config.learning_rate=1e-4"]}.items()]
    assert labels_of(runs) == [f"{name}, learning_rate {rate}" for name, rate in (
        ("bert", 5e-05), ("roberta", 5e-05), ("bert", 0.0001))]
    alike = [write_run(tmp_path / name, 0.8, f"model_config.model_name={name}/bert")[0] for name in ("x", "y")]
    assert labels_of(alike) == ["bert (1)", "bert (2)"]
    copy = write_run(tmp_path / "copy", 0.8, "data_config.dataset=a/copy")[0]
    refuse_different_tests([read_result(runs[0]), read_result(copy)])
    changes = [(), ("model_config.pooling=mean",), ("train_config.epochs=2", "data_config.max_len=64"),
               ("train_config.weight_decay=0.01",)]
    many = [write_run(tmp_path / f"run{number}", 0.8, *change)[0] for number, change in enumerate(changes)]
    assert labels_of(many) == ["base", "pooling mean", "len 64, epochs 2", "weight_decay 0.01"]
    assert labels_of([*many[1:], many[0]]) == ["pooling mean", "len 64, epochs 2", "weight_decay 0.01", "base"]


# ---------------------------------------------------------------------------------------------------------------------
# The web page


def test_the_page_loads_nothing_and_holds_hostile_reviews_as_data(reported):
    four_runs, output, _ = reported
    page = (output / "report.html").read_text(encoding="utf-8")
    scripts = re.findall("<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    assert "<" not in scripts[0][1]  # so that no review ends the script, or begins another
    sources = re.findall("(?:src|href)=.{22}", page.replace(scripts[0][1], ""))
    assert sources == ['src="data:image/png;base64'] * 3
    data = json.loads(scripts[0][1])
    wrong = np.stack([run.predicted != run.labels for run in four_runs.values()])
    assert {row["id"] for row in data["rows"]} == set((10 * np.flatnonzero(wrong.any(axis=0))).tolist())
    assert all(row["text"] == text_of(row["id"]) for row in data["rows"])
    times = [sum(answer != row["label"] for answer, _ in row["answers"]) for row in data["rows"]]
    assert times == sorted(times, reverse=True)  # what most runs get wrong comes first


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_in_a_browser(reported, tmp_path):
    """The reviews are shown as text, no script of theirs runs, and the filters leave what they should."""
    four_runs, output, _ = reported
    page = (output / "report.html").read_text(encoding="utf-8")
    wrong = np.stack([run.predicted != run.labels for run in four_runs.values()])
    expected = {"any": wrong.any(axis=0), "all": wrong.all(axis=0), "some": wrong.any(axis=0) & ~wrong.all(axis=0),
                "0": wrong[:2].any(axis=0), "1": wrong[2:].any(axis=0)}
    probe = """<script>const found = {};
    for (const choice of ["any", "all", "some", "0", "1"]) {
      element("wrong").value = choice; element("wrong").dispatchEvent(new Event("input"));
      found[choice] = element("count").textContent; }
    element("wrong").value = "any"; element("contains").value = "</SCR" + "IPT>";
    element("contains").dispatchEvent(new Event("input"));
    found.contains = element("count").textContent; found.cell = document.querySelector("td.text").textContent;
    found.title = document.title; add(document.body, "pre", JSON.stringify(found)).id = "found";</script></body>"""
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking " \
            "--disable-component-update --disable-sync"
    address = (tmp_path / "probe.html").as_uri()
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    [found] = re.findall(r'<pre id="found">(.*)</pre>', result.stdout)
    found = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    total = int(wrong.any(axis=0).sum())
    for choice, reviews in expected.items():
        assert found[choice].startswith(f"{int(reviews.sum())} of {total} reviews"), choice
    ids = 10 * np.flatnonzero(wrong.any(axis=0))
    assert found["contains"].startswith(f"{(ids % len(HOSTILE) == 0).sum()} of ")
    assert HOSTILE[0] in found["cell"]
    assert found["title"] == "a comparison"
