"""What is faster on a CPU than torch's own dropout and attention, and where memory comes from: it changes no result."""

import math
import mmap
import os
import platform
import sys
from unittest import mock

import pytest
import torch
from conftest import ENCODERS, content_of, run_script
from test_model import batch, build

from benchmarks.speed import GLIBCS_OWN, KEEPS
from suite.encoders import cpu_kernels
from suite.encoders.cpu_kernels import SHORT, SHORT_FORWARD, BlockAttention, cpu_attention, drop, use_cpu_kernels

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is not the C library here")


@pytest.mark.long
@needs_glibc
def test_where_memory_comes_from_changes_no_bit(overrides, tmp_path):
    runs = {}
    for name, environment in (("suite", {}), ("glibc", GLIBCS_OWN), ("kept", KEEPS)):
        result = run_script("main.py", *overrides, f"run_name={name}", environment=environment)
        assert result.returncode == 0, result.stderr
        files = content_of(tmp_path / "runs" / name)
        runs[name] = {file: files[file] for file in ("best/model.safetensors", "history.jsonl",
                                                     "valid_predictions.csv", "test_predictions.csv")}
    assert runs["suite"] == runs["glibc"] == runs["kept"]


@needs_glibc
def test_freed_memory_is_kept_until_the_process_has_grown_by_half(monkeypatch):
    libc = mock.Mock()
    monkeypatch.setattr(cpu_kernels.ctypes, "CDLL", lambda _: libc)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    model = torch.nn.Identity()
    cpu_kernels.keep_freed_memory(model)
    assert libc.mallopt.call_count == 2

    def pages(count, passes=1):
        monkeypatch.setattr(cpu_kernels, "own_pages", lambda: count)
        for _ in range(passes):
            model(torch.ones(1))
        return libc.malloc_trim.call_count

    assert pages(500, cpu_kernels.PASSES - 1) == 0  # too early to say what is usual
    assert pages(100) == 0
    assert pages(150, 1000) == 0
    assert pages(151) == 1
    assert pages(1000, cpu_kernels.PASSES - 1) == 1  # not at once again
    assert pages(150) == 1
    assert pages(151) == 2


@needs_glibc
@pytest.mark.parametrize("environment", [GLIBCS_OWN, KEEPS])
def test_an_environment_that_says_how_to_allocate_is_obeyed(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_kernels.ctypes, "CDLL", lambda _: pytest.fail("glibc was told something"))
    cpu_kernels.keep_freed_memory(torch.nn.Identity())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_own_pages_are_counted():
    before = cpu_kernels.own_pages()
    with mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:  # not what a heap has kept
        taken.write(b"x" * len(taken))
        after = cpu_kernels.own_pages()
    assert (after - before) * os.sysconf("SC_PAGE_SIZE") >= 0.9 * (1 << 26)  # the kernel counts roughly


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_cpu_kernels_change_nothing_but_the_draw(encoder_folder, name):
    inputs, labels = batch(ENCODERS[name].pad_token_id or 0)
    model = build(encoder_folder(name), dropout_rate=0.5, encoder_dropout=0.2)
    expected = model.eval()(**inputs).logits
    use_cpu_kernels(model)
    assert not any(type(module) is torch.nn.Dropout for module in model.modules())
    torch.testing.assert_close(model(**inputs).logits, expected)
    torch.manual_seed(3)
    first = model.train()(**inputs).logits
    torch.manual_seed(3)
    assert torch.equal(first, model(**inputs).logits)  # the draw comes from torch's generator, which a run saves
    assert not torch.equal(first, model(**inputs).logits)
    # The layers above a dropout are not linear, so its mean is compared with that of torch's own.
    own = build(encoder_folder(name), dropout_rate=0.5, encoder_dropout=0.2).train()
    ours, torchs = (torch.stack([each(**inputs).logits.detach() for _ in range(150)]) for each in (model, own))
    errors = ((ours.var(dim=0) + torchs.var(dim=0)) / 150).sqrt()
    assert ((ours.mean(dim=0) - torchs.mean(dim=0)).abs() < 5 * errors).all()
    torch.testing.assert_close(ours.std(dim=0), torchs.std(dim=0), rtol=0.3, atol=0)
    tiny = build(encoder_folder(name), dropout_rate=0.0, encoder_dropout=1e-9).train()  # rounds to no dropout at all
    use_cpu_kernels(tiny)
    torch.testing.assert_close(tiny(**inputs).logits, tiny.eval()(**inputs).logits)


