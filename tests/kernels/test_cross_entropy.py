"""`cross_entropy` against torch's in fp64, loss and gradient; the kernel in the interpreter and on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longattn.kernels.cross_entropy import cross_entropy

# One step of the kernel is 4096 columns in fp32 and 8192 in 16 bits.
SHAPES = [(3, 1), (5, 37), (2, 4097), (3, 9001)]


def name(value):
    return str(value).removeprefix("torch.")


def make(n, V, dtype, device="cpu", width=None, spread=4.0):
    """Logits with a stride between rows, and targets, one of them the last column."""
    logits = spread * torch.randn(n, width or V + 3, device=device)
    targets = torch.randint(V, (n,), device=device)
    targets[:1] = V - 1
    return logits.to(dtype)[:, :V], targets


def by_torch(logits, targets, smoothing, dtype):
    """Losses and gradient of torch's own, taken in `dtype`, the gradient rounded to that of the logits."""
    leaf = logits.detach().to(dtype, copy=True).requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient if dtype == torch.float64 else gradient.to(logits.dtype)


def assert_close(result, own, exact, eps):
    """At most 1.5 times the error that the standard way has, and one rounding."""
    assert result.isfinite().all()
    allowed = (own.double() - exact).norm() + eps * exact.norm()
    assert (result.double() - exact).norm() <= 1.5 * allowed


