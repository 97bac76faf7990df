"""Gated activations against their definition in fp64; the kernel in the interpreter."""

import math

import pytest
import torch

from hf_longattn.kernels.gated_activation import gated_activation

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
SHAPES = [(1, 1, 64), (2, 3, 2100), (0, 8)]


def definition(gate, activation):
    gate = gate.double()
    if activation == "silu":
        return gate / (1 + torch.exp(-gate))
    if activation == "gelu":
        return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2


def plain(gate, activation):
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def check(impl, dtype, shape, activation, device="cpu"):
    # Halves of one tensor, as a fused projection leaves them; some gates far outside, where exp overflows.
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
    both[..., : shape[-1] : 16] *= 40
    gate, up = both.to(dtype).chunk(2, dim=-1)
    result = gated_activation(gate, up, activation=activation, impl=impl)
    exact = definition(gate, activation) * up.double()
    own = (plain(gate, activation) * up).double()
    assert result.dtype == dtype and result.shape == gate.shape
    allowed = (own - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (result.double() - exact).norm() <= 1.5 * allowed


def gradients(function, both, grad):
    both = both.detach().clone().requires_grad_()
    return torch.autograd.grad(function(*both.chunk(2, dim=-1)), both, grad)[0].chunk(2, dim=-1)


def check_gradients(impl, dtype, shape, activation, device="cpu"):
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
    both[..., : shape[-1] : 16] *= 40
    both, grad = both.to(dtype), torch.randn(*shape, device=device).to(dtype)
    result = gradients(
        lambda gate, up: gated_activation(gate, up, activation=activation, impl=impl), both, grad
    )
    exact = gradients(lambda gate, up: definition(gate, activation) * up, both.double(), grad.double())
    own = gradients(lambda gate, up: plain(gate, activation) * up, both, grad)
    for ours, theirs, true in zip(result, own, exact, strict=True):
        assert ours.dtype == dtype
        allowed = (theirs.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (ours.double() - true).norm() <= 1.5 * allowed


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reference(dtype, activation):
    for shape in SHAPES:
        check("reference", dtype, shape, activation)
        check_gradients("reference", dtype, shape, activation)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_under_the_interpreter(activation):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            check("triton", dtype, shape, activation)
            check_gradients("triton", dtype, shape, activation)


@pytest.mark.interpreted
def test_the_operator_is_registered_as_torch_asks_under_the_interpreter():
    gate, up, grad = torch.randn(3, 4, 40)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    operators = torch.ops.hf_longattn
    torch.library.opcheck(operators.gated_activation, (*leaves, "silu"), test_utils=tests)
    arguments = (grad, gate, up, "silu")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.gated_activation_backward, arguments, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(dtype, activation):
    for shape in (*SHAPES, (300, 14336)):
        check("triton", dtype, shape, activation, "cuda")
        check_gradients("triton", dtype, shape, activation, "cuda")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_reference(activation):
    gate, up = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: gated_activation(*x, activation=activation), (gate, up))


def test_what_does_not_fit_is_refused():
    gate = torch.randn(2, 8)
    with pytest.raises(ValueError, match="`activation`"):
        gated_activation(gate, gate, activation="relu")
    with pytest.raises(ValueError, match="`up`"):
        gated_activation(gate, gate[:, :4])
    with pytest.raises(ValueError, match="`impl`"):
        gated_activation(gate, gate, impl="fast")
