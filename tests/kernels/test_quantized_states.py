"""`quantized_states`: how far a row may lie from itself, what becomes of odd rows, the kernel in Python."""

import pytest
import torch

from hf_longattn.kernels.quantized_states import dequantized_states, quantized_states

EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
interpreted = pytest.mark.interpreted


def name(value):
    return str(value).removeprefix("torch.")


def make(dtype=torch.float32, shape=(2, 3, 7, 48), width=20):
    """Rows of very different sizes, with strides of a transposed projection."""
    B, G, T, K = shape
    size = torch.logspace(-6, 3, T)[None, :, None, None]
    key = (torch.randn(B, T, G, K) * size).to(dtype).transpose(1, 2)
    return key, torch.randn(B, G, T, width).to(dtype)


@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=name)
def test_a_row_comes_back_within_half_a_step(dtype, eight):
    states = make(dtype)
    *rows, scales = quantized_states(*states, eight)
    assert scales.dtype == torch.float32 and scales.shape == (2, 3, 7, 2)
    for i, (row, state) in enumerate(zip(rows, states, strict=True)):
        assert row.dtype == eight
        exact, scale = state.double(), scales[..., i : i + 1].double()
        back = dequantized_states(row, scales[..., i : i + 1], torch.float64)
        # Half a step of int8; of fp8, 2^-4 of the value, and half of its smallest step, 2^-9.
        bound = 0.5 * scale if eight == torch.int8 else torch.maximum(exact.abs() / 16, 2.0**-10 * scale)
        slack = 8 * 2.0**-24 * exact.abs().amax(-1, keepdim=True)
        assert ((back - exact).abs() <= bound + slack).all()
        largest = 127 if eight == torch.int8 else 448
        # The largest number of a row is the largest number there is.
        assert (row.float().abs().amax(-1) == largest).all()


@pytest.mark.parametrize("eight", EIGHT_BITS, ids=name)
def test_rows_of_zeros_and_rows_that_are_not_finite(eight):
    key, value = make()
    key[0, 0, 1], key[0, 1, 2, 3], value[1, 0, 3, 0], value[1, 1, 1] = 0, torch.nan, -torch.inf, 1e-38
    key8, value8, scales = quantized_states(key, value, eight)
    back = dequantized_states(key8, scales[..., :1], torch.float32)
    assert (back[0, 0, 1] == 0).all() and back[0, 1, 2].isnan().all()
    assert back.isnan().sum() == key.shape[3]
    back = dequantized_states(value8, scales[..., 1:], torch.float32)
    assert back[1, 0, 3].isnan().all() and (back[1, 1, 1].abs() <= 1e-30).all()
    assert back.isnan().sum() == value.shape[3]


def test_a_row_does_not_depend_on_its_neighbours():
    key, value = make()
    whole = quantized_states(key, value, torch.int8)
    for t in range(key.shape[2]):
        alone = quantized_states(key[:, :, t : t + 1], value[:, :, t : t + 1], torch.int8)
        assert all(torch.equal(a, w[:, :, t : t + 1]) for a, w in zip(alone, whole, strict=True))


def test_empty_and_registered():
    *rows, scales = quantized_states(torch.zeros(0, 2, 3, 4), torch.zeros(0, 2, 3, 5), torch.int8)
    assert [x.shape for x in (*rows, scales)] == [(0, 2, 3, 4), (0, 2, 3, 5), (0, 2, 3, 2)]
    operator = torch.ops.hf_longattn.quantized_states.default
    torch.library.opcheck(operator, (*make(), torch.int8, "auto"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.int4}, TypeError, "`dtype` must be torch.int8 or"),
        ({"value": torch.zeros(1, 2, 4, 5)}, ValueError, "`key` and `value` must be"),
        ({"key": torch.zeros(1, 2, 3, 5).int()}, TypeError, "must be floating point"),
        ({"impl": "sdpa"}, ValueError, "`impl` of quantized_states"),
    ],
)
def test_refuses(change, error, message):
    states = {"key": torch.zeros(1, 2, 3, 5), "value": torch.zeros(1, 2, 3, 5), "dtype": torch.int8}
    with pytest.raises(error, match=message):
        quantized_states(**{**states, **change})


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16], ids=name)
@pytest.mark.parametrize("shape", [(2, 3, 7, 48), (1, 2, 2050, 16)], ids=str)
def test_triton_gives_the_bytes_of_the_reference(shape, dtype):
    key, value = make(dtype, shape)
    # Ties, which round to even.
    key[0, 0, 0] = torch.arange(shape[3]) + 0.5
    key[0, 0, 0, 0] = 127
    key[0, 0, 1] = 0
    expected = quantized_states(key, value, torch.int8, impl="reference")
    for got, want in zip(quantized_states(key, value, torch.int8, impl="triton"), expected, strict=True):
        assert torch.equal(got, want)
    key[0, 0, 1, 3], value[0, 1, 0, 2] = torch.nan, torch.inf
    scales = quantized_states(key, value, torch.int8, impl="triton")[2]
    assert scales[0, 0, 1, 0].isnan() and scales[0, 1, 0, 1].isnan() and scales.isnan().sum() == 2
