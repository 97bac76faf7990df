"""`decode_attention` against a dense fp64 softmax, with every slot that nobody sees full of NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.decode_attention import reference as reference_module
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_partials
from hf_longattn.kernels.quantized_states import quantized_states

interpreted = pytest.mark.interpreted


def make_inputs(B, H, G, T, S, K, V, dtype=torch.float32):
    shapes = (B, H, T, K), (B, G, S, K), (B, G, S, V)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def make_mask(kind, B, T, S):
    """Every field of `KeyRange`, alone and together; the intervals differ by row and some are empty."""
    lower = torch.randint(0, max(1, S // 3), (B, T), dtype=torch.int32)
    upper = torch.randint(S // 4, S + 9, (1, T), dtype=torch.int32)
    holes = torch.rand(B, S) > 0.3
    return {
        "all": KeyRange(),
        "causal": KeyRange(causal=True),
        "padding": KeyRange(causal=True, lower=lower[:, :1].expand(B, T)),
        "capacity": KeyRange(upper=(S // 2 + torch.arange(T, dtype=torch.int32)).unsqueeze(0)),
        "gaps": KeyRange(lower=4 * lower[:, :T], upper=4 * lower[:, :T] + S // 9),
        "holes": KeyRange(key_mask=holes),
        "everything": KeyRange(True, lower, upper, holes),
        "nothing": KeyRange(lower=upper + 1, upper=upper),
    }[kind]


def visibility(mask, query, key):
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    return mask.tile(slice(0, T), slice(0, S), T, S, query.device).expand(B, 1, T, S)


def poisoned(key, value, visible):
    """The same cache with NaN and infinity wherever no row looks."""
    dead = ~visible.any(2).expand(key.shape[:3])
    key, value = key.clone(), value.clone()
    key[dead], value[dead] = torch.nan, torch.inf
    return key, value


def dense(query, key, value, visible, softcap=None, sinks=None, dtype=torch.float64):
    """Softmax attention on the full score matrix, as it is usually written, in `dtype`."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return weights[..., : key.shape[2]] @ value.repeat_interleave(group, 1), lse


def assert_exact(inputs, mask=None, softcap=None, sinks=None, **options):
    """The error is at most 1.5 times that of the same softmax written plainly in the kernel's dtype."""
    query, key, value = inputs
    mask = KeyRange() if mask is None else mask
    visible = visibility(mask, query, key)
    want, want_lse = dense(query, key, value, visible, softcap, sinks)
    dtype = query.dtype
    plain, _ = dense(query, key, value, visible, softcap, sinks, dtype)
    _, plain_lse = dense(
        query, key, value, visible, softcap, sinks, torch.promote_types(dtype, torch.float32)
    )
    key, value = poisoned(key, value, visible)
    output, lse = decode_attention(query, key, value, mask=mask, softcap=softcap, sinks=sinks, **options)
    assert output.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    # One unit in the last place of the largest output is what rounding the result costs in itself. Nothing
    # wider than fp64 is at hand, so there the bound is that of two sums of K and S terms.
    ulps = sum(key.shape[2:]) if dtype == torch.float64 else 1
    eps = ulps * torch.finfo(dtype).eps * want.abs().max()
    assert (output.double() - want).abs().max() <= 1.5 * ((plain.double() - want).abs().max() + eps)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    live = want_lse > -torch.inf
    if not live.any():
        assert (output == 0).all()
        return
    eps = ulps * torch.finfo(lse.dtype).eps * want_lse[live].abs().max().clamp(min=1.0)
    error = (plain_lse.double() - want_lse)[live].abs().max()
    assert (lse.double() - want_lse)[live].abs().max() <= 1.5 * (error + eps)


