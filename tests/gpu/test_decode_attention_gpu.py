"""What only a GPU can show of `decode_attention` and `merge_partials`: bf16, graphs, compilation, size."""

import pytest
import torch
from test_decode_attention import (
    EIGHT_BITS,
    FAR,
    MASKS,
    assert_exact_at_far_scales,
    assert_exact_in_8_bits,
    dense,
    make_inputs,
    make_mask,
    name,
    poisoned,
    spread,
    visibility,
)

from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_partials
from hf_longattn.kernels.quantized_states import quantized_states

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_gpu(*arguments):
    return [tensor.cuda() for tensor in make_inputs(*arguments)]


def assert_near(inputs, mask, softcap=None, sinks=None, num_splits=None):
    """At most 1.5 times the error of SDPA in the same dtype, and one rounding of the result."""
    query, key, value = inputs
    visible = visibility(mask, query, key)
    group = query.shape[1] // key.shape[1]
    repeated = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    # SDPA knows neither caps nor sinks; its error on the same inputs without them stands in.
    peer = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=visible).double()
    plain, plain_lse = dense(query, key, value, visible)
    live = plain_lse > -torch.inf
    peer_error = (peer - plain)[live].abs().max() if live.any() else 0.0
    want, want_lse = dense(query, key, value, visible, softcap, sinks)
    key, value = poisoned(key, value, visible)
    output, lse = decode_attention(
        query, key, value, mask=mask, softcap=softcap, sinks=sinks, num_splits=num_splits, impl="triton"
    )
    eps = torch.finfo(query.dtype).eps * want.abs().max()
    assert (output.double() - want).abs().max() <= 1.5 * (peer_error + eps)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    seen = want_lse > -torch.inf
    # Eight roundings: the product, its scale, the exponential and its sum over lanes, steps and splits.
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=0, atol=8 * 2**-23 * 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("num_queries", [1, 3, 16], ids="T{}".format)
def test_masks(kind, num_queries, dtype):
    inputs = on_gpu(2, 8, 2, num_queries, 1500, 128, 128, dtype)
    assert_near(inputs, make_mask(kind, 2, num_queries, 1500).to(inputs[0].device))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dims", [(16, 16), (48, 48), (80, 64), (96, 96), (192, 128), (256, 256)], ids=str)
