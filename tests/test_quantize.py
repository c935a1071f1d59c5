"""--int8: the head stays exact, and the file stays only if it labels validation reviews as the original does."""

import json

import onnx
import pytest
from conftest import run_here, train_here, write_reviews

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from suite.common import cli
from suite.inference import quantize
from utils import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    """The overrides and the folder of a finished run with 540 validation reviews."""
    folder = tmp_path_factory.mktemp("int8")
    overrides = [f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={write_reviews(folder / 'reviews.csv', rows=1200)}",
                 "data_config.text_column=review", "data_config.label_column=verdict", "data_config.max_len=32",
                 "data_config.batch_size=16", "data_config.split=[0.4,0.45,0.15]", "train_config.learning_rate=0.01",
                 "train_config.epochs=1", "train_config.device=cpu", "log_config.wandb_mode=disabled"]
    train_here(*overrides)
    return overrides, folder / "run"


def export(run, output, *more: str, formats=("onnx",)):
    return run_here(*run[0], *more, mode="export", int8=True, formats=formats, output=str(output))


def test_the_quantized_model_labels_as_the_original(run, tmp_path):
    result = export(run, tmp_path / "export", formats=("onnx", "transformers"))
    assert result.returncode == 0, result.stderr
    small, large = (tmp_path / "export" / "onnx" / name for name in ("model_quantized.onnx", "model.onnx"))
    assert small.stat().st_size < large.stat().st_size / 2
    assert "model_quantized.onnx: on 540 validation reviews" in result.stdout
    card = (tmp_path / "export" / "README.md").read_text()
    assert "a probability changes by at most 0.0" in card
    assert "between a review alone and in a batch by at most 0.0" in card
    assert 'dtype: "fp32" });    // "q8": in 8 bits' in card
    graph = onnx.load(small).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 12  # six matrices in each of two layers
    heads = [weights for weights in graph.initializer if weights.name.startswith("head.weight")]
    assert [weights.data_type for weights in heads] == [onnx.TensorProto.FLOAT]


def test_an_exclusion_that_does_not_take_is_noticed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "readers_of", lambda graph, weights: [])
    with pytest.raises(RuntimeError, match=r"has quantized head\.weight"):
        export(run, tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("guard", ["SAME_LABELS", "ACCURACY_LOST"])
def test_a_model_that_does_not_bear_it_leaves_no_file(run, tmp_path, monkeypatch, guard):
    monkeypatch.setattr(quantize, guard, {"SAME_LABELS": 1.01, "ACCURACY_LOST": -0.01}[guard])
    result = export(run, tmp_path / "export")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "--int8 costs this model too much: on 540 validation reviews" in line
    assert line.endswith("export it without --int8")
    assert not list(tmp_path.iterdir())


def test_too_few_or_other_reviews_are_refused(run, tmp_path):
    for more, expected in (
            (["data_config.limit=1000"], "is not what"),
            (["data_config.split_seed=7"], "is not what"),
            ([f"data_config.dataset={write_reviews(tmp_path / 'other.csv', rows=1200, seed=1)}"], "is not what")):
        result = export(run, tmp_path / "export", *more)
        assert (result.returncode, expected in result.stderr) == (2, True), result.stderr
    monkeypatched = quantize.FEWEST
    try:
        quantize.FEWEST = 541
        result = export(run, tmp_path / "export")
    finally:
        quantize.FEWEST = monkeypatched
    assert "checked on at least 541 validation reviews, and this run has 540" in result.stderr
    assert not (tmp_path / "export").exists()


def test_an_export_knows_its_reviews_too(run):
    assert run_here(*run[0], mode="export", formats=("transformers",)).returncode == 0
    more = run_here(*run[0], "data_config.split_seed=7", mode="export", int8=True, model=str(run[1] / "export"))
    assert (more.returncode, "is not what" in more.stderr) == (2, True), more.stderr


def test_the_run_s_own_settings_are_read(run, monkeypatch):
    for model in (None, str(run[1]), str(run[1] / "best")):
        named = [f"output_dir={run[1].parent}", "run_name=run"] if model is None else []
        config = cli.config_for("export", "config.yaml", named, model, int8=True)
        assert (config.data_config.text_column, config.data_config.split) == ("review", [0.4, 0.45, 0.15])
    with pytest.raises(UserError, match="--int8 is checked on the validation reviews of the model's run"):
        cli.config_for("export", "config.yaml", [], str(run[1].parent), int8=True)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--format", "transformers", "--int8"], "--int8 is made of the ONNX"),
    (["--format", "onnx,onnx"], "each at most once"),
    (["--format", "tflite"], "'tflite' is not one of onnx, transformers"),
])
def test_wrong_options_are_one_line(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main.py", "--mode", "export", *arguments])
    with pytest.raises(SystemExit):
        cli.read_command("", accumulates=False)
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line


def test_its_config_reads_as_the_export_s(run, tmp_path):
    assert export(run, tmp_path / "export").returncode == 0
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["architectures"], config["max_len"]) == (["BertForSequenceClassification"], 32)
