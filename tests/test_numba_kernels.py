"""The kernels that numba compiles compute what they should, in any number of threads; a run stops and goes on with
them, and without numba it takes the usual path."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ENCODERS, PROJECT, differing_files, launch, metrics_of, stop_at, train_here
from test_model import batch, build

from suite.common import devices
from suite.common.devices import Devices, numba_works
from suite.encoders.cpu_kernels import LEVELS
from suite.encoders.placement import checkpoint_gradients, place_model
from utils import Config, TrainConfig, UserError

numba = pytest.importorskip("numba", reason="pip install -r requirements-fast.txt")
if not numba_works():
    pytest.skip("numba finds no OpenMP here", allow_module_level=True)

from suite.encoders import numba_layers  # noqa: E402
from suite.encoders.numba_layers import GELU, Attention, DropoutAddNorm, numba_attention  # noqa: E402


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def scale_of(rate: float) -> float:
    return LEVELS / (LEVELS - round(rate * LEVELS))


def assert_near(found: tuple, exact: tuple, error: float) -> None:
    for ours, expected in zip(found, exact, strict=True):
        assert float((ours.detach().double() - expected.detach()).norm() / expected.detach().norm()) < error


PADDED = (torch.arange(50) < torch.tensor([50, 41, 1, 20])[:, None])[:, None]  # (4, 1, 50)
NEAR = PADDED & ((torch.arange(50)[:, None] - torch.arange(50)).abs() <= 8)  # ModernBERT's local attention


def attention(query, key, value, mask, rate):
    torch.manual_seed(5)
    return Attention.apply(query, key, value, mask, 0.3, rate)


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize(("mask", "tokens"), [(PADDED, 50), (NEAR, 50), (PADDED, 1), (torch.ones(1, 1, 50).bool(), 50)],
                         ids=["padded", "local", "first token", "unpadded"])
def test_attention(monkeypatch, mask, tokens, rate):
    monkeypatch.setattr("suite.encoders.cpu_kernels.BLOCK", 3 * 50 * tokens * 3)  # 3 reviews at a time, and 1
    given = [normal(4, length, 3, 16).transpose(1, 2).detach().requires_grad_() for length in (tokens, 50, 50)]
    exact = doubles(*given)
    context = attention(*given, mask, rate)
    kept = context.grad_fn.saved_tensors[3].view(torch.int16) >= 0  # the sign of each probability
    assert kept.double().mean() == pytest.approx(1 - rate, abs=0.05)
    scores = (exact[0] @ exact[1].mT * 0.3).masked_fill(~mask[:, None], -1e30)
    expected = (scores.softmax(dim=-1) * kept * scale_of(rate) @ exact[2]).transpose(1, 2)
    reads = mask.any(dim=-1)[..., None, None]  # a token that may read nothing is padding, and nothing reads it
    upstream = normal(*context.shape).detach() * reads
    assert_near((context * reads, *torch.autograd.grad(context, given, upstream)),
                (expected * reads, *torch.autograd.grad(expected, exact, upstream.double())), 0.006)


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(4, 50, 96), (3, 1, 33)])
def test_dropout_add_norm(shape, rate):
    given = [normal(*shape), *(normal(*size, dtype=torch.float32) for size in (shape, shape[-1:], shape[-1:]))]
    exact = doubles(*given)
    torch.manual_seed(5)
    normed, narrowed = DropoutAddNorm.apply(*given, 1e-12, rate)
    assert torch.equal(normed.bfloat16(), narrowed)
    kept = normed.grad_fn.saved_tensors[0] != given[1]
    assert kept.double().mean() == pytest.approx(1 - rate, abs=0.1)
    expected = F.layer_norm(exact[1] + exact[0] * kept * scale_of(rate), shape[-1:], *exact[2:], 1e-12)
    upstream = normal(*shape, dtype=torch.float32).detach(), normal(*shape).detach()
    of_hidden, *others = torch.autograd.grad((normed, narrowed), given, upstream)
    of_hidden_exact, *others_exact = torch.autograd.grad(expected, exact, sum(doubles(*upstream)))
    assert_near((normed, *others), (expected, *others_exact), 1e-6)
    assert_near((of_hidden,), (of_hidden_exact,), 0.003)  # which is bf16


def test_gelu():
    x = torch.cat([5 * normal(10007).detach(), torch.tensor([0.0, -0.0, 100, -100]).bfloat16()]).requires_grad_()
    exact, = doubles(x)
    result, upstream = GELU.apply(x), normal(len(x)).detach()
    assert torch.equal(result, F.gelu(x))
    assert_near(torch.autograd.grad(result, x, upstream),
                torch.autograd.grad(F.gelu(exact), exact, upstream.double()), 0.003)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        given = [normal(4, 3, 50, 16).detach().requires_grad_() for _ in range(3)]
        normal_form = [normal(4, 50, 96), *(normal(*size, dtype=torch.float32) for size in ((4, 50, 96), (96,), (96,)))]
        context, x = attention(*given, PADDED, 0.1), normal(10007)
        normed = DropoutAddNorm.apply(*normal_form, 1e-12, 0.1)
        return [context, *normed, *torch.autograd.grad(context.sum(), given), torch.autograd.grad(
            GELU.apply(x).sum(), x)[0], *torch.autograd.grad(sum(map(torch.sum, normed)), normal_form)]

    threads = torch.get_num_threads()
    alone = results()
    torch.set_num_threads(2)
    try:
        together = results()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


DIGEST = """
import hashlib, torch
from suite.common.devices import numba_works
numba_works()
from suite.encoders.numba_layers import DropoutAddNorm
torch.manual_seed(0)
given = [torch.randn(200, 384, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
normed, _ = DropoutAddNorm.apply(*given, torch.randn(384), torch.randn(384), 1e-12, 0.1)
print(hashlib.sha256(normed.numpy().tobytes()).hexdigest())
"""


@pytest.mark.long
def test_the_first_process_has_the_bits_of_those_that_find_its_kernels_in_the_cache(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (subprocess.run([sys.executable, "-c", DIGEST], cwd=PROJECT, env=environment, check=True,
                                    capture_output=True).stdout for _ in range(2))
    assert list(tmp_path.rglob("*.nbc"))
    assert first == second != b""


def test_kernels_that_cannot_be_kept_are_one_line(monkeypatch):
    monkeypatch.setattr(numba_layers.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess(
        [], 1, "", "Traceback\nRuntimeError: cannot cache function 'exp'"))
    with pytest.raises(UserError, match=r"kept \(RuntimeError: cannot cache .*\): set NUMBA_CACHE_DIR to a folder"):
        numba_layers.from_cache()


def pass_of(folder: str, by_numba: bool, checkpointed: bool = False, dropout: float = 0.0, precision: str = "bf16",
            pooling: str = "cls") -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.nn.Module]:
    """(logits without dropout, gradients in training, model)"""
    devices = Devices(Config(train_config=TrainConfig(device="cpu", mixed_precision=precision)))
    model = build(folder, pooling=pooling, dropout_rate=dropout, encoder_dropout=dropout)
    place_model(model, devices.device, by_numba=by_numba)
    if checkpointed:
        checkpoint_gradients(model, folder)
    inputs, labels = batch(model.encoder.config.pad_token_id or 0)
    with devices.autocast():
        with torch.inference_mode():
            logits = model.eval()(**inputs).logits
        loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    return logits, {name: weight.grad for name, weight in model.named_parameters()}, model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_model_learns_as_without_them_and_evaluates_the_same_bits(encoder_folder, name, pooling):
    folder = encoder_folder(name)
    logits, plain, _ = pass_of(folder, by_numba=False, pooling=pooling)
    same, ours, model = pass_of(folder, by_numba=True, pooling=pooling)
    assert torch.equal(same, logits)
    assert not all(torch.equal(ours[weight], plain[weight]) for weight in ours)
    exact = pass_of(folder, by_numba=False, precision="no", pooling=pooling)[1]

    def error(gradients: dict[str, torch.Tensor]) -> float:
        differences = torch.stack([(gradients[weight] - exact[weight]).norm() for weight in exact])
        return float(differences.norm() / torch.stack([tensor.norm() for tensor in exact.values()]).norm())

    assert error(ours) < 1.5 * error(plain)
    fused = sum("forward" in vars(module) and hasattr(module, "LayerNorm") for module in model.modules())
    assert fused == (4 if name in ("bert", "roberta", "electra", "deberta-v3") else 0)  # two in each of the two layers


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_gradients_are_the_same_bits_where_layers_are_computed_again(encoder_folder, name):
    folder = encoder_folder(name)
    kept = pass_of(folder, by_numba=True, dropout=0.2)[1]
    again = pass_of(folder, by_numba=True, dropout=0.2, checkpointed=True)[1]
    assert [weight for weight in kept if not torch.equal(kept[weight], again[weight])] == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(encoder_folder, value):
    """So that a step with it changes no weight: see FiniteGuard."""
    model = pass_of(encoder_folder("bert"), by_numba=True)[2]
    inputs, labels = batch()
    for name, weight in model.encoder.encoder.layer[0].named_parameters():
        kept, place = weight.detach().clone(), (0,) * weight.dim()
        with torch.no_grad():
            weight[place] = value
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
        assert not norm.isfinite(), name
        with torch.no_grad():
            weight.copy_(kept)


def test_a_model_in_fp32_takes_the_usual_path(encoder_folder, monkeypatch):
    monkeypatch.setattr(numba_layers, "call", lambda *_: pytest.fail("a kernel of bf16 was called"))
    plain = pass_of(encoder_folder("bert"), by_numba=False, dropout=0.2, precision="no")[1]
    ours = pass_of(encoder_folder("bert"), by_numba=True, dropout=0.2, precision="no")[1]
    assert [weight for weight in plain if not torch.equal(plain[weight], ours[weight])] == []
    query = normal(1, 2, 3, 4).detach().requires_grad_()
    numba_attention(torch.nn.Identity().eval(), query, query, query, None)  # nor in evaluation


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    monkeypatch.setattr(devices, "numba_works", numba_works.__wrapped__)


BF16 = ["train_config.mixed_precision=bf16", "model_config.encoder_dropout=0.2"]


def test_a_run_goes_on_with_the_same_bits_and_never_under_other_kernels(overrides, tmp_path, monkeypatch):
    arguments, runs = [*overrides, *BF16], tmp_path / "runs"
    assert "on cpu (bf16, numba kernels)" in train_here(*arguments).stdout
    assert metrics_of(runs / "run")["environment"]["numba"] == numba.__version__
    tested = (runs / "run" / "test_predictions.csv").read_bytes()
    stop_at(7, [*arguments, "run_name=stopped"], monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(devices, "numba_works", lambda: False)
        refused = train_here(*arguments, "run_name=stopped", code=2).stderr
        assert "was trained on cpu (bf16, numba kernels), and would go on with cpu (bf16) here" in refused
        train_here(*arguments, mode="test")
    assert (runs / "run" / "test_predictions.csv").read_bytes() == tested  # evaluation has no part in numba
    assert "continuing from" in train_here(*arguments, "run_name=stopped").stdout
    assert differing_files(runs / "run", runs / "stopped") == []


@pytest.mark.long
def test_two_processes_train_by_them(overrides):
    arguments = [*overrides, *BF16, "train_config.ema_decay=0.9", "data_config.num_workers=2"]
    assert "on 2 x cpu (bf16, numba kernels)" in launch(2, "main_accumulation.py", *arguments)


def test_without_numba_a_run_takes_the_usual_path(overrides, monkeypatch, without_numba):
    monkeypatch.delitem(sys.modules, "suite.encoders.numba_layers")
    finished = train_here(*overrides, *BF16, "train_config.max_steps=2")
    assert "on cpu (bf16)\n" in finished.stdout
    assert "suite.encoders.numba_layers" not in sys.modules


def test_numba_without_openmp_is_not_used_and_that_is_said(monkeypatch, capsys):
    def fail(count):
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(numba, "set_num_threads", fail)
    assert not numba_works.__wrapped__()
    assert "numba is installed, but finds no OpenMP" in capsys.readouterr().out
    monkeypatch.undo()
    assert numba_works.__wrapped__()
