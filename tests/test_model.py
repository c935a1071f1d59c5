"""The model: six families of encoders, padding that counts nowhere, files that are safe and exact."""

import json
import stat
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ENCODERS, run_here
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, BigBirdConfig, BigBirdModel

from data import Encode
from model import EncoderForClassification, mean_over_tokens
from suite.common.storage import read_json
from suite.encoders.loading import load_model, new_model, save_model
from suite.encoders.tokenizers import load_tokenizer
from utils import ModelConfig


def build(folder: str, **settings) -> EncoderForClassification:
    torch.manual_seed(1)
    return new_model(ModelConfig(model_name=folder, **settings), ["bad", "good"])


def save(model: EncoderForClassification, folder, tokenizer: str) -> None:
    save_model(folder, model.config, model.state_dict(), load_tokenizer(tokenizer))


def batch(pad: int = 0):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(5, 1200, (4, 20), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 12:], mask[3, 5:] = 0, 0
    return {"input_ids": input_ids.masked_fill(mask == 0, pad), "attention_mask": mask}, torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_family(encoder_folder, name, pooling, tmp_path):
    model = build(encoder_folder(name), pooling=pooling, dropout_rate=0.0, encoder_dropout=0.0)
    inputs, labels = batch(ENCODERS[name].pad_token_id or 0)
    loss, logits = model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]), labels=labels).to_tuple()
    assert logits.shape == (4, 2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    torch.testing.assert_close(model(**inputs, labels=labels, reduction="sum").loss, 4 * loss)
    loss.backward()
    assert [weight for weight, p in model.named_parameters() if p.grad is None] == []  # DDP needs every gradient

    # A review's logits do not know how much padding stands beside it.
    model.eval()
    with torch.no_grad():
        alone = model(inputs["input_ids"][1:2, :12]).logits
        torch.testing.assert_close(model(**inputs).logits[1:2], alone, atol=1e-6, rtol=1e-5)

        save(model, tmp_path, encoder_folder(name))
        assert torch.equal(load_model(tmp_path).eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["bert", "modernbert", "roberta", "electra"])
def test_the_last_layer_at_the_first_token_alone_is_exact(encoder_folder, name, masked):
    # In float64, where rounding cannot hide anything; ModernBERT's local attention sees 8 of the 20 tokens.
    inputs, labels = batch(ENCODERS[name].pad_token_id or 0)
    if not masked:
        del inputs["attention_mask"]
    model = build(encoder_folder(name), dropout_rate=0.0, encoder_dropout=0.0).double()
    assert model.reads_first_token
    hidden = model.encoder(inputs["input_ids"]).last_hidden_state
    assert hidden.shape[:2] == (4, 1)  # the other tokens are not computed
    loss, logits = model(**inputs, labels=labels).to_tuple()
    loss.backward()

    plain = build(encoder_folder(name), dropout_rate=0.0, encoder_dropout=0.0).double()
    plain.encoder = AutoModel.from_pretrained(encoder_folder(name), dtype=torch.float64)
    plain.encoder.pooler = None
    hidden = plain.encoder(**inputs).last_hidden_state
    assert hidden.shape[:2] == (4, 20)
    expected = plain.head(hidden[:, 0])
    F.cross_entropy(expected, labels).backward()
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-10)
    reference = dict(plain.named_parameters())
    for weight, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[weight].grad, atol=1e-12, rtol=1e-9, msg=weight)


@pytest.mark.parametrize("name", ["bert", pytest.param("modernbert", marks=pytest.mark.long)])
def test_compiled_for_few_shapes_whatever_the_batches_are(encoder_folder, name):
    model, counter = build(encoder_folder(name)).train(), CompileCounter()
    torch._dynamo.reset()
    model.encoder.compile(backend=counter, dynamic=True)  # as Run does
    for reviews, tokens, padded in [(4, 20, True), (8, 30, True), (3, 25, False), (5, 40, True), (6, 33, False)]:
        mask = torch.ones(reviews, tokens, dtype=torch.int64)
        mask[0, -3:] = 0
        ids = torch.randint(5, 100, (reviews, tokens))
        loss = model(ids, mask if padded else None, labels=torch.zeros(reviews, dtype=torch.int64)).loss
        loss.backward()
    assert counter.frame_count == 2  # with a mask and without one


def test_the_mean_leaves_padding_out():
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert mean_over_tokens(hidden, mask).tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert mean_over_tokens(hidden, None).tolist() == [[2.0, 3.0], [8.0, 9.0]]


def test_pretrained_weights_are_the_encoders_and_the_head_is_new(encoder_folder):
    folder = encoder_folder("bert")
    model, reference = build(folder), AutoModel.from_pretrained(folder)
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, reference.state_dict()[name]), name
    fresh = build(folder, pretrained=False)
    assert not torch.equal(fresh.encoder.embeddings.word_embeddings.weight, reference.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_dropout_replaces_every_rate(encoder_folder, name):
    model = build(encoder_folder(name), encoder_dropout=0.3, dropout_rate=0.7)
    rates = [module.p for module in model.encoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert all(rate == 0.3 for rate in rates)
    assert model.dropout.p == 0.7
    assert {value for key, value in model.encoder.config.to_dict().items()
            if "dropout" in key and isinstance(value, float) and key != "head_dropout"} == {0.3}


def test_ignored_labels_weigh_nothing(encoder_folder):
    model = build(encoder_folder("bert")).eval()
    inputs, labels = batch()
    all_ignored = torch.full_like(labels, -100)
    assert model(**inputs, labels=all_ignored, reduction="sum").loss == 0
    some = torch.where(torch.tensor([True, False, True, False]), labels, -100)
    two = {name: values[::2] for name, values in inputs.items()}
    torch.testing.assert_close(model(**inputs, labels=some, reduction="sum").loss,
                               model(**two, labels=labels[::2], reduction="sum").loss)


def test_saved_model_is_readable_by_others_and_names_its_classes(encoder_folder, tmp_path):
    save(build(encoder_folder("bert")), tmp_path, encoder_folder("bert"))
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) & 0o044 == 0o044
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).label2id == {"bad": 0, "good": 1}
    assert not list(tmp_path.glob(".*"))


