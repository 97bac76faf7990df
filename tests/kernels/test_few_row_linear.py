"""Linear maps of a few rows against fp64: one row and many, odd sizes, biases, gates, interpreted too."""

import functools

import pytest
import torch

from hf_longattn.kernels.few_row_linear import few_row_gated_linear, few_row_linear
from hf_longattn.kernels.few_row_linear.reference import ACTIVATIONS

SHAPES = [(1, 17, 96), (1, 9, 1040), (2, 16, 520), (5, 65, 256), (16, 48, 130)]
IDS = [f"M{m}-N{n}-K{k}" for m, n, k in SHAPES]


def inputs(m, n, k, dtype, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    # Rows of the states lie apart, as slices of a longer tensor do.
    states = draw(m, 2 * k)[:, :k].to(dtype)
    return states, (draw(n, k) / k**0.5).to(dtype), (draw(n, k) / k**0.5).to(dtype), draw(n).to(dtype)


def check(impl, dtype, shape, device="cpu"):
    states, weight, up, bias = inputs(*shape, dtype, device)
    x, w, u, b = (tensor.double() for tensor in (states, weight, up, bias))
    cases = [
        (few_row_linear, (states, weight), x @ w.T),
        (few_row_linear, (states, weight, bias), x @ w.T + b),
        (few_row_gated_linear, (states, weight, up), torch.nn.functional.silu(x @ w.T) * (x @ u.T)),
    ]
    for name, function in ACTIVATIONS.items():
        operator = functools.partial(few_row_linear, activation=name)
        cases.append((operator, (states, weight, bias), function(x @ w.T + b)))
    for function, arguments, exact in cases:
        standard = function(*arguments, impl="reference").double()
        result = function(*arguments, impl=impl)
        allowed = (standard - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (result.double() - exact).norm() <= 1.5 * allowed, function
        assert result.dtype == dtype and result.shape == exact.shape
        batched = function(arguments[0][:, None], *arguments[1:], impl=impl)
        assert torch.equal(batched[:, 0], result)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_under_the_interpreter(dtype, shape):
    check("triton", dtype, shape)


@pytest.mark.interpreted
@pytest.mark.parametrize("tiles", [1, 2], ids="A{}".format)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=IDS[1:3])
def test_tiles_ahead_give_the_same_bits_under_the_interpreter(monkeypatch, shape, tiles):
    from hf_longattn.kernels.few_row_linear import triton as kernels

    asked, own = [], kernels.tiles_ahead
    states, weight, up, _ = inputs(*shape, torch.float32)

    def both(**promise):
        options = {"impl": "triton", **promise}
        single = few_row_linear(states, weight, **options)
        return torch.cat((single, few_row_gated_linear(states, weight, up, **options)))

    def spy(*arguments):
        asked.append(own(*arguments))
        return asked[-1]

    expected = both()
    # One program runs after the other there, and none has to wait.
    monkeypatch.setattr(kernels, "overlap", lambda device: {"OVERLAP": True})
    monkeypatch.setattr(kernels, "let_next_begin", lambda on: None)
    monkeypatch.setattr(kernels, "wait_for_previous", lambda on: None)
    monkeypatch.setattr(kernels, "_LARGE", 0 if tiles == 2 else 1 << 30)
    monkeypatch.setattr(kernels, "tiles_ahead", spy)
    assert torch.equal(both(), expected)
    assert not asked, "without the promise nothing is loaded ahead"
    assert torch.equal(both(settled_weight=True), expected)
    assert asked == [min(tiles, -(-shape[2] // 1024)) if shape[0] == 1 else 0] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1, 14336, 4096), (8, 4096, 14336)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(dtype, shape):
    check("triton", dtype, shape, "cuda")


def test_the_configuration_is_traced_whole():
    """By torch 2.11 too, whose compiler raises where a truth value is the index of a tuple."""
    kernels = pytest.importorskip("hf_longattn.kernels.few_row_linear.triton")
    torch._dynamo.reset()
    width = torch.compile(
        lambda x, n: x + kernels.choose(len(x), n).block_n, fullgraph=True, dynamic=False, backend="eager"
    )
    for rows, columns in ((1, 64), (1, 8192), (4, 64), (4, 8192)):
        expected = kernels.choose(rows, columns).block_n
        assert width(torch.zeros(rows), columns).tolist() == [expected] * rows
    torch._dynamo.reset()


def test_on_a_cpu_it_is_torch():
    states, weight, up, bias = inputs(20, 8, 16, torch.float64)
    assert torch.equal(few_row_linear(states, weight, bias), torch.nn.functional.linear(states, weight, bias))
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: few_row_gated_linear(states, w, up), (weight,))


def test_what_does_not_fit_is_refused():
    states, weight, up, bias = inputs(2, 8, 16, torch.float32)
    with pytest.raises(ValueError, match="`weight` of few_row_linear must be"):
        few_row_linear(states, weight[:, :4])
    with pytest.raises(ValueError, match="`weight` of few_row_linear must be .* in torch.float32"):
        few_row_linear(states, weight.half())
    with pytest.raises(ValueError, match="`bias` must be"):
        few_row_linear(states, weight, bias[:3])
    with pytest.raises(ValueError, match="`activation` of few_row_linear must be"):
        few_row_linear(states, weight, activation="relu")
    with pytest.raises(ValueError, match="`up` must be"):
        few_row_gated_linear(states, weight, up[:3])
    with pytest.raises(ValueError, match="`impl`"):
        few_row_linear(states, weight, impl="fast")


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("change", "words"),
    [("rows", "1 to 16 rows"), ("dtype", "fp32 alone"), ("strides", "contiguous rows"),
     ("gradient", "no backward")],
)  # fmt: skip
def test_what_the_kernel_cannot_do_is_refused_by_name(change, words):
    dtype = torch.float64 if change == "dtype" else torch.float32
    states, weight, up, _ = inputs(17 if change == "rows" else 2, 8, 16, dtype)
    if change == "strides":
        weight = weight.T.contiguous().T
    if change == "gradient":
        weight.requires_grad_()
    with pytest.raises(ValueError, match=f"`impl='triton'` of few_row_linear .*{words}"):
        few_row_linear(states, weight, impl="triton")
    with pytest.raises(ValueError, match=f"`impl='triton'` of few_row_gated_linear .*{words}"):
        few_row_gated_linear(states, weight, up, impl="triton")
