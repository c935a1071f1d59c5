"""What mixed_precision=auto decides: fp32 or bf16 by the CPU, in each process, and for a whole run.

These tests hold two promises: the same command ends with the same bits after a stop, and an optimizer step is the mean
over its effective batch, on either kind of CPU.
"""

import csv
import re
import shutil

import pytest
import torch
from conftest import PROJECT, content_of, differing_files, metrics_of, run_script, stop_at, train_here
from transformers import AutoModel, DebertaConfig

from suite.common.devices import pick_precision
from suite.common.storage import read_json
from suite.inference import classifier, labelling

PICKED = {"fp32": "no", "bf16": "bf16"}
READER = f"""
import sys, torch
sys.path.insert(0, {str(PROJECT)!r})
from suite.common.devices import pick_precision
print(pick_precision("auto", torch.device("cpu")))
"""


def test_the_tests_and_their_children_believe_in_the_same_cpu(cpu, tmp_path):
    """Or tests in automatic precision would prove one kind of CPU alone, that of the machine. A fresh child and one
    that is forked."""
    (tmp_path / "reader.py").write_text(READER)
    assert pick_precision("auto", torch.device("cpu")) == PICKED[cpu]
    for fresh in {False, cpu == "bf16"}:
        assert run_script(str(tmp_path / "reader.py"), fresh=fresh).stdout.strip() == PICKED[cpu]


@pytest.fixture
def automatic(overrides) -> list[str]:
    return [*overrides, "train_config.mixed_precision=auto"]


def test_a_run_in_automatic_precision_ends_with_the_same_bits_after_a_stop(automatic, tmp_path, cpu, monkeypatch):
    """And is the run of the precision that auto has picked, to the last bit."""
    stop_at(13, [*automatic, "run_name=stopped"], monkeypatch)
    assert "continuing from" in train_here(*automatic, "run_name=stopped").stdout
    train_here(*automatic, "run_name=whole", f"train_config.mixed_precision={PICKED[cpu]}")
    stopped, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    assert differing_files(stopped, whole) == []
    assert metrics_of(stopped)["environment"]["precision"] == PICKED[cpu]
    assert metrics_of(stopped)["test"]["accuracy"] == 1.0


def test_a_run_is_not_continued_in_another_precision(automatic, tmp_path, cpu, monkeypatch):
    """The same command ends with the same bits, or with one line: never half in bf16 and half in fp32."""
    stop_at(13, automatic, monkeypatch)
    before, [other] = content_of(tmp_path / "runs"), {"fp32", "bf16"} - {cpu}
    monkeypatch.setenv("CPU_OF_TESTS", other)
    [line] = train_here(*automatic, code=2).stderr.splitlines()
    assert re.search(rf"was trained on cpu \({cpu}.*\), and would go on with cpu \({other}.*\) here: finish", line)
    assert content_of(tmp_path / "runs") == before


def test_pretraining_takes_the_precision_that_auto_picks(automatic, tmp_path, cpu):
    for name, precision in (("auto", "auto"), ("picked", PICKED[cpu])):
        train_here(*automatic, f"run_name={name}", f"train_config.mixed_precision={precision}", mode="pretrain")
    auto, picked = ((tmp_path / "runs" / name / "history.jsonl").read_bytes() for name in ("auto", "picked"))
    assert auto == picked


def test_an_encoder_that_knows_fp32_alone_trains_and_labels_in_bf16(overrides, tmp_path, encoder_folder, reviews_file):
    """Its head computes in bf16, the encoder in fp32, in training and with the cast weights of a labelling job."""
    folder = shutil.copytree(encoder_folder("deberta-v3"), tmp_path / "deberta")
    torch.manual_seed(0)
    AutoModel.from_config(DebertaConfig.from_dict(read_json(folder / "config.json") | {"model_type": "deberta"})
                          ).save_pretrained(folder)
    settings = [*overrides, f"model_config.model_name={folder}"]
    assert "cpu (bf16" in train_here(*settings, "train_config.mixed_precision=bf16").stdout
    found = []
    for precision in ("no", "bf16"):
        train_here(*settings, f"train_config.mixed_precision={precision}", mode="predict", input=str(reviews_file),
                   output=str(tmp_path / f"{precision}.csv"))
        with open(tmp_path / f"{precision}.csv", newline="") as file:
            found.append([float(row["probability_good"]) for row in csv.DictReader(file)])
    assert found[1] == pytest.approx(found[0], abs=0.003)


def test_labelling_says_what_the_test_said(automatic, tmp_path, reviews_file, cpu):
    """Whatever shares a batch with a review: in bf16, sums that round in another order move a probability further."""
    train_here(*automatic)
    train_here(*automatic, mode="predict", input=str(reviews_file), output=str(tmp_path / "labelled.csv"))
    with open(tmp_path / "labelled.csv", newline="") as labelled, open(
            tmp_path / "runs" / "run" / "test_predictions.csv", newline="") as tested:
        rows, expected = list(csv.DictReader(labelled)), list(csv.DictReader(tested))
    assert len(expected) == 20
    for row in expected:
        again = rows[int(row["id"])]
        assert again["predicted"] == row["predicted"]
        assert float(again["probability_good"]) == pytest.approx(
            float(row["probability_good"]), abs={"fp32": 1e-6, "bf16": 2e-3}[cpu])


def test_a_labelling_job_is_not_continued_in_another_precision(automatic, tmp_path, reviews_file, cpu, monkeypatch):
    """No labelled file is half of one precision and half of another."""
    train_here(*automatic)
    monkeypatch.setattr(labelling, "CHUNK_ROWS", 64)
    calls, label = [], classifier.Classifier.probabilities

    def stopping(self, texts):
        calls.append(texts)
        if len(calls) == 2:
            raise SystemExit(130)
        return label(self, texts)

    monkeypatch.setattr(classifier.Classifier, "probabilities", stopping)
    job = {"mode": "predict", "input": str(reviews_file), "output": str(tmp_path / "labelled.csv")}
    train_here(*automatic, code=130, **job)
    [other] = {"fp32", "bf16"} - {cpu}
    monkeypatch.setenv("CPU_OF_TESTS", other)
    [line] = train_here(*automatic, code=2, **job).stderr.splitlines()
    assert "holds the rows of an interrupted job with another precision" in line
    monkeypatch.setenv("CPU_OF_TESTS", cpu)
    assert "going on: 1 chunks" in train_here(*automatic, **job).stdout
