"""--int8: the head stays exact, and the file stays only if it labels validation reviews as the original does."""

import functools
import json

import pytest
from conftest import expect, run_here, train_here, write_reviews

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnxruntime.quantization

from suite.common import cli
from suite.common.devices import Devices
from suite.inference import onnx_file
from suite.inference.classifier import Classifier
from utils import UserError, load_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    """The overrides and the folder of a finished run with 540 validation reviews, and its export with everything."""
    folder = tmp_path_factory.mktemp("int8")
    overrides = [f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={write_reviews(folder / 'reviews.csv', rows=1200)}",
                 "data_config.text_column=review", "data_config.label_column=verdict", "data_config.max_len=32",
                 "data_config.batch_size=16", "data_config.split=[0.4,0.45,0.15]", "train_config.learning_rate=0.01",
                 "train_config.epochs=1", "train_config.device=cpu", "log_config.wandb_mode=disabled"]
    train_here(*overrides)
    result = expect(0, run_here(*overrides, mode="export", int8=True, formats=("onnx", "transformers")))
    return overrides, folder / "run", result.stdout


def test_the_quantized_model_labels_as_the_original(run):
    _, folder, printed = run
    small, large = (folder / "export" / "onnx" / name for name in ("model_quantized.onnx", "model.onnx"))
    assert small.stat().st_size < large.stat().st_size / 2
    assert "model_quantized.onnx: on 540 validation reviews" in printed
    card = (folder / "export" / "README.md").read_text()
    assert "a probability changes by at most 0.0" in card
    assert "between a review alone and in a batch by at most 0.0" in card
    graph = onnx.load(small).graph
    heads = [weights for weights in graph.initializer if weights.name.startswith("head.weight")]
    assert [weights.data_type for weights in heads] == [onnx.TensorProto.FLOAT]
    config = json.loads((folder / "export" / "config.json").read_text())
    assert (config["architectures"], config["max_len"]) == (["BertForSequenceClassification"], 32)


@pytest.fixture
def write_int8(run, tmp_path):
    """write_int8(): the comparison of the run's export with its 8 bits, in a folder of this test's own."""
    overrides, folder, _ = run
    config = load_config("config.yaml", overrides)
    classifier = Classifier(folder / "best", config, Devices(config))
    return lambda: onnx_file.write_int8(folder / "export" / "onnx" / "model.onnx", tmp_path / "int8.onnx", classifier,
                                        *onnx_file.load_validation(config, classifier))


def test_an_exclusion_that_does_not_take_is_noticed(write_int8, monkeypatch):
    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", functools.partial(
        lambda quantize, *files, nodes_to_exclude, **options: quantize(*files, **options),
        onnxruntime.quantization.quantize_dynamic))
    with pytest.raises(RuntimeError, match="has quantized the head"):
        write_int8()


@pytest.mark.parametrize(("guard", "value"), [("SAME_LABELS", 1.01), ("ACCURACY_LOST", -0.01)])
def test_a_model_that_does_not_bear_it_is_refused(write_int8, monkeypatch, guard, value):
    monkeypatch.setattr(onnx_file, guard, value)
    with pytest.raises(UserError, match="^--int8 costs this model too much: on 540 validation reviews.* export it "
                                        "without --int8$"):
        write_int8()


@pytest.mark.parametrize(("more", "reason"), [
    (["data_config.limit=1000"], "is not what"), (["data_config.split_seed=7"], "is not what"),
    (["data_config.dataset=OTHER"], "is not what"), ([], "on at least 541 validation reviews, and this run has 540")])
@pytest.mark.parametrize("model", ["best", "export"])  # an export knows its reviews, too
def test_too_few_or_other_reviews_are_refused(run, tmp_path, monkeypatch, more, reason, model):
    """The comparison would be made on reviews that the model was trained on."""
    monkeypatch.setattr(onnx_file, "FEWEST", 541)
    other = write_reviews(tmp_path / "other.csv", rows=1200, seed=1)
    result = expect(2, run_here(*run[0], *(item.replace("OTHER", str(other)) for item in more), mode="export",
                                int8=True, model=str(run[1] / model), output=str(tmp_path / "export")))
    assert reason in result.stderr
    assert not (tmp_path / "export").exists()


def test_the_run_s_own_settings_are_read(run):
    for model in (None, str(run[1]), str(run[1] / "best")):
        named = [f"output_dir={run[1].parent}", "run_name=run"] if model is None else []
        config = cli.config_for("export", "config.yaml", named, model, int8=True)
        assert (config.data_config.text_column, config.data_config.split) == ("review", [0.4, 0.45, 0.15])
    with pytest.raises(UserError, match="--int8 is checked on the validation reviews of the model's run"):
        cli.config_for("export", "config.yaml", [], str(run[1].parent), int8=True)
