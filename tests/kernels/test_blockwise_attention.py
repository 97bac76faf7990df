"""Blockwise attention against a dense softmax in fp64: every mask and option, outputs and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_longattn.kernels.blockwise_attention import api, blockwise_attention, sdpa
from hf_longattn.kernels.blockwise_attention.philox import keep_tile, philox_words
from hf_longattn.kernels.blockwise_attention.spans import query_spans
from hf_longattn.kernels.blockwise_attention.terms import Terms
from hf_longattn.kernels.dispatch import interpreting
from hf_longattn.kernels.key_range import KeyRange

# Run as it is, this file tests the torch implementations; `test_interpreter_runs_the_kernels` runs it again
# with TRITON_INTERPRET=1, and then the same cases go through the Triton kernels.
IMPLS = ("triton",) if interpreting() else ("reference", "sdpa")
# The interpreter takes its time for every head.
HEADS = 2 if interpreting() else 4
torch_only = pytest.mark.skipif(interpreting(), reason="does not depend on the implementation")


def make_inputs(B=2, H=4, G=2, T=63, S=63, K=16, V=None, dtype=torch.float32, std=1.0):
    value_dim = K if V is None else V
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, value_dim))
    return [(std * torch.randn(shape)).to(dtype) for shape in shapes]


def dense_probs(query, key, *, scale=None, mask=None, bias=None, softcap=None, sinks=None, dropout=None):
    """The definition, with every pair in memory, in the dtype of its inputs: probabilities and lse."""
    (B, H, T, K), (G, S) = query.shape, key.shape[1:3]
    key = key.repeat_interleave(H // G, dim=1)
    logits = query @ key.mT * (K**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    tile = (mask or KeyRange()).tile(slice(0, T), slice(0, S), T, S, query.device)
    logits = logits.masked_fill(~tile, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[:, None, None].expand(B, H, T, 1).to(logits.dtype)), dim=3)
    lse = torch.logsumexp(logits, dim=3)
    probs = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])[..., :S]
    if dropout is not None:
        keep = keep_tile(dropout, (B, H), slice(0, T), slice(0, S), query.device)
        probs = probs * keep / (1 - dropout[0])
    return probs, lse


def dense(query, key, value, **options):
    probs, lse = dense_probs(query, key, **options)
    return probs @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1), lse


def sizes_before_cancelling(query, key, value, seeds, options):
    """Norms of output, lse and the gradients of query and key, every term of their sums taken positive.

    Rounding is relative to these: for a row of one key dp - delta is 0, and the rounding of both is left.
    """
    query, key, value, *seeds = (x.double().abs() for x in (query, key, value, *seeds))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    probs = options["probs"]
    pairs = probs * (seeds[0] @ value.mT)
    pairs = pairs + probs * (pairs.sum(dim=3, keepdim=True) + seeds[1][..., None])
    grad_query, grad_key = options["scale"] * pairs @ key, options["scale"] * pairs.mT @ query
    return [(probs @ value).norm(), 1.0, grad_query.norm(), group**0.5 * grad_key.norm()]


def run(function, tensors, seeds, options, dtype=None):
    """[output, lse, gradients ...] of `function`; tensors and floating options are leaves in `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    options = dict(options)
    for name in ("bias", "sinks"):
        if is_floating(extra := options.get(name)):
            options[name] = extra.detach().to(dtype or extra.dtype).requires_grad_()
            leaves.append(options[name])
    output, lse = function(*leaves[:3], **options)
    seen = lse > -torch.inf
    loss = (output * seeds[0].to(output.dtype)).sum() + (
        lse.masked_fill(~seen, 0) * seeds[1].to(lse.dtype)
    ).sum()
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def is_floating(option):
    return isinstance(option, torch.Tensor) and option.is_floating_point()


def error(got, exact):
    assert got.shape == exact.shape
    assert torch.equal(got.isfinite(), exact.isfinite())
    return (got.double() - exact).nan_to_num(0, 0, 0).norm().item()


def check(tensors, impl, with_lse=True, **options):
    """Error against fp64 at most 1.5 times that of the dense formula in the dtype of the inputs."""
    query, value = tensors[0], tensors[2]
    seeds = (torch.randn(*query.shape[:3], value.shape[3]), torch.randn(query.shape[:3]) * with_lse)
    options = {name: option for name, option in options.items() if option is not None}
    exact = run(dense, tensors, seeds, options, torch.float64)
    plain = run(dense, tensors, seeds, options)
    got = run(lambda *a, **k: blockwise_attention(*a, **k, impl=impl), tensors, seeds, options)
    eps = torch.finfo(query.dtype).eps
    wide = {name: x.double() if is_floating(x) else x for name, x in options.items()}
    probs = dense_probs(query.double(), tensors[1].double(), **wide)[0]
    scale = options.get("scale", query.shape[3] ** -0.5)
    sizes = sizes_before_cancelling(*tensors, seeds, {"probs": probs, "scale": scale})
    for index, (x, standard, truth) in enumerate(zip(got, plain, exact, strict=True)):
        size = max(truth[truth.isfinite()].norm(), sizes[index] if index < len(sizes) else 0)
        bound = 1.5 * (error(standard, truth) + eps * size)
        assert error(x, truth) <= bound, f"result {index}: {error(x, truth)} > {bound}"


def supported(impl, options):
    return impl != "sdpa" or not (is_floating(options.get("bias")) or {"softcap", "dropout"} & options.keys())


def positions(T=63):
    return torch.arange(T, dtype=torch.int32)[None]


def documents(length, T=63):
    start = positions(T) // length * length
    return {"lower": start, "upper": (start + length).clamp(max=T).int()}


def rows(*starts, T=63):
    return torch.tensor(starts, dtype=torch.int32)[:, None].expand(len(starts), T)


OPTIONS = {
    "full": dict,
    "causal": lambda: {"mask": KeyRange(causal=True)},
    "scale": lambda: {"mask": KeyRange(causal=True), "scale": 0.7},
    "window": lambda: {"mask": KeyRange(causal=True, lower=positions() - 8)},
    "bidirectional-window": lambda: {"mask": KeyRange(lower=positions() - 8, upper=positions() + 9)},
    "left-padding": lambda: {"mask": KeyRange(causal=True, lower=rows(5, 40))},
    "right-padding": lambda: {"mask": KeyRange(causal=True, upper=rows(50, 7))},
    "packed": lambda: {"mask": KeyRange(causal=True, **documents(20))},
    "packed-bidirectional": lambda: {"mask": KeyRange(**documents(20))},
    "chunks": lambda: {"mask": KeyRange(causal=True, lower=positions() // 16 * 16)},
    "holes": lambda: {"mask": KeyRange(causal=True, key_mask=torch.rand(2, 63) > 0.4)},
    "nothing": lambda: {"mask": KeyRange(upper=rows(0, 9))},
    "bool-bias": lambda: {"bias": torch.rand(2, 1, 63, 63) > 0.5},
    "bias": lambda: {"mask": KeyRange(causal=True), "bias": torch.randn(2, HEADS, 63, 63)},
    "bias-of-a-head": lambda: {"bias": torch.randn(1, HEADS, 63, 63)},
    "bias-of-a-key": lambda: {"bias": torch.randn(2, 1, 1, 63)},
    "bias-with-inf": lambda: {
        "bias": torch.randn(1, 1, 63, 63).masked_fill(torch.rand(63, 63) > 0.8, -torch.inf)
    },
    "softcap": lambda: {"mask": KeyRange(causal=True), "softcap": 2.0},
    "sinks": lambda: {"mask": KeyRange(causal=True), "sinks": torch.randn(HEADS)},
    "sinks-and-padding": lambda: {
        "mask": KeyRange(causal=True, lower=rows(5, 40)),
        "sinks": torch.randn(HEADS),
    },
    "dropout": lambda: {"mask": KeyRange(causal=True), "dropout": (0.3, 1234)},
    "dropout-wide-seed": lambda: {"dropout": (0.1, 2**41 + 17)},
    "softcap-sinks-window-dropout": lambda: {
        "mask": KeyRange(causal=True, lower=positions() - 8),
        "softcap": 1.5,
        "sinks": torch.randn(HEADS),
        "dropout": (0.2, 3),
    },
}


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


def sizes_of(pieces):
    return [piece.stop - piece.start for piece in pieces]


@torch_only
@pytest.mark.parametrize("tile", [1, 128])
@pytest.mark.parametrize("unit", [0, 1, 500, 1023, 1024, 4096, 5000])
@pytest.mark.parametrize("prefix", [0, 1, 127, 4095, 4096, 4097, 8192, 15000, 114624, 131071])
def test_pieces_cover_the_prefix_in_whole_tiles(prefix, unit, tile):
    pieces = list(sdpa.prefix_pieces(prefix, unit, tile))
    sizes = sizes_of(pieces)
    assert sum(sizes) == prefix and 0 not in sizes
    assert [piece.start for piece in pieces] == [sum(sizes[:index]) for index in range(len(sizes))]
    tiled = tile > 1 and prefix >= 4096 and unit >= 1024
    if tiled:
        assert all(size % tile == 0 for size in sizes[sizes[:1] == [prefix % tile] :])
    elif unit and prefix % unit == 0:
        assert sorted(sizes, reverse=True) == sizes and all((size // unit).bit_count() == 1 for size in sizes)
    else:
        assert sizes == ([prefix] if prefix else [])


@torch_only
@pytest.mark.parametrize("before", [-1, -127, 1, 127, 128, 10007])
def test_chunks_behind_what_fills_no_tile_meet_few_shapes(before):
    unit, shapes = 4096, set()
    for chunk in range(2, 32):
        ragged, *sizes = sizes_of(sdpa.prefix_pieces(chunk * unit + before, unit, 128))
        # Fewer keys than a tile go to a kernel without plans.
        shapes |= {*sizes, *([] if ragged < 128 else [ragged])}
        assert len(sizes) + 1 <= 2 + chunk.bit_length()
    # One, two, four, eight and 16 chunks, and what lies before the first.
    assert len(shapes) <= 6 + (before > unit)


@torch_only
def test_cuts_are_for_cudnn_alone(monkeypatch):
    query, key, _ = make_inputs()
    monkeypatch.setattr(sdpa, "_uses_cudnn", lambda query, key: True)
    assert sdpa.key_tile(query, key) == 1 and sdpa.key_tile(query.to("meta"), key) == 1


@torch_only
def test_gradients_of_a_prefix_cut_into_tiles(monkeypatch):
    monkeypatch.setattr(sdpa, "key_tile", lambda query, key: 16)
    monkeypatch.setattr(sdpa, "_LONG_PREFIX", 64)
    monkeypatch.setattr(sdpa, "_MANY_QUERIES", 32)
    for with_lse in (True, False):
        check(make_inputs(T=40, S=119), "sdpa", with_lse, mask=KeyRange(causal=True))


@torch_only
@pytest.mark.parametrize("T", [31, 32, 40, 64])
@pytest.mark.parametrize("offset", [63, 64, 65, 79, 80, 81, 128, 143])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_prefix_cut_into_tiles(monkeypatch, T, offset, sinks):
    monkeypatch.setattr(sdpa, "key_tile", lambda query, key: 16)
    monkeypatch.setattr(sdpa, "_LONG_PREFIX", 64)
    monkeypatch.setattr(sdpa, "_MANY_QUERIES", 32)
    tensors = make_inputs(T=T, S=T + offset)
    forward, seen = sdpa._attend_cpu, []

    def attend(q, k, *rest):
        seen.append(k.shape[2])
        return forward(q, k, *rest)

    monkeypatch.setattr(sdpa, "_attend_cpu", attend)
    options = {"mask": KeyRange(causal=True), **({"sinks": torch.randn(4)} if sinks else {})}
    results = blockwise_attention(*tensors, **options, impl="sdpa")
    *pieces, square = seen
    wide = [x.double() for x in tensors]
    exact, plain = dense(*wide, **options), dense(*tensors, **options)
    for got, standard, truth in zip(results, plain, exact, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert error(got, truth) <= 1.5 * (error(standard, truth) + eps * truth.norm())
    assert square == T and sum(pieces) == offset
    assert (pieces[0] == offset % 16) == (T >= 32 and offset >= 64 and offset % 16 > 0)


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
def test_memory_grows_with_the_length_only():
    def saved_bytes(T):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        leaves = [x.requires_grad_() for x in make_inputs(B=1, T=T, S=T)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            blockwise_attention(*leaves, mask=KeyRange(causal=True))
        return total

    short, long = saved_bytes(64), saved_bytes(256)
    assert short >= 64 * (4 + 2 + 2 + 4) * 16 * 4
    assert long == 4 * short


@torch_only
def test_default_choice_equals_the_reference():
    tensors = make_inputs(T=300, S=300)
    mask = KeyRange(causal=True, lower=positions(300) - 50)
    chosen, exact = (
        blockwise_attention(*tensors, mask=mask),
        blockwise_attention(*tensors, mask=mask, impl="reference"),
    )
    torch.testing.assert_close(chosen, exact, rtol=0, atol=5e-6)


@torch_only
@pytest.mark.parametrize("name", ["causal", "bias-of-a-head", "sinks-and-padding"])
def test_compiles_into_one_graph(name):
    options = OPTIONS[name]()
    tensors, seeds = make_inputs(), (torch.randn(2, 4, 63, 16), torch.randn(2, 4, 63))
    compiled = torch.compile(blockwise_attention, fullgraph=True, backend="aot_eager")
    expected, got = run(blockwise_attention, tensors, seeds, options), run(compiled, tensors, seeds, options)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch_only
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lse_used", [False, True], ids=["output", "lse"])
def test_operator_is_well_formed(lse_used, impl):
    mask = KeyRange(causal=True, lower=positions(9))
    tensors = [x.requires_grad_() for x in make_inputs(T=9, S=9)]
    arguments = (*tensors, None, None, mask.lower, None, None, True, 0.25, None, 0.0, 0, impl)
    torch.library.opcheck(torch.ops.hf_longattn.blockwise_attention.default, arguments)
    output, lse = (x.detach() for x in torch.ops.hf_longattn.blockwise_attention(*arguments))
    detached = [x.detach() for x in tensors]
    backward = (torch.randn_like(output), torch.randn_like(lse) if lse_used else None, *detached, output, lse)
    torch.library.opcheck(
        torch.ops.hf_longattn.blockwise_attention_backward.default,
        (*backward, *arguments[3:], False),
        test_utils=("test_schema", "test_faketensor"),
    )


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


BAD_CALLS = {
    "`query`": lambda q, k, v: {"query": q[0]},
    "`query` must have a head dim": lambda q, k, v: {"query": q[..., :0], "key": k[..., :0]},
    "`key` must share": lambda q, k, v: {"key": k[..., :8]},
    "`key` heads": lambda q, k, v: {"query": q[:, :3]},
    "`value`": lambda q, k, v: {"value": v[:, :, :5]},
    "`mask.lower`": lambda q, k, v: {"mask": KeyRange(lower=positions(5))},
    "`mask.key_mask`": lambda q, k, v: {"mask": KeyRange(key_mask=torch.ones(3, 63, dtype=torch.bool))},
    "`bias`": lambda q, k, v: {"bias": torch.zeros(2, 4, 63, 1)},
    "`sinks`": lambda q, k, v: {"sinks": torch.zeros(3)},
    "`softcap`": lambda q, k, v: {"softcap": 0.0},
    "`scale`": lambda q, k, v: {"scale": -1.0},
    "`dropout`": lambda q, k, v: {"dropout": (1.0, 0)},
    "`dropout` must be": lambda q, k, v: {"dropout": 0.5},
    "`key` is on meta": lambda q, k, v: {"key": k.to("meta")},
    "`value` is on meta": lambda q, k, v: {"value": v.to("meta")},
    "`bias` is on meta": lambda q, k, v: {"bias": torch.zeros(1, 1, 63, 63, device="meta")},
    "`sinks` is on meta": lambda q, k, v: {"sinks": torch.zeros(4, device="meta")},
    "`impl` of": lambda q, k, v: {"impl": "flash"},
    "`impl='sdpa'`": lambda q, k, v: {"impl": "sdpa", "softcap": 1.0},
}


@torch_only
@pytest.mark.parametrize("message", BAD_CALLS)
def test_refuses_by_name(message):
    query, key, value = make_inputs()
    call = {"query": query, "key": key, "value": value, **BAD_CALLS[message](query, key, value)}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        blockwise_attention(call.pop("query"), call.pop("key"), call.pop("value"), **call)


@torch_only
@pytest.mark.parametrize(
    ("head_dim", "dtype", "chosen"),
    [
        (512, torch.bfloat16, "triton"), (520, torch.float16, "reference"), (256, torch.float32, "triton"),
        (300, torch.float32, "reference"), (64, torch.float64, "reference"),
    ],
)  # fmt: skip
def test_heads_wider_than_the_kernels_hold(head_dim, dtype, chosen, monkeypatch):
    monkeypatch.setattr(api.dispatch, "triton_runs_on", lambda device: True)
    tensors = [torch.empty(1, 2, 9, dim, dtype=dtype, device="meta") for dim in (head_dim, head_dim, 16)]
    terms = Terms(1.0, KeyRange(), None, 20.0, None, None)
    assert api._choose("auto", *tensors, terms, False) == chosen
    if chosen == "reference":
        with pytest.raises(ValueError, match=r"`impl='triton'` of .* cannot take (a head dim of|float64)"):
            api._choose("triton", *tensors, terms, False)


@torch_only
def test_refuses_what_is_of_another_type():
    query, key, value = make_inputs()
    with pytest.raises(TypeError, match="`value`"):
        blockwise_attention(query, key, value.half())
    with pytest.raises(TypeError, match="`mask` must be a KeyRange or None, got Tensor"):
        blockwise_attention(query, key, value, mask=torch.ones(63, 63))
    with pytest.raises(TypeError, match="`mask.lower` must be an integer dtype"):
        blockwise_attention(query, key, value, mask=KeyRange(lower=positions(63).float()))
    with pytest.raises(TypeError, match="`mask.key_mask` must be bool"):
        blockwise_attention(query, key, value, mask=KeyRange(key_mask=torch.ones(1, 63)))


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
