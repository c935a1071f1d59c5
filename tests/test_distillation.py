"""--mode distill: which reviews it reads, that the loss is the cross-entropy with the targets, that a run which was
killed while the teacher labelled or the student learned ends with the same bits, and that the student needs no teacher
later.
"""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from accumulation_worker import build_model, distance, explicit_data, single_device, train_steps
from conftest import PROJECT, bits_of, expect, launch, metrics_of, run_here, stop_run_at, train_here
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from test_pretraining import write_splits

from data import IGNORED, classes_of
from suite.common import cli
from suite.common.devices import Devices
from suite.common.stopping import SIGNALS, StopRequested
from suite.common.storage import seal
from suite.comparison.results import group_by_setting, read_result
from suite.comparison.stacking import stack_runs
from suite.inference.classifier import BagOfWordsLabeller, open_classifier
from suite.reviews.splitting import load_split, text_digests
from suite.reviews.unlabelled import with_unlabelled
from suite.training import distillation
from suite.training.distillation import DistillationRun, prepare_student_data
from utils import Config, UserError

LABELLED, UNLABELLED = 120, 300  # the latter without 60 copies


def write_dataset(folder) -> None:
    """Reviews whose words give their class away, of films of four. The unlabelled ones repeat 50 of the labelled ones
    and 10 of their own."""
    generator, rows = random.Random(0), []
    words = {0: "dull dreary pointless".split(), 1: "gripping moving delightful".split()}
    for row in range(LABELLED + UNLABELLED):
        filler = generator.choices("the film was a story of this and that with some people".split(),
                                   k=generator.randint(2, 24))
        text = [*filler, *generator.choices(words[row % 2], k=len(filler) // 2 + 1), f"number {row}"]
        generator.shuffle(text)
        rows.append({"text": " ".join(text), "label": row % 2, "film": f"film {row // 4 % 60}"})
    unlabelled = [row | {"label": -1} for row in (*rows[LABELLED:], *rows[-10:], *rows[:50])]
    write_splits(folder, "jsonl", **{name: "".join(json.dumps(row) + "\n" for row in part) for name, part in (
        ("train", rows[:LABELLED]), ("unsupervised", unlabelled))})


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, encoder_folder) -> list[str]:
    """Settings of a run of seconds: 48 reviews to train on, 36 to validate and 36 to test."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder)
    return [f"output_dir={tmp_path_factory.mktemp('runs')}", f"model_config.model_name={encoder_folder('bert')}",
            f"data_config.dataset={folder}", "data_config.split=[0.4,0.3,0.3]", "data_config.max_len=32",
            "data_config.batch_size=16", "train_config.epochs=3",
            "train_config.learning_rate=0.01", "train_config.mixed_precision=no", "train_config.device=cpu",
            "train_config.save_every_steps=7", "log_config.wandb_mode=disabled", "log_config.log_every_steps=3"]


@pytest.fixture(scope="module")
def teachers(overrides) -> dict:
    """{kind: run folder} of a bag of words, an encoder and the stack of both."""
    train_here(*overrides, "run_name=words", mode="baseline")
    train_here(*overrides, "run_name=encoder")
    runs = config_of(overrides).run_folder.parent
    stack_runs([runs / "words", runs / "encoder"], runs / "stack")
    return {name: runs / name for name in ("words", "encoder", "stack")}


@pytest.fixture(scope="module")
def finished(overrides, teachers):
    """The run folder of a student of the bag of words."""
    return taught(overrides, teachers["words"], "run_name=finished")


def config_of(overrides: list[str], *more: str, teacher="any") -> Config:
    return cli.config_for("distill", PROJECT / "config.yaml", [*overrides, *more], teacher=str(teacher))


def taught(overrides: list[str], teacher, *more: str, code: int = 0):
    """The run folder of a student, or with a `code` the one line of a refused command."""
    result = train_here(*overrides, f"train_config.teacher={teacher}", *more, mode="distill", code=code)
    return result.stderr if code else config_of(overrides, *more).run_folder


def opened(overrides: list[str], teacher, *more: str) -> DistillationRun:
    config = config_of(overrides, *more, teacher=teacher)
    return DistillationRun.open(config, Devices(config))


# ---------------------------------------------------------------------------------------------------------------------
# The reviews, their targets and the loss


@pytest.mark.parametrize("more", [[], ["data_config.limit=100"], ["data_config.group_column=film"]])
def test_no_text_and_no_film_that_validates_or_tests_is_learned_from(overrides, more, tmp_path):
    train_here(*overrides, *more, f"output_dir={tmp_path}", "run_name=words", mode="baseline")
    config = config_of(overrides, *more, f"output_dir={tmp_path}", teacher=tmp_path / "words")
    data, split = prepare_student_data(config), load_split(config)
    whole, train = with_unlabelled(split), data.splits["train"]
    unlabelled = train.ids[train.ids >= LABELLED]
    assert train.ids[:len(split.ids_of["train"])].tolist() == split.ids_of["train"].tolist()
    read = whole.digests[train.ids]
    assert len(np.unique(read)) == len(read)
    assert not np.isin(data.digests, split.held_out).any()
    assert np.isin(read, data.digests).all()
    if split.groups is None:
        assert len(unlabelled) == (100 if more else UNLABELLED)
    else:
        assert not np.isin(whole.groups[train.ids], whole.groups[np.concatenate([split.ids_of[name] for name in (
            "valid", "test")])]).any()
        assert 0 < len(unlabelled) < UNLABELLED
    assert np.isnan(train.targets[train.ids >= LABELLED]).all()
    known = train.targets[train.ids < LABELLED]
    assert (known == np.eye(2)[split.reviews.labels[split.ids_of["train"]]]).all()
    assert data.splits["test"].targets is None
    assert data.fingerprint == split.fingerprint


def with_targets():
    """The explicit data of test_accumulation.py, whose reviews have several windows: half of the targets are soft."""
    dataset = explicit_data()
    soft = np.random.default_rng(1).dirichlet([1, 1], len(dataset))
    hard = np.arange(len(dataset)) % 2 == 0
    dataset.targets = np.where(hard[:, None], np.eye(2)[dataset.labels], soft).astype(np.float32)
    return dataset


def test_the_loss_is_the_cross_entropy_with_the_targets(encoder_folder):
    dataset, model = with_targets(), build_model(encoder_folder("bert"))
    rows = np.array([3, 8, 5, 9, 11, ~7])  # the last one only keeps processes in step
    batch = dataset.batch(rows)
    assert batch.pop("id").tolist() == [3, 8, 5, 9, 11, -1]
    assert len(batch["input_ids"]) > len(rows)  # some have several windows
    output = model(**batch, reduction="sum")
    expected = -(dataset.targets[rows[:-1]] * log_softmax(output.logits.detach().numpy(), axis=1)[:-1]).sum()
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert classes_of(batch["labels"]).tolist() == [*dataset.targets[rows[:-1]].argmax(axis=1), IGNORED]
    one_hot = torch.eye(2)[torch.tensor([0, 1, 1, 0, 1, 1])]
    hard, soft = (model(**batch | {"labels": labels}).loss for labels in (one_hot.argmax(dim=1), one_hot))
    assert hard.item() == pytest.approx(soft.item(), rel=1e-6)


def test_any_micro_batch_gives_the_same_parameters(encoder_folder):
    def after(micro_batch: int) -> tuple[dict, torch.Tensor]:
        model = build_model(encoder_folder("bert"))
        sums = train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), single_device(), with_targets(), 64,
                           micro_batch)
        return model.state_dict(), sums

    start, (whole, sums) = build_model(encoder_folder("bert")).state_dict(), after(64)
    assert distance(start, whole) > 1e-4
    cut, sums_of_cut = after(13)
    assert distance(whole, cut) < 1e-6
    assert sums.tolist() == pytest.approx(sums_of_cut.tolist(), rel=1e-6)


def test_two_processes_give_the_same_parameters(overrides, teachers):
    settings = ["train_config.effective_batch_size=16", "train_config.max_steps=4", "train_config.optimizer=sgd",
                "train_config.learning_rate=0.5", "model_config.encoder_dropout=0", "model_config.dropout_rate=0"]
    one = taught(overrides, teachers["words"], *settings, "run_name=one")
    arguments = [item for item in overrides if not item.startswith("data_config.batch_size")]
    launch(2, "main_accumulation.py", "--mode", "distill", "--teacher", str(teachers["words"]), *arguments, *settings,
           "data_config.batch_size=4", "run_name=two")
    weights = [load_file(folder / "best/model.safetensors") for folder in (one, one.with_name("two"))]
    assert distance(*weights) < 1e-6
    histories = [[json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
                 for folder in (one, one.with_name("two"))]
    for first, second in zip(*histories, strict=True):  # the train accuracy among them
        assert first == pytest.approx(second, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def test_the_student_learns_from_both_kinds_of_reviews(overrides, teachers, finished):
    measured = metrics_of(finished)
    assert (measured["test"]["n"], measured["test"]["accuracy"] > 0.9) == (36, True)
    assert measured["test"]["loss"] < metrics_of(teachers["encoder"])["test"]["loss"] / 2  # of 48 reviews alone
    assert measured["train"]["optimizer_steps"] == 3 * -(-(48 + UNLABELLED) // 16)
    run = opened(overrides, teachers["words"], "run_name=finished")
    targets = run.data.splits["train"].targets
    steps = [targets[rows].max(axis=1) == 1 for rows in run.sampler.effective_batches(0)]
    assert any(0 < is_hard.sum() < len(is_hard) for is_hard in steps)
    assert ((targets > 0) & (targets < 1)).all(axis=1).sum() == UNLABELLED
    seen = np.load(finished / "best" / "training_texts.npy")
    assert len(seen) == 48 + UNLABELLED
    assert np.isin(text_digests(run.data.splits["train"].texts.select(run.data.splits["train"].ids)), seen).all()


@pytest.mark.parametrize("kind", ["words", "encoder", "stack"])
def test_the_targets_are_what_any_kind_of_teacher_predicts(overrides, teachers, kind, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ROWS", 128)
    run = opened(overrides, teachers[kind], f"run_name=of-{kind}")
    train, model = run.data.splits["train"], open_classifier(teachers[kind] / "best", run.config, run.devices)
    rows = np.flatnonzero(train.ids >= LABELLED)
    texts = [train.text(number) for number in train.ids[rows]]
    expected = np.concatenate([softmax(model.logits(texts[start:start + 128]), axis=1)
                               for start in range(0, len(texts), 128)])
    assert (train.targets[rows] == expected.astype(np.float32)).all()


def test_nothing_needs_the_teacher_any_more(overrides, finished, tmp_path):
    """The student's model is a folder like any other run's, in a folder from which its teacher is gone."""
    folder = shutil.copytree(finished, tmp_path / "runs" / "finished")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(
        "teacher: " + str(finished.with_name("words")), "teacher: /gone"))
    there, before = [f"output_dir={tmp_path / 'runs'}", "run_name=finished"], metrics_of(folder)
    assert before["data"]["train"] == 48 + UNLABELLED
    train_here(*there, mode="test")
    after = metrics_of(folder)
    assert after.pop("tested_on") == before["environment"]
    assert after == before
    again = train_here(*overrides, *there, "train_config.teacher=/gone", mode="distill")
    assert "nothing was done again" in again.stdout
    labelled = expect(0, run_here(mode="predict", model=str(folder), text="gripping and moving")).stdout
    exported = str(tmp_path / "export")
    expect(0, run_here(mode="export", model=str(folder), formats=("transformers",), output=exported))
    assert expect(0, run_here(mode="predict", model=exported, text="gripping and moving")).stdout == labelled
    assert {path.name for path in (folder / "best").iterdir()} == {
        path.name for path in finished.with_name("encoder").joinpath("best").iterdir()}
    card = (finished / "best" / "README.md").read_text()
    assert "that the model words gave them" in card
    labels = {setting.label for setting in group_by_setting([read_result(finished.with_name(name)) for name in (
        "finished", "encoder")])}
    assert labels == {"teacher words", "no teacher"}


def test_labels_can_be_copied_from_one_student_to_the_next(overrides, teachers, finished, monkeypatch):
    """Not to one that is tested on what their teacher was trained on, nor labels of another teacher."""
    for name in ("copied", "mixed", "leaking"):
        shutil.copytree(finished / "teacher", finished.with_name(name) / "teacher")
    monkeypatch.setattr(distillation, "open_classifier", None)
    assert is_same_run(taught(overrides, teachers["words"], "run_name=copied"), finished)
    for teacher, *more in ((teachers["stack"], "run_name=mixed"),
                           ("/gone", "run_name=leaking", "data_config.split_seed=7")):
        assert "holds labels of another teacher, for other reviews or for another split" in taught(
            overrides, teacher, *more, code=2)


def test_labels_without_their_conditions_are_made_again(overrides, teachers, finished):
    folder = shutil.copytree(finished / "teacher", finished.with_name("bare") / "teacher")
    (folder / "manifest.json").unlink()
    (folder / "labels.json").unlink()
    np.save(folder / "00000001.npy", np.zeros((UNLABELLED, 2), np.float32))
    assert is_same_run(taught(overrides, teachers["words"], "run_name=bare"), finished)


def is_same_run(folder, other) -> bool:
    bits, wanted = bits_of(folder), bits_of(other)
    return all(bits[name] == wanted[name] for name in bits if name != "best/README.md")  # the card has the run's name


def test_stopped_while_the_student_learns_it_ends_with_the_same_bits(overrides, teachers, finished, monkeypatch):
    stopped = opened(overrides, teachers["words"], "run_name=stopped")
    stop_run_at(stopped.steps_per_epoch + 3, stopped, monkeypatch)  # in the second epoch
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "open_classifier", None)  # the labels are there
        taught(overrides, teachers["words"], "run_name=stopped")
    assert is_same_run(stopped.folder.path, finished)


@pytest.mark.parametrize("way", ["SIGTERM", "kill"])
def test_stopped_while_the_teacher_labels_it_ends_with_the_same_bits(overrides, teachers, finished, monkeypatch, way):
    """The labels of the bag of words do not depend on the chunks, and `finished` has had one."""
    monkeypatch.setattr(distillation, "CHUNK_ROWS", 64)
    name, of_words, labelled = f"run_name={way}", BagOfWordsLabeller.probabilities, []

    def interrupted(words, texts):
        labelled.append(len(texts))
        if len(labelled) == 3 and way == "kill":
            raise SystemExit(-9)
        if len(labelled) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return of_words(words, texts)

    monkeypatch.setattr(BagOfWordsLabeller, "probabilities", interrupted)
    monkeypatch.setattr(SIGNALS, "received", None)
    result = run_here(*overrides, name, f"train_config.teacher={teachers['words']}", mode="distill")
    assert result.returncode == {"SIGTERM": 143, "kill": -9}[way]
    assert "SIGTERM: the same command goes on labelling" in result.stdout or way == "kill"
    folder = config_of(overrides, name).run_folder
    assert len(list((folder / "teacher").glob("*.npy"))) == {"SIGTERM": 3, "kill": 2}[way]
    monkeypatch.setattr(SIGNALS, "received", None)
    taught(overrides, teachers["words"], name)
    assert len(labelled) == {"SIGTERM": 5, "kill": 6}[way]  # of five chunks; the one that a kill has cut comes again
    assert is_same_run(folder, finished)


def test_labels_of_another_teacher_are_not_mixed_in(overrides, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ROWS", 64)
    teacher, name = shutil.copytree(teachers["words"], tmp_path / "teacher"), "run_name=changed"
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "stop_if_asked", stop_at_once)
        assert run_here(*overrides, name, f"train_config.teacher={teacher}", mode="distill").returncode == 143
    shutil.rmtree(teacher)
    shutil.copytree(teachers["stack"], teacher)
    config = config_of(overrides, name, teacher=teacher)
    run = DistillationRun.open(config, Devices(config))
    expected = open_classifier(teacher / "best", config, run.devices).probabilities(
        [run.data.text(number) for number in run.data.splits["train"].ids[48:112]])
    assert (np.load(run.folder.path / "teacher" / "00000001.npy") == expected.astype(np.float32)).all()
    damaged = run.folder.path / "teacher" / "00000002.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert "00000002.npy is damaged" in taught(overrides, teacher, name, code=2)
    started_afresh = taught(overrides, teachers["words"], name, "train_config.resume=never", "train_config.max_steps=1")
    assert np.load(started_afresh / "teacher" / "00000002.npy").shape == (64, 2)


def stop_at_once(devices):
    raise StopRequested


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(("teacher", "more", "words"), [
    ("stack", ["data_config.split_seed=1"], "was trained on other reviews or another split"),
    ("stack", ["data_config.limit=60"], "was trained on other reviews or another split"),
    ("nowhere", [], "there is no trained model in"),
    ("../dataset", [], "there is no trained model in"),
    ("damaged", [], "it has changed since it was saved"),
    ("renamed", [], "has the classes neg, pos, and the reviews have 0, 1"),
    ("words", ["run_name=words", "train_config.resume=never", "train_config.overwrite=true"],
     "is the folder that the new run would write"),
    ("words", ["run_name=finished", "train_config.seed=1"], "train_config.seed: 42 -> 1"),
    ("stack", ["run_name=finished"], "train_config.teacher: "),
    ("words", ["data_config.dataset={labelled}"], "it has no unlabelled review"),
])
def test_refusals(overrides, teachers, finished, tmp_path, teacher, more, words):
    for name in ("damaged", "renamed"):
        shutil.copytree(teachers["words"], tmp_path / name)
    (tmp_path / "damaged/best/config.json").write_text("{}")
    config = tmp_path / "renamed/best/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "neg", "1": "pos"}}))
    seal(config.parent)
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    dataset = next(item for item in overrides if item.startswith("data_config.dataset=")).partition("=")[2]
    shutil.copy(f"{dataset}/train.jsonl", labelled / "train.jsonl")
    folder = teachers.get(teacher, tmp_path / teacher)
    runs = finished.parent
    before = sorted(runs.glob("[!.]*"))
    error = taught(overrides, folder, "run_name=x", *(item.format(labelled=labelled) for item in more), code=2)
    assert words in error
    assert error.count("\n") == 1
    assert sorted(runs.glob("[!.]*")) == before


def test_what_the_command_line_refuses(overrides, monkeypatch):
    def refused(mode: str, *more: str) -> str:
        with pytest.raises(UserError) as refusal:
            cli.config_for(mode, PROJECT / "config.yaml", [*overrides, *more])
        return str(refusal.value)

    assert "give --teacher FOLDER" in refused("distill")
    for mode, given in (("train", "teacher=x"), ("pretrain", "teacher=x"), ("train", "objective=distillation")):
        assert "--mode distill --teacher FOLDER" in refused(mode, f"train_config.{given}")
    assert "train_config.class_weights is 'balanced'" in refused("distill", "train_config.teacher=x",
                                                                 "train_config.class_weights=balanced")
    assert "does not name an encoder" in refused("distill", "train_config.teacher=x",
                                                 "model_config.model_name=bag-of-words")
    monkeypatch.setattr("sys.argv", ["main.py", "--mode", "distill", "--teacher", "runs/stack"])
    command = cli.read_command("", accumulates=False)
    chosen = command.config.train_config
    assert (chosen.teacher, chosen.objective) == ("runs/stack", "distillation")
    assert command.config.run_name == "distill-bert-base-uncased-len128-bs64-seed42"
