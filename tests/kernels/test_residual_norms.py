"""Residual sums with their norms against fp64: odd widths, one norm and two, offsets far from zero."""

import pytest
import torch

from hf_longattn.kernels.residual_norms import residual_norms

SHAPES = [(3, 1, 64), (2, 5, 100), (1, 2, 2048), (0, 1, 32)]
IDS = [f"B{b}-T{t}-D{d}" for b, t, d in SHAPES]


def inputs(b, t, d, dtype, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    # A mean beside which the rest is small, as residual streams have it; branches in slices.
    states = (draw(b, t, d) + 3).to(dtype)
    branches = tuple(draw(b, t, 2 * d)[..., :d].to(dtype) for _ in range(2))
    pairs = [tuple(draw(d).to(dtype) for _ in range(2)) for _ in range(2)]
    return states, branches, pairs


def definition(total, pairs, eps):
    """The norms, in fp64, of a sum as it was rounded."""
    wide = total.double()
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return [scaled * weight.double() + bias.double() for weight, bias in pairs]


def check(impl, dtype, shape, device="cpu"):
    states, branches, pairs = inputs(*shape, dtype, device)
    for given in (pairs, [pairs[0], None]):
        standard = residual_norms(states, branches, *given, eps=1e-5, impl="reference")
        result = residual_norms(states, branches, *given, eps=1e-5, impl=impl)
        assert torch.equal(result[0], standard[0]), "the sum is rounded otherwise"
        exact = definition(result[0], [pair for pair in given if pair is not None], 1e-5)
        for norm, plain, wanted in zip(result[1:], standard[1:], exact, strict=False):
            allowed = (plain.double() - wanted).norm() + torch.finfo(dtype).eps * wanted.norm()
            assert (norm.double() - wanted).norm() <= 1.5 * allowed
            assert norm.dtype == dtype and norm.shape == states.shape
        assert (result[2] is None) == (given[1] is None)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_under_the_interpreter(dtype, shape):
    check("triton", dtype, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (256, 2, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(dtype, shape):
    check("triton", dtype, shape, "cuda")


def test_reference_is_the_sum_and_its_norms():
    states, branches, pairs = inputs(2, 3, 16, torch.float64)
    total, *norms = residual_norms(states, branches, *pairs, eps=1e-5)
    torch.testing.assert_close(total, states + sum(branches))
    torch.testing.assert_close(norms, definition(total, pairs, 1e-5))


def test_what_does_not_fit_is_refused():
    states, branches, pairs = inputs(2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="`branches` of residual_norms must be"):
        residual_norms(states, (branches[0], branches[1][..., :4]), *pairs, eps=1e-5)
    with pytest.raises(ValueError, match="`first` and `second`"):
        residual_norms(states, branches, pairs[0], (pairs[1][0], pairs[1][1][:3]), eps=1e-5)
    with pytest.raises(ValueError, match="`impl`"):
        residual_norms(states, branches, *pairs, eps=1e-5, impl="fast")
