"""Blockwise attention on a CUDA device: the kernels against fp64, and what only a device can show."""

import pytest
import torch
import torch.nn.functional as F

from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.key_range import KeyRange

pytestmark = pytest.mark.gpu
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
half_dtypes = pytest.mark.parametrize("dtype", ["bf16", "fp16"])


def make_inputs(T, S=None, K=64, H=8, G=2, B=2, dtype=torch.bfloat16, V=None):
    shapes = ((B, H, T, K), (B, G, S or T, K), (B, G, S or T, V or K))
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def positions(T):
    return torch.arange(T, device="cuda", dtype=torch.int32)[None]


def outcome(function, tensors, seed, options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = dict(options)
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].to(tensors[0].dtype).detach().requires_grad_()
            leaves.append(options[name])
    output, lse = function(*leaves[:3], **options)
    loss = (output.double() * seed).sum() + lse[lse > -torch.inf].double().sum() / 8
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def sdpa_outcome(tensors, seed):
    """Causal SDPA with its lse's gradient left out: what the dtype costs on inputs like these."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    T, S = tensors[0].shape[2], tensors[1].shape[2]
    visible = torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T)
    key, value = (x.repeat_interleave(tensors[0].shape[1] // x.shape[1], dim=1) for x in leaves[1:])
    output = F.scaled_dot_product_attention(leaves[0], key, value, attn_mask=visible)
    return [output.detach(), *torch.autograd.grad((output.double() * seed).sum(), leaves)]


def errors(got, exact):
    for a, b in zip(got, exact, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    return [
        ((a.double() - b).nan_to_num(0, 0, 0).norm() / b.nan_to_num(0, 0, 0).norm().clamp(min=1e-6)).item()
        for a, b in zip(got, exact, strict=True)
    ]


def check(tensors, impl, **options):
    T, V = tensors[0].shape[2], tensors[2].shape[3]
    seed = torch.randn(*tensors[0].shape[:2], T, V, device="cuda")
    wide = [x.double() for x in tensors]
    exact = outcome(lambda *x, **k: blockwise_attention(*x, **k, impl="reference"), wide, seed, options)
    got = outcome(lambda *x, **k: blockwise_attention(*x, **k, impl=impl), tensors, seed, options)
    of_output, *of_gradients = errors(sdpa_outcome(tensors, seed), sdpa_outcome(wide, seed))
    eps = torch.finfo(tensors[0].dtype).eps
    allowed = [of_output, of_output, *of_gradients, *[of_gradients[0]] * (len(got) - 5)]
    for index, (error, bound) in enumerate(zip(errors(got, exact), allowed, strict=True)):
        assert error <= 1.5 * (bound + eps), f"result {index}: {error} > 1.5 * ({bound} + {eps})"


OPTIONS = {
    "full": dict,
    "causal": lambda: {"mask": KeyRange(causal=True)},
    "window": lambda: {"mask": KeyRange(causal=True, lower=positions(500) - 99)},
    "packed": lambda: {"mask": KeyRange(causal=True, lower=positions(500) // 130 * 130)},
    "left-padding": lambda: {"mask": KeyRange(causal=True, lower=positions(500) * 0 + 70)},
    "holes": lambda: {"mask": KeyRange(causal=True, key_mask=torch.rand(2, 500, device="cuda") > 0.3)},
    "bias": lambda: {"bias": torch.randn(1, 8, 500, 500, device="cuda")},
    "bias-of-a-key": lambda: {"bias": torch.randn(2, 1, 1, 500, device="cuda")},
    "softcap": lambda: {"mask": KeyRange(causal=True), "softcap": 20.0},
    "sinks": lambda: {"mask": KeyRange(causal=True), "sinks": torch.randn(8, device="cuda")},
    "dropout": lambda: {"mask": KeyRange(causal=True), "dropout": (0.2, 99)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    check(make_inputs(500, dtype=DTYPES[dtype]), "triton", **OPTIONS[name]())


def eager_softcap(query, key, value, softcap):
    """The standard formula, every step in the dtype of the inputs."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = softcap * torch.tanh(query @ key.mT * query.shape[3] ** -0.5 / softcap)
    hidden = torch.ones(logits.shape[2:], dtype=torch.bool, device="cuda").triu(1)
    probs = torch.softmax(logits.masked_fill(hidden, -torch.inf).double(), dim=3).to(query.dtype)
    return probs @ value


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("std", [1, 10, 60])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_softcap_up_to_saturation(K, std, dtype):
    query, key, value = make_inputs(500, K=K, dtype=DTYPES[dtype])
    tensors, seed = (query * std, key, value), torch.randn(2, 8, 500, K, device="cuda")

    def outcomes(function, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad((output.double() * seed).sum(), leaves)]

    def eager(*x):
        return eager_softcap(*x, 30.0)

    def ours(*x):
        return blockwise_attention(*x, mask=KeyRange(causal=True), softcap=30.0, impl="triton")[0]

    exact = outcomes(eager, [x.double() for x in tensors])
    allowed = errors(outcomes(eager, tensors), exact)
    eps = torch.finfo(DTYPES[dtype]).eps
    for index, (got, bound) in enumerate(zip(errors(outcomes(ours, tensors), exact), allowed, strict=True)):
        assert got <= 1.5 * (bound + eps), f"result {index}: {got} > 1.5 * ({bound} + {eps})"


@half_dtypes
@pytest.mark.parametrize("K", [16, 48, 80, 96, 128, 192, 256, 512])
def test_head_dims(K, dtype):
    mask = KeyRange(causal=True, lower=positions(300) - 99)
    check(make_inputs(300, K=K, dtype=DTYPES[dtype]), "triton", mask=mask)


