"""Whenever a run dies, the same command continues it and ends with the same bits, for both scripts.

Runs are killed at random moments: in a save, among micro-batches, in validation, twice in an epoch. The numbers are
drawn from KILLS_SEED (printed), over KILLS_ROUNDS rounds:

    python -m pytest tests/test_kills.py --long -n 0 -s                          50 rounds of each script, an hour
    KILLS_ROUNDS=3 KILLS_SEED=7 python -m pytest tests/test_kills.py --long -n 0 -s -k SIGKILL
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, RESULTS, bits_of, content_of, run_here, start_script, train, train_here, write_reviews

from suite.common.storage import damage, room_for, seal
from suite.encoders.loading import load_model
from suite.encoders.tokenizers import load_tokenizer
from suite.training.states import newest_good_state, saved_states
from utils import UserError

SEED = int(os.environ.get("KILLS_SEED", random.randrange(2**32)))
SCRIPTS = ["main.py", "main_accumulation.py"]
SETTLED = RESULTS - {"best/README.md"}  # the model card tells the run's name


def rounds(usual: int) -> int:
    return int(os.environ.get("KILLS_ROUNDS", usual))


def tensors_of(state: Path) -> list:
    """Everything that is saved in a state but the time that it took."""
    weights, average, loop = (torch.load(state / name, weights_only=True)
                              for name in ("state.pt", "average_0.pt", "process_0.pt"))
    progress = json.loads((state / "progress.json").read_text())
    del loop["meter"]["seconds"]
    return [progress, weights, average, loop]


def is_equal(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_equal, first, second))
    return first == second


def assert_same_bits(folder: Path, expected: Path) -> None:
    bits, wanted = bits_of(folder), bits_of(expected)
    assert {name for name in [*SETTLED, "metrics"] if bits[name] != wanted[name]} == set()
    assert is_equal(tensors_of(newest_good_state(folder / "last")), tensors_of(newest_good_state(expected / "last")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoder_folder):
    """undisturbed(script): (arguments of a run of that script without run_name, folder of one that nothing disturbed).

    Two epochs of 12 optimizer steps, saved after every second one; main_accumulation.py takes 4 micro-batches a step.
    """
    root = tmp_path_factory.mktemp("kills")
    write_reviews(root / "reviews.csv", rows=240)
    finished = {}

    def run(script: str) -> tuple[list[str], Path]:
        micro_batch = 4 if script == "main_accumulation.py" else 16
        arguments = [
            f"output_dir={root / script}", f"model_config.model_name={encoder_folder('bert')}",
            f"data_config.dataset={root / 'reviews.csv'}", "data_config.text_column=review",
            "data_config.label_column=verdict", "data_config.max_len=32", f"data_config.batch_size={micro_batch}",
            "data_config.eval_batch_size=4", "train_config.effective_batch_size=16", "train_config.epochs=2",
            "train_config.learning_rate=0.003", "train_config.scheduler=cosine", "train_config.mixed_precision=no",
            "train_config.device=cpu", "train_config.save_every_steps=2", "log_config.log_every_steps=3",
            "log_config.wandb_mode=disabled", "train_config.ema_decay=0.9"]
        if script not in finished:
            finish_run(script, [*arguments, "run_name=whole"])
            finished[script] = root / script / "whole"
        return arguments, finished[script]

    return run


def refusal_here(arguments: list[str], mode: str = "train") -> str:
    """The one line of a refused command."""
    return train_here(*arguments, mode=mode, code=2).stderr


def wait_for(moment: str, folder: Path, process, chance: random.Random) -> None:
    """Return when the run is about there, or has ended."""
    before = set(saved_states(folder / "last"))
    reached = {
        "in a save": lambda: any((folder / "last").glob("*.partial")) or any(folder.glob("best.*")),
        "after a save": lambda: set(saved_states(folder / "last")) - before,
        "in validation": lambda: any(state.name.endswith(("0000012", "0000024"))
                                     for state in set(saved_states(folder / "last")) - before),
        "while it starts": lambda: True,
    }[moment]
    deadline = time.monotonic() + 90
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    longest = {"in a save": 0.02, "after a save": 0.2, "in validation": 0.1, "while it starts": 8}[moment]
    time.sleep(chance.uniform(0, longest))


def finish_run(script: str, arguments: list[str]) -> None:
    if script == "main.py":
        train_here(*arguments)
    else:
        train(*arguments, script=script)  # Accelerate wants a process of its own


def run_until_done(script: str, name: str, undisturbed, sent: signal.Signals, chance: random.Random, kills: int
                   ) -> None:
    """Send the signal up to `kills` times, start again each time, and compare what comes out."""
    arguments, whole = undisturbed(script)
    folder, arguments = whole.parent / name, [*arguments, f"run_name={name}"]
    codes = []
    for _ in range(kills):
        moment = chance.choice(["in a save", "in a save", "after a save", "in validation", "while it starts"])
        process = start_script(script, *arguments, merged=True, fresh=moment == "while it starts")
        wait_for(moment, folder, process, chance)
        process.send_signal(sent)
        output = process.communicate(timeout=90)[0]
        codes.append(process.returncode)
        print(f"{name}: {sent.name} {moment}, left with {process.returncode}", flush=True)
        # 0 where the signal found it finished; SIGTERM ends it as every program where it does not train
        assert process.returncode in ({-sent, 0} | ({143} if sent == signal.SIGTERM else set())), output
    finish_run(script, arguments)
    assert_same_bits(folder, whole)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("script", "sent"), [("main.py", signal.SIGKILL)])
def test_killed_twice(undisturbed, script, sent):
    run_until_done(script, "short", undisturbed, sent, random.Random(SEED), kills=2)


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_again_and_again(undisturbed, script, sent):
    print(f"KILLS_SEED={SEED}")
    for number in range(rounds(50 if sent == signal.SIGKILL else 20)):
        chance = random.Random(f"{SEED} {script} {sent.name} {number}")
        run_until_done(script, f"{sent.name}-{number}", undisturbed, sent, chance, kills=chance.randint(1, 3))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_signal_among_the_imports_leaves_without_a_word(undisturbed, sent):
    # torch's C++ aborts the process when an exception comes up in the middle of its import.
    arguments, _ = undisturbed("main.py")
    for seconds in (0.2, 0.6, 1.2):
        process = start_script("-c", f"import sys; sys.argv = ['main.py', *{arguments}]; "
                               "from suite.common import cli; cli.begin(); cli.read_command('', False); "
                               "print('reading', flush=True); import main", merged=True)
        assert process.stdout.readline() == "reading\n"
        time.sleep(seconds)
        process.send_signal(sent)
        output = process.communicate(timeout=60)[0]
        assert (process.returncode, output) in ((-sent, ""), (0, ""))  # a shell shows 143 and 130


def test_a_second_ctrl_c_leaves_at_once(undisturbed):
    arguments, whole = undisturbed("main.py")
    # Evaluating takes long enough for two signals: the first one waits for the end of a batch.
    process = start_script("main.py", *arguments, "run_name=impatient", "data_config.eval_batch_size=1", merged=True)
    wait_for("after a save", whole.parent / "impatient", process, random.Random(SEED))
    process.send_signal(signal.SIGSTOP)  # both arrive before it can act on the first
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def fill_the_disk(script: str, name: str, undisturbed, chance: random.Random) -> None:
    """Continue a run, which has a state to save yet, under a limit that the weights exceed, and then without it."""
    arguments, whole = undisturbed(script)
    folder, arguments = shutil.copytree(whole, whole.parent / name), [*arguments, f"run_name={name}"]
    (folder / "metrics.json").unlink()
    shutil.rmtree(saved_states(folder / "last")[0])  # the one after the last validation
    [safe] = saved_states(folder / "last")
    before = content_of(safe)
    sizes = sorted(path.stat().st_size for path in safe.iterdir())
    limit = chance.randint(sizes[-2], sizes[-1] - 1)  # the weights do not fit, or only in part
    process = start_script(script, *arguments, merged=True)
    # Python ignores SIGXFSZ: a write above the limit fails, as on a full disk
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    output = process.communicate(timeout=90)[0]
    print(f"{name}: files of at most {limit:,} bytes: {output.splitlines()[-1]}", flush=True)
    assert process.returncode == 2, output
    [error] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{folder}: no room to write" in error
    assert "Traceback" not in output
    assert content_of(safe) == before
    assert damage(newest_good_state(folder / "last")) is None
    assert not any((folder / "last").glob("*.partial"))
    finish_run(script, arguments)
    assert_same_bits(folder, whole)
    shutil.rmtree(folder)


def test_a_full_disk(undisturbed):
    fill_the_disk("main.py", "full", undisturbed, random.Random(SEED))


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_again_and_again(undisturbed, script):
    print(f"KILLS_SEED={SEED}")
    for number in range(rounds(20)):
        fill_the_disk(script, f"full-{number}", undisturbed, random.Random(f"{SEED} {script} {number}"))


def test_a_full_disk_is_also_known_by_what_a_library_in_rust_says(encoder_folder, tmp_path):
    tokenizer = load_tokenizer(encoder_folder("bert"))
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}: no room to write"), room_for(tmp_path):
            tokenizer.save_pretrained(tmp_path)  # raises a plain Exception
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    with pytest.raises(Exception, match="os error 2"), room_for(tmp_path):
        tokenizer.backend_tokenizer.save(str(tmp_path / "no" / "folder"))


def test_a_disk_without_room_is_refused_before_the_first_step(undisturbed, monkeypatch):
    arguments, whole = undisturbed("main.py")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_100_000))
    error = refusal_here([*arguments, "run_name=small"])
    # three states of the weights, their average and Adam's two moments, and two best models: 14 times 0.4 MB
    assert "no room to write 6 MB (1 MB are free" in error
    assert "set output_dir" in error
    assert not (whole.parent / "small").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files, and two processes in one folder


def damaged_copies(content: bytes, parts: int):
    """Copies of a file in which one of `parts` ranges, which cover all of it, is flipped, cut off or zeroed."""
    edges = [len(content) * part // parts for part in range(parts + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        if end > begin:
            yield content[:begin] + bytes(byte ^ 0xFF for byte in content[begin:end]) + content[end:]
            yield content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1:]  # a single bit
            yield content[:begin]
            yield content[:begin] + content[end:]
            yield content + content[begin:end]


def test_all_damage_to_saved_files_is_found_and_named(undisturbed, tmp_path):
    _, whole = undisturbed("main.py")
    for source in (saved_states(whole / "last")[0], whole / "best"):
        folder = shutil.copytree(source, tmp_path / source.name)
        assert damage(folder) is None
        sealed = {path for path in folder.iterdir() if path.name != "README.md"}
        assert len(sealed) >= 4
        for path in sealed:
            content = path.read_bytes()
            for copy in damaged_copies(content, parts=16):
                path.write_bytes(copy)
                # A manifest that is still JSON blames the file whose sum it changed: each way the state is refused.
                assert (path.name in damage(folder)) or path.name == "manifest.json", path
            path.unlink()
            assert path.name in damage(folder)
            path.write_bytes(content)
            assert damage(folder) is None
    (folder / "README.md").write_text("A model card is its owner's to edit.")
    assert damage(folder) is None


def test_a_damaged_best_model_is_refused_by_everything_that_reads_it(undisturbed):
    arguments, whole = undisturbed("main.py")
    folder, arguments = shutil.copytree(whole, whole.parent / "spoilt"), [*arguments, "run_name=spoilt"]
    weights = folder / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last bit of the last weight: every library loads it silently
    weights.write_bytes(content)
    before = content_of(folder)
    assert f"error: {weights} is damaged" in refusal_here(arguments, "test")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_model(folder / "best")
    assert content_of(folder) == before
    (folder / "metrics.json").unlink()
    assert f"error: {weights} is damaged" in refusal_here(arguments)
    weights.write_bytes((whole / "best" / "model.safetensors").read_bytes())
    (folder / "best" / "manifest.json").unlink()
    assert "manifest.json is missing" in refusal_here(arguments, "test")


def test_a_kill_between_the_two_renames_is_mended(undisturbed):
    arguments, whole = undisturbed("main.py")
    folder = shutil.copytree(whole, whole.parent / "renamed")
    (folder / "metrics.json").unlink()
    (folder / "best").rename(folder / "best.old")
    shutil.copytree(folder / "best.old", folder / "best.partial")
    train_here(*arguments, "run_name=renamed")
    assert_same_bits(folder, whole)
    assert not (folder / "best.old").exists()


def test_a_model_from_elsewhere_needs_no_manifest(undisturbed, tmp_path):
    _, whole = undisturbed("main.py")
    folder = shutil.copytree(whole / "best", tmp_path / "model")
    (folder / "manifest.json").unlink()
    assert load_model(folder)


def test_model_files_can_be_read_by_whom_the_umask_allows(undisturbed):
    _, whole = undisturbed("main.py")
    umask = os.umask(0)
    os.umask(umask)
    for path in (*whole.glob("best/*"), *whole.glob("last/*/*"), whole / "metrics.json"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_a_second_process_in_one_folder_is_refused(undisturbed):
    arguments, whole = undisturbed("main.py")
    folder, arguments = shutil.copytree(whole, whole.parent / "shared"), [*arguments, "run_name=shared"]
    (folder / "metrics.json").unlink()
    before = content_of(folder)
    code = ("import pathlib, sys; from suite.common import storage; "
            "storage.lock(pathlib.Path(sys.argv[1])); print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", code, folder], cwd=PROJECT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    for mode in ("train", "test"):
        assert f"error: {folder} is in use by another process" in refusal_here(arguments, mode)
    assert content_of(folder) == before
    other.kill()  # and with it goes its lock
    other.wait()
    train_here(*arguments)
    assert_same_bits(folder, whole)


# ---------------------------------------------------------------------------------------------------------------------
# No pickle is ever loaded


class Bomb:
    """Unpickled, it leaves a file where the test would see it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["state.pt", "process_0.pt"])
def test_a_planted_pickle_does_not_run_even_under_a_true_manifest(undisturbed, tmp_path, name):
    arguments, whole = undisturbed("main.py")
    folder = shutil.copytree(whole, tmp_path / "planted")
    (folder / "metrics.json").unlink()
    shutil.rmtree(saved_states(folder / "last")[1])
    [state] = saved_states(folder / "last")
    torch.save({"model": Bomb(tmp_path / "ran"), "scheduler": Bomb(tmp_path / "ran")}, state / name)
    seal(state)
    assert damage(state) is None
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run_here(*arguments, f"output_dir={tmp_path}", "run_name=planted")
    assert not (tmp_path / "ran").exists()
