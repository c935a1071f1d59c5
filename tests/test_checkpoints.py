"""The model that is trained is the checkpoint's: every layout in which encoders are published gives the original's
hidden states, bit for bit, and a weight of the encoder that would be left unread is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ENCODERS, run_here
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from suite.encoders.loading import load_encoder_config, load_model, new_model
from suite.encoders.masked_lm import new_masked_lm
from suite.encoders.tokenizers import load_tokenizer
from utils import ModelConfig, UserError

HEADS = (AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification,
         AutoModelForQuestionAnswering, AutoModelForTokenClassification)
INPUTS = torch.randint(5, 1200, (2, 12), generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path, encoder: str, change, kind=AutoModel, **settings) -> Path:
    """`folder` with the encoder's weights, loaded as `kind`, saved after `change(name, tensor) -> {name: tensor}`."""
    torch.manual_seed(1)
    kind.from_pretrained(encoder).save_pretrained(folder)
    load_tokenizer(encoder).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {key: value for name, tensor in load_file(path).items() for key, value in change(name, tensor).items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@torch.no_grad()
def hidden(encoder) -> torch.Tensor:
    return encoder.eval()(input_ids=INPUTS).last_hidden_state


def assert_same_hidden_states(folder, reference) -> None:
    model = new_model(ModelConfig(str(folder), pooling="mean"))  # with cls, it would compute the first token alone
    assert torch.equal(hidden(model.encoder), hidden(reference))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_checkpoint_with_any_head_gives_the_encoder_that_it_holds(encoder_folder, tmp_path, name, capsys):
    for kind in HEADS:
        if type(ENCODERS[name]) in kind._model_mapping:
            folder = checkpoint(tmp_path / kind.__name__, encoder_folder(name), lambda key, tensor: {key: tensor}, kind)
            assert_same_hidden_states(folder, AutoModel.from_pretrained(encoder_folder(name)))
            config = ModelConfig(str(folder))
            new_masked_lm(config, load_encoder_config(config))
    assert "unread" not in capsys.readouterr().out


def as_published(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The names of Google's first checkpoints, and the tensors that they have besides the encoder's."""
    name = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    more = {"bert.embeddings.position_ids": torch.arange(66)[None], "cls.seq_relationship.bias": torch.zeros(2),
            "bert.pooler.dense.bias": torch.zeros(32)} if key == "cls.predictions.bias" else {}
    return {name: tensor} | more


def test_the_first_layouts_of_bert_give_the_same_hidden_states(encoder_folder, tmp_path):
    reference = AutoModel.from_pretrained(encoder_folder("bert"))
    folder = checkpoint(tmp_path / "float32", encoder_folder("bert"), as_published, AutoModelForMaskedLM)
    names = load_file(folder / "model.safetensors")
    assert {"bert.embeddings.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.beta"} < names.keys()
    assert_same_hidden_states(folder, reference)
    folder = checkpoint(tmp_path / "bf16", encoder_folder("bert"), lambda key, tensor: {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in as_published(key, tensor).items()}, AutoModelForMaskedLM)
    assert_same_hidden_states(folder, reference.bfloat16().float())


def beside(suffix: str, values: torch.Tensor):
    """Leaves every tensor as it is, and puts another one beside each query."""
    return lambda key, tensor: {key: tensor} | (
        {key.replace("query.weight", suffix): values.clone()} if key.endswith("query.weight") else {})


UNREAD = {
    "relative positions": (beside("distance_embedding.weight", torch.ones(131, 16)), "self.distance_embedding.weight"),
    "LoRA": (beside("query.lora_A.default.weight", torch.ones(8, 32)), "query.lora_A.default.weight"),
    "LoRA around its layer": (lambda key, tensor: {key.replace("query.", "query.base_layer."): tensor},
                              "query.base_layer.bias"),
    "adapters": (beside("adapters.mine.adapter_up.weight", torch.ones(32, 4)), "self.adapters.mine.adapter_up.weight"),
}


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("case", UNREAD)
def test_a_weight_of_the_encoder_that_nothing_reads_is_refused_by_name(encoder_folder, tmp_path, refused, case, kind):
    change, name = UNREAD[case]
    folder = checkpoint(tmp_path / "model", encoder_folder("bert"), change, kind)
    error = refused(f"model_config.model_name={folder}")
    assert "model_config.model_name" in error
    assert f"layer.0.attention.{name if name.startswith('self') else 'self.' + name}" in error
    if kind is AutoModelForSequenceClassification:
        result = run_here("data_config.max_len=32", mode="predict", text="a story", model=str(folder))
        assert (result.returncode, result.stdout) == (2, "")
        assert name in result.stderr


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "0.auto_model.", "bert.bert."])
def test_names_that_are_not_the_encoders_are_refused(encoder_folder, tmp_path, prefix):
    folder = checkpoint(tmp_path / "model", encoder_folder("bert"), lambda key, tensor: {prefix + key: tensor})
    with pytest.raises(UserError, match=r"embeddings\.LayerNorm\.bias"):
        new_model(ModelConfig(str(folder)))


def test_positions_that_transformers_cannot_compute_are_refused_without_their_weights_too(encoder_folder, tmp_path):
    folder = checkpoint(tmp_path / "model", encoder_folder("bert"), lambda key, tensor: {key: tensor},
                        position_embedding_type="relative_key_query")
    for pretrained in (True, False):
        with pytest.raises(UserError, match="position_embedding_type is 'relative_key_query'.*distance_embedding"):
            load_encoder_config(ModelConfig(str(folder), pretrained=pretrained))


def test_fewer_layers_may_be_meant_and_a_line_says_so(encoder_folder, tmp_path, capsys):
    for kind in (AutoModel, AutoModelForSequenceClassification):
        folder = checkpoint(tmp_path / kind.__name__, encoder_folder("bert"), lambda key, tensor: {key: tensor}, kind,
                            num_hidden_layers=1)
        model = new_model(ModelConfig(str(folder), pooling="mean"))
        [line] = capsys.readouterr().out.splitlines()
        assert f"{folder}: config.json asks for fewer layers than its weights have" in line
        assert "encoder.layer.1." in line
        whole = AutoModel.from_pretrained(encoder_folder("bert"))
        whole.encoder.layer = whole.encoder.layer[:1]
        assert torch.equal(hidden(model.encoder), hidden(whole))
    load_model(folder)
    shown = capsys.readouterr()
    assert "fewer layers" in shown.err
    assert shown.out == ""  # where the rows that it labels are printed