def assert_exact_in_8_bits(inputs, eight, mask, softcap=None, sinks=None, **options):
    """Against fp64 attention over the dequantised cache, at the bound of `assert_exact`; the standard
    implementation dequantises to its own dtype. Slots that nobody sees have NaN scales.

    In fp32 a kernel adds up the K terms of a score one after the other, where a library keeps several sums.
    After i terms the sum has grown to sqrt(i / K) of its size, and adding the next errs by eps / 2 of it:
    eps / 2 sqrt(sum of i / K) = eps sqrt(K / 8) in all, for scores, weights and output alike.
    """
    query, key, value = inputs
    key, value, scales = quantized_states(key, value, eight, impl="reference")
    exact = [states.double() * scales[..., i : i + 1] for i, states in enumerate((key, value))]
    visible = visibility(mask, query, key)
    want, want_lse = dense(query, *exact, visible, softcap, sinks)
    plain, _ = dense(query, *(x.to(query.dtype) for x in exact), visible, softcap, sinks, query.dtype)
    wide = torch.promote_types(query.dtype, torch.float32)
    _, plain_lse = dense(query, *(x.to(wide) for x in exact), visible, softcap, sinks, wide)
    scales = scales.masked_fill(~visible.any(2).expand(key.shape[:3])[..., None], torch.nan)
    output, lse = decode_attention(
        query, key, value, mask=mask, softcap=softcap, sinks=sinks, scales=scales, **options
    )
    live = want_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, live) and (output[~live] == 0).all()
    # Norms: rows of the cache differ in size, and the largest single error is a matter of luck.
    error, eps = (plain.double() - want)[live].norm(), torch.finfo(query.dtype).eps * want[live].norm()
    if query.dtype == torch.float32 and options.get("impl") == "triton":
        eps = eps * max(1.0, (query.shape[-1] / 8) ** 0.5)
    assert (output.double() - want)[live].norm() <= 1.5 * (error + eps)
    error, eps = (
        (plain_lse.double() - want_lse)[live].norm(),
        torch.finfo(lse.dtype).eps * want_lse[live].norm(),
    )
    assert (lse.double() - want_lse)[live].norm() <= 1.5 * (error + eps)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 4, 2, 1, 63, 64, 64),
    (2, 6, 2, 3, 150, 48, 80),
    (2, 8, 1, 16, 70, 16, 192),
    (3, 2, 2, 5, 40, 96, 32),
]
MASKS = ["all", "causal", "padding", "capacity", "gaps", "holes", "everything", "nothing"]


def name(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    return "B{}-H{}-G{}-T{}-S{}-K{}-V{}".format(*value) if isinstance(value, tuple) else None


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_reference(shape, kind, dtype):
    B, _, _, T, S = shape[:5]
    assert_exact(make_inputs(*shape, dtype), make_mask(kind, B, T, S), impl="reference")


@pytest.mark.parametrize("num_splits", [None, 1, 7])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "capped"])
def test_reference_options(softcap, sinks, num_splits, monkeypatch):
    monkeypatch.setattr(reference_module, "CHUNK", 20)
    inputs = make_inputs(2, 4, 2, 3, 50, 16, 32)
    sinks = torch.randn(4) if sinks else None
    for kind in ("all", "everything", "nothing"):
        mask = make_mask(kind, 2, 3, 50)
        assert_exact(inputs, mask, softcap, sinks, impl="reference", num_splits=num_splits)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reference_on_any_shape(data):
    B, G, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    T, S = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    bounds = st.lists(st.integers(-5, 45), min_size=B * T, max_size=B * T)
    lower, upper = (
        torch.tensor(data.draw(bounds)).view(B, T) if data.draw(st.booleans()) else None for _ in "lu"
    )
    holes = torch.rand(1, S) > 0.5 if data.draw(st.booleans()) else None
    mask = KeyRange(data.draw(st.booleans()), lower, upper, holes)
    inputs = make_inputs(B, G * group, G, T, S, 8, 12, torch.float64)
    assert_exact(
        inputs, mask, data.draw(st.sampled_from([None, 2.0])), num_splits=data.draw(st.integers(1, 6))
    )


EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


def spread(inputs):
    """Keys and values whose rows differ in size by many powers of two, below what fp16 holds as a scale."""
    query, key, value = inputs
    key = key * torch.logspace(-2, 0.3, key.shape[2])[:, None].to(key)
    return query, key, value * torch.logspace(-5, -3, value.shape[2])[:, None].to(value)


@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("kind", ["all", "everything", "gaps"])
def test_reference_in_8_bits(kind, dtype, eight):
    inputs = spread(make_inputs(2, 6, 2, 3, 150, 48, 80, dtype))
    sinks = torch.randn(6)
    for softcap, extra in ((None, None), (3.0, sinks)):
        mask = make_mask(kind, 2, 3, 150)
        assert_exact_in_8_bits(inputs, eight, mask, softcap, extra, impl="reference", num_splits=4)


def cut(inputs, mask, edges):
    """Parts over disjoint keys, merged."""
    query, key, value = inputs
    parts = []
    for a, b in zip(edges, edges[1:], strict=False):
        shifted = KeyRange(lower=mask.lower - a, upper=mask.upper - a)
        parts.append(decode_attention(query, key[:, :, a:b], value[:, :, a:b], mask=shifted))
    return merge_partials(*map(torch.stack, zip(*parts, strict=True)))


