"""A model folder that was whole is spoiled in one way, and refused at each door where it is read: one line, exit code
2. What only looks odd is still read."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, run_here, train_here
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from suite.encoders.loading import new_model, save_model
from suite.encoders.tokenizers import load_tokenizer
from suite.training.model_card import plain
from utils import ModelConfig

KERNEL = "kernels-community/flash-attn2"
INDEX = "model.safetensors.index.json"

# ---------------------------------------------------------------------------------------------------------------------
# How to spoil a folder; each function returns one that does it


def values(**changes):
    """Other values in config.json; in a classifier of the suite, in its encoder's part."""
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.get("encoder", config).update(changes)
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def first(text: str):
    """`text` before everything else in config.json."""
    return lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", "{" + text + ",", 1))


def file(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def folder_instead(name: str):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def without(*names: str):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def part(name: str, **changes):
    """Other values in a JSON file or, with a dot in `name`, in a part of it."""
    def spoil(folder: Path) -> None:
        path, _, inner = name.partition(":")
        content = json.loads((folder / path).read_text())
        (content[inner] if inner else content).update(changes)
        (folder / path).write_text(json.dumps(content))
    return spoil


def weights(change, name: str = "layer.1.output.dense.bias", shards: bool = False, index: dict | None = None):
    """`change` made to a tensor; `shards`: in two files, with an index, whose `index` names other files."""
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        place = next(key for key in tensors if key.endswith(name))
        tensors[place] = change(tensors[place])
        if not shards:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return
        (folder / "model.safetensors").unlink()
        files = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(sorted(tensors))}
        for half in set(files.values()):
            save_file({key: tensors[key] for key in files if files[key] == half}, folder / half, {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | (index or {})}))
    return spoil


def one(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor
    return change


def renamed_words(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word if word[0] == "[" else f"{number}x": number for word, number in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))


TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
UNIGRAM = {"type": "Unigram", "vocab": [["[PAD]", 0.0], ["<unk>", 0.0], ["xq", -1.0]], "unk_id": 1}
NO_SIZE, TOO_LARGE, FOREIGN = "is no size that", "describes more weights than model.safetensors", "foreign code is not"
TOKENIZERS = [
    ("no tokenizer", without(*TOKENIZER), "tokenizer"),
    ("an empty vocab.txt", lambda folder: (without(*TOKENIZER)(folder), file("vocab.txt", "")(folder)), "tokenizer"),
    ("no words", part("tokenizer.json:model", vocab={}), "its tokenizer has no words"),
    ("other words", renamed_words, "its tokenizer does not know"),
    ("other words in Unigram", part("tokenizer.json", model=UNIGRAM), "its tokenizer does not know"),
    ("words deleted", part("tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}),
     "does not keep the words"),
    ("a special token that is none", part("tokenizer.json:post_processor", special_tokens={}), "fails on a text"),
    ("no unknown token", part("tokenizer.json:model", unk_token="[NOPE]"), "[UNK] token"),
    ("a huge token", part("tokenizer.json:model", vocab={"film": 2**31, "[UNK]": 1}), "gives token 2147483648"),
    ("another JSON", file("tokenizer.json", '{"a": 1}'), "cannot be loaded"),
    ("an empty tokenizer.json", file("tokenizer.json", ""), "Expecting value"),
    ("a folder as tokenizer", folder_instead("tokenizer.json"), "tokenizer"),
    *((f"model_max_length {value}", part("tokenizer_config.json", model_max_length=value), "model_max_length in its")
      for value in ("word", [1])),
    *((f"{key} {value}", part("tokenizer_config.json", **{key: value}), "cannot be loaded") for key, value in (
        ("pad_token", ["a"]), ("pad_token", 3), ("added_tokens_decoder", {"a": 3}), ("truncation_side", "up"),
        ("chat_template", [{"a": 1}]), ("tokenizer_class", 3))),
    ("deep tokenizer_config.json", file("tokenizer_config.json", "[" * 3000), "cannot be loaded"),
    ("a list as special tokens", file("special_tokens_map.json", "[]"), "cannot be loaded"),
    ("words as added tokens", file("added_tokens.json", '{"a": "b"}'), "cannot be loaded"),
]
UNSAVED = [  # of tokenizers that can be read and not written
    ("no place for the text", part("tokenizer.json:post_processor", single=[]), "does not keep the words"),
    ("half a character in a template", part("tokenizer_config.json", chat_template="\ud800"), "surrogates not"),
    ("a key of transformers' own", part("tokenizer_config.json", _tokenizer={"a": 1}), "cannot be loaded"),
]
MODELS = [
    ("infinity in a tensor", weights(one(-float("inf"))), "output.dense.bias has values that are not finite"),
    ("nan in a shard", weights(one(float("nan")), shards=True), "output.dense.bias has values that are not finite"),
    ("too large for float32", weights(lambda t: torch.full_like(t.double(), 1e300)), "are not finite"),
    ("finite weights, infinite logits", weights(lambda t: torch.full_like(t, 3e38)), "no finite logits"),
    *((f"weights of {kind}", weights(lambda t, kind=kind: t.to(kind)), "output.dense.bias has values of type")
      for kind in (torch.uint8, torch.bool, torch.float8_e4m3fn)),
    ("integers in a shard", weights(torch.Tensor.long, shards=True), "values of type I64"),
    ("a shard outside", weights(one(0), shards=True, index={"x": "../../x.safetensors"}), "'../../x.safetensors'"),
    ("a shard that is no safetensors", weights(one(0), shards=True, index={"x": "config.json"}), "'config.json'"),
    ("a shard that is no name", weights(one(0), shards=True, index={"x": 3}), "names the file '3'"),
    ("an index that is none", lambda folder: (weights(one(0), shards=True)(folder), file(INDEX, "[]")(folder)),
     "model.safetensors.index.json is damaged"),
    *((f"{key} {value}", values(**{key: value}), TOO_LARGE)
      for key, value in (("vocab_size", 10**9), ("vocab_size", 10**12), ("hidden_size", 10**9),
                         ("intermediate_size", 10**12), ("max_position_embeddings", 10**12))),
    ("heads of 400 digits", values(num_attention_heads=10**400), NO_SIZE),
    ("layers without end", values(num_hidden_layers=10**12), NO_SIZE),
    ("no layers", values(num_hidden_layers=0), "config.json"),
    ("many small layers", values(num_hidden_layers=99_999, hidden_size=2, intermediate_size=1, vocab_size=9),
     "more than 5,000 tensors"),
    *((f"hidden_size {value}", values(hidden_size=value), "hidden_size") for value in (1.5, None, True)),
    ("labels without end", first('"num_labels": 1000000000000'), NO_SIZE),
    ("NaN", values(layer_norm_eps=float("nan")), NO_SIZE),
    ("infinity", values(hidden_dropout_prob=float("inf")), NO_SIZE),
    ("a thousand brackets", first(f'"x": {"[" * 1000}{"]" * 1000}'), "nested too deeply"),
    ("5,000 digits", first(f'"x": {"9" * 5000}'), "4300 digits"),
    ("a list as config.json", file("config.json", "[]"), "no object of keys and values"),
    ("a NUL in config.json", file("config.json", '{"model_type": "bert\0"}'), "Invalid control character"),
    ("no model_type", file("config.json", "{}"), "model_type"),
    ("a list as model_type", file("config.json", '{"model_type": ["bert"]}'), "model_type"),
    ("a NUL in model_type", file("config.json", '{"model_type": "bert\\u0000"}'), "bert"),
    ("an adapter", file("adapter_config.json", '{"base_model_name_or_path": "a/b"}'), "adapter_config.json"),
    *((f"{key}: {name}", values(**{key: name}), FOREIGN) for key, name in (
        ("attn_implementation", KERNEL), ("_attn_implementation", "owner/name:function"),
        ("attn_implementation", f"paged|{KERNEL}"), ("attn_implementation", {"": KERNEL}),
        ("_attn_implementation_internal", f"flash|{KERNEL}"), ("attn_implementation", [KERNEL]))),
    ("a kernel in a part", values(text_config={"attn_implementation": KERNEL}), FOREIGN),
    ("a kernel at the top", first(f'"attn_implementation": "{KERNEL}"'), FOREIGN),
    ("a kernel for experts", values(experts_implementation="deepgemm"), FOREIGN),
    *((key, values(**{key: value}), f"{key} makes the model depend on other code") for key, value in (
        ("use_kernels", True), ("kernel_config", {"a": "b/c"}), ("quantization_config", {"quant_method": "awq"}),
        ("transformers_weights", "other.safetensors"), ("fusion_config", {"a": True}))),
]
LABELS = [[], ["a", "b"], {"0": "a", "1": "a"}, {"1": "a", "2": "b"}, {"x": "a"}, {"0": ["a"], "1": None}, 3,
          {"0": "\ud800", "1": "b"}]
CLASSIFIERS = [
    *((f"id2label {names}", lambda folder, names=names: part("config.json", id2label=names)(folder), "config.json: not")
      for names in LABELS),
    ("a manifest of nonsense", file("manifest.json", '{"a": 3}'), "manifest.json is missing or damaged"),
    ("a deep manifest", file("manifest.json", "[" * 5000), "manifest.json is missing or damaged"),
    ("a long name", file("manifest.json", json.dumps({"x" * 5000: {"bytes": 1, "sha256": ""}})), "manifest.json is m"),
    ("a token beyond the encoder's", part("tokenizer.json:model", vocab={"film": 99999, "[UNK]": 1}), "token 99999"),
]
WHOLE = [
    *((f"weights of {kind}", weights(lambda t, kind=kind: t.to(kind)))
      for kind in (torch.float16, torch.bfloat16, torch.float64)),
    ("large finite weights", weights(one(3e38), "word_embeddings.weight")),
    ("two shards", weights(one(0.1), shards=True)),
    ("eager attention", values(attn_implementation="eager")),
    ("other odd values", values(torch_dtype="float16", x=[[[[1]]]], pad_token_id=None)),
    ("keys of the suite's own models", values(truncation=None, max_len=[3], pooling=7)),
    ("odd lengths", part("tokenizer_config.json", model_max_length=10**400)),
    ("no length", part("tokenizer_config.json", model_max_length=None)),
]

# ---------------------------------------------------------------------------------------------------------------------
# The doors


@pytest.fixture(scope="session")
def whole(encoder_folder, tmp_path_factory) -> dict[str, Path]:
    """A whole folder for each door: an encoder, a classifier of this suite, and one of transformers."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ours", "theirs")}
    tokenizer, model = load_tokenizer(encoder_folder("bert")), new_model(ModelConfig(encoder_folder("bert")))
    save_model(folders["ours"], model.config, model.state_dict(), tokenizer)
    BertForSequenceClassification.from_pretrained(encoder_folder("bert")).save_pretrained(folders["theirs"])
    tokenizer.save_pretrained(folders["theirs"])
    return folders | {"encoder": Path(encoder_folder("bert"))}


@pytest.fixture
def spoiled(whole, tmp_path):
    def copy(door: str, spoil) -> Path:
        folder = shutil.copytree(whole[door], tmp_path / "model")
        spoil(folder)
        return folder
    return copy


def predict(folder: Path, text: str = "the film was a story") -> subprocess.CompletedProcess:
    return run_here("data_config.max_len=32", mode="predict", text=text, model=str(folder))


def refusal(result: subprocess.CompletedProcess) -> str:
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    return line


def cases(table):
    return pytest.mark.parametrize(("spoil", "words"), [row[1:] for row in table], ids=[row[0][:60] for row in table])


@cases(TOKENIZERS + UNSAVED + MODELS)
def test_a_spoiled_encoder_is_not_trained(spoiled, refused, spoil, words):
    error = refused(f"model_config.model_name={spoiled('encoder', spoil)}")
    assert words in error
    assert "model_config.model_name" in error


@cases(TOKENIZERS + MODELS + CLASSIFIERS)
def test_a_spoiled_classifier_of_the_suite_does_not_predict(spoiled, spoil, words):
    refuses(spoiled("ours", spoil), words)


@cases(MODELS + CLASSIFIERS)  # tokenizers are read in the same way
def test_a_spoiled_classifier_of_transformers_does_not_predict(spoiled, spoil, words):
    refuses(spoiled("theirs", spoil), words)


def refuses(folder: Path, words: str) -> None:
    started = time.perf_counter()
    error = refusal(predict(folder))
    assert time.perf_counter() - started < 3
    assert words in error
    assert str(folder) in error


@pytest.mark.parametrize("door", ["encoder", "ours", "theirs"])
@pytest.mark.parametrize("spoil", [row[1] for row in WHOLE], ids=[row[0] for row in WHOLE])
def test_what_only_looks_odd_is_read(spoiled, door, spoil):
    folder = spoiled(door, spoil)
    if door == "encoder":
        new_model(ModelConfig(str(folder)))
        load_tokenizer(str(folder))
    else:
        assert predict(folder).returncode == 0


def test_absurd_sizes_do_not_fill_the_memory_without_weights_either(spoiled, refused):
    folder = spoiled("encoder", values(vocab_size=10**9))
    error = refused(f"model_config.model_name={folder}", "model_config.pretrained=false")
    assert "describes more weights than this machine's memory has room for" in error


def test_unknown_words_in_a_file_leave_nothing_behind(spoiled, tmp_path):
    (tmp_path / "in.txt").write_text("a film\nthe story\n" * 5)
    output = tmp_path / "out.csv"
    folder = spoiled("ours", renamed_words)
    for options in ({"input": str(tmp_path / "in.txt"), "output": str(output)}, {"input": str(tmp_path / "in.txt")}):
        result = run_here("data_config.max_len=32", mode="predict", model=str(folder), **options)
        assert "does not know 100% of the words" in refusal(result)
    result = run_here("data_config.max_len=32", mode="explain", text="the film", model=str(folder))
    assert "does not know 100% of the words" in refusal(result)
    assert list(tmp_path.glob("out*")) == []


def test_one_odd_row_among_good_ones_is_labelled(whole, tmp_path):
    (tmp_path / "in.txt").write_text("the film was a story\n" * 5 + "\u4eca\u5929 \u2603\n")
    arguments = {"mode": "predict", "input": str(tmp_path / "in.txt"), "model": str(whole["ours"])}
    result = run_here("data_config.max_len=32", **arguments)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 7), result.stderr


def test_packages_that_would_load_foreign_code_are_out_of_reach(tmp_path):
    for package in ("kernels", "peft"):
        (tmp_path / f"{package}.py").write_text("print('ran')")
    code = "import suite, importlib.util as u; print(u.find_spec('kernels'), u.find_spec('peft'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.stdout == "None None\n"
    assert importlib.util.find_spec("kernels") is None


@pytest.mark.parametrize(("name", "shown"), [
    ("good", "good"), ("two words", "two words"), ("a|b", r"a\|b"), ("<b>", r"\<b\>"), ("`x`", r"\`x\`"),
    ("a\nb", r"a\\nb"), ("\x1b[31m", r"\\x1b\[31m"), ("\u202e", r"\\u202e"), ("---\n# x", r"---\\n# x"),
    ("\ud800", r"\\ud800"), ("schön", "schön")])
def test_a_class_name_stays_text_in_the_model_card(name, shown):
    assert plain(name) == shown


def test_a_model_card_of_odd_names_is_whole(overrides, tmp_path):
    from conftest import write_reviews
    from huggingface_hub import ModelCard

    names = ("bad\x1b[31m\n# x", "<b>|`good`")
    reviews = write_reviews(tmp_path / "odd: |name`.csv", names=names)
    train_here(*overrides, f"data_config.dataset={json.dumps(str(reviews))}", "train_config.max_steps=2")
    text = (tmp_path / "runs/run/best/README.md").read_text()
    assert r"bad\\x1b\[31m\\n# x" in text
    assert r"\<b\>\|\`good\`" in text
    assert not re.search(r"[^\n -~]", text)
    card = ModelCard.load(tmp_path / "runs/run/best/README.md")
    assert card.data.eval_results[0].dataset_name == "odd: |name`.csv"
