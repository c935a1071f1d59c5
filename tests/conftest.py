"""What the tests share: tiny encoders, tiny data, an isolated cache, and the real scripts as child processes."""

import contextlib
import csv
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Before any Hugging Face library is imported: nothing outside, and nobody's cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests share the cores, and the bits of a result depend on the threads
for variable in ("WORLD_SIZE", "RANK", "WANDB_API_KEY"):
    os.environ.pop(variable, None)
# Nothing that a test sees depends on this machine's CPU: see tests/cpu_of_tests, and the fixture `cpu`
CPU_OF_TESTS = str(Path(__file__).resolve().parent / "cpu_of_tests")
sys.path.insert(0, CPU_OF_TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join([CPU_OF_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["CPU_OF_TESTS"] = "fp32"

import pytest
import torch
from forked import Forked, can_fork
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
)

PROJECT = Path(__file__).resolve().parent.parent
SHARED = PROJECT.parent / "shared"
SMALL = {"vocab_size": 2500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 0}
ENCODERS = {
    "bert": BertConfig(**SMALL),
    "modernbert": ModernBertConfig(**SMALL, global_attn_every_n_layers=2, local_attention=8, bos_token_id=2,
                                   eos_token_id=3, cls_token_id=2, sep_token_id=3),
    "roberta": RobertaConfig(**SMALL | {"pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": DistilBertConfig(vocab_size=2500, dim=32, n_layers=2, n_heads=2, hidden_dim=64,
                                   max_position_embeddings=66),
    "electra": ElectraConfig(**SMALL, embedding_size=16),
    "deberta-v3": DebertaV2Config(**SMALL, type_vocab_size=0, relative_attention=True, position_biased_input=False,
                                  pos_att_type=["p2c", "c2p"], position_buckets=16, norm_rel_ebd="layer_norm",
                                  share_att_key=True),
}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--long-tenth", type=int, choices=range(10), metavar="N",
                     help="run every tenth of them, from the N-th (0 to 9), in place of all")


# From the longest to the shortest: files that come last should be short, so that no process waits for the other.
LONGEST_FILES = ["test_accumulation", "test_resuming", "test_benchmarks", "test_outside", "test_training", "test_hub",
                 "test_experiment", "test_native_heads", "test_data", "test_kills", "test_cpu_kernels",
                 "test_processes", "test_model", "test_quantize", "test_bad_surroundings", "test_predict"]


def pytest_collection_modifyitems(config, items):
    order = {f"{name}.py": place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    long, tenth = [item for item in items if "long" in item.keywords], config.getoption("--long-tenth")
    wanted = long if config.getoption("--long") else [] if tenth is None else long[tenth::10]
    for item in set(long) - set(wanted):
        item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))


@pytest.fixture(scope="session", autouse=True)
def not_drawn():
    """Plots are made and not drawn in this process: that would take half of a tiny run's time. The scripts that tests
    start do draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"not drawn"))
        yield


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """encoder_folder(name): a folder with a tiny random encoder of that architecture and a tokenizer."""
    folders = {}

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            AutoModel.from_config(ENCODERS[name]).save_pretrained(folders[name])
            tokenizer = "demo/modernbert" if name == "modernbert" else "demo/bert"
            AutoTokenizer.from_pretrained(PROJECT / tokenizer).save_pretrained(folders[name])
        return str(folders[name])

    return folder


def write_reviews(path: Path, rows: int = 200, names: tuple = ("bad", "good"), seed: int = 0) -> Path:
    """A file of reviews whose words give their class away, 3 to 40 words long."""
    generator = random.Random(seed)
    words = {names[0]: "dull dreary pointless".split(), names[1]: "gripping moving delightful".split()}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        for row in range(rows):
            name = names[row % len(names)]
            filler = generator.choices("the film was a story of this and that with some people".split(),
                                       k=generator.randint(2, 24))
            text = [*filler, *generator.choices(words.get(name, ["odd"]), k=len(filler) // 2 + 1), f"number {row}"]
            generator.shuffle(text)
            writer.writerow([" ".join(text), name])
    return path


@pytest.fixture
def reviews_file(tmp_path) -> Path:
    return write_reviews(tmp_path / "reviews.csv")


@pytest.fixture
def overrides(tmp_path, reviews_file, encoder_folder) -> list[str]:
    """Settings of a run of seconds: tiny encoder, 160 training reviews, fp32, 10 optimizer steps an epoch."""
    return [f"output_dir={tmp_path / 'runs'}", "run_name=run", f"model_config.model_name={encoder_folder('bert')}",
            f"data_config.dataset={reviews_file}", "data_config.text_column=review", "data_config.label_column=verdict",
            "data_config.max_len=32", "data_config.batch_size=16", "model_config.pooling=mean", "train_config.epochs=2",
            "train_config.learning_rate=0.01", "train_config.mixed_precision=no", "train_config.device=cpu",
            "log_config.wandb_mode=disabled", "log_config.log_every_steps=3"]


@pytest.fixture(params=["fp32", "bf16"])
def cpu(request, monkeypatch) -> str:
    """The test runs twice, here and in the processes that it starts: on a CPU for which mixed_precision=auto picks
    fp32, and on one for which it picks bf16, which torch computes everywhere. Other tests run on the first kind."""
    monkeypatch.setenv("CPU_OF_TESTS", request.param)
    return request.param


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_script(*arguments: str, environment: dict | None = None, merged: bool = False, fresh: bool = False
                 ) -> subprocess.Popen | Forked:
    """Starts `python ARGUMENTS` in the project's folder, as a user would call it: forked from a process that has
    imported the libraries, unless a `fresh` one is asked for. `merged`: standard error goes to standard output."""
    environment = {**os.environ, **(environment or {})}
    if can_fork(arguments, environment) and not fresh:
        return Forked(arguments, environment, merged)
    return subprocess.Popen([sys.executable, *arguments], cwd=PROJECT, text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT if merged else subprocess.PIPE)


def run_script(*arguments: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """Starts it as `start_script` does, and waits for its end."""
    process = start_script(*arguments, **options)
    try:
        output, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, error)


ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch"]


def launch(processes: int, *arguments: str, machines: int = 1, timeout: float = 120, **variables: str) -> str:
    """What `torchrun --nproc_per_node PROCESSES ARGUMENTS` on so many machines prints. Its processes start as
    torchrun would start them, with the same variables; a few tests call torchrun itself, and `accelerate launch`."""
    together = {"WORLD_SIZE": str(machines * processes), "LOCAL_WORLD_SIZE": str(processes), **variables,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [start_script(*arguments, merged=True, environment=together | {
        "RANK": str(rank), "GROUP_RANK": str(rank // processes), "LOCAL_RANK": str(rank % processes)})
        for rank in range(machines * processes)]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    return "\n".join(outputs)


def run_here(*arguments: str, mode: str = "train", config: str = "config.yaml", devices_class: type | None = None,
             **options) -> subprocess.CompletedProcess:
    """What `python main.py --mode MODE --config CONFIG --OPTION VALUE ARGUMENTS` does, in this process, which has paid
    for its imports already."""
    import main
    from suite.common import cli
    from suite.common.devices import Devices

    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(cli, "atexit"):
        try:  # and what a script does at its end would end the tests
            cli.run_with_exit_code(lambda: main.main(cli.Command(
                mode, cli.config_for(mode, PROJECT / config, arguments, options.get("model")), **options),
                devices_class or Devices))
        except SystemExit as left:
            code = left.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def stop_at(step: int, arguments: list[str], monkeypatch) -> None:
    """Train, in this process, and stop after this optimizer step with the state saved."""
    from suite.common.devices import Devices
    from suite.training.run import Run
    from utils import load_config

    config = load_config(PROJECT / "config.yaml", arguments)
    stop_run_at(step, Run.open(config, Devices(config)), monkeypatch)


def stop_run_at(step: int, run, monkeypatch) -> None:
    """The same with a run of any kind that is open."""
    import main
    from suite.common.stopping import StopRequested

    def stop_if_asked(devices):
        if run.progress.step == step:
            raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr("suite.training.run.stop_if_asked", stop_if_asked)
        with pytest.raises(SystemExit):
            main.train(run)


RESULTS = {"history.jsonl", "valid_predictions.csv", "test_predictions.csv", "misclassified.csv", "best/config.json",
           "best/model.safetensors", "best/tokenizer.json", "best/README.md"}


def train(*arguments: str, script: str = "main.py", code: int = 0, **options) -> subprocess.CompletedProcess:
    """The real script, in a process of its own."""
    return expect(code, run_script(script, *arguments, **options))


def train_here(*arguments: str, code: int = 0, **options) -> subprocess.CompletedProcess:
    return expect(code, run_here(*arguments, **options))


def expect(code: int, result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == code, result.stdout + result.stderr
    return result


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(path) -> list[dict]:
    """The rows of a .csv file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def history_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def bits_of(folder) -> dict[str, bytes]:
    """Everything of a run that must not depend on when it was interrupted; metrics.json less its timings."""
    measured, files = metrics_of(folder), {name: (folder / name).read_bytes() for name in RESULTS}
    return files | {"metrics": json.dumps([measured["valid"], measured["test"], measured["train"]["optimizer_steps"]])}


def differing_files(first: Path, second: Path) -> list[str]:
    """The files in which two runs differ, of those that hold neither a run's name nor its timings."""
    names = ("best/model.safetensors", "history.jsonl", "valid_predictions.csv", "test_predictions.csv")
    return [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()]


def node_package(name: str) -> Path | None:
    """Where NODE_PATH has a package of npm; None if it has not."""
    folders = (Path(folder) / name for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder)
    return next((folder for folder in folders if folder.is_dir()), None)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoder_folder):
    """(overrides, run folder) of one finished run that the tests of a file share."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_reviews(folder / "reviews.csv")
    overrides = [
        f"output_dir={folder / 'runs'}", f"model_config.model_name={encoder_folder('bert')}",
        "model_config.pooling=mean", f"data_config.dataset={folder / 'reviews.csv'}",
        "data_config.text_column=review", "data_config.label_column=verdict",
        "data_config.max_len=32", "data_config.batch_size=16",
        "train_config.epochs=3", "train_config.learning_rate=0.01", "train_config.scheduler=linear",
        "train_config.mixed_precision=no", "train_config.device=cpu", "train_config.save_every_steps=4",
        "log_config.log_every_steps=3", "log_config.wandb_mode=disabled"]
    train_here(*overrides, "run_name=run")
    return overrides, folder / "runs" / "run"


@pytest.fixture
def stdin(monkeypatch):
    """stdin(bytes): what standard input holds from now on."""
    return lambda content: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


@pytest.fixture
def refused(tmp_path, overrides):
    """refused(*more overrides): the one line of a run that must not start, over a run folder that must stay."""
    occupied = tmp_path / "runs" / "run"
    (occupied / "best").mkdir(parents=True)
    (occupied / "best" / "model.safetensors").write_bytes(b"precious")

    def attempt(*more: str) -> str:
        before, started = content_of(occupied), time.process_time()
        result = run_here(*overrides, "train_config.resume=never", *more)
        assert time.process_time() - started < 5  # of this process, however busy the machine is
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.returncode, len(errors)) == (2, 1), result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.rstrip().endswith(errors[0]), result.stderr  # one line, however long
        assert content_of(occupied) == before
        return errors[0]

    return attempt
