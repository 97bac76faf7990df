"""The energy generates the cumulants of the values: its gradient is attention, its curvature covariance."""

import pytest
import torch

from hf_longattn.kernels.attention_energy import attention_energy
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.key_range import KeyRange

SCALE = 0.3


def make_inputs(B=2, H=4, G=2, T=7, S=11, K=8, V=5, dtype=torch.float64):
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, V), (B, H, T, V))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def dense(query, key, value, zeta, mask=None):
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    logits = SCALE * query @ key.mT + zeta @ value.mT
    return torch.logsumexp(logits if mask is None else logits.masked_fill(~mask, -torch.inf), dim=-1)


def causal(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@pytest.mark.parametrize("mask", [None, causal(7, 11), torch.arange(11) > 3], ids=["full", "causal", "keys"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_equals_the_dense_formula(dtype, mask):
    tensors = make_inputs(dtype=dtype)
    exact = dense(*(x.double() for x in tensors), mask)
    wide = torch.promote_types(dtype, torch.float32)
    plain = dense(*(x.to(wide) for x in tensors), mask)
    got = attention_energy(*tensors, scale=SCALE, mask=mask)
    assert got.dtype == wide
    bound = 1.5 * ((plain.double() - exact).norm() + torch.finfo(wide).eps * exact.norm())
    assert (got.double() - exact).norm() <= bound


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_energy_and_its_gradient_on_a_gpu(dtype):
    tensors = [x.cuda() for x in make_inputs(T=130, S=200, K=64, V=64, dtype=dtype)]
    mask = causal(130, 200).cuda()
    # Widened as the operator widens: what is held against fp64 is the sum, not the rounding of the inputs.
    inputs = {"exact": [x.double() for x in tensors], "plain": [x.float() for x in tensors], "ours": tensors}
    found = {}
    for name, (query, key, value, zeta) in inputs.items():
        zeta = zeta.float().requires_grad_() if name == "ours" else zeta.requires_grad_()
        if name == "ours":
            energy = attention_energy(query, key, value, zeta, scale=SCALE, mask=mask)
        else:
            energy = dense(query, key, value, zeta, mask)
        found[name] = energy.double(), torch.autograd.grad(energy.sum(), zeta)[0].double()
    for got, plain, exact in zip(found["ours"], found["plain"], found["exact"], strict=True):
        # fp32 products on tensor cores err by a unit of TF32 where torch is told to use them; here it is not.
        allowed = (plain - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
        assert (got - exact).norm() <= 1.5 * allowed


def test_gradient_at_zero_is_attention():
    query, key, value, _ = make_inputs(T=11)
    zeta = torch.zeros(2, 4, 11, 5, dtype=torch.float64, requires_grad=True)
    energy = attention_energy(query, key, value, zeta, scale=SCALE, mask=causal(11, 11))
    (gradient,) = torch.autograd.grad(energy.sum(), zeta)
    output, lse = blockwise_attention(query, key, value, scale=SCALE, mask=KeyRange(causal=True))
    torch.testing.assert_close(gradient, output, rtol=0, atol=1e-13)
    torch.testing.assert_close(energy, lse, rtol=0, atol=1e-13)


def test_gradcheck_in_every_input():
    tensors = [x.requires_grad_() for x in make_inputs(B=1, H=2, G=1, T=3, S=4, K=3, V=2)]
    assert torch.autograd.gradcheck(lambda *x: attention_energy(*x, scale=SCALE), tensors)


def test_curvature_of_the_formula_is_the_covariance_and_the_operator_has_it_by_differences():
    query, key, value, zeta = make_inputs(B=1, H=1, G=1, T=1, V=3)
    zeta = zeta.flatten()
    hessian = torch.autograd.functional.hessian(
        lambda z: dense(query, key, value, z.view(1, 1, 1, 3)).sum(), zeta
    )
    probs = torch.softmax(SCALE * query @ key.mT + zeta @ value[0, 0].mT, dim=-1).flatten()
    centred = value[0, 0] - probs @ value[0, 0]
    torch.testing.assert_close(hessian, centred.mT @ (probs[:, None] * centred), rtol=0, atol=1e-13)

    def gradient(z):
        z = z.view(1, 1, 1, 3).clone().requires_grad_()
        return torch.autograd.grad(attention_energy(query, key, value, z, scale=SCALE).sum(), z)[0].flatten()

    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(gradient(zeta + e) - gradient(zeta - e)) / 2e-5 for e in step])
    torch.testing.assert_close(differences, hessian, rtol=0, atol=1e-8)


def test_is_convex_along_every_segment():
    query, key, value, start = make_inputs()
    stop = torch.randn_like(start)
    energy = [attention_energy(query, key, value, z, scale=SCALE) for z in (start, (start + stop) / 2, stop)]
    assert (energy[1] < (energy[0] + energy[2]) / 2).all()


def test_subtracting_a_constant_leaves_the_gradient():
    # Keys shifted along the query move every logit by the same amount: the safe softmax rests on it.
    query, key, value, zeta = make_inputs(B=1, H=1, G=1, T=1)
    zeta.requires_grad_()
    energies = [
        attention_energy(query, key + shift * query, value, zeta, scale=SCALE) for shift in (0.0, 2.0)
    ]
    gradients = [torch.autograd.grad(energy.sum(), zeta)[0] for energy in energies]
    assert not torch.allclose(*energies)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_a_query_that_sees_nothing_has_no_energy():
    tensors = make_inputs()
    mask = torch.ones(7, 11, dtype=torch.bool)
    mask[2] = False
    energy = attention_energy(*tensors, scale=SCALE, mask=mask)
    assert (energy[:, :, 2] == -torch.inf).all()
    assert energy[:, :, [0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"zeta": torch.zeros(2, 4, 7, 8)}, ValueError, "`zeta`"),
        ({"mask": torch.zeros(7, 11)}, TypeError, "`mask`"),
        ({"mask": torch.ones(7, 9, dtype=torch.bool)}, ValueError, "`mask`"),
    ],
    ids=["zeta", "mask-dtype", "mask-shape"],
)
def test_refuses_by_name(change, error, message):
    query, key, value, zeta = make_inputs()
    with pytest.raises(error, match=message):
        attention_energy(query, key, value, change.get("zeta", zeta), scale=SCALE, mask=change.get("mask"))
