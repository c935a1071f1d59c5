"""--mode pretrain: what it reads and masks, exact steps, resuming, and that fine-tuning starts with its weights."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from accumulation_worker import distance
from conftest import ENCODERS, PROJECT, free_port, run_here, run_script, stop_run_at, train_here
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Data2VecTextConfig,
    MPNetConfig,
    pipeline,
)

import main
from suite.common import cli
from suite.common.devices import Devices
from suite.common.pages import write_pretrained_card
from suite.comparison.results import read_result
from suite.encoders.loading import load_encoder_config, new_model
from suite.encoders.masked_lm import MaskedLanguageModel, new_masked_lm
from suite.reviews.classes import load_reviews
from suite.reviews.splitting import load_split, text_digests
from suite.training.pretraining import PretrainingRun, prepare_texts
from utils import Config, DataConfig, ModelConfig, UserError, load_config

SMALL = ENCODERS["bert"].to_dict()
SMALL = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                     "intermediate_size", "max_position_embeddings")}
FAMILIES = ENCODERS | {"albert": AlbertConfig(**SMALL, embedding_size=16), "mpnet": MPNetConfig(**SMALL)}


def write_splits(folder, kind: str, **contents: str) -> None:
    """A dataset's folder with a file of this kind for each split."""
    for name, content in contents.items():
        (folder / f"{name}.{kind}").write_text(content)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {name}\n    path: {name}.{kind}\n" for name in contents) + "---\n")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, encoder_folder) -> list[str]:
    """Settings of a run of seconds on 120 labelled texts and an unlabelled split: 60 texts of 1 to 5 windows, 5 of them
    twice, and copies of 40 labelled ones."""
    folder = tmp_path_factory.mktemp("dataset")
    generator = random.Random(0)
    words = "the film was a story of this and that with some gripping people and a dull moving end".split()
    texts = [" ".join([*generator.choices(words, k=generator.randint(3, 45)), f"number {row}"]) for row in range(180)]
    labelled = [{"text": text, "label": row % 2} for row, text in enumerate(texts[:120])]
    unlabelled = [{"text": text, "label": -1} for text in (*texts[120:], *texts[175:], *texts[:40])]
    write_splits(folder, "jsonl", **{name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in (
        ("train", labelled), ("unsupervised", unlabelled))})
    return [f"output_dir={tmp_path_factory.mktemp('runs')}", f"data_config.dataset={folder}", "data_config.max_len=14",
            f"model_config.model_name={encoder_folder('bert')}", "data_config.batch_size=32", "train_config.epochs=2",
            "train_config.learning_rate=0.01", "train_config.mixed_precision=no", "train_config.device=cpu",
            "train_config.save_every_steps=4", "log_config.wandb_mode=disabled"]


@pytest.fixture(scope="module")
def finished(overrides):
    """(what it printed, the run folder) of a finished run."""
    result = train_here(*overrides, "run_name=finished", mode="pretrain")
    return result.stdout, config_of(overrides, "run_name=finished").run_folder


def config_of(overrides: list[str], *more: str) -> Config:
    return cli.config_for("pretrain", PROJECT / "config.yaml", [*overrides, *more])


def opened(overrides: list[str], *more: str) -> PretrainingRun:
    config = config_of(overrides, *more)
    return PretrainingRun.open(config, Devices(config))


# ---------------------------------------------------------------------------------------------------------------------
# Texts and masks


@pytest.mark.parametrize("limit", [None, 50])
def test_no_valid_or_test_text_is_read_and_each_other_text_once(overrides, limit):
    data = prepare_texts(config_of(overrides, f"data_config.limit={limit or 'null'}"))
    assert len(data.held_out) == (24 if limit is None else 10)
    assert not np.isin(data.digests, data.held_out).any()
    # All training reviews, and of the 60 + 5 + 40 unlabelled rows those that are neither twice there nor held out
    assert len(data.digests) == len(np.unique(data.digests))
    assert len(data.digests) == 96 + 60 if limit is None else 40 < len(data.digests) <= 40 + 50
    reviews = load_reviews(config_of(overrides).data_config, 2)
    texts = [*reviews.table["text"], *(text for part in reviews.unlabelled for text in part.table["text"])]
    digests = np.concatenate([text_digests(part.table) for part in (*reviews.parts, *reviews.unlabelled)])
    found = {name: set(split.ids.tolist()) for name, split in data.splits.items()}
    assert not found["train"] & found["valid"]
    assert len(found["valid"]) == round(0.05 * len(data.digests))
    assert sorted(digests[[*found["train"], *found["valid"]]].tolist()) == sorted(data.digests.tolist())
    tokenizer, split = data.tokenizer, data.splits["train"]  # and of each text, everything is read
    for text_id in found["train"]:
        windows = [split.tokens[split.offsets[place]:split.offsets[place + 1]]
                   for place in split.first_windows[split.ids == text_id]]
        assert max(map(len, windows)) <= 14
        assert np.concatenate([window[1:-1] for window in windows]).tolist() == tokenizer(
            texts[text_id], add_special_tokens=False)["input_ids"]


