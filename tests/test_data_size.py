"""How much data is enough: a power law is recovered with honest intervals, and an experiment over training sizes makes
bags of words, encoders and stacks, goes on after a kill without repeating what was finished, and reports its curves.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, run_script, start_script, train_here, write_reviews
from test_compare import write_run
from test_experiment import is_training, wait_for

from experiment import list_cells, write_report
from suite.common.storage import read_json
from suite.comparison import data_size, running
from suite.comparison.data_size import fit_power_law
from suite.comparison.grid import find_finished, read_experiment
from suite.comparison.report import compare_runs
from suite.comparison.results import group_by_setting, read_result
from suite.comparison.running import run_cells
from suite.comparison.stacking import stack_runs
from utils import UserError

SIZES = np.array([500, 1000, 2000, 4000, 8000])


def test_a_known_power_law_is_recovered():
    law = fit_power_law(SIZES, 0.9 * SIZES**-0.25)
    assert (law.factor, law.exponent) == (pytest.approx(0.9), pytest.approx(0.25))
    assert law.error(16_000) == pytest.approx(0.9 * 16_000**-0.25)
    assert law.interval(16_000) == pytest.approx((law.error(16_000), law.error(16_000)))


def test_the_interval_holds_the_next_size_as_often_as_it_says():
    """In 19 of 20 worlds in which the errors scatter around a law."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        errors = 0.9 * np.append(SIZES, 16_000)**-0.25 * np.exp(0.03 * generator.standard_normal(6))
        low, high = fit_power_law(SIZES, errors[:-1]).interval(16_000)
        hits += low <= errors[-1] <= high
    assert 930 <= hits <= 970


