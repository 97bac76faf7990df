"""Blockwise attention against a dense softmax in fp64: every mask and option, outputs and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_attention import (
    HEADS,
    IMPLS,
    OPTIONS,
    check,
    dense,
    error,
    make_inputs,
    positions,
    run,
    supported,
    torch_only,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.blockwise_attention.philox import philox_words
from hf_longattn.kernels.blockwise_attention.spans import query_spans
from hf_longattn.kernels.blockwise_attention.terms import Terms
from hf_longattn.kernels.dispatch import interpreting
from hf_longattn.kernels.key_range import KeyRange


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, impl):
    options = OPTIONS[name]()
    if not supported(impl, options):
        pytest.skip("torch's kernels do not cover it")
    inputs = make_inputs(H=HEADS, G=HEADS // 2)
    check(inputs, impl, **options)
    if impl == "sdpa":
        check(inputs, impl, with_lse=False, **options)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["left-padding", "bias-of-a-key", "softcap-sinks-window-dropout"])
def test_some_options_of_the_kernels(name):
    check(make_inputs(H=HEADS, G=HEADS // 2), "triton", **OPTIONS[name]())


SHAPES = {
    "B1-T1-S1-H1-G1-K16": dict(B=1, H=1, G=1, T=1, S=1),
    "B2-T1-S63-H4-G2-K16": dict(T=1),
    "B2-T33-S90-H4-G4-K16": dict(T=33, S=90, G=4),
    "B2-T90-S33-H4-G1-K16": dict(T=90, S=33, G=1),
    "B1-T64-S128-H6-G2-K80": dict(B=1, H=6, T=64, S=128, K=80),
    "B1-T40-S40-H2-G2-K48-V96": dict(B=1, H=2, T=40, S=40, K=48, V=96),
    "B0-T9-S9-H4-G2-K16": dict(B=0, T=9, S=9),
    "B2-T9-S0-H4-G2-K16": dict(T=9, S=0),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, causal, impl):
    sizes = SHAPES[name]
    if impl == "sdpa" and "V" in sizes:
        pytest.skip("torch's kernels do not cover it")
    check(make_inputs(**sizes), impl, mask=KeyRange(causal=causal))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("T", [63, pytest.param(500, marks=pytest.mark.slow)])
def test_half_precision(dtype, T, impl):
    if interpreting() and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 wrongly")
    tensors = make_inputs(T=T, S=T, K=64, dtype=dtype)
    check(tensors, impl, with_lse=False, mask=KeyRange(causal=True))
    check(tensors, impl, with_lse=False, mask=KeyRange(causal=True, lower=positions(T) - 30))


def coarse_tanh(pattern, size):
    """tanh off by `size` of itself: always the same way, or by a sign that changes from score to score."""
    exact = torch.tanh
    sign = {"above": lambda x: 1, "below": lambda x: -1, "both": lambda x: torch.sign(torch.sin(200 * x))}
    return lambda x: (exact(x) * (1 + size * sign[pattern](x))).clamp(-1, 1)


def softcap_ratios(monkeypatch, dtype, std, tanh):
    """The errors of the formula in fp32 with an inexact tanh, in those of the standard one in `dtype`."""
    query, key, value = make_inputs(B=1, T=130, S=130, K=32, dtype=dtype)
    tensors, seeds = (query * std, key, value), (torch.randn(1, 4, 130, 32), torch.zeros(1, 4, 130))
    options = {"mask": KeyRange(causal=True), "softcap": 30.0}
    exact = run(dense, tensors, seeds, options, torch.float64)
    plain = run(dense, tensors, seeds, options)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", tanh)
        got = run(lambda *a, **k: blockwise_attention(*a, **k, impl="reference"), tensors, seeds, options)
    return [error(x, truth) / error(y, truth) for x, y, truth in zip(got, plain, exact, strict=True)]


@torch_only
@pytest.mark.parametrize("std", [1, 10, 60])
@pytest.mark.parametrize("pattern", ["above", "below", "both"])
def test_softcap_of_bf16_bears_the_tanh_instruction(monkeypatch, std, pattern):
    # tanh.approx.f32 errs by at most 2^-11, which is taken here everywhere, and scores from far below the cap
    # to beyond it.
    assert max(softcap_ratios(monkeypatch, torch.bfloat16, std, coarse_tanh(pattern, 2**-11))) <= 1.5


@torch_only
def test_softcap_of_fp16_does_not_bear_it(monkeypatch):
    assert max(softcap_ratios(monkeypatch, torch.float16, 60, coarse_tanh("above", 2**-11))) > 1.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [pytest.param(500, marks=pytest.mark.slow), 130])
def test_long_rows(T, impl):
    lower = positions(T) // 100 * 100
    check(make_inputs(B=1, T=T, S=T, H=2, G=1, K=32), impl, mask=KeyRange(causal=True, lower=lower))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    query = torch.randn(2, 63, 4, 16).transpose(1, 2)
    key = torch.randn(2, 2, 200, 16)[:, :, 50:113]
    value = torch.randn(2, 2, 16, 63).mT if impl != "sdpa" else torch.randn(2, 63, 2, 16).transpose(1, 2)
    assert not any(x.is_contiguous() for x in (query, key, value))
    seeds = (torch.randn(2, 63, 4, 16).transpose(1, 2), torch.randn(2, 63, 4).mT)
    run_it = lambda *a, **k: blockwise_attention(*a, **k, impl=impl)  # noqa: E731
    strided = run(run_it, (query, key, value), seeds, {"mask": KeyRange(causal=True)})
    whole = run(run_it, [x.contiguous() for x in (query, key, value)], seeds, {"mask": KeyRange(causal=True)})
    for one, other in zip(strided, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@st.composite
def problems(draw):
    longest = 40 if interpreting() else 70
    T, S = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    batch = draw(st.integers(1, 2))
    bounds = st.lists(st.integers(-3, S + 3), min_size=T, max_size=T)
    lower = draw(st.none() | bounds)
    upper = draw(st.none() | bounds)
    copies = draw(st.sampled_from([1, batch]))
    lower = None if lower is None else torch.tensor([lower] * copies, dtype=torch.int32)
    upper = None if upper is None else torch.tensor([upper], dtype=torch.int32)
    key_mask = draw(st.none() | st.lists(st.booleans(), min_size=S, max_size=S))
    key_mask = None if key_mask is None else torch.tensor([key_mask])
    mask = KeyRange(draw(st.booleans()), lower, upper, key_mask)
    groups = draw(st.sampled_from([1, 2]))
    return dict(B=batch, H=2 * groups, G=groups, T=T, S=S, K=draw(st.sampled_from([8, 16, 24]))), mask


@pytest.mark.parametrize("impl", IMPLS)
@settings(
    max_examples=6 if interpreting() else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=problems())
def test_any_mask(impl, problem):
    sizes, mask = problem
    check(make_inputs(**sizes), impl, mask=mask)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ["key-range", "bool-bias", "holes", "gap"])
def test_nan_in_unseen_slots_stays_there(options, impl):
    query, key, value = make_inputs()
    hidden = torch.zeros(63, dtype=torch.bool)
    hidden[40:] = True
    keywords = {"mask": KeyRange(upper=positions() * 0 + 40)}
    if options == "gap":
        hidden = (torch.arange(63) >= 10) & (torch.arange(63) < 20)
        late = positions() >= 10
        keywords = {
            "mask": KeyRange(lower=torch.where(late, 20, 0).int(), upper=torch.where(late, 63, 10).int())
        }
    elif options == "bool-bias":
        keywords = {"bias": ~hidden.expand(1, 4, 63, 63)}
    elif options == "holes":
        keywords = {"mask": KeyRange(key_mask=~hidden[None])}
    seeds = (torch.randn(2, 4, 63, 16), torch.randn(2, 4, 63))
    results = []
    for filler in (0.0, torch.nan):
        slots = [x.masked_fill(hidden[:, None], filler) for x in (key, value)]
        results.append(
            run(lambda *a, **k: blockwise_attention(*a, **k, impl=impl), (query, *slots), seeds, keywords)
        )
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_over_keys_merge_to_the_whole(impl):
    tensors = make_inputs(T=20, S=63)
    seeds = (torch.randn(2, 4, 20, 16), torch.randn(2, 4, 20))

    def in_parts(query, key, value, mask):
        parts = []
        for start, stop in ((0, 17), (17, 18), (18, 50), (50, 63)):
            upper = (positions(20) + 44 - start).clamp(max=stop - start).int()
            part = blockwise_attention(
                query, key[:, :, start:stop], value[:, :, start:stop], mask=KeyRange(upper=upper), impl=impl
            )
            parts.append(part)
        outputs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
        lse = torch.logsumexp(lses, dim=0)
        return (torch.exp(lses - lse)[..., None] * outputs).sum(0), lse

    exact = run(dense, tensors, seeds, {"mask": KeyRange(causal=True)}, torch.float64)
    plain = run(dense, tensors, seeds, {"mask": KeyRange(causal=True)})
    merged = run(in_parts, tensors, seeds, {"mask": None})
    for got, standard, truth in zip(merged, plain, exact, strict=True):
        # A merge of four parts rounds four more times.
        assert error(got, truth) <= 1.5 * (
            error(standard, truth) + 4 * torch.finfo(torch.float32).eps * truth.norm()
        )


@torch_only
@pytest.mark.parametrize(
    "name", ["causal", "softcap-sinks-window-dropout", "bias-of-a-head", "bias-of-a-key", "holes"]
)
def test_gradcheck(name):
    torch.manual_seed(3)
    options = OPTIONS[name]()
    small = {
        "lower": (slice(None), slice(0, 6)),
        "upper": (slice(None), slice(0, 6)),
        "key_mask": (slice(None), slice(0, 6)),
    }
    mask = options.get("mask", KeyRange())
    mask = KeyRange(
        mask.causal, *(None if (x := getattr(mask, n)) is None else x[i] for n, i in small.items())
    )
    leaves = [x.double().requires_grad_() for x in make_inputs(B=2, T=6, S=6, K=3)]
    bias, sinks = options.get("bias"), options.get("sinks")
    bias = None if bias is None else bias[:, :, :6, :6].double().requires_grad_()
    sinks = None if sinks is None else sinks.double().requires_grad_()
    fixed = {name: options[name] for name in ("softcap", "dropout") if name in options}

    def function(query, key, value, bias, sinks):
        output, lse = blockwise_attention(query, key, value, mask=mask, bias=bias, sinks=sinks, **fixed)
        return output, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, (*leaves, bias, sinks), fast_mode=True)


def test_dropout_rate_and_independence():
    rate, sizes = 0.3, dict(B=1, H=2, G=2, T=64, S=512, K=16)
    query, key, _ = make_inputs(**sizes)
    # One value of 1 a key makes the output the kept share of the probability.
    value = torch.ones(1, 2, 512, 1)
    impl = IMPLS[0]
    uniform = blockwise_attention(query * 0, key, value, dropout=(rate, 5), impl=impl)[0]
    share = uniform * (1 - rate)
    deviation = (rate * (1 - rate) / share.numel() / 512) ** 0.5
    assert abs(share.mean().item() - (1 - rate)) < 4 * deviation
    assert (share.std() / (rate * (1 - rate) / 512) ** 0.5 - 1).abs() < 0.3
    other = blockwise_attention(query * 0, key, value, dropout=(rate, 6), impl=impl)[0]
    correlation = torch.corrcoef(torch.stack((uniform.flatten(), other.flatten())))[0, 1]
    assert correlation.abs() < 4 / uniform.numel() ** 0.5


@torch_only
def test_philox_known_answers():
    # Random123's known answers of philox4x32-10: (counter, key) -> first word.
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert philox_words(0, zero, zero, zero, zero).item() == 0x6627E8D5
    assert philox_words(0xFFFFFFFFFFFFFFFF, ones, ones, ones, ones).item() == 0x408F276D
    counter = [torch.tensor(x) for x in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    assert philox_words(0x299F31D0A4093822, *counter).item() == 0xD16CFE09


@torch_only
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=problems(), block_m=st.sampled_from([4, 16]), block_n=st.sampled_from([8, 16]))
def test_query_spans_hold_every_visible_tile(problem, block_m, block_n):
    sizes, mask = problem
    T, S = sizes["T"], sizes["S"]
    spans = query_spans(Terms(1.0, mask), T, S, block_m, block_n)
    if spans is None:
        return
    no_holes = KeyRange(mask.causal, mask.lower, mask.upper)
    visible = no_holes.tile(slice(0, T), slice(0, S), T, S, torch.device("cpu"))[:, 0]
    for b, key_tile in torch.cartesian_prod(
        torch.arange(visible.shape[0]), torch.arange(spans.shape[1])
    ).tolist():
        first, inner_first, inner_last, last = spans[b, key_tile].tolist()
        assert 0 <= first <= inner_first <= inner_last <= last <= -(-T // block_m)
        columns = visible[b, :, key_tile * block_n : (key_tile + 1) * block_n]
        tiles = columns.split(block_m)
        assert not any(tile.any() for tile in (*tiles[:first], *tiles[last:]))
        some = visible[b].any(dim=1).split(block_m)
        assert all(tiles[i][some[i]].all() for i in range(inner_first, inner_last))


@torch_only
@pytest.mark.slow
def test_interpreter_runs_the_kernels():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not interpreted",
        str(Path(__file__)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-4000:]