def test_training_reviews_that_are_cut_are_not_read(overrides):
    """Except as unlabelled texts, if they stand there, too: else a curve over training sizes would be too good."""
    config = config_of(overrides, "data_config.train_limit=40")
    whole, data, labelled = prepare_texts(config_of(overrides)), prepare_texts(config), load_split(config)
    read = np.concatenate([split.ids for split in data.splits.values()])
    assert set(read[read < len(labelled.digests)]) == set(labelled.ids_of["train"])
    assert len(labelled.ids_of["train"]) == 40
    assert data.record["held_out"] == whole.record["held_out"]


def masked_words(batches) -> dict[tuple, tuple]:
    """{(masked tokens of a window, its text): its labels by place}, whatever batches the windows are in."""
    found = {}
    for batch in batches:
        labels = torch.full(batch["input_ids"].shape, -1).flatten()
        labels[batch["masked"]] = batch["labels"]
        lengths = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1)
        for row, length in enumerate(lengths):
            key = (*batch["input_ids"][row, :length].tolist(), batch["id"][row].item())
            found[key] = tuple(labels.view(batch["input_ids"].shape)[row, :length].tolist())
    return found


def test_masks_depend_on_seed_epoch_and_step_alone(overrides):
    data = prepare_texts(config_of(overrides))
    train, valid = data.splits["train"], data.splits["valid"]
    rows = np.random.default_rng(0).permutation(len(train))[:100]
    _, whole, count, _ = train.step(rows, [rows], (42, 0, 3))
    _, cut, again, _ = train.step(rows, [rows[60:], rows[:7], rows[7:60]], (42, 0, 3))
    assert (count, masked_words(whole)) == (again, masked_words(cut))
    assert sum(len(batch["labels"]) for batch in cut) == count
    other = train.step(rows, [rows, ~rows[:1]], (42, 0, 4)).micro_batches
    assert masked_words(whole) != masked_words(other[:1])
    assert len(other[1]["labels"]) == 0  # a row that only keeps processes in step
    tokens = sum(train.lengths[rows] - 2)
    assert 0.1 < count / tokens < 0.2
    is_mask = whole[0]["input_ids"].flatten()[whole[0]["masked"]] == data.tokenizer.mask_token_id
    assert 0.7 < is_mask.float().mean() < 0.9
    assert not torch.isin(whole[0]["labels"], torch.tensor(data.tokenizer.all_special_ids)).any()
    everything = np.arange(len(valid))
    assert masked_words([valid.batch(everything)]) == masked_words(
        [valid.batch(everything[5:]), valid.batch(everything[:5])])


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_a_fresh_head_holds_no_number_that_lay_in_memory(tmp_path, encoder_folder):
    """transformers leaves biases of some families unset where the checkpoint has none: here torch fills them."""
    shutil.copytree(encoder_folder("roberta"), tmp_path / "model")
    AutoModel.from_config(Data2VecTextConfig(**SMALL)).save_pretrained(tmp_path / "model")
    config = ModelConfig(str(tmp_path / "model"))
    torch.use_deterministic_algorithms(True)  # new memory is NaN now
    try:
        model = new_masked_lm(config, load_encoder_config(config))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not model.model.lm_head.bias.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_masked_places_are_those_of_the_whole_model(family):
    torch.manual_seed(0)
    whole = AutoModelForMaskedLM.from_config(FAMILIES[family]).eval()
    input_ids, mask = torch.randint(5, 2500, (3, 17)), torch.ones(3, 17, dtype=torch.int64)
    mask[1, 9:] = 0
    labels, masked = torch.full((3, 17), -100), torch.tensor([0, 3, 18, 40])
    labels.view(-1)[masked] = input_ids.view(-1)[masked]
    with torch.no_grad():
        expected = whole(input_ids=input_ids, attention_mask=mask, labels=labels)
        found = MaskedLanguageModel(whole)(input_ids, masked, mask, labels=labels.view(-1)[masked])
    assert torch.allclose(found.logits, expected.logits.flatten(0, 1)[masked], atol=1e-6)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_the_head_is_fresh_where_the_checkpoint_has_none_and_else_its_own(overrides, finished, capsys):
    printed, folder = finished
    assert printed.count("has no head for masked words: a fresh one is trained") == 1
    config = ModelConfig(model_name=str(folder / "best"))
    weights = new_masked_lm(config, load_encoder_config(config)).state_dict()
    saved = load_file(folder / "best" / "model.safetensors")
    assert all(torch.equal(weights[f"model.{name}"], tensor) for name, tensor in saved.items())
    assert any(name.startswith("cls.") for name in saved)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# The run


