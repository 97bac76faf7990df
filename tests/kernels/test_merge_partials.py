"""`merge_partials`: the reduction itself, its algebra, its gradient, and the kernel in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longattn.kernels.dispatch import interpreting
from hf_longattn.kernels.merge_partials import merge_over_first, merge_partials

interpreted = pytest.mark.interpreted


def make_parts(N, B, H, T, V, dtype=torch.float32, empty=0.3):
    """Random parts, some of them empty and then full of NaN."""
    outputs = torch.randn(N, B, H, T, V).to(dtype)
    lse = 5 * torch.randn(N, B, H, T, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    hole = torch.rand(N, B, H, T) < empty
    return outputs.masked_fill(hole.unsqueeze(-1), torch.nan), lse.masked_fill(hole, -torch.inf)


def exact(outputs, lse):
    """The definition in fp64: a softmax over the parts."""
    lse = lse.double()
    total = lse.logsumexp(0)
    weights = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0)).unsqueeze(-1)
    return (weights * outputs.double().masked_fill(lse.unsqueeze(-1) == -torch.inf, 0.0)).sum(0), total


def assert_merged(outputs, lse, impl):
    output, merged = merge_partials(outputs, lse, impl=impl)
    want, want_lse = exact(outputs, lse)
    assert output.dtype == outputs.dtype and merged.dtype == lse.dtype
    # One rounding to the output's dtype, and N roundings of the sum in the dtype of lse; |outputs| < 8.
    eps = torch.finfo(outputs.dtype).eps + (len(outputs) + 2) * torch.finfo(lse.dtype).eps
    assert (output.double() - want).abs().max() <= eps * outputs.nan_to_num().abs().max()
    assert torch.equal(merged == -torch.inf, want_lse == -torch.inf)
    seen = merged > -torch.inf
    torch.testing.assert_close(
        merged[seen].double(), want_lse[seen], rtol=0, atol=40 * torch.finfo(lse.dtype).eps
    )
    assert (output[~seen] == 0).all()


SHAPES = [(1, 2, 3, 1, 64), (2, 1, 4, 5, 48), (5, 2, 3, 7, 80), (70, 1, 2, 1, 16), (3, 1, 1, 3, 192)]
DTYPES = [torch.float32, torch.float16, torch.float64]


def name(value):
    return (
        str(value).removeprefix("torch.").replace("float", "fp") if isinstance(value, torch.dtype) else None
    )


def shape_name(shape):
    return "N{}-B{}-H{}-T{}-V{}".format(*shape)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_reference(shape, dtype):
    assert_merged(*make_parts(*shape, dtype), "reference")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_triton(shape, dtype):
    assert_merged(*make_parts(*shape, dtype), "triton")


@interpreted
def test_triton_shares_programs_among_many_rows():
    assert_merged(*make_parts(2, 2, 65, 64, 16, torch.float16), "triton")


@interpreted
def test_triton_reads_strides():
    outputs, lse = make_parts(4, 2, 1, 3, 32)
    strided = outputs.permute(3, 1, 4, 2, 0).contiguous().permute(4, 1, 3, 0, 2)
    assert not strided.is_contiguous()
    strided_lse = lse.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert_merged(strided, strided_lse, "triton")
    want = merge_partials(outputs, lse, impl="triton")
    assert all(map(torch.equal, merge_partials(strided, strided_lse, impl="triton"), want))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("shape", [(2, 2, 3, 37, 64), (3, 1, 5, 20, 48)], ids=shape_name)
def test_triton_writes_over_the_first_part(shape, dtype):
    outputs, lse = make_parts(*shape, dtype)
    want, want_lse = merge_partials(outputs, lse, impl="reference")
    # Heads next to each other, as torch's kernels leave them.
    parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in outputs]
    output, merged = merge_over_first(list(zip(parts, [part.clone() for part in lse], strict=True)))
    assert output.data_ptr() == parts[0].data_ptr() and output.stride() == parts[0].stride()
    eps = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    assert (output.double() - want.double()).abs().max() <= 2 * eps * want.abs().max()
    torch.testing.assert_close(merged, want_lse, rtol=0, atol=1e-5)


@interpreted
def test_triton_writes_over_the_first_of_parts_cut_from_longer_ones():
    outputs, lse = make_parts(3, 1, 2, 12, 32)
    want = merge_partials(outputs, lse, impl="reference")
    # One row of the batch: where the next one would begin differs, and nothing else.
    longer = torch.cat([outputs[1], outputs[1]], 2).transpose(1, 2).contiguous().transpose(1, 2)
    parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in outputs]
    parts[1] = longer[:, :, :12]
    assert parts[1].stride() != parts[0].stride()
    got = merge_over_first(list(zip(parts, [part.clone() for part in lse], strict=True)))
    assert got[0].data_ptr() == parts[0].data_ptr()
    for part, expected in zip(got, want, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("number", [1, 3])
def test_parts_that_lie_apart(number, dtype):
    outputs, lse = make_parts(number, 2, 3, 4, 8, dtype, empty=0.0)
    want = merge_partials(outputs, lse)
    for got, expected in zip(merge_over_first(list(zip(outputs, lse, strict=True))), want, strict=True):
        torch.testing.assert_close(got, expected)


@interpreted
def test_triton_joins_many_parts_over_the_first_in_turns():
    outputs, lse = make_parts(18, 1, 2, 5, 32)
    want = merge_partials(outputs, lse, impl="reference")
    parts = [part.clone() for part in outputs]
    got = merge_over_first(list(zip(parts, [part.clone() for part in lse], strict=True)))
    assert got[0].data_ptr() == parts[0].data_ptr()
    for part, expected in zip(got, want, strict=True):
        torch.testing.assert_close(part, expected)


@interpreted
def test_triton_sink_is_one_more_part():
    from hf_longattn.kernels.merge_partials.triton import merge_forward

    outputs, lse = make_parts(3, 2, 4, 3, 32, empty=0.6)
    sinks = torch.randn(4)
    output, merged = merge_forward(outputs, lse, torch.float16, sinks)
    parts = torch.cat([outputs, torch.zeros_like(outputs[:1])])
    want, want_lse = exact(parts, torch.cat([lse, sinks[None, None, :, None].expand(1, 2, 4, 3)]))
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), want, rtol=2**-10, atol=2**-20)
    torch.testing.assert_close(merged.double(), want_lse, rtol=0, atol=5e-6)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 2**16))
def test_any_grouping_gives_the_same(cuts, seed):
    torch.manual_seed(seed)
    outputs, lse = make_parts(12, 1, 2, 3, 8, torch.float64)
    edges = [0, *sorted(cuts), 12]
    groups = [(outputs[a:b], lse[a:b]) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    merged = [merge_partials(*group) for group in reversed(groups)]
    nested = merge_partials(*map(torch.stack, zip(*merged, strict=True)))
    for got, want in zip(nested, merge_partials(outputs, lse), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_empty_part_is_the_identity():
    outputs, lse = make_parts(1, 2, 3, 4, 16, empty=0.0)
    padded = torch.cat([torch.full_like(outputs, torch.nan), outputs])
    merged, total = merge_partials(padded, torch.cat([torch.full_like(lse, -torch.inf), lse]))
    assert torch.equal(merged, outputs[0]) and torch.equal(total, lse[0])


def test_large_scores_do_not_overflow():
    outputs, lse = make_parts(4, 1, 2, 3, 16)
    output, total = merge_partials(outputs, lse)
    moved, moved_total = merge_partials(outputs, lse + 1024.0)
    torch.testing.assert_close(moved, output, rtol=0, atol=2e-3)
    torch.testing.assert_close(moved_total, total + 1024.0, rtol=0, atol=2e-3)
    assert moved.isfinite().all()


def test_nan_in_a_live_part_is_not_hidden():
    outputs, lse = make_parts(3, 1, 1, 2, 4, empty=0.0)
    outputs[1, 0, 0, 0, 2] = torch.nan
    output, _ = merge_partials(outputs, lse)
    assert output.isnan().sum() == 1 and output[0, 0, 0, 2].isnan()


def test_gradients():
    outputs, lse = (part.requires_grad_() for part in make_parts(3, 1, 2, 2, 4, torch.float64, empty=0.0))
    assert torch.autograd.gradcheck(merge_partials, (outputs, lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_gradients_with_empty_parts(dtype):
    outputs, lse = make_parts(4, 2, 2, 3, 8, dtype, empty=0.5)
    lse[:, 0, 0, 0] = -torch.inf
    outputs, lse = outputs.requires_grad_(), lse.requires_grad_()
    output, total = merge_partials(outputs, lse)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    first = outputs.grad, lse.grad
    outputs.grad = lse.grad = None
    output, total = merge_partials(outputs, lse)
    total[total > -torch.inf].sum().backward()
    assert (outputs.grad == 0).all() and torch.allclose(lse.grad.sum(0)[total > -torch.inf], torch.ones(()))

    parts, scores = outputs.detach().double(), lse.detach().double().requires_grad_()
    live = scores > -torch.inf
    parts = parts.masked_fill(~live.unsqueeze(-1), 0.0).requires_grad_()
    soft = torch.softmax(scores.masked_fill(~live.any(0), 0.0), 0) * live
    ((soft.unsqueeze(-1) * parts).sum(0) * weights.double()).sum().backward()
    eps = torch.finfo(dtype).eps
    for got, want in zip(first, (parts.grad, scores.grad), strict=True):
        want = want.masked_fill(~live if want.dim() == 4 else ~live.unsqueeze(-1), 0.0)
        assert got.isfinite().all()
        assert (got.double() - want).abs().max() <= 8 * eps * want.abs().max()


def test_zero_length_batch():
    output, lse = merge_partials(torch.zeros(2, 0, 3, 1, 8), torch.zeros(2, 0, 3, 1))
    assert output.shape == (0, 3, 1, 8) and lse.shape == (0, 3, 1)


def test_compiles_in_one_graph_and_passes_opcheck():
    outputs, lse = make_parts(3, 1, 2, 2, 8, empty=0.0)
    compiled = torch.compile(lambda o, s: merge_partials(o * 2, s), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(outputs, lse), merge_partials(outputs * 2, lse), strict=True):
        torch.testing.assert_close(got, want)
    inputs = (outputs.requires_grad_(), lse.requires_grad_(), "auto")
    torch.library.opcheck(torch.ops.hf_longattn.merge_partials.default, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda o, s: (o[0], s), ValueError, "`outputs` must be"),
        (lambda o, s: (o[:0], s[:0]), ValueError, "N >= 1"),
        (lambda o, s: (o, s[..., :1]), ValueError, "`lse` must be"),
        (lambda o, s: (o, s.half()), TypeError, "`lse` must be torch.float32"),
        (lambda o, s: (o.double(), s), TypeError, "`lse` must be torch.float64"),
        (lambda o, s: (o.long(), s), TypeError, "floating-point"),
        (lambda o, s: (list(o), list(s)), TypeError, "must be tensors, got list and list"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        merge_partials(*change(*make_parts(2, 1, 2, 3, 4)))


def test_refuses_an_implementation_that_cannot_run():
    parts = make_parts(2, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="`impl` of merge_partials"):
        merge_partials(*parts, impl="cuda")
    if not interpreting():
        with pytest.raises(ValueError, match="cannot run on 'cpu' tensors"):
            merge_partials(*parts, impl="triton")