@pytest.mark.parametrize("edges", [(0, 64), (0, 1, 64), (0, 30, 30, 64), (0, 5, 50, 63, 64)], ids=str)
def test_shards_merge_to_the_whole(edges):
    inputs = make_inputs(2, 4, 2, 3, 64, 16, 16, torch.float64)
    mask = KeyRange(lower=torch.full((1, 3), 9), upper=torch.tensor([[40, 41, 42]]))
    for got, want in zip(cut(inputs, mask, edges), decode_attention(*inputs, mask=mask), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_empty_inputs():
    output, lse = decode_attention(*make_inputs(0, 4, 2, 1, 9, 16, 32))
    assert output.shape == (0, 4, 1, 32) and lse.shape == (0, 4, 1)
    output, lse = decode_attention(*make_inputs(2, 4, 2, 3, 0, 16, 32))
    assert output.shape == (2, 4, 3, 32) and (output == 0).all() and (lse == -torch.inf).all()
    _, lse = decode_attention(*make_inputs(2, 4, 2, 3, 0, 16, 32), sinks=torch.arange(4.0))
    assert torch.equal(lse, torch.arange(4.0)[None, :, None].expand(2, 4, 3))


def test_nan_in_a_visible_slot_is_not_hidden():
    query, key, value = make_inputs(1, 2, 1, 1, 20, 16, 16)
    value[0, 0, 7, 3] = torch.nan
    output, _ = decode_attention(query, key, value)
    assert output[..., 3].isnan().all() and output.isnan().sum() == 2


def test_compiles_in_one_graph_and_passes_opcheck():
    inputs = make_inputs(1, 4, 2, 2, 30, 16, 32)
    mask, sinks = make_mask("everything", 1, 2, 30), torch.randn(4)

    def step(query, key, value, lower):
        narrow = KeyRange(True, lower, mask.upper, mask.key_mask)
        return decode_attention(query * 2, key, value, mask=narrow, softcap=9.0, sinks=sinks)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs, mask.lower), step(*inputs, mask.lower), strict=True):
        torch.testing.assert_close(got, want)
    options = (0.25, True, mask.lower, mask.upper, mask.key_mask, 9.0, sinks, None, "auto")
    torch.library.opcheck(torch.ops.hf_longattn.decode_attention.default, (*inputs, *options))


BYTES = {name: torch.zeros(1, 2, 9, 16, dtype=torch.int8) for name in ("key", "value")}
FP8 = {name: states.to(torch.float8_e4m3fn) for name, states in BYTES.items()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"query": torch.zeros(1, 4, 17, 16)},
            ValueError,
            "1 to 16 positions, got T=17; use `blockwise_attention`",
        ),
        ({"query": torch.zeros(1, 4, 0, 16)}, ValueError, "1 to 16 positions, got T=0"),
        ({"query": torch.zeros(1, 3, 1, 16)}, ValueError, "heads of `query` must be a multiple"),
        ({"query": torch.zeros(4, 1, 16)}, ValueError, "`query`, `key` and `value` must be"),
        (
            {"query": torch.zeros(1, 4, 1, 0), "key": torch.zeros(1, 2, 9, 0)},
            ValueError,
            "`query` must have a head dim",
        ),
        ({"query": torch.zeros(1, 4, 1, 8)}, ValueError, "`key` must be"),
        ({"value": torch.zeros(1, 2, 8, 16)}, ValueError, "`key` must be"),
        ({"value": torch.zeros(1, 2, 9, 16).half()}, TypeError, "must share one dtype of bf16, fp16"),
        (
            FP8 | {"query": torch.zeros(1, 4, 1, 16).to(torch.float8_e4m3fn)},
            TypeError,
            "got torch.float8_e4m3fn, torch.float8_e4m3fn and",
        ),
        ({"query": torch.zeros(1, 4, 1, 16, requires_grad=True)}, ValueError, "`blockwise_attention`"),
        ({"softcap": 0.0}, ValueError, "`softcap` must be positive"),
        ({"num_splits": 0}, ValueError, "`num_splits` must be at least 1"),
        ({"sinks": torch.zeros(2)}, ValueError, r"`sinks` must be \(4,\)"),
        ({"sinks": torch.zeros(4).long()}, TypeError, "`sinks` must be floating point"),
        ({"mask": torch.ones(1, 9)}, TypeError, "`mask` must be a KeyRange or None, got Tensor"),
        ({"query": torch.zeros(1, 4, 1, 16).int()}, TypeError, r"convert them with `.to\(dtype\)`"),
        ({"mask": KeyRange(lower=torch.zeros(1, 2))}, ValueError, "`mask.lower` must be"),
        ({"mask": KeyRange(upper=torch.zeros(1, 1))}, TypeError, "`mask.upper` must be an integer dtype"),
        ({"mask": KeyRange(key_mask=torch.zeros(1, 9).int())}, TypeError, "`mask.key_mask` must be bool"),
        ({"impl": "flash"}, ValueError, "`impl` of decode_attention"),
        ({"scales": torch.ones(1, 2, 9, 2)}, TypeError, "`scales` belong to `key` and `value`"),
        ({**BYTES, "scales": torch.ones(1, 2, 9)}, ValueError, r"`scales` must be \(1, 2, 9, 2\)"),
        ({**BYTES, "scales": torch.ones(1, 2, 9, 2).half()}, TypeError, "`scales` must be float32"),
        (BYTES, TypeError, "or give the `scales`"),
    ],
)
def test_refuses(change, error, message):
    query, key, value = make_inputs(1, 4, 2, 1, 9, 16, 16)
    arguments = {"query": query, "key": key, "value": value, **change}
    with pytest.raises(error, match=message):
        decode_attention(**arguments)


