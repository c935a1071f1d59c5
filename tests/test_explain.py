"""The explanation: it adds up, it finds the words that decide, and any text can be shown without harm."""

import csv
import re
import shutil
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from conftest import ENCODERS, train_here, write_reviews
from transformers import BatchEncoding

import main
from suite.common import cli
from suite.common.devices import Devices
from suite.encoders.loading import load_model, new_model, save_model
from suite.encoders.tokenizers import load_tokenizer
from suite.inference import attribution, explain
from suite.inference.attribution import TOLERANCE, attribute
from suite.inference.classifier import Classifier
from suite.training.evaluation import write_mistakes
from utils import ModelConfig, UserError, load_config

TELLING = {"good": {"gripping", "moving", "delightful"}, "bad": {"dull", "dreary", "pointless"}}
ODD_TEXTS = ["word", "a dull film 😀🎬 👨\u200d👩\u200d👧 great", "これは素晴らしい映画です。最高！", "فيلم رائع جدا",
             "½ ﬁne ①", "x<br /><br />y &amp; <b>z</b> $title ${note} $$ </script>", "\u200b", "[SEP] [MASK] <s>",
             "a\x00b\x1b[31mred\x07", "  lead\n\n\ttail  ", "x" * 3000, "dull " * 20_000]


def classifier(folder) -> Classifier:
    config = load_config("config.yaml", ["train_config.device=cpu", "train_config.mixed_precision=no"])
    return Classifier(folder, config, Devices(config))


@pytest.fixture
def random_model(encoder_folder, tmp_path):
    """random_model(name, ...): a classifier of fresh weights whose logits differ from text to text."""
    def build(name: str, pooling: str = "cls", truncation: str = "head", labels=("bad", "good"), max_len: int = 24):
        torch.manual_seed(1)
        model = new_model(ModelConfig(model_name=encoder_folder(name), pooling=pooling), list(labels))
        model.head.weight.data *= 50
        model.config.max_len, model.config.truncation, model.config.max_windows = max_len, truncation, 3
        folder = tmp_path / f"{name}-{pooling}-{truncation}-{len(labels)}"
        save_model(folder, model.config, model.state_dict(), load_tokenizer(encoder_folder(name)))
        return classifier(folder)
    return build


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    """The overrides of a finished run on reviews whose words give their class away."""
    folder = tmp_path_factory.mktemp("explained")
    reviews = write_reviews(folder / "reviews.csv")
    overrides = [f"output_dir={folder / 'runs'}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
                 f"data_config.dataset={reviews}", "data_config.text_column=review",
                 "data_config.label_column=verdict", "data_config.max_len=32", "data_config.batch_size=16",
                 "model_config.pooling=mean", "train_config.epochs=10", "train_config.learning_rate=0.001",
                 "train_config.mixed_precision=no", "train_config.device=cpu", "log_config.wandb_mode=disabled"]
    train_here(*overrides)
    return overrides


def command(overrides, **options):
    config = load_config("config.yaml", overrides)
    main.main(cli.Command("explain", config, **options))
    return config.run_folder


@pytest.mark.parametrize(("name", "pooling"), [*((name, "cls") for name in ENCODERS), ("bert", "mean"),
                                               ("modernbert", "mean"), ("deberta-v3", "mean")])
def test_the_attributions_sum_to_the_difference(random_model, name, pooling):
    each = random_model(name, pooling, labels=("bad", "so so", "good"))
    explanation = attribute(each, "a gripping and moving film, if dreary")
    assert explanation.is_complete
    assert explanation.error <= TOLERANCE * 2 * explanation.total

    # The same two logits without hooks: word embeddings are given, at the same positions.
    model, encode = each.model, each.encode
    ids = torch.tensor(encode({"text": [explanation.text]})["input_ids"])
    padding = torch.tensor([encode.prefix + [each.tokenizer.pad_token_id] * (ids.shape[1] - 2) + encode.suffix])
    embeddings = model.encoder.get_input_embeddings()
    with torch.no_grad():
        scores = []
        for inputs in (ids, padding):
            hidden = model.encoder(inputs_embeds=embeddings(inputs)).last_hidden_state
            logits = model.head(hidden[0, 0] if pooling == "cls" else hidden[0].mean(dim=0))
            own = each.label_names.index(explanation.predicted)
            scores.append(logits[own] - (logits.sum() - logits[own]) / 2)
    assert abs(scores[0] - scores[1]) > 1e-3
    assert [explanation.score, explanation.baseline] == pytest.approx([float(score) for score in scores], abs=1e-4)
    assert [explanation.text[word.start:word.end] for word in explanation.words][:3] == ["a", "gripping", "and"]


