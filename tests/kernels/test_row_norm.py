"""Norms against their definition in fp64 and transformers' own modules; the kernel in the interpreter."""

import os

import pytest
import torch
from interpreted import run_under_interpreter
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from hf_longattn.kernels.row_norm import add_row_norm, row_norm

KINDS = ["rms", "rms_wide", "rms_plus_one", "layer"]
# Short rows that share a program among many, a width that fills no block, one row, none.
SHAPES = [(1, 1, 256), (2, 3, 80), (2, 2100, 16), (0, 4, 32)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
EPS = 1e-5


def inputs(shape, dtype, kind, device="cpu"):
    states, residual = (torch.randn(shape, device=device) * 3 + 1 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device) for _ in range(2))
    return [x.to(dtype) for x in (states, residual, weight)] + [bias.to(dtype) if kind == "layer" else None]


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
    states, residual, weight, bias = inputs(shape, dtype, kind, device)
    total, normed = add_row_norm(states, residual, weight, bias, eps=EPS, kind=kind, impl=impl)
    assert torch.equal(total, states + residual)
    alone = row_norm(states, weight, bias, eps=EPS, kind=kind, impl=impl)
    with torch.no_grad():
        module = module_like(kind, weight, bias)
        for result, x in ((normed, total), (alone, states)):
            exact = definition(x, weight, bias, kind)
            own = module(x)
            assert result.dtype == own.dtype == dtype
            allowed = (own.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
            assert (result.double() - exact).norm() <= 1.5 * allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference(shape, dtype, kind):
    check("reference", dtype, shape, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gives_the_bits_of_the_modules(kind):
    states, _, weight, bias = inputs((5, 64), torch.bfloat16, kind)
    with torch.no_grad():
        own = module_like(kind, weight, bias)(states)
    result = row_norm(states, weight, bias, eps=EPS, kind=kind)
    # torch's layer norm sums in another order.
    assert torch.equal(result, own) or (kind == "layer" and (result != own).double().mean() < 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_under_the_interpreter(kind):
    if os.environ.get("TRITON_INTERPRET") == "1":
        for shape in SHAPES:
            for dtype in (torch.float32, torch.float16):
                check("triton", dtype, shape, kind)
        states = torch.randn(6, 40, 3).transpose(1, 2)
        expected = row_norm(states, None, eps=EPS, kind=kind, impl="reference")
        torch.testing.assert_close(row_norm(states, None, eps=EPS, kind=kind, impl="triton"), expected)
        return
    if kind != KINDS[0]:
        pytest.skip("the first kind starts the interpreter for all of them")
    run_under_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096), (512, 2048), (4100, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(shape, dtype, kind):
    check("triton", dtype, shape, kind, "cuda")


def test_a_weight_in_fp32_widens_what_llama_returns():
    states, weight = torch.randn(2, 8).bfloat16(), torch.randn(8)
    assert row_norm(states, weight, eps=EPS).dtype == torch.float32
    assert row_norm(states, weight, eps=EPS, kind="rms_wide").dtype == torch.bfloat16


def test_gradients_take_the_plain_path():
    states, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8), (8,))
    )
    assert torch.autograd.gradcheck(lambda x, w: row_norm(x, w, eps=EPS), (states, weight))


def test_what_does_not_fit_is_refused():
    states, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="`kind`"):
        row_norm(states, weight, eps=EPS, kind="batch")
    with pytest.raises(ValueError, match="`kind`"):
        row_norm(states, weight, weight, eps=EPS)
    with pytest.raises(ValueError, match="`weight`"):
        row_norm(states, weight[:4], eps=EPS)
    with pytest.raises(ValueError, match="`residual`"):
        add_row_norm(states, states[:1], weight, eps=EPS)
    with pytest.raises(ValueError, match="`impl"):
        row_norm(states, weight, eps=EPS, impl="fast")
