"""Norms against their definition in fp64 and transformers' own modules; the kernel in the interpreter."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from hf_longattn.kernels.row_norm import gated_row_norm, row_norm

KINDS = ["rms", "rms_wide", "rms_plus_one", "layer"]
# Short rows that share a program among many, a width that fills no block, one row, none.
SHAPES = [(1, 1, 256), (2, 3, 80), (2, 2100, 16), (0, 4, 32)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
EPS = 1e-5


def inputs(shape, dtype, kind, device="cpu"):
    states = torch.randn(shape, device=device) * 3 + 1
    weight, bias = (torch.randn(shape[-1], device=device) for _ in range(2))
    return states.to(dtype), weight.to(dtype), bias.to(dtype) if kind == "layer" else None


def module_like(kind, weight, bias):
    if kind == "layer":
        module = torch.nn.LayerNorm(weight.shape[0], eps=EPS).to(weight)
        module.bias.data.copy_(bias)
    else:
        name = {"rms": LlamaRMSNorm, "rms_wide": Olmo2RMSNorm, "rms_plus_one": Gemma2RMSNorm}[kind]
        module = name(weight.shape[0], eps=EPS).to(weight)
    module.weight.data.copy_(weight)
    return module


def definition(states, weight, bias, kind):
    x = states.double()
    if kind == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), EPS)
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x * (weight.double() + (kind == "rms_plus_one"))


def check(impl, dtype, shape, kind, device="cpu"):
    states, weight, bias = inputs(shape, dtype, kind, device)
    result = row_norm(states, weight, bias, eps=EPS, kind=kind, impl=impl)
    exact = definition(states, weight, bias, kind)
    with torch.no_grad():
        own = module_like(kind, weight, bias)(states)
    assert result.dtype == own.dtype == dtype
    allowed = (own.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (result.double() - exact).norm() <= 1.5 * allowed


def check_gated(impl, dtype, shape, kind, sigmoid, device="cpu"):
    states, weight, _ = inputs(shape, dtype, kind, device)
    # Rows that are not next to one another, as those of a slice.
    gate = (torch.randn(*shape[:-1], 2 * shape[-1], device=device) * 4).to(dtype)[..., : shape[-1]]
    factor = gate.sigmoid() if sigmoid else gate
    wide = gate.double().sigmoid() if sigmoid else gate.double()
    for scale in (weight, None):
        result = gated_row_norm(states, gate, scale, eps=EPS, kind=kind, sigmoid=sigmoid, impl=impl)
        ones = torch.full_like(weight, float(kind != "rms_plus_one"))
        exact = definition(states, ones if scale is None else scale, torch.zeros_like(weight), kind) * wide
        own = factor * row_norm(states, scale, eps=EPS, kind=kind, impl="reference")
        assert result.dtype == own.dtype == dtype
        allowed = (own.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (result.double() - exact).norm() <= 1.5 * allowed


def gradients(function, tensors, grad):
    """Gradients of the first of three tensors (or of all that are there) that want one."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors if x is not None]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def check_gradients(impl, dtype, shape, kind, device="cpu"):
    states, weight, bias = inputs(shape, dtype, kind, device)
    # Rows that are not next to one another, as those of a slice.
    grad = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., : shape[-1]]
    tensors = (states, weight, bias)
    result = gradients(lambda x, *w: row_norm(x, *w, eps=EPS, kind=kind, impl=impl), tensors, grad)
    wide = [None if x is None else x.double() for x in tensors]
    exact = gradients(lambda x, w, b=None: definition(x, w, b, kind), wide, grad.double())

    def by_module(x, w, b=None):
        module = module_like(kind, weight, bias)
        named = {"weight": w} if b is None else {"weight": w, "bias": b}
        return torch.func.functional_call(module, named, (x,))

    own = gradients(by_module, tensors, grad)
    for ours, theirs, true in zip(result, own, exact, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        allowed = (theirs.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (ours.double() - true).norm() <= 1.5 * allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference(shape, dtype, kind):
    check("reference", dtype, shape, kind)
    check_gradients("reference", dtype, shape, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigmoid", [True, False], ids=["sigmoid", "plain"])
def test_gated_reference(kind, sigmoid):
    for shape in SHAPES:
        check_gated("reference", torch.bfloat16, shape, kind, sigmoid)


def test_gradients_of_a_gated_norm():
    states, gate, weight = (torch.randn(3, 8).double().requires_grad_() for _ in range(3))
    leaves = [states, gate, weight[0].detach().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: gated_row_norm(*x, eps=EPS, sigmoid=True), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gives_the_bits_of_the_modules(kind):
    states, weight, bias = inputs((5, 64), torch.bfloat16, kind)
    with torch.no_grad():
        own = module_like(kind, weight, bias)(states)
    result = row_norm(states, weight, bias, eps=EPS, kind=kind)
    # torch's layer norm sums in another order.
    assert torch.equal(result, own) or (kind == "layer" and (result != own).double().mean() < 0.02)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_under_the_interpreter(kind):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            check("triton", dtype, shape, kind)
            check_gated("triton", dtype, shape, kind, shape[0] == 2)
            # The interpreter takes a second for the many programs of the third.
            if shape[1] < 2000 or kind == "layer":
                check_gradients("triton", dtype, shape, kind)
    states = torch.randn(6, 40, 3).transpose(1, 2)
    expected = row_norm(states, None, eps=EPS, kind=kind, impl="reference")
    torch.testing.assert_close(row_norm(states, None, eps=EPS, kind=kind, impl="triton"), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=["states", "weight"])
def test_one_gradient_alone_under_the_interpreter(wants):
    states, weight, _ = inputs((3, 5, 48), torch.float32, "rms")
    grad = torch.randn_like(states)
    states, weight = (x.requires_grad_(wanted) for x, wanted in zip((states, weight), wants, strict=True))
    leaf = states if wants[0] else weight
    found = []
    for impl in ("triton", "reference"):
        found.append(torch.autograd.grad(row_norm(states, weight, eps=EPS, impl=impl), leaf, grad)[0])
    torch.testing.assert_close(*found)


@pytest.mark.interpreted
def test_the_operator_is_registered_as_torch_asks_under_the_interpreter():
    states, weight, bias = inputs((3, 5, 48), torch.float32, "layer")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [x.requires_grad_() for x in (states, weight, bias)]
    operators = torch.ops.hf_longattn
    torch.library.opcheck(operators.row_norm, (*leaves, EPS, "layer"), test_utils=tests)
    arguments = (states.detach(), states.detach(), weight.detach(), [True, False, True], EPS, "layer")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.row_norm_backward, arguments, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096), (512, 2048), (4100, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(shape, dtype, kind):
    check("triton", dtype, shape, kind, "cuda")
    check_gated("triton", dtype, shape, kind, True, "cuda")
    check_gated("triton", dtype, shape, kind, False, "cuda")
    check_gradients("triton", dtype, shape, kind, "cuda")


@pytest.mark.gpu
def test_gradients_of_the_weight_are_the_same_every_time():
    states, weight, _ = inputs((3, 5000, 256), torch.bfloat16, "rms", "cuda")
    grad = torch.randn_like(states)
    first, again = (gradients(lambda x, w: row_norm(x, w, eps=EPS), (states, weight), grad) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_a_weight_in_fp32_widens_what_llama_returns():
    states, weight = torch.randn(2, 8).bfloat16(), torch.randn(8)
    assert row_norm(states, weight, eps=EPS).dtype == torch.float32
    assert row_norm(states, weight, eps=EPS, kind="rms_wide").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference(kind):
    states, weight, bias = inputs((2, 8), torch.float64, kind)
    leaves = [x.requires_grad_() for x in (states, weight, bias) if x is not None]
    assert torch.autograd.gradcheck(lambda *x: row_norm(*x, eps=EPS, kind=kind), leaves)


def test_what_does_not_fit_is_refused():
    states, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="`kind`"):
        row_norm(states, weight, eps=EPS, kind="batch")
    with pytest.raises(ValueError, match="`kind`"):
        row_norm(states, weight, weight, eps=EPS)
    with pytest.raises(ValueError, match="`weight`"):
        row_norm(states, weight[:4], eps=EPS)
    with pytest.raises(ValueError, match="`gate`"):
        gated_row_norm(states, states[:1], weight, eps=EPS)
    with pytest.raises(ValueError, match="`impl"):
        row_norm(states, weight, eps=EPS, impl="fast")