def test_the_words_that_give_the_class_away_are_the_strongest(run):
    each = classifier(load_config("config.yaml", run).run_folder / "best")
    with open(load_config("config.yaml", run).data_config.dataset, newline="", encoding="utf-8") as file:
        reviews = list(csv.DictReader(file))[:20]
    for review in reviews:
        explanation = attribute(each, review["review"])
        assert explanation.predicted == review["verdict"]
        telling, others = [], []
        for word in explanation.words:
            is_telling = review["review"][word.start:word.end] in TELLING[review["verdict"]]
            (telling if is_telling else others).append(word.attribution)
        assert max(telling) > max(map(abs, others))
        assert sum(telling) > 2 * sum(map(abs, others))


def test_blanks_divide_words_where_the_tokenizer_does_not(random_model, monkeypatch):
    """Gemma's says of every token that it is part of the first word."""
    each, text = random_model("bert", "mean"), "a gripping film,\nif dreary"
    whole = [text[word.start:word.end] for word in attribute(each, text).words]
    monkeypatch.setattr(BatchEncoding, "word_ids", lambda encoded: [0] * len(encoded["input_ids"]))
    found = [text[word.start:word.end] for word in attribute(each, text).words]
    assert whole == ["a", "gripping", "film", ",", "if", "dreary"]
    assert found == text.split()
    each.tokenizer = SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match="does not say where its tokens stand in the text"):
        attribute(each, text)


def test_words_for_the_other_class_count_against(run):
    each = classifier(load_config("config.yaml", run).run_folder / "best")
    text = "a story that was gripping, moving and delightful with some dull people, gripping and moving"
    explanation = attribute(each, text)
    assert explanation.predicted == "good"
    against = min(explanation.words, key=lambda word: word.attribution)
    assert text[against.start:against.end] == "dull"
    assert re.search(r"-\d+\.\d %  dull", explain.as_plain_text(explanation))


@pytest.mark.parametrize(("name", "truncation"), [  # WordPiece, and bytes, in whose middle a cut can be
    ("bert", "head"), ("bert", "windows"), ("modernbert", "tail"), ("modernbert", "head_tail"),
    ("modernbert", "windows")])
def test_any_text(random_model, tmp_path, monkeypatch, name, truncation):
    monkeypatch.setattr(attribution, "MOST_STEPS", attribution.FEWEST_STEPS)  # how exact they are does not matter here
    each = random_model(name, truncation=truncation)
    explanations = [(text[:20], attribute(each, text)) for text in ODD_TEXTS]
    for text, (_, explanation) in zip(ODD_TEXTS, explanations, strict=True):
        assert "".join(piece for piece, *_ in explanation.pieces()) == text
        room = each.encode.room * (3 if truncation == "windows" else 1)
        assert (explanation.unread is None) == (len(each.encode._tokens([text])[0]) <= room)
        coloured = explain.in_colour(explanation)
        assert len(coloured) < 5000  # what was not read is counted, not printed
        assert not re.search("[\0-\x08\x0b-\x1f]", re.sub("\x1b\\[(0|2|30;48;5;[0-9]+)m", "", coloured))
    explain.write_explanations(tmp_path / "page.html", "odd <texts>", "", explanations)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>odd &lt;texts&gt;</title>" in page
    body = page[page.index("<body>"):]
    assert not set(re.findall(r"</?(\w+)", body)) - {"body", "h1", "h2", "p", "span", "html"}
    assert not set(page) & set(map(chr, explain.UNPRINTABLE))
    shown = unescape(re.sub("<[^>]+>", "", body))
    assert all(text.translate(explain.UNPRINTABLE) in shown for text in ODD_TEXTS)


def test_the_cut_part_is_where_it_was_cut(random_model):
    text = " ".join(f"film{place:03d}" if place % 10 else "end." for place in range(200))
    unread = {}
    for truncation in ("head", "tail", "head_tail"):
        explanation = attribute(random_model("bert", truncation=truncation), text)
        unread[truncation] = explanation.unread
        assert re.search("not read: 1.. of 200 words", "\n".join(explain.remarks(explanation)))
    assert unread["head"][0] > 0
    assert unread["head"][1] == len(text)
    assert unread["tail"][0] == 0
    assert unread["tail"][1] < len(text)
    assert 0 < unread["head_tail"][0] < unread["head_tail"][1] < len(text)