def test_head_dims(dims, dtype):
    assert_near(on_gpu(2, 8, 2, 2, 700, *dims, dtype), KeyRange(causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_softcap_and_sinks(dtype):
    mask = make_mask("padding", 2, 2, 900).to(torch.device("cuda"))
    for softcap, sinks in ((20.0, None), (None, torch.randn(8).cuda()), (5.0, torch.randn(8).cuda())):
        assert_near(on_gpu(2, 8, 2, 2, 900, 64, 64, dtype), mask, softcap, sinks)


@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("num_queries", [1, 5, 16], ids="T{}".format)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_keys_in_8_bits(dims, num_queries, dtype, eight):
    for kind in ("causal", "everything", "gaps"):
        inputs = spread(on_gpu(2, 8, 2, num_queries, 900, *dims, dtype))
        mask = make_mask(kind, 2, num_queries, 900).to(inputs[0].device)
        sinks = torch.randn(8).cuda() if kind == "gaps" else None
        assert_exact_in_8_bits(inputs, eight, mask, None, sinks, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
@pytest.mark.parametrize("kind", FAR)
def test_scales_that_fp16_cannot_hold(kind, dtype):
    assert_exact_at_far_scales(kind, dtype, "cuda")


@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
def test_every_number_of_8_bits_is_itself(eight):
    """One key with all the weight: the result is its value, exactly, in words and in single bytes."""
    numbers = torch.arange(-128, 128, dtype=torch.int8, device="cuda").view(eight)
    numbers = torch.where(numbers.float().isnan(), torch.zeros((), device="cuda"), numbers.float()).to(eight)
    value, key = numbers.view(1, 1, 1, 256), torch.zeros(1, 1, 1, 256, device="cuda").to(eight)
    query, scales = torch.ones(1, 1, 1, 256, device="cuda").half(), torch.ones(1, 1, 1, 2, device="cuda")
    buffer = torch.zeros(1, 1, 1, 258, device="cuda").to(eight)
    buffer[..., 1:257] = value
    for states in (value, buffer[..., 1:257]):
        output, _ = decode_attention(query, key, states, scales=scales, impl="triton")
        assert torch.equal(output.float(), value.float())
    one_hot = torch.eye(256, device="cuda").half().view(16, 16, 1, 256)
    _, lse = decode_attention(
        one_hot, value.expand(16, 16, 1, 256), value.expand(16, 16, 1, 256), scale=1.0,
        scales=scales.expand(16, 16, 1, 2), impl="triton",
    )  # fmt: skip
    torch.testing.assert_close(lse.flatten(), value.float().flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("length", [1, 5000], ids="T{}".format)
def test_quantised_rows_are_those_of_the_reference(length, dtype, eight):
    key, value = (
        torch.randn(2, length, 2, 128).to(dtype).transpose(1, 2),
        torch.randn(2, 2, length, 80).to(dtype),
    )
    key[0, 1, 0] = 0
    # On a GPU torch divides by a number by multiplying by its inverse: the reference runs on the CPU.
    expected = quantized_states(key, value, eight, impl="reference")
    result = quantized_states(key.cuda(), value.cuda(), eight, impl="triton")
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got.float().cpu(), want.float(), rtol=0, atol=0)


def test_a_graph_quantises_and_attends():
    key, value = torch.randn(1, 2, 1, 64).cuda().bfloat16(), torch.randn(1, 2, 1, 64).cuda().bfloat16()
    query = torch.randn(1, 8, 1, 64).cuda().bfloat16()

    def step():
        key8, value8, scales = quantized_states(key, value, torch.int8)
        return decode_attention(query, key8, value8, scales=scales)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for _ in range(2):
        value.normal_()
        graph.replay()
        # One key has all the weight, so the output is its value, half a step of 8 bits away at most.
        bound = value.abs().amax(-1, keepdim=True).repeat_interleave(4, 1) * (0.5 / 127 + 2**-7)
        assert ((output - value.repeat_interleave(4, 1)).abs() <= bound).all()


@pytest.mark.parametrize("group", [1, 4, 32], ids="H{}".format)
def test_rows_fill_several_tiles(group):
    assert_near(on_gpu(1, group, 1, 16, 2000, 128, 128, torch.bfloat16), KeyRange(causal=True), num_splits=5)


def test_graph_follows_lengths_on_the_device():
    query, key, value = on_gpu(2, 8, 2, 1, 8192, 128, 128, torch.bfloat16)
    lower, upper = (torch.zeros(2, 1, dtype=torch.int32, device="cuda") for _ in range(2))
    mask = KeyRange(lower=lower, upper=upper)
    upper.fill_(10)
    decode_attention(query, key, value, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = decode_attention(query, key, value, mask=mask)
    for first, last in ((0, 1), (5, 4097), (100, 8192), (0, 0)):
        lower.fill_(first)
        upper.copy_(torch.tensor([[last], [max(first, last - 3)]]))
        graph.replay()
        want, want_lse = decode_attention(query, key, value, mask=mask, impl="reference")
        torch.testing.assert_close(output, want, rtol=2**-7, atol=2**-8)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_nothing_waits_for_the_device_and_nothing_recompiles():
    from hf_longattn.kernels.decode_attention.triton import _split_kernel

    query, key, value = on_gpu(1, 8, 2, 1, 4096, 64, 64, torch.bfloat16)

    def step(length):
        lower = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
        mask = KeyRange(causal=True, lower=lower)
        return decode_attention(query, key[:, :, :length], value[:, :, :length], mask=mask, num_splits=8)

    step(100)
    cache = _split_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for length in (101, 112, 1000, 1024, 1337, 4095):
            step(length)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(cache) == before


def test_compiles_with_inductor():
    query, key, value = on_gpu(1, 8, 2, 1, 500, 64, 64, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: decode_attention(q * 2, k, v)[0] + 1, fullgraph=True)
    want = decode_attention(query * 2, key, value)[0] + 1
    torch.testing.assert_close(compiled(query, key, value), want)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    length, seen = 17 * 2**20, 300
    key, value = (torch.zeros(1, 1, length, 128, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    for tensor in (key, value):
        tensor[:, :, -seen:] = torch.randn(1, 1, seen, 128, device="cuda")
        tensor[:, :, :seen] = torch.nan
    query = torch.randn(1, 4, 1, 128, dtype=torch.bfloat16, device="cuda")
    lower = torch.full((1, 1), length - seen, device="cuda")
    got = decode_attention(query, key, value, mask=KeyRange(lower=lower))
    want = decode_attention(query, key[:, :, -seen:], value[:, :, -seen:])
    torch.testing.assert_close(got[0], want[0], rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=name)
@pytest.mark.parametrize("shape", [(132, 1, 32, 1, 128), (3, 2, 8, 1000, 128), (8, 4, 4, 16, 80)], ids=str)
def test_merge(shape, dtype):
    lse_dtype = torch.promote_types(dtype, torch.float32)
    outputs = torch.randn(shape, device="cuda").to(dtype)
    lse = 5 * torch.randn(shape[:-1], device="cuda", dtype=lse_dtype)
    hole = torch.rand(shape[:-1], device="cuda") < 0.3
    outputs, lse = outputs.masked_fill(hole.unsqueeze(-1), torch.nan), lse.masked_fill(hole, -torch.inf)
    want, want_lse = merge_partials(outputs.double(), lse.double(), impl="reference")
    output, merged = merge_partials(outputs, lse, impl="triton")
    eps = torch.finfo(dtype).eps + (shape[0] + 2) * torch.finfo(lse_dtype).eps
    assert (output.double() - want).abs().max() <= eps * outputs.nan_to_num().abs().max()
    torch.testing.assert_close(merged.double(), want_lse, rtol=0, atol=40 * torch.finfo(lse_dtype).eps)