@interpreted
@pytest.mark.parametrize("kind", MASKS)
def test_triton_masks(kind):
    inputs = make_inputs(2, 2, 1, 3, 150, 16, 16, torch.float16)
    assert_exact(inputs, make_mask(kind, 2, 3, 150), impl="triton", num_splits=2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 63, 48, 48),
        (1, 2, 2, 1, 40, 80, 16),
        (1, 2, 1, 2, 33, 96, 192),
        (1, 2, 1, 16, 30, 16, 16),
        (1, 2, 1, 1, 40, 256, 256),
    ],
    ids=name,
)
def test_triton_shapes(shape, dtype):
    mask = make_mask("causal", shape[0], shape[3], shape[4])
    assert_exact(make_inputs(*shape, dtype), mask, impl="triton", num_splits=3)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_triton_softcap_and_sinks(dtype):
    inputs = make_inputs(1, 4, 1, 2, 70, 32, 16, dtype)
    for softcap, sinks in ((3.0, None), (None, torch.randn(4)), (50.0, torch.randn(4).to(dtype))):
        assert_exact(inputs, make_mask("everything", 1, 2, 70), softcap, sinks, impl="triton", num_splits=2)


@interpreted
def test_triton_reads_a_cache_in_place():
    query, key, value = make_inputs(2, 2, 2, 1, 60, 16, 32)
    want = decode_attention(query, key, value, impl="triton", num_splits=2)
    buffer = torch.full((2, 2, 100, 16), torch.nan)
    buffer[:, :, :60] = key
    token_major = value.transpose(1, 2).contiguous().transpose(1, 2)
    wide = query.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    got = decode_attention(wide, buffer[:, :, :60], token_major, impl="triton", num_splits=2)
    assert not token_major.is_contiguous() and all(map(torch.equal, got, want))


@interpreted
@pytest.mark.parametrize("num_splits", [None, 1, 9])
def test_triton_any_number_of_splits(num_splits):
    inputs = make_inputs(1, 2, 1, 1, 300, 16, 16)
    assert_exact(inputs, make_mask("padding", 1, 1, 300), impl="triton", num_splits=num_splits)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_triton_one_part_is_the_bits_of_its_merge(dtype):
    inputs = make_inputs(3, 4, 2, 2, 90, 48, 16, dtype)
    # The last row sees nothing.
    mask = KeyRange(upper=torch.tensor([[70, 71], [3, 90], [0, 0]]))
    sinks = torch.full((4,), -torch.inf)
    direct = decode_attention(*inputs, mask=mask, impl="triton", num_splits=1)
    merged = decode_attention(*inputs, mask=mask, impl="triton", num_splits=1, sinks=sinks)
    assert all(map(torch.equal, direct, merged)) and direct[0].dtype == dtype
    assert bool((direct[1][2] == -torch.inf).all()) and not direct[0][2].any()


@interpreted
def test_triton_rows_of_one_interval_and_gaps_between():
    mask = KeyRange(lower=torch.tensor([[2, 140]]), upper=torch.tensor([[9, 150]]))
    assert_exact(make_inputs(1, 1, 1, 2, 200, 16, 16), mask, impl="triton", num_splits=2)


@interpreted
def test_triton_without_keys():
    _, lse = decode_attention(*make_inputs(1, 2, 2, 1, 0, 16, 16), sinks=torch.arange(2.0), impl="triton")
    assert torch.equal(lse, torch.arange(2.0)[None, :, None])
    assert decode_attention(*make_inputs(0, 2, 2, 1, 4, 16, 16), impl="triton")[0].shape == (0, 2, 1, 16)