def test_one_review(run, tmp_path, capsys, monkeypatch):
    text = "a gripping film & <i>moving</i> 😀"
    command(run, text=text, output=str(tmp_path / "one.html"))
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"predicted good \(0\.\d{4}\)", printed[0])
    assert re.fullmatch(r" +\+\d+\.\d %  (gripping|moving)", printed[2])
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert re.search(r'<span class="for" style="--strength: [\d.]+" title="\+[\d.]+ % \(\+[\d.]+ logits\)">gripping<',
                     page)
    assert "<i>" not in page
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    command(run, text=text)
    coloured = capsys.readouterr().out
    assert re.search(r"\x1b\[30;48;5;(46|83)m(gripping|moving)\x1b\[0m", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    command(run, text=text)
    assert "\x1b" not in capsys.readouterr().out


def test_the_most_confident_mistakes_of_a_run(run, capsys):
    folder = load_config("config.yaml", run).run_folder
    rows = [{"id": number, "text": f"a dull, dreary story number {number}", "label": "good", "predicted": "bad",
             "confidence": 0.9} for number in range(100, 125)]
    write_mistakes(folder / "misclassified.csv", rows)
    command(run)
    printed = capsys.readouterr().out
    assert printed.count("labelled good") == 3
    page = (folder / "misclassified.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>review (\d+): labelled good, predicted bad", page) == [str(n) for n in range(100, 120)]
    command(run)  # again, over its own page


def test_the_mistakes_are_those_of_the_models_own_run(run, tmp_path, capsys):
    own = load_config("config.yaml", run).run_folder
    other = shutil.copytree(own, tmp_path / "other")
    write_mistakes(other / "misclassified.csv", [{"id": 7, "text": "a film", "label": "good", "predicted": "bad",
                                                  "confidence": 0.9}])
    for model in (other, other / "best"):
        command(run, model=str(model))
        assert "review 7: labelled good" in capsys.readouterr().out
        (other / "misclassified.html").unlink()
    with pytest.raises(UserError, match="is in no run folder, whose mistakes could be explained: give --text"):
        command(run, model=str(shutil.copytree(own / "best", tmp_path / "alone")))


def test_what_cannot_be_explained_is_one_line(run, tmp_path):
    """Wrong settings end in one line with the fix."""
    with pytest.raises(UserError, match="misclassified.csv is missing: .*--mode test"):
        explain.read_mistakes(tmp_path)
    shutil.copytree(load_config("config.yaml", run).run_folder, tmp_path / "perfect")
    (tmp_path / "perfect" / "misclassified.csv").write_text("id,text,label,predicted,confidence\n")
    with pytest.raises(UserError, match="no misclassified reviews, which is good news"):
        command([*run, f"output_dir={tmp_path}", "run_name=perfect"])


def test_a_full_disk_matters_only_where_a_page_is_written(run, tmp_path, monkeypatch, capsys):
    config = load_config("config.yaml", run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))

    def explained(**options) -> None:
        explain.explain(cli.Command("explain", config, **options), Devices(config))

    explained(text="a gripping film")
    assert capsys.readouterr().out.startswith("predicted good")
    no_room = "{}: no room to write 1 MB .* make room or choose another --output$"
    with pytest.raises(UserError, match=no_room.format(tmp_path)):
        explained(text="a gripping film", output=str(tmp_path / "page.html"))
    assert not list(tmp_path.iterdir())
    write_mistakes(config.run_folder / "misclassified.csv",
                   [{"id": 1, "text": "a film", "label": "good", "predicted": "bad", "confidence": 0.9}])
    with pytest.raises(UserError, match=no_room.format(config.run_folder)):
        explained()


def test_explaining_changes_no_weight(run):
    folder = load_config("config.yaml", run).run_folder / "best"
    each = classifier(folder)
    attribute(each, "a gripping film")
    fresh = load_model(folder).state_dict()
    assert all(torch.equal(weights, fresh[name]) for name, weights in each.model.state_dict().items())
    assert not any(hooks for module in each.model.modules() for hooks in [module._forward_hooks])


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_a_review_in_windows_is_explained_by_the_words_of_all_of_them(random_model, name):
    each = random_model(name, truncation="windows")
    text = "a gripping and moving film, if dreary at its start and a little too long before the end " * 2
    assert 2 <= len(each.encode.windows([text])[0]) <= 3
    explanation = attribute(each, text)
    assert explanation.is_complete
    assert explanation.unread is None
    read = " ".join(text[word.start:word.end] for word in explanation.words)
    assert read.split() == text.replace(",", " ,").split()
    windows = [torch.tensor([window]) for window in each.encode.windows([text])[0]]
    with torch.no_grad():
        logits = torch.cat([each.model(window).logits for window in windows]).mean(dim=0)
    own = each.label_names.index(explanation.predicted)
    assert explanation.score == pytest.approx(float(logits[own] - logits[1 - own]), abs=1e-4)
    assert explanation.probability == pytest.approx(float(logits.softmax(dim=0)[own]), abs=1e-5)
