"""--format web: a page that reads reviews as Python does. The last tests run it in Chromium:

    npm install --ignore-scripts --prefix FOLDER @huggingface/transformers@4.3.2
    NODE_PATH=FOLDER/node_modules python -m pytest tests/test_web_page.py -n 0    # with Debian's chromium-driver
"""

import functools
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import PROJECT, expect, free_port, node_package, rows_of, run_here, write_reviews

from data import truncate
from suite.common.devices import Devices
from suite.common.storage import write_json
from suite.encoders.loading import new_model, save_model
from suite.encoders.tokenizers import load_tokenizer
from suite.inference.classifier import open_classifier
from suite.inference.export import INT8, page_settings
from utils import DEMO_WARNING, ModelConfig, load_config

pytest.importorskip("onnxscript")

LIBRARY, RUNTIME = node_package("@huggingface/transformers"), node_package("onnxruntime-web")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, encoder_folder):
    """(the export's folder, what was printed, the same model in Python). It reads windows and has a threshold."""
    folder, encoder = tmp_path_factory.mktemp("web"), encoder_folder("bert")
    torch.manual_seed(1)
    model = new_model(ModelConfig(model_name=encoder, pooling="mean"), ["bad", "<b>good</b>"]).eval()
    tokenizer = load_tokenizer(encoder)
    model.head.weight.data *= 100  # these reviews' hidden states are much alike
    with torch.no_grad():
        model.head.bias -= model(tokenizer("the film was a story", return_tensors="pt")["input_ids"]).logits[0]
    model.config.max_len, model.config.truncation, model.config.max_windows = 12, "windows", 3
    save_model(folder / "model", model.config, model.state_dict(), tokenizer)
    write_json(folder / "model" / "threshold.json", {"threshold": 0.6})
    (folder / "model" / "README.md").write_text(f"# A model\n\n{DEMO_WARNING}\n")
    given = ["train_config.device=cpu", "train_config.mixed_precision=no"]
    done = expect(0, run_here(*given, mode="export", model=str(folder / "model"), formats=("web",)))
    config = load_config(PROJECT / "config.yaml", given)
    return folder / "model-export", done.stdout, open_classifier(folder / "model", config, Devices(config))


def test_the_folder_holds_what_the_page_needs(exported):
    folder, printed, classifier = exported
    assert printed.splitlines()[-1] == ("open http://127.0.0.1:8000 after: python -m http.server --bind 127.0.0.1 "
                                        f"--directory {folder}")
    size = (folder / "onnx" / "model.onnx").stat().st_size
    start, *_, end = classifier.tokenizer("film")["input_ids"]
    assert json.loads((folder / "page.json").read_text()) == {
        "name": "model", "warning": DEMO_WARNING, "dtype": "fp32", "megabytes": round(size / 1e6, 1), "prefix": [start],
        "suffix": [end], "room": 10, "truncation": "windows", "max_windows": 3, "classes": ["bad", "<b>good</b>"],
        "threshold": 0.6}
    page, card = (folder / "index.html").read_text(), (folder / "README.md").read_text()
    assert "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.2/dist/" in page
    assert "@huggingface/transformers@4.3.2\n" in card
    assert not any(str(folder.parent) in text for text in (page, card))  # for publishing
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "manifest.json"}


def test_with_8_bits_the_page_takes_them(exported, tmp_path):
    (tmp_path / INT8).parent.mkdir()
    (tmp_path / INT8).write_bytes(b"8 bits" * 100_000)
    settings = page_settings(tmp_path, exported[2])
    assert (settings["dtype"], settings["megabytes"], settings["threshold"]) == ("q8", 0.6, None)


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not at hand")
def test_the_page_cuts_reviews_as_training_does(exported):
    page = (exported[0] / "index.html").read_text()
    function = re.search(r"^function windowsOf.*?^}", page, re.MULTILINE | re.DOTALL)
    cases = [{"count": count, "room": 10, "truncation": truncation, "max_windows": most}
             for count in (0, 1, 9, 10, 11, 19, 21, 29, 31, 45, 200) for most in (1, 2, 3, 4)
             for truncation in ("head", "tail", "head_tail", "windows")]
    script = (f"{function[0]}; console.log(JSON.stringify({json.dumps(cases)}.map((each) => "
              "windowsOf([...Array(each.count).keys()], each))));")
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60, check=True)
    expected = [truncate(list(range(case["count"])), case["room"], case["truncation"], case["max_windows"])
                for case in cases]
    assert json.loads(done.stdout) == expected


def test_a_bag_of_words_has_no_page(tmp_path):
    given = [f"output_dir={tmp_path}", "run_name=words", "log_config.wandb_mode=disabled",
             f"data_config.dataset={write_reviews(tmp_path / 'reviews.csv')}",
             "data_config.text_column=review", "data_config.label_column=verdict"]
    expect(0, run_here(*given, mode="baseline"))
    refusal = expect(2, run_here(*given, mode="export", formats=("web",))).stderr
    assert "but not be explained or exported" in refusal
    assert not (tmp_path / "words" / "export").exists()


# ---------------------------------------------------------------------------------------------------------------------
# In Chromium