def test_the_report_has_a_curve_for_each_kind_of_model(tmp_path, capsys):
    runs = [write_run(tmp_path / f"{rate}-{size}", accuracy, f"train_config.learning_rate={rate}",
                      f"data_config.train_limit={size}", fingerprint=str(size))[0]
            for rate, accuracies in ((1e-4, (0.6, 0.7, 0.8, 0.85)), (2e-4, (0.6, 0.9)))
            for size, accuracy in zip((500, 1000, 2000, "null"), accuracies, strict=False)]
    compare_runs(runs, tmp_path / "report", "sizes")
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())["data_size"]
    first, second = found["curves"]
    points = first["points"]
    assert [point["trained_on"] for point in points] == [500, 1000, 2000, 8000]  # null: all of them
    law = fit_power_law([500, 1000, 2000, 8000], [1 - point["accuracy"] for point in points])
    assert first["law"]["twice"] == {"trained_on": 16_000, "accuracy": pytest.approx(1 - law.error(16_000)),
                                     "accuracy_ci95": pytest.approx([1 - end for end in law.interval(16_000)[::-1]])}
    smaller = fit_power_law([500, 1000, 2000], [1 - point["accuracy"] for point in points[:3]])
    assert first["law"]["without_last"]["accuracy"] == pytest.approx(1 - smaller.error(8000))
    assert f"expects {1 - law.error(16_000):.4f} (95 % interval " in first["sentence"]
    assert first["sentence"].endswith(" there; what was seen lies within.")
    level = [{"trained_on": size, "accuracy": 1 - 0.9 * size**-0.25 * factor, "accuracy_ci95": [0, 1]}
             for size, factor in zip(SIZES, (1, 1.02, 0.98, 1, 1.4), strict=True)]
    assert "outside, so the law does not hold here" in data_size._curve("it", level, "")["sentence"]
    assert second["sentence"] == "learning_rate 0.0002: a forecast needs 3 training sizes, and there are 2."
    perfect = [{"trained_on": size, "accuracy": min(1, size / 2000), "accuracy_ci95": [0, 1]} for size in SIZES]
    assert data_size._curve("it", perfect, "")["sentence"] == (
        "it: no forecast, because at one of the sizes nothing is wrong.")
    falling = [row | {"accuracy": 1 - row["accuracy"]} for row in level]
    assert data_size._curve("it", falling, "")["sentence"].startswith("it: no forecast, because the error does")
    markdown, page = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for text in (capsys.readouterr().out, markdown, page):
        assert all(curve["sentence"] in text for curve in found["curves"])
        assert "training reviews" in text
    assert f"![{found['words']}](plots/data_size.png)" in markdown
    assert f'alt="{found["words"]}"' in page
    assert f"learning_rate 0.0001 from {points[0]['accuracy']:.4f} at 500 to " in found["words"]
    assert (tmp_path / "report" / "plots" / "data_size.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


@pytest.fixture
def arguments(tmp_path, encoder_folder, monkeypatch):
    """(path, overrides) of an experiment of two sizes with two seeds, which comes to 2 + 4 + 4 runs."""
    monkeypatch.chdir(PROJECT)
    reviews, path = write_reviews(tmp_path / "reviews.csv"), tmp_path / "sizes.yaml"
    path.write_text(json.dumps({
        "config": "config.yaml", "grid": {"data_config.train_limit": [60, None]}, "seeds": [1, 2], "also": ["stack"],
        "overrides": {
            "data_config.dataset": str(reviews), "data_config.text_column": "review", "data_config.max_len": 32,
            "data_config.label_column": "verdict", "data_config.batch_size": 16, "model_config.pooling": "mean",
            "train_config.mixed_precision": "no", "train_config.device": "cpu", "log_config.wandb_mode": "disabled",
            "train_config.epochs": 2, "train_config.learning_rate": 0.01,
            "model_config.model_name": encoder_folder("bert")}}))
    return str(path), [f"output_dir={tmp_path / 'runs'}"]


def run_in_this_process(experiment, cell) -> None:
    script, *arguments = cell.command
    if script == "ensemble.py":
        *members, _, output = map(Path, arguments)
        stack_runs(members, output)
    else:
        base, *overrides = arguments[arguments.index("--config") + 1:]
        train_here(*overrides, mode="baseline" if "baseline" in arguments else "train", config=base)


def test_bags_of_words_encoders_and_stacks_are_made_once_each(arguments, monkeypatch, capsys):
    experiment, ran, most = read_experiment(*arguments), [], [5]
    list_cells(experiment, experiment.cells)
    listed = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert listed[:3] == ["model=bag-of-words, train_limit=60, seed 1", "train_limit=60, seed 1",
                          "model=stack, train_limit=60, seed 1"]

    def run(experiment, cell):
        if len(ran) in most:
            raise SystemExit(137)  # what a kill between two runs leaves
        ran.append(cell.folder.name)
        run_in_this_process(experiment, cell)

    monkeypatch.setattr(running, "run_cell", run)
    with pytest.raises(SystemExit):
        run_cells(experiment, experiment.cells)
    most.clear()
    experiment = read_experiment(*arguments)
    assert [cell.is_finished for cell in experiment.cells] == [True] * 5 + [False] * 5
    assert run_cells(experiment, experiment.cells) == {}
    assert ran == [cell.folder.name for cell in experiment.cells]
    assert all(cell.is_finished for cell in read_experiment(*arguments).cells)

    write_report(experiment, {})
    rows = json.loads((experiment.report_folder / "comparison.json").read_text())["settings"]
    assert [(row["setting"].partition(",")[0], row["trained_on"], row["seeds"]) for row in rows] == [
        (name, size, seeds) for size in (60, 160) for name, seeds in (
            ("bag-of-words", [1]), ("bert0", [1, 2]), ("stack of bag-of-words", [1, 2]))]


def test_a_stack_waits_for_members_that_another_process_trains(arguments, monkeypatch):
    cells = read_experiment(*arguments).cells
    words, encoder, stack, next_words = cells[:4]
    locked = {encoder.folder}
    monkeypatch.setattr(running, "is_locked", locked.__contains__)
    assert running._next_free([encoder, stack, next_words]) is next_words
    assert running._next_free([stack, next_words]) is next_words
    locked.clear()
    assert running._next_free([stack, encoder]) is encoder
    assert running._next_free([stack]) is stack


def test_the_command_line_replaces_seeds_sizes_and_what_is_also_made(arguments):
    path, overrides = arguments
    smaller = [*overrides, "seeds=[7]", "grid.data_config.train_limit=[20,40,null]", "also=[bag-of-words]"]
    experiment = read_experiment(path, smaller)
    found = [(cell.setting.get("model"), cell.config.data_config.train_limit, cell.seed) for cell in experiment.cells]
    assert found == [
        (model, size, 7) for size in (20, 40, None) for model in ("bag-of-words", None)]
    assert experiment.overrides == smaller[1:]
    with pytest.raises(UserError, match="also.0 is trees: it must be"):
        read_experiment(path, [*overrides, "also=[trees]"])
    with pytest.raises(UserError, match="also: a stack needs tested runs: leave out train_config.test=false"):
        read_experiment(path, [*overrides, "train_config.test=false"])


def test_what_is_the_same_beside_two_encoders_is_made_once(arguments):
    path, overrides = arguments
    cells = read_experiment(path, [*overrides, "grid.train_config.epochs=[1,2]", "seeds=[1]"]).cells
    assert [cell.setting.get("model", "") for cell in cells] == [
        "bag-of-words", "", "stack", "", "stack"] * 2
    assert len({cell.folder for cell in cells}) == len(cells)
    assert "epochs" not in cells[0].folder.name


@pytest.mark.long
def test_another_encoder_of_the_same_name_gets_a_stack_of_its_own(arguments):
    """And the two stacks are two settings, although the runs in them have the same names."""
    path, overrides = arguments
    overrides = [*overrides, "seeds=[1]", "grid.data_config.train_limit=[null]"]
    for more in ([], ["train_config.max_steps=2"]):
        experiment = read_experiment(path, [*overrides, *more])
        assert [cell.is_finished for cell in experiment.cells] == [bool(more), False, False]
        for cell in experiment.cells[bool(more):]:
            run_in_this_process(experiment, cell)
            find_finished(experiment.cells)
    first, second = (read_experiment(path, [*overrides, *more]).cells for more in ([], ["train_config.max_steps=2"]))
    assert all(cell.is_finished for cell in [*first, *second])
    assert (first[0].folder, len({cell.folder for cell in [*first, *second]})) == (second[0].folder, 5)
    for cells in (first, second):
        members = read_json(cells[2].folder / "best" / "config.json")["members"]
        assert [member["run"] for member in members] == [cell.folder.name for cell in cells[:2]]
    settings = group_by_setting([read_result(cell.folder) for cell in [*first[1:], *second[1:]]])
    assert [setting.label for setting in settings] == [
        "bert, no max_steps", f"stack of bag-of-words, {first[1].folder.name.removesuffix('-seed1')}, no max_steps",
        "bert, max_steps 2", f"stack of bag-of-words, {first[1].folder.name.removesuffix('-seed1')}, max_steps 2"]


def test_killed_again_and_again_it_makes_every_run(arguments, tmp_path):
    """With the real processes: SIGKILL during a bag of words, an encoder, and a stack."""
    path, overrides = arguments[0], [*arguments[1], "seeds=[1]"]
    cells = read_experiment(path, overrides).cells
    begins = [lambda: cells[0].is_begun, is_training(cells[1].folder), lambda: cells[2].is_begun]
    for begun in begins:
        process = start_script("experiment.py", path, *overrides)
        wait_for(begun, process)
        process.kill()
        process.communicate(timeout=60)
    result = run_script("experiment.py", path, *overrides, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(cell.is_finished for cell in read_experiment(path, overrides).cells)
    assert (tmp_path / "runs" / "sizes-report" / "plots" / "data_size.png").stat().st_size > 10_000