@half_dtypes
def test_value_dim_of_its_own(dtype):
    check(make_inputs(300, K=192, V=128, dtype=DTYPES[dtype]), "auto", mask=KeyRange(causal=True))


@half_dtypes
@pytest.mark.parametrize("impl", ["sdpa", "triton"])
@pytest.mark.parametrize(("T", "S"), [(1, 63), (63, 63), (500, 500), (200, 500), (500, 200)])
@pytest.mark.parametrize("K", [64, 128])
def test_lengths(T, S, K, impl, dtype):
    if T > S:
        # SDPA has no finite answer for rows that see nothing, so the bound is that of the square case.
        tensors = make_inputs(T, S, K=K, dtype=DTYPES[dtype])
        square = blockwise_attention(
            tensors[0][:, :, T - S :], *tensors[1:], mask=KeyRange(causal=True), impl=impl
        )
        output, lse = blockwise_attention(*tensors, mask=KeyRange(causal=True), impl=impl)
        assert not output[:, :, : T - S].any() and (lse[:, :, : T - S] == -torch.inf).all()
        torch.testing.assert_close(output[:, :, T - S :], square[0], rtol=0, atol=1e-2)
        return
    check(make_inputs(T, S, K=K, dtype=DTYPES[dtype]), impl, mask=KeyRange(causal=True))


@half_dtypes
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "cut from more heads"])
@pytest.mark.parametrize("offset", [4095, 4096, 4097, 4160, 4223, 4224, 4225, 9001])
@pytest.mark.parametrize("T", [1023, 1024, 1100])
def test_keys_before_the_diagonal_that_fill_no_tile(T, offset, layout, dtype):
    tensors = make_inputs(T, T + offset, K=128, B=1, dtype=DTYPES[dtype])
    if layout != "heads first":
        heads = 8 if layout == "tokens first" else 12
        query = torch.empty(1, T, heads, 128, device="cuda", dtype=DTYPES[dtype]).transpose(1, 2)
        tensors[0] = query[:, :8].copy_(tensors[0])
    mask = KeyRange(causal=True)
    exact = blockwise_attention(*(x.double() for x in tensors), mask=mask, impl="reference")
    visible = torch.ones(T, T + offset, dtype=torch.bool, device="cuda").tril(offset)
    key, value = (x.repeat_interleave(4, dim=1) for x in tensors[1:])
    plain = F.scaled_dot_product_attention(tensors[0], key, value, attn_mask=visible)
    (bound,) = errors([plain], exact[:1])
    eps = torch.finfo(DTYPES[dtype]).eps
    for error in errors(blockwise_attention(*tensors, mask=mask, impl="sdpa"), exact):
        assert error <= 1.5 * (bound + eps)


def test_default_takes_torch_for_dense_and_triton_for_the_rest():
    tensors = make_inputs(500, K=128)
    dense, window = KeyRange(causal=True), KeyRange(causal=True, lower=positions(500) - 99)
    for mask, impl in ((dense, "sdpa"), (window, "triton")):
        chosen, named = (
            blockwise_attention(*tensors, mask=mask),
            blockwise_attention(*tensors, mask=mask, impl=impl),
        )
        assert all(torch.equal(a, b) for a, b in zip(chosen, named, strict=True))


def test_same_bits_twice():
    tensors, seed = make_inputs(1500, K=128), torch.randn(2, 8, 1500, 128, device="cuda")
    options = {"mask": KeyRange(causal=True, lower=positions(1500) - 300), "softcap": 30.0}
    first, second = (outcome(blockwise_attention, tensors, seed, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_drops_the_same_entries_as_the_reference():
    query, key, _ = make_inputs(130, dtype=torch.float32, K=16)
    value = torch.eye(130, device="cuda").expand(2, 2, 130, 130)
    dropout = (0.4, 2**35 + 11)
    got = blockwise_attention(query, key, value, dropout=dropout, impl="triton")[0]
    exact = blockwise_attention(query, key, value, dropout=dropout, impl="reference")[0]
    assert torch.equal(got == 0, exact == 0)


def test_nan_in_unseen_slots_stays_there():
    query, key, value = make_inputs(500)
    mask = KeyRange(upper=positions(500) * 0 + 333)
    results = []
    for filler in (0.0, torch.nan):
        slots = [x.clone() for x in (key, value)]
        for slot in slots:
            slot[:, :, 333:] = filler
        seed = torch.ones(2, 8, 500, 64, device="cuda")
        results.append(outcome(blockwise_attention, (query, *slots), seed, {"mask": mask}))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_lengths_do_not_recompile():
    from hf_longattn.kernels.blockwise_attention.triton_forward import _forward_kernel

    def compiled():
        return sum(len(caches[0]) for caches in _forward_kernel.device_caches.values())

    for T in (300, 301):
        blockwise_attention(*make_inputs(T), impl="triton")
    before = compiled()
    for T in (302, 303, 999, 1000):
        blockwise_attention(*make_inputs(T), impl="triton")
    assert compiled() == before


@pytest.mark.slow
def test_offsets_past_32_bits():
    T = 1 << 20
    key, value = (torch.zeros(1, 17, T, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.zeros(1, 17, 64, 128, device="cuda", dtype=torch.bfloat16)
    value[:, 16, T - 1] = 1
    mask = KeyRange(lower=positions(64) * 0 + T - 2)
    output = blockwise_attention(query, key, value, mask=mask)[0]
    assert (output[:, 16] == 0.5).all() and not output[:, :16].any()