def settings(batch_size: int) -> list[str]:
    """Effective batches of 160 windows, of which the last one of an epoch is smaller; no dropout."""
    return ["train_config.effective_batch_size=160", f"data_config.batch_size={batch_size}", "train_config.epochs=1",
            "train_config.optimizer=sgd", "train_config.learning_rate=0.5", "model_config.encoder_dropout=0"]


@pytest.fixture(scope="module")
def whole_batches(overrides):
    """A run that trained on whole effective batches."""
    run = opened(overrides, *settings(160), "run_name=whole")
    main.train(run)
    return run


def test_any_micro_batch_gives_the_same_parameters(overrides, whole_batches):
    cut = opened(overrides, *settings(8), "run_name=cut")
    start = {name: tensor.clone() for name, tensor in cut.model.state_dict().items()}
    main.train(cut)
    assert distance(start, cut.model.state_dict()) > 1e-3
    assert distance(whole_batches.model.state_dict(), cut.model.state_dict()) < 1e-6
    assert cut.progress.best_metrics == pytest.approx(whole_batches.progress.best_metrics, rel=1e-5)


def test_a_step_is_that_of_the_mean_over_all_masked_words(overrides):
    run = opened(overrides, *settings(8), "run_name=step", "train_config.max_steps=1")
    rows = run.sampler.effective_batches(0)[0]
    model = AutoModelForMaskedLM.from_config(run.model.config)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in run.model.state_dict().items()})
    [batch] = run.data.splits["train"].step(rows, [rows], (42, 0, 0)).micro_batches
    labels = torch.full(batch["input_ids"].shape, -100)
    labels.view(-1)[batch["masked"]] = batch["labels"]
    model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
    main.train(run)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        assert torch.allclose(run.model.state_dict()[f"model.{name}"], expected, atol=1e-6), name


def test_two_processes_give_the_same_parameters(overrides, whole_batches):
    result = run_script("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
                        "main_accumulation.py", "--mode", "pretrain", *overrides, *settings(10), "run_name=two")
    assert result.returncode == 0, result.stdout + result.stderr
    runs = whole_batches.folder.path.parent
    weights = [load_file(runs / name / "best/model.safetensors") for name in ("whole", "two")]
    assert distance(*weights) < 1e-6
    metrics = json.loads((runs / "two" / "metrics.json").read_text())
    assert metrics["valid"] == pytest.approx(whole_batches.progress.best_metrics | {"epoch": 1}, rel=1e-5)


def test_stopped_and_started_again_it_ends_with_the_same_bits(overrides, finished, monkeypatch):
    stopped = opened(overrides, "run_name=stopped")
    stop_run_at(stopped.steps_per_epoch + 3, stopped, monkeypatch)  # in the second epoch
    result = run_here(*overrides, "run_name=stopped", mode="pretrain")
    assert "continuing from" in result.stdout
    for name in ("best/model.safetensors", "best/pretraining_texts.npy", "history.jsonl"):
        assert (stopped.folder.path / name).read_bytes() == (finished[1] / name).read_bytes(), name


def test_the_run_folder(overrides, finished, tmp_path):
    _, folder = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"train", "valid", "data", "environment"}
    valid = metrics["valid"]
    assert valid["perplexity"] == pytest.approx(np.exp(valid["loss"]))
    validation = prepare_texts(config_of(overrides)).splits["valid"]
    assert valid["n"] == len(validation.batch(np.arange(len(validation)))["labels"])
    losses = [record["valid/loss"] for record in map(json.loads, (folder / "history.jsonl").read_text().splitlines())
              if "valid/loss" in record]
    assert valid["loss"] == min(losses) < 7  # an even guess has log 2500 = 7.8
    assert "auto_map" not in (folder / "best" / "config.json").read_text()
    card, fresh = (folder / "best" / "README.md").read_text(), config_of(overrides)
    assert ", pretrained further by masked" in card
    fresh.model_config.pretrained, fresh.model_config.model_name = False, "owner/encoder"
    write_pretrained_card(tmp_path, fresh, valid, 3)
    assert ", pretrained from random weights by masked" in (tmp_path / "README.md").read_text()
    assert "base_model" not in (tmp_path / "README.md").read_text()
    assert pipeline("fill-mask", model=str(folder / "best"))("the [MASK] was dull")[0]["token_str"]
    before = (folder / "metrics.json").read_bytes()
    again = run_here(*overrides, "run_name=finished", mode="pretrain")
    assert "nothing was done again" in again.stdout
    assert (again.returncode, (folder / "metrics.json").read_bytes()) == (0, before)
    assert config_of(overrides).run_name.startswith("pretrain-")


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning from it, and what is refused