def assert_same(found, expected):
    """Losses and gradient but for roundings: strides decide in which order sums are taken."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2 * torch.finfo(theirs.dtype).eps * theirs.norm()


def check(impl, logits, targets, smoothing=0.0, overwrite=False):
    before, wide = logits.clone(), torch.promote_types(logits.dtype, torch.float32)
    exact = by_torch(logits, targets, smoothing, torch.float64)
    own = by_torch(logits, targets, smoothing, wide)
    options = {"label_smoothing": smoothing, "impl": impl}
    losses, nothing = cross_entropy(logits, targets, overwrite=overwrite, **options)
    assert nothing is None and torch.equal(logits, before)
    again, gradient = cross_entropy(logits, targets, gradient=True, overwrite=overwrite, **options)
    assert losses.dtype == again.dtype == wide and gradient.dtype == logits.dtype
    assert overwrite or torch.equal(logits, before)
    if overwrite and impl == "triton":
        assert gradient.data_ptr() == logits.data_ptr()
    # Of fp64 the standard is exact by name only: with smoothing it adds up V terms one after the other.
    rounded = logits.shape[1] if wide == torch.float64 else 1
    for found in (losses, again):
        assert_close(found, own[0], exact[0], rounded * torch.finfo(wide).eps)
    assert_close(gradient, own[1], exact[1], rounded * torch.finfo(logits.dtype).eps)


def check_masked(impl, dtype, device="cpu"):
    """Of masked vocabularies: whole steps of -inf before and behind the rest, and the lowest number."""
    logits, targets = make(4, 20000, dtype, device)
    logits[0, :17000], targets[0] = -math.inf, 18000
    logits[1, 9:], targets[1] = -math.inf, 3
    logits[2, ::2], targets[2] = -math.inf, 4095
    logits[3, :8], targets[3] = torch.finfo(dtype).min, 9
    hidden = logits.isinf()
    check(impl, logits, targets)
    _, gradient = cross_entropy(logits, targets, gradient=True, impl=impl)
    assert not gradient[hidden].any()


def check_not_finite(impl, dtype, device="cpu"):
    """Rows that have no loss get NaN as from torch, and rows beside them are as they are alone."""
    logits, targets = make(5, 5000, dtype, device)
    logits[0, 4500], logits[1, 7], logits[2], targets[4] = math.nan, math.inf, -math.inf, 11
    logits[4, 11] = -math.inf
    losses, gradient = cross_entropy(logits, targets, gradient=True, impl=impl)
    expected, theirs = by_torch(logits, targets, 0.0, torch.float32)
    assert torch.equal(losses.isnan(), expected.isnan()) and losses[4] == math.inf
    assert torch.equal(gradient.isnan(), theirs.isnan()) and gradient[:3].isnan().all()
    alone = cross_entropy(logits[3:4], targets[3:4], gradient=True, impl=impl)
    assert_same(alone, (losses[3:4], gradient[3:4]))


def check_unusual(impl, dtype, device="cpu"):
    """No row, columns apart, rows that share memory, and logits so large that only differences count."""
    losses, gradient = cross_entropy(*make(0, 7, dtype, device), gradient=True, overwrite=True, impl=impl)
    assert losses.shape == (0,) and gradient.shape == (0, 7)
    logits, targets = make(6, 50, dtype, device)
    columns = logits.T.contiguous().T
    assert columns.stride(1) != 1
    check(impl, columns, targets)
    row = logits[:1].clone().expand(6, 50)
    for unusual in (columns, row):
        expected = cross_entropy(unusual.contiguous(), targets, gradient=True, impl=impl)
        found = cross_entropy(unusual.detach(), targets, gradient=True, overwrite=True, impl=impl)
        assert_same(found, expected)
    check(impl, logits + 2048, targets, 0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=name)
def test_reference(dtype, smoothing):
    for shape in SHAPES:
        for overwrite in (False, True):
            check("auto", *make(*shape, dtype), smoothing, overwrite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_reference_of_unusual_rows(dtype):
    check_masked("reference", dtype)
    check_not_finite("reference", dtype)
    check_unusual("reference", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_kernel_under_the_interpreter(dtype):
    for shape, smoothing in zip(SHAPES * 2, [0.0] * 4 + [0.1, 1.0, 0.1, 0.2], strict=True):
        for overwrite in (False, True):
            check("triton", *make(*shape, dtype), smoothing, overwrite)
    check_masked("triton", dtype)
    check_not_finite("triton", dtype)
    check_unusual("triton", dtype)


@pytest.mark.interpreted
@given(
    st.integers(1, 4), st.integers(1, 700), st.sampled_from([0.0, 0.1]), st.floats(0.1, 60), st.integers(0, 9)
)
@settings(max_examples=20, deadline=None)
def test_any_size_under_the_interpreter(n, V, smoothing, spread, more):
    for impl in ("triton", "reference"):
        check(impl, *make(n, V, torch.float32, width=V + more, spread=spread), smoothing, overwrite=True)


@pytest.mark.interpreted
def test_a_target_outside_has_no_loss_under_the_interpreter():
    logits, targets = make(3, 40, torch.float32)
    targets[0], targets[1] = 40, -100
    losses, gradient = cross_entropy(logits, targets, gradient=True, impl="triton")
    assert losses.isnan().tolist() == [True, True, False]
    assert gradient[:2].sum(1).allclose(torch.ones(2))


def test_it_is_part_of_one_compiled_graph():
    logits, targets = make(3, 33, torch.float32)

    def both(logits, targets):
        return cross_entropy(logits * 2, targets, gradient=True, overwrite=True)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert_same(compiled(logits, targets), both(logits, targets))


def test_what_does_not_fit_is_refused():
    logits, targets = make(3, 8, torch.float32)
    for wrong in (targets[:2], targets.int(), targets[:, None]):
        with pytest.raises(ValueError, match="`targets`"):
            cross_entropy(logits, wrong)
    with pytest.raises(ValueError, match="`label_smoothing`"):
        cross_entropy(logits, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match="`impl"):
        cross_entropy(logits, targets, impl="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name)
def test_kernel_on_a_gpu(dtype, smoothing):
    for shape in (*SHAPES, (300, 32000), (64, 50257), (40, 128256), (7, 262144)):
        for overwrite in (False, True):
            check("triton", *make(*shape, dtype, "cuda"), smoothing, overwrite)
            check("auto", *make(*shape, dtype, "cuda", width=shape[1]), smoothing, overwrite)
    check_masked("triton", dtype, "cuda")
    check_not_finite("triton", dtype, "cuda")
    check_unusual("triton", dtype, "cuda")


@pytest.mark.gpu
def test_more_than_two_billion_logits_on_a_gpu():
    n, V = 8200, 262144
    logits = torch.empty(n, V, device="cuda", dtype=torch.bfloat16).normal_(0, 4)
    targets = torch.randint(V, (n,), device="cuda")
    last, rows = logits[-3:].clone(), targets[-3:]
    losses, gradient = cross_entropy(logits, targets, gradient=True, overwrite=True)
    assert gradient.data_ptr() == logits.data_ptr() and losses.isfinite().all()
    exact, own = (by_torch(last, rows, 0.0, dtype) for dtype in (torch.float64, torch.float32))
    assert_close(losses[-3:], own[0], exact[0], torch.finfo(torch.float32).eps)
    assert_close(gradient[-3:], own[1], exact[1], torch.finfo(torch.bfloat16).eps)