ELSEWHERE = """
import sys, torch
from transformers import pipeline
try:  # without its code, it is refused rather than misread
    pipeline("text-classification", model=sys.argv[1], trust_remote_code=False)
    sys.exit("it was read without its code")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
classify = pipeline("text-classification", model=sys.argv[1], trust_remote_code=True)
assert not {"loading", "utils"} & set(sys.modules), "this is to work without the project"
texts = sys.stdin.read().splitlines()
logits = []
for text in texts:
    inputs = classify.tokenizer(text, truncation=True, return_tensors="pt")
    logits.append((inputs["input_ids"], classify.model(**inputs).logits.detach()))
torch.save([logits, classify(texts, truncation=True)], sys.argv[2])
"""


@pytest.mark.parametrize(("name", "pooling"), [
    ("bert", "cls"), pytest.param("modernbert", "mean", marks=pytest.mark.long)])
def test_the_same_bits_in_a_pipeline_that_knows_nothing_of_this_project(encoder_folder, tmp_path, name, pooling):
    model = build(encoder_folder(name), pooling=pooling).eval()
    tokenizer = load_tokenizer(encoder_folder(name), line_breaks="space")
    model.config.update({"max_len": 16})
    save_model(tmp_path / "best", model.config, model.state_dict(), tokenizer)
    texts = ["A great film.", "dull<br /><br />and dreary", "moving " * 30, "x"]
    child = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path / "best", tmp_path / "logits"], cwd=tmp_path,
                           input="\n".join(texts), text=True, capture_output=True, check=False)
    assert child.returncode == 0, child.stderr
    logits, answers = torch.load(tmp_path / "logits", weights_only=True)
    trained = load_model(tmp_path / "best").eval()
    for (input_ids, found), answer, text in zip(logits, answers, texts, strict=True):
        assert input_ids.tolist() == tokenizer([text], max_length=16, truncation=True)["input_ids"]
        for each in (model, trained):
            assert torch.equal(each(input_ids, torch.ones_like(input_ids)).logits, found)
        assert answer["label"] == ["bad", "good"][int(found.argmax())]
    assert logits[2][0].shape == (1, 16)
    assert "<" not in tokenizer.decode(logits[1][0][0])


@pytest.mark.parametrize("truncation", ["head", "tail"])
def test_the_tokenizer_of_a_trained_model_cuts_as_in_training(encoder_folder, tmp_path, truncation):
    model, tokenizer = build(encoder_folder("bert")), load_tokenizer(encoder_folder("bert"))
    model.config.update({"max_len": 8, "truncation": truncation})
    text = "one two three four five six seven eight nine ten"
    expected = Encode(tokenizer, 8, truncation)({"text": [text]})["input_ids"][0]
    save_model(tmp_path, model.config, model.state_dict(), tokenizer)
    assert load_tokenizer(tmp_path)(text, truncation=True)["input_ids"] == expected
    assert len(expected) == 8
    assert read_json(tmp_path / "tokenizer_config.json")["padding_side"] == "right"  # as in training


def test_a_big_bird_says_how_it_is_trained(tmp_path):
    """transformers turns it to full attention at its first short text, and saves the attention it had before."""
    config = BigBirdConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, block_size=4, num_random_blocks=1)
    BigBirdModel(config).save_pretrained(tmp_path)
    model = new_model(ModelConfig(model_name=str(tmp_path)))
    assert model.config.encoder.attention_type == model.encoder.attention_type == "original_full"


@pytest.mark.parametrize(("name", "dtype", "precision"), [
    ("bert", torch.float16, "no"), ("modernbert", torch.bfloat16, "bf16")], ids=str)
def test_an_encoder_stored_in_half_precision_is_trained_and_used_in_float32(overrides, encoder_folder, tmp_path, name,
                                                                           dtype, precision):
    folder = tmp_path / "half"
    AutoModel.from_pretrained(encoder_folder(name), dtype=dtype).save_pretrained(folder)
    load_tokenizer(encoder_folder(name)).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    result = run_here(*overrides, f"model_config.model_name={folder}", "train_config.max_steps=1",
                      "train_config.test=false", f"train_config.mixed_precision={precision}")
    assert result.returncode == 0, result.stderr
    best = tmp_path / "runs" / "run" / "best"
    assert {weights.dtype for weights in load_model(best).parameters()} == {torch.float32}
    for key in ("dtype", "torch_dtype"):  # as earlier versions of this project and of transformers have written it
        (best / "manifest.json").unlink(missing_ok=True)
        config = json.loads((best / "config.json").read_text())
        config["encoder"] |= {"dtype": None, key: "float16"}
        (best / "config.json").write_text(json.dumps(config))
        assert {weights.dtype for weights in load_model(best).parameters()} == {torch.float32}