def test_fine_tuning_starts_with_its_weights(overrides, finished):
    best = finished[1] / "best"
    started = new_model(ModelConfig(model_name=str(best))).encoder.state_dict()
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, saved[f"bert.{name}"]) for name, tensor in started.items())
    fine_tuning = [*overrides, f"model_config.model_name={best}", "train_config.epochs=1"]
    result = train_here(*fine_tuning)
    assert "finished-len14-bs32-seed42: 96 reviews to train on" in result.stdout
    other_split = run_here(*fine_tuning, "data_config.split_seed=1", "run_name=other_split")
    assert "texts that are validated or tested on here" in other_split.stderr
    assert other_split.returncode == 2
    assert not (finished[1].with_name("other_split")).exists()


def test_fine_tuning_and_pretraining_again_have_different_names(overrides, finished):
    again = [*overrides, f"model_config.model_name={finished[1].with_name('pretrain-x') / 'best'}"]
    names = {cli.config_for(mode, PROJECT / "config.yaml", again).run_name for mode in ("train", "pretrain")}
    assert names == {"pretrain-x-len14-bs32-seed42", "pretrain-pretrain-x-len14-bs32-seed42"}


@pytest.mark.parametrize(("kind", "label"), [("csv", "-1"), ("csv", " "), ("jsonl", "-1"), ("jsonl", "null")])
def test_a_split_without_labels_is_unlabelled_whatever_its_name(tmp_path, kind, label):
    head, row = ("text,label\n", "{},{}\n") if kind == "csv" else ("", '{{"text": "{}", "label": {}}}\n')
    write_splits(tmp_path, kind, train=head + "".join(row.format(f"labelled {n}", n % 2) for n in range(30)),
                 extra=head + "".join(row.format(f"unlabelled {n}", label) for n in range(5)))
    reviews = load_reviews(DataConfig(dataset=str(tmp_path)), 2)
    assert (len(reviews.table), [len(part.table) for part in reviews.unlabelled]) == (30, [5])


@pytest.mark.parametrize(("mode", "more", "words"), [
    ("train", ["run_name=finished"], "train_config.objective: masked_lm -> classification"),
    ("test", ["run_name=finished"], "it predicts masked words and has no classes"),
    ("predict", ["run_name=finished"], "it predicts masked words and has no classes"),
    ("pretrain", ["run_name=finished", "train_config.seed=1"], "train_config.seed: 42 -> 1"),
    ("pretrain", ["run_name=x", "model_config.model_name={unmasked}"], "has no mask token"),
    ("pretrain", ["run_name=x", "model_config.model_name={damaged}"], "damaged: it has changed"),
    ("pretrain", ["run_name=x", "model_config.model_name={best}", "data_config.split_seed=1"], "was trained on"),
    ("train", ["run_name=x", "model_config.model_name={best}", "model_config.pretrained=false"], "pretrained is false"),
    ("pretrain", ["run_name=x", "data_config.text_column=label"], "are both 'label'"),
])
def test_refusals(overrides, finished, encoder_folder, tmp_path, mode, more, words):
    folders = {name: shutil.copytree(source, tmp_path / name) for name, source in (
        ("unmasked", encoder_folder("bert")), ("damaged", finished[1] / "best"), ("best", finished[1] / "best"))}
    tokenizer = AutoTokenizer.from_pretrained(folders["unmasked"])
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folders["unmasked"])
    (folders["damaged"] / "config.json").write_text((folders["damaged"] / "config.json").read_text() + " ")
    before = sorted(finished[1].parent.glob("[!.]*"))
    try:
        result = run_here(*overrides, *(item.format(**folders) for item in more), mode=mode, text="A film.")
        error = result.stderr
    except UserError as refusal:  # from the command line, before anything is imported
        error = str(refusal)
    assert words in error
    assert "Traceback" not in error
    assert sorted(finished[1].parent.glob("[!.]*")) == before


def test_the_objective_is_set_by_the_mode_alone(overrides):
    with pytest.raises(UserError, match="give --mode pretrain"):
        cli.config_for("train", PROJECT / "config.yaml", ["train_config.objective=masked_lm"])
    config = cli.config_for("pretrain", PROJECT / "config.yaml", ["train_config.objective=classification"])
    assert (config.pretrains, config.train_config.best_metric) == (True, "loss")
    assert not load_config(PROJECT / "config.yaml").pretrains


def test_compare_says_what_it_is(finished):
    with pytest.raises(UserError, match="holds a pretraining run"):
        read_result(finished[1])