@pytest.mark.parametrize("block", [cpu_kernels.BLOCK, 500, 1])  # all reviews at once, some, and one
@pytest.mark.parametrize("tokens", [7, 1])  # those of the first-token fast path's last layer, too
@pytest.mark.parametrize("rate", [0.25, 0.0])
def test_attention_by_blocks_is_exact(monkeypatch, block, tokens, rate):
    monkeypatch.setattr(cpu_kernels, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    batch, heads, keys, size = 5, 3, 7, 4
    query, key, value = (torch.randn(batch, count, heads, size, dtype=torch.float64, generator=generator)
                         .transpose(1, 2).requires_grad_() for count in (tokens, keys, keys))
    padding = torch.arange(keys) >= torch.arange(keys, keys - batch, -1)[:, None, None, None]
    bias = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -math.inf)

    def by_blocks(value):
        torch.manual_seed(5)
        return BlockAttention.apply(query, key, value, bias, 0.3, rate)

    probabilities = (query @ key.mT * 0.3 + bias).softmax(dim=-1)
    kept = by_blocks(torch.eye(keys, dtype=torch.float64).expand(batch, heads, keys, keys)).transpose(1, 2) > 0
    assert kept.double().mean() / (~padding).double().mean() == pytest.approx(1 - rate, abs=0.1)
    expected = (probabilities * kept / (1 - rate) @ value).transpose(1, 2)
    context = by_blocks(value)
    torch.testing.assert_close(context, expected)
    given = torch.randn(context.shape, dtype=torch.float64, generator=generator)
    for ours, exact in zip(torch.autograd.grad(context, (query, key, value), given),
                           torch.autograd.grad(expected, (query, key, value), given), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("tokens", [64, SHORT + 1])  # by blocks, and left to torch
@pytest.mark.parametrize("scale", [1, 3])  # of queries and keys: the scores' standard deviation is 1 or 9
def test_attention_in_bf16_is_as_exact_as_transformers_eager_attention(tokens, scale):
    generator = torch.Generator().manual_seed(0)
    exact = [(size * torch.randn(4, 4, tokens, 32, generator=generator)).bfloat16().double().requires_grad_()
             for size in (scale, scale, 1)]
    lengths = torch.tensor([tokens, tokens - 9, 20, tokens])
    mask = (torch.arange(tokens) < lengths[:, None])[:, None, None, :].expand(4, 1, tokens, tokens)

    def eager(query, key, value):
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, torch.finfo(query.dtype).min)
        return scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype) @ value

    def block(*given):
        return cpu_attention(torch.nn.Identity(), *given, mask)[0].transpose(1, 2)

    def results(attention, given):
        context = attention(*given)
        context.square().sum().backward()
        return [context.detach(), *(tensor.grad for tensor in given)]

    def errors(attention):
        found = results(attention, [tensor.detach().bfloat16().requires_grad_() for tensor in exact])
        assert {tensor.dtype for tensor in found} == {torch.bfloat16}
        if scale == 1:
            torch.testing.assert_close(found[0].double(), expected[0], atol=0.02, rtol=0.02)
            for ours, theirs in zip(found[1:], expected[1:], strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=0.06, rtol=0.03)
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]

    expected = results(eager, exact)
    for ours, theirs in zip(errors(block), errors(eager), strict=True):
        assert ours < 1.5 * theirs


def test_dropout_draws_at_its_rate_and_keeps_the_expectation():
    torch.manual_seed(0)
    values = torch.ones(1000, 1001, requires_grad=True)
    dropped = drop(values, 0.1)
    zeros = (dropped == 0).double().mean().item()
    assert abs(zeros - 0.1) < 5 * (0.1 * 0.9 / values.numel()) ** 0.5
    assert dropped.detach().unique().numel() == 2
    assert dropped.max().item() == pytest.approx(1 / 0.9, abs=1e-5)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())  # the same mask backwards
    columns = (dropped.detach() == 0).double()
    assert abs(torch.corrcoef(columns.T[:40]).fill_diagonal_(0)).max() < 0.2  # neighbours share a number, not a draw


@pytest.mark.parametrize(("has_amx", "tokens", "by_blocks"), [
    (False, SHORT_FORWARD, True), (False, SHORT_FORWARD + 1, False), (True, SHORT, False)])
def test_without_a_backward_pass_the_faster_attention_is_taken(monkeypatch, has_amx, tokens, by_blocks):
    monkeypatch.setattr(cpu_kernels, "has_fast_fused_attention", lambda: has_amx)
    calls, own = [], BlockAttention.apply
    monkeypatch.setattr(BlockAttention, "apply", lambda *given: calls.append(1) or own(*given))
    given = torch.ones(3, 1, 1, tokens, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        context, _ = cpu_attention(torch.nn.Identity(), *given, None)
    torch.testing.assert_close(context, torch.ones(1, tokens, 1, 2, dtype=torch.bfloat16))
    assert bool(calls) == by_blocks