@interpreted
@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("all", torch.float16), ("everything", torch.float32), ("gaps", torch.float16)],
    ids=name,
)
def test_triton_in_8_bits(kind, dtype, eight):
    inputs = spread(make_inputs(2, 2, 1, 3, 90, 16, 48, dtype))
    for softcap, sinks in ((None, None), (3.0, torch.randn(2))):
        mask = make_mask(kind, 2, 3, 90)
        assert_exact_in_8_bits(inputs, eight, mask, softcap, sinks, impl="triton", num_splits=2)


@interpreted
def test_triton_in_8_bits_reads_rows_that_are_no_words():
    inputs = make_inputs(1, 2, 2, 1, 50, 17, 33, torch.float16)
    query, key, value = inputs
    assert_exact_in_8_bits(inputs, torch.int8, KeyRange(), impl="triton", num_splits=2)
    key, value, scales = quantized_states(key, value, torch.int8)
    buffers = [torch.full((1, 2, 50, width), 99, dtype=torch.int8) for width in (18, 40)]
    buffers[0][..., 1:], buffers[1][..., 3:36] = key, value
    want = decode_attention(query, key, value, scales=scales, impl="triton", num_splits=2)
    views = buffers[0][..., 1:], buffers[1][..., 3:36]
    token_major = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in views)
    for cache in (views, token_major):
        got = decode_attention(query, *cache, scales=scales, impl="triton", num_splits=2)
        assert all(map(torch.equal, got, want))


def far_scales(kind, dtype):
    """Query, keys and values in int8, and scales that fp16 cannot hold; what is attended to is of size 1."""
    query, key, value = make_inputs(1, 2, 1, 2, 96, 32, 32)
    _, _, scales = eight = quantized_states(key, value, torch.int8, impl="reference")
    far = 2.0**60 if dtype == torch.bfloat16 else 2.0**13
    if kind == "small values":
        scales[..., 1] *= 2.0**-9
    elif kind == "large queries":
        query[:, 0], scales[..., 0] = query[:, 0] * far, scales[..., 0] / far
    elif kind == "zeros":
        scales[:, :, ::3, 1] = 0.0
    elif kind == "an unseen giant":
        # A value far above all others, whose weight is further below theirs.
        eight[0][:, :, 7], scales[:, :, 7, 1] = 127, 2.0**30
        scales[:, :, 7, 0], query[..., 0] = 2.0, -query[..., 1:].abs().sum(-1) - 60.0
    return query.to(dtype), *eight


FAR = ["small values", "large queries", "zeros", "an unseen giant"]


def assert_exact_at_far_scales(kind, dtype, device="cpu"):
    """Weights and result are rounded to 16 bits once: eps / 2 of every term, and of the sum.

    The reduced precision counts for all terms as if they had one sign; fp32 sums are far below it.
    """
    query, key, value, scales = (tensor.to(device) for tensor in far_scales(kind, dtype))
    output, _ = decode_attention(query, key, value, scales=scales, impl="triton", num_splits=2)
    keys, values = key.double() * scales[..., :1].double(), value.double() * scales[..., 1:].double()
    weights = torch.softmax(query.double() @ keys.mT * query.shape[-1] ** -0.5, -1)
    bound = torch.finfo(torch.float16).eps / 2 * (weights @ values.abs())
    # The smallest numbers of the result's dtype are as far apart as this.
    bound += torch.finfo(dtype).eps / 2 * (weights @ values).abs() + torch.finfo(dtype).smallest_normal / 1024
    assert ((output.double() - weights @ values).abs() <= 1.5 * bound).all()
    assert output.isfinite().all() and output.any()


@interpreted
@pytest.mark.parametrize("kind", FAR)
def test_triton_scales_that_fp16_cannot_hold(kind):
    assert_exact_at_far_scales(kind, torch.float16)


def test_splits_fill_the_machine():
    pytest.importorskip("triton")
    from hf_longattn.kernels.decode_attention.triton import pick_num_splits

    for tiles in (1, 8, 24, 64, 100, 160, 1000):
        splits = pick_num_splits(2**20, tiles, 132)
        waves = -(-tiles * splits // 132)
        assert tiles * splits >= min(0.85 * 132 * waves, 128 * tiles)
    # One wave that keeps the memory busy; where rows end apart, full waves of short programs.
    assert pick_num_splits(2**20, 8, 132) == 16
    assert pick_num_splits(2**18, 64, 132) == 2 and pick_num_splits(2**18, 64, 132, ragged=True) == 33
    assert pick_num_splits(128, 8, 132) == 1
    assert 1 <= pick_num_splits(4096, 8, 132) <= 16
