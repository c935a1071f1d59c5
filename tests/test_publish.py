"""Publishing: nothing is sent unasked, a fixed list of files arrives whole, and what is not for others is refused."""

import json
import os
import re
import shutil

import huggingface_hub
import pytest
from conftest import PROJECT, content_of, expect, run_here, run_script, train_here, write_reviews
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from upload_hub import TOKEN, upload_hub

from suite.common.pages import escaped
from suite.common.storage import seal
from suite.encoders.loading import load_model
from suite.inference.publish import FILES


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_folder):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("published")
    train_here(f"output_dir={folder}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
               f"data_config.dataset={write_reviews(folder / 'secret-place.csv', rows=120)}",
               "data_config.text_column=review", "data_config.label_column=verdict", "data_config.max_len=32",
               "train_config.epochs=1", "train_config.device=cpu", "log_config.wandb_mode=disabled")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs" / "run")


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, with its address and a login where the library looks for them."""
    with upload_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def publish(run, repo="owner/name", **options):
    return run_here(f"output_dir={run.parent}", f"run_name={run.name}", mode="publish", repo=repo, **options)


def test_without_yes_nothing_is_sent_and_nothing_asked(run, hub):
    before = content_of(run)
    result = expect(0, publish(run, license="mit"))
    assert hub.requests == []
    assert content_of(run) == before
    lines = result.stdout.splitlines()
    assert lines[0] == "owner/name: a private repository, licence mit"
    assert any(line.startswith("  model.safetensors  ") and line.endswith(" MB") for line in lines)
    assert "not sent: manifest.json, training_texts.npy" in lines
    assert "license: mit" in lines
    assert 'model="owner/name"' in result.stdout  # the card's example works as it is printed
    assert "`FOLDER` is a copy: `hf download owner/name --local-dir FOLDER`." in result.stdout
    assert lines[-1] == "Nothing was sent. To send it, give the same command with --yes."


def test_the_vocabulary_of_every_encoder_s_tokenizer_is_sent():
    kinds = [TOKENIZER_MAPPING_NAMES.get(kind) for kind in [*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bertweet", "phobert"]]
    classes = [tokenizer_class_from_name(kind) for kind in kinds if kind]
    assert len(classes) > 30
    names = {file for kind in classes for file in getattr(kind, "vocab_files_names", {}).values()}
    assert {"vocab.txt", "bpe.codes"} < names <= set(FILES)


@pytest.mark.parametrize("public", [False, True])
def test_a_model_arrives_whole_and_nothing_else_does(run, hub, tmp_path, public):
    expect(0, publish(run, yes=True, public=public))
    assert hub.private == {"owner/name": not public}
    sent, best = hub.files["owner/name"], content_of(run / "best")
    assert set(sent) == set(best) - {"manifest.json", "training_texts.npy"} <= set(FILES)
    assert {name for name in sent if sent[name] != best[name]} <= {"README.md"}
    assert not any(b"secret-place" in content and name != "README.md" for name, content in sent.items())
    assert not any(str(tmp_path.parent).encode() in content for content in sent.values())  # no path of this machine
    assert b"license" not in sent["README.md"].partition(b"\n---\n")[0]
    for name, content in sent.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    assert load_model(tmp_path / "there").config.id2label == {0: "bad", 1: "good"}


def test_an_export_is_published_with_its_folders(run, hub):
    train_here(f"output_dir={run.parent}", "run_name=run", mode="export", formats=("transformers",))
    (run / "export" / "onnx").mkdir()
    (run / "export" / "onnx" / "model.onnx").write_bytes(b"a graph")
    (run / "export" / "notes.txt").write_text("mine")
    seal(run / "export")
    expect(0, run_here(mode="publish", repo="owner/name", model=str(run / "export"), yes=True))
    sent = hub.files["owner/name"]
    assert {"onnx/model.onnx", "model.safetensors", "sentence_bert_config.json"} < set(sent)
    assert not {"notes.txt", "model.py", "manifest.json"} & set(sent)


def test_publishing_again_replaces_the_files(run, hub):
    expect(0, publish(run, yes=True))
    before = dict(hub.files["owner/name"])
    # What an earlier export has left there would be read together with this model; notes.txt is the owner's.
    hub.files["owner/name"] |= {"config.json": b"old", "onnx/model.onnx": b"of another model", "notes.txt": b"mine"}
    expect(0, publish(run, yes=True))
    assert hub.files["owner/name"] == before | {"notes.txt": b"mine"}


def refused(result, *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert all(part in line for part in parts), line


def test_a_repository_of_other_visibility_is_left_alone(run, hub):
    hub.private["owner/name"], hub.files["owner/name"] = False, {"README.md": b"theirs"}
    refused(publish(run, yes=True), "owner/name exists already and is public: give --public, or choose another name")
    hub.private["owner/name"] = True
    refused(publish(run, yes=True, public=True), "is private: leave out --public")
    assert hub.files["owner/name"] == {"README.md": b"theirs"}


def test_what_the_hub_refuses_is_one_line(run, hub, monkeypatch):
    hub.fails = True
    refused(publish(run, yes=True), "owner/name was not sent", "507", "all files arrive together or not at all")
    assert hub.files["owner/name"] == {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(publish(run, yes=True), "owner/name was not sent", "Invalid user token")
    monkeypatch.delenv("HF_TOKEN")
    refused(publish(run, yes=True), "owner/name was not sent", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(publish(run, yes=True), "owner/name was not sent", "offline")


@pytest.mark.parametrize(("how", "place"), [("hangs_up_at", "whoami"), ("hangs_up_at", "commit"),
                                            ("babbles_at", "preupload")])
def test_a_server_that_fails_anywhere_is_one_line(run, hub, monkeypatch, how, place):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    setattr(hub, how, place)
    refused(publish(run, yes=True), "owner/name was not sent", "all files arrive together or not at all")
    assert not hub.files.get("owner/name")


def test_the_card_is_sent_as_it_is(run, hub):
    """Its owner may write anything into it, also what is no valid YAML."""
    for card in ("no metadata, ä", "---\nlanguage: no\nlicense: old\nodd: [\n---\ntext\n---\n"):
        (run / "best" / "README.md").write_text(card, encoding="utf-8")
        expect(0, publish(run, yes=True))
        assert hub.files["owner/name"]["README.md"].decode() == card
    expect(0, publish(run, yes=True, license="mit"))
    assert hub.files["owner/name"]["README.md"].decode() == "---\nlicense: mit\nlanguage: no\nodd: [\n---\ntext\n---\n"


def test_an_export_of_an_untested_run_is_refused_wherever_it_is(run, hub, tmp_path):
    (run / "best" / "README.md").unlink()  # written by the test
    train_here(f"output_dir={run.parent}", "run_name=run", mode="export", formats=("transformers",),
               output=str(tmp_path / "elsewhere"))
    refused(run_here(mode="publish", repo="owner/name", model=str(tmp_path / "elsewhere"), yes=True),
            "was exported before its run was tested")
    assert hub.requests == []


def damage(run):
    weights = run / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


@pytest.mark.parametrize(("spoil", "reason"), [
    (damage, "model.safetensors is damaged"),
    (lambda run: (run / "metrics.json").unlink(), "is not finished, or not tested"),
    (lambda run: (run / "best" / "README.md").unlink(), "there is no model card"),
    (lambda run: (run / "best" / "README.md").write_bytes(b"\xff"), "there is no model card in UTF-8"),
    (lambda run: (run / "best" / "manifest.json").unlink(), "manifest.json is missing or damaged")])
def test_what_is_not_whole_is_refused(run, hub, spoil, reason):
    """A damaged model is noticed, and nothing is sent; so is one of which nothing tells whether its files are whole."""
    spoil(run)
    refused(publish(run, yes=True), reason)
    copy = shutil.copytree(run / "best", run.parent / "copy")
    if reason != "is not finished, or not tested":  # the run says that
        refused(run_here(mode="publish", repo="owner/name", model=str(copy), yes=True), reason)
    assert hub.requests == []


def test_a_demo_is_refused_wherever_it_is(run, hub):
    text = (run / "config.yaml").read_text()
    dataset = next(line for line in text.splitlines() if line.strip().startswith("dataset:"))
    (run / "config.yaml").write_text(text.replace(dataset, f"  dataset: {PROJECT / 'demo' / 'reviews.csv'}"))
    refused(publish(run, yes=True), "is a DEMO")
    copy = shutil.copytree(run / "best", run.parent / "copy")
    (copy / "README.md").write_text("> **DEMO: generated reviews and small encoders from scratch. These figures say "
                                    "nothing about IMDB.**")
    refused(run_here(mode="publish", repo="owner/name", model=str(copy), yes=True), "is a DEMO")
    assert hub.requests == []


def test_a_bag_of_words_is_refused(tmp_path, hub):
    write_reviews(tmp_path / "reviews.csv")
    arguments = (f"output_dir={tmp_path}", f"data_config.dataset={tmp_path / 'reviews.csv'}", "run_name=words",
                 "data_config.text_column=review", "data_config.label_column=verdict", "log_config.wandb_mode=disabled")
    train_here(*arguments, mode="baseline")
    refused(publish(tmp_path / "words", yes=True), "holds a bag-of-words model", "publish an encoder")


@pytest.mark.long
def test_the_command_itself(run):
    """As a user gives it, in a process of its own."""
    with upload_hub() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
                       "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        result = run_script("main.py", "--mode", "publish", "owner/name", "--model", str(run), "--public", "--yes",
                            "--license", "apache-2.0", environment=environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines()[-1] == f"sent: {hub.address}/owner/name/commit/{'0' * 40}"
        assert hub.private == {"owner/name": False}
        assert b"license: apache-2.0" in hub.files["owner/name"]["README.md"]


@pytest.mark.parametrize(("name", "shown"), [
    ("good", "good"), ("two words", "two words"), ("a|b", r"a\|b"), ("<b>", r"\<b\>"), ("`x`", r"\`x\`"),
    ("a\nb", r"a\\nb"), ("\x1b[31m", r"\\x1b\[31m"), ("---\n# x", r"---\\n# x"),
    ("\ud800", r"\\ud800"), ("schön", "schön")])
def test_a_class_name_stays_text_in_the_model_card(name, shown):
    assert escaped(name) == shown


def test_a_model_card_of_odd_names_is_whole(overrides, tmp_path):
    names = ("bad\x1b[31m\n# x", "<b>|`good`")
    reviews = write_reviews(tmp_path / "odd: |name`.csv", names=names)
    train_here(*overrides, f"data_config.dataset={json.dumps(str(reviews))}", "train_config.max_steps=2")
    text = (tmp_path / "runs/run/best/README.md").read_text()
    assert r"bad\\x1b\[31m\\n# x" in text
    assert r"\<b\>\|\`good\`" in text
    assert not re.search(r"[^\n -~]", text)
    card = huggingface_hub.ModelCard.load(tmp_path / "runs/run/best/README.md")
    assert card.data.eval_results[0].dataset_name == "odd: |name`.csv"