in_chromium = pytest.mark.skipif(
    None in (shutil.which("chromium"), shutil.which("chromedriver"), LIBRARY, RUNTIME),
    reason="Chromium, its driver, @huggingface/transformers and onnxruntime-web are not at hand")


class Browser:
    """Chromium through its driver, by the WebDriver protocol."""

    def __init__(self):
        port = free_port()
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                self.ask("/status")
                break
            except OSError:
                time.sleep(0.1)
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage"]}
        session = self.ask("/session", capabilities={"alwaysMatch": {"goog:chromeOptions": options,
                                                                     "timeouts": {"script": 120_000}}})
        self.address += f"/session/{session['sessionId']}"

    def ask(self, path: str, **values):
        request = urllib.request.Request(self.address + path, json.dumps(values).encode() if values else None)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *arguments):
        """What a script in the page gives to its function `done`."""
        script = f"const done = arguments[arguments.length - 1]; {script}"
        return self.ask("/execute/async", script=script, args=arguments)

    def open(self, address: str) -> str:
        """What the page says once it has loaded its model, or could not."""
        self.ask("/url", url=address)
        return self.run("""const look = () => document.querySelector("progress").hidden
            ? done(document.getElementById("status").textContent) : setTimeout(look, 50); look();""")

    def close(self):
        urllib.request.urlopen(urllib.request.Request(self.address, method="DELETE")).close()
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope="module")
def browser(exported):
    folder = exported[0]
    shutil.copy(LIBRARY / "dist" / "transformers.min.js", folder)
    for path in (RUNTIME / "dist").glob("ort-wasm-simd-threaded.asyncify.*"):
        shutil.copy(path, folder)
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def address(exported):
    """Of the folder in which the export's folder lies, on a server like that of `python -m http.server`."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=exported[0].parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


CLASSIFY = """
const [text, button, read] = ["text", "classify", "read"].map((id) => document.getElementById(id));
text.value = arguments[0];
read.textContent = "";
button.click();
const look = () => read.textContent ? done([
    Object.fromEntries([...document.querySelectorAll("#classes li")].map((row) =>
        [row.querySelector("span").textContent, Number(row.querySelector("data").value)])),
    document.getElementById("predicted").textContent, read.textContent]) : setTimeout(look, 20);
look();
"""


@in_chromium
def test_the_page_gives_the_probabilities_of_python(exported, browser, address, tmp_path):
    folder, _, classifier = exported
    assert browser.open(f"{address}/{folder.name}/") == "Ready."
    reviews = [row["review"] for row in rows_of(write_reviews(tmp_path / "reviews.csv", rows=18))]
    reviews += ["Café <br /> № ½ 😀 日本", "gripping " * 80]
    expected = classifier.probabilities(reviews)
    assert np.ptp(expected, axis=0).min() > 0.2
    windows = [len(each) for each in classifier.encode.windows(reviews)]
    assert set(windows) == {1, 2, 3}
    for review, probabilities, count in zip(reviews, expected, windows, strict=True):
        found, chosen, read = browser.run(CLASSIFY, review)
        np.testing.assert_allclose([found["bad"], found["<b>good</b>"]], probabilities, atol=1e-5)
        assert chosen == f"Class: {classifier.columns(probabilities)['predicted']}"
        assert (f"in {count} windows" in read) == (count > 1)
    assert read.startswith("30 of ")
    assert read.endswith(" <b>good</b> is chosen from 60.00 % on.")


@in_chromium
def test_the_documented_lines_work_in_a_browser(exported, browser, address):
    folder, _, classifier = exported
    documentation = (PROJECT / "docs" / "inference.md").read_text(encoding="utf-8")
    lines = re.search(r"```javascript\nimport (\{.*?\}) from .*?\n(.*?)```", documentation, re.DOTALL)
    script = lines[2].replace("checkpoints/RUN", "/").replace('"export"', f'"{folder.name}"')
    script = re.sub(r"^console\.log\((.*)\);", r"return \1;", script, flags=re.MULTILINE)
    browser.ask("/url", url=f"{address}/{folder.name}/config.json")  # a page without a policy of its own
    found = browser.run(f"""import("/{folder.name}/transformers.min.js").then(async (library) => {{
        const {lines[1]} = library;
        env.backends.onnx.wasm.wasmPaths = "/{folder.name}/";
        {script} }}).then(done, (error) => done(String(error)));""")
    expected = classifier.probabilities(["A film to remember."])[0]
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        dict(zip(classifier.label_names, expected, strict=True)), abs=1e-5)


@in_chromium
def test_what_is_missing_is_one_sentence(exported, browser, address):
    folder = exported[0]
    assert "run `python -m http.server --bind 127.0.0.1` in the folder" in browser.open(f"file://{folder}/index.html")
    (folder / "onnx" / "model.onnx").rename(folder / "elsewhere")
    try:
        problem = browser.open(f"{address}/{folder.name}/")
    finally:
        (folder / "elsewhere").rename(folder / "onnx" / "model.onnx")
    assert re.fullmatch(r"The model could not be loaded \(.*onnx/model\.onnx.*\): check that all files .*", problem)
