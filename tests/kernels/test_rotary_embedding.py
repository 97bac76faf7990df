"""Rotary embedding against its definition in fp64, strided inputs and the interpreted kernel included."""

import pytest
import torch

from hf_longattn.kernels.rotary_embedding import rotary_embedding

# (B, H, G, T, K, R): the first R of a head turn.
SHAPES = [
    (2, 4, 2, 1, 64, 64),
    (1, 3, 1, 5, 48, 48),
    (2, 2, 2, 3, 16, 16),
    (0, 2, 1, 4, 32, 32),
    (1, 10, 9, 70, 24, 24),
    (2, 9, 2, 3, 128, 32),
    (1, 3, 1, 5, 81, 20),
]
IDS = [f"B{b}-H{h}-G{g}-T{t}-K{k}-R{r}" for b, h, g, t, k, r in SHAPES]


def inputs(b, h, g, t, k, r, dtype, device="cpu"):
    # Heads behind tokens, as projections leave them.
    query = torch.randn(b, t, h, k, device=device).to(dtype).transpose(1, 2)
    key = torch.randn(b, t, g, k, device=device).to(dtype).transpose(1, 2)
    angle = torch.randn(b, t, r // 2, device=device).repeat(1, 1, 2)
    return query, key, angle.cos().to(dtype), angle.sin().to(dtype)


def definition(states, cos, sin):
    """The rotation as a product of complex numbers; what does not turn stays."""
    width, half = cos.shape[-1], cos.shape[-1] // 2
    turned = torch.complex(states[..., :half].double(), states[..., half:width].double())
    turned = turned * torch.complex(cos[:, None, :, :half].double(), sin[:, None, :, :half].double())
    return torch.cat((turned.real, turned.imag, states[..., width:].double()), -1)


def check(impl, dtype, shape, device="cpu"):
    query, key, cos, sin = inputs(*shape, dtype, device)
    width, half = shape[5], shape[5] // 2
    for result, states in zip(rotary_embedding(query, key, cos, sin, impl=impl), (query, key), strict=True):
        assert torch.equal(result[..., width:], states[..., width:])
        result, states = result[..., :width], states[..., :width]
        exact = definition(states, cos, sin)
        swapped = torch.cat((-states[..., half:], states[..., :half]), -1)
        plain = states * cos[:, None] + swapped * sin[:, None]
        allowed = (plain.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (result.double() - exact).norm() <= 1.5 * allowed
        assert result.dtype == dtype


def check_gradients(impl, dtype, shape, device="cpu"):
    query, key, cos, sin = inputs(*shape, dtype, device)
    grads = [torch.randn_like(x) for x in (query, key)]

    def gradients(function, states, grads):
        leaves = [x.detach().requires_grad_() for x in states]
        return torch.autograd.grad(function(*leaves), leaves, grads)

    result = gradients(lambda q, k: rotary_embedding(q, k, cos, sin, impl=impl), (query, key), grads)
    own = gradients(lambda q, k: rotary_embedding(q, k, cos, sin, impl="reference"), (query, key), grads)
    exact = gradients(
        lambda q, k: (definition(q, cos, sin), definition(k, cos, sin)),
        (query.double(), key.double()),
        [grad.double() for grad in grads],
    )
    for ours, theirs, true in zip(result, own, exact, strict=True):
        allowed = (theirs.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (ours.double() - true).norm() <= 1.5 * allowed
        assert ours.dtype == dtype
        if impl == "triton":
            # As projections leave heads, so that nothing is copied on the way back to them.
            assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reference_is_a_rotation(shape, dtype):
    check("reference", dtype, shape)
    check_gradients("reference", dtype, shape)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_kernel_under_the_interpreter(shape):
    check("triton", torch.float32, shape)
    if shape[3] < 70:
        check_gradients("triton", torch.float32, shape)


@pytest.mark.interpreted
def test_the_operator_is_registered_as_torch_asks_under_the_interpreter():
    query, key, cos, sin = inputs(2, 4, 2, 5, 16, 12, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (query, key)]
    operator = torch.ops.hf_longattn.rotary_embedding
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for inverse in (False, True):
        torch.library.opcheck(operator, (*leaves, cos, sin, inverse), test_utils=tests)
    # Angles whose halves differ: the backward is the transpose all the same.
    cos, sin = torch.randn_like(cos), torch.randn_like(sin)
    found = []
    for impl in ("triton", "reference"):
        turned = rotary_embedding(*leaves, cos, sin, impl=impl)
        found.append(torch.autograd.grad([(part**2).sum() for part in turned], leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(shape, dtype):
    check("triton", dtype, shape, "cuda")
    check_gradients("triton", dtype, shape, "cuda")


def test_gradients_of_the_reference():
    tensors = [x.requires_grad_() for x in inputs(1, 2, 1, 3, 8, 6, torch.float64)]
    assert torch.autograd.gradcheck(rotary_embedding, tensors)


def test_what_does_not_fit_is_refused():
    query, key, cos, sin = inputs(1, 2, 1, 3, 8, 8, torch.float32)
    for width, other in ((3, 3), (4, 6), (0, 0)):
        with pytest.raises(ValueError, match="`cos`"):
            rotary_embedding(query, key, cos[..., :width], sin[..., :other])
    with pytest.raises(ValueError, match="`cos`"):
        rotary_embedding(query[..., :6], key[..., :6], cos, sin)
    with pytest.raises(ValueError, match="`impl`"):
        rotary_embedding(query, key, cos, sin, impl="fast")
