"""Lightning attention: chunks, tokens and definition agree, states hand over, gradients hold, kernels match.

The tests of the kernels are marked `interpreted`: `test_interpreter.py` starts them.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longattn.kernels.lightning_attention import (
    combine_states,
    lightning_attention,
    lightning_attention_step,
)
from hf_longattn.kernels.lightning_attention import reference as ref

SLOPES = [0.84, 0.11, 3.9e-3, 3.9e-8]
FP32_EPS = torch.finfo(torch.float32).eps
interpreted = pytest.mark.interpreted


def make(B=1, T=70, H=4, G=4, K=8, V=8, dtype=torch.float64, grad=False):
    q = torch.randn(B, H, T, K).to(dtype)
    k, v = torch.randn(B, G, T, K).to(dtype), torch.randn(B, G, T, V).to(dtype)
    slopes = torch.tensor(SLOPES[:H], dtype=torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_(grad) for x in (q, k, v)] + [slopes]


def make_state(B=1, H=4, K=8, V=8, dtype=torch.float64):
    return torch.randn(B, H, K, V, dtype=dtype)


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()


def close(actual, expected, bound=1e-12):
    assert actual.shape == expected.shape
    assert actual.numel() == 0 or error(actual, expected) < bound


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "K", "V"),
    [
        (1, 1, 4, 4, 8, 8),
        (2, 63, 4, 2, 16, 8),
        (1, 64, 4, 1, 8, 24),
        (2, 65, 4, 4, 48, 8),
        (1, 500, 2, 2, 6, 5),
    ]
    + [(1, 1200, 4, 2, 4, 3), (0, 65, 4, 4, 8, 8), (1, 0, 4, 4, 8, 8)],
    ids=lambda x: str(x),
)
def test_chunked_equals_definition(B, T, H, G, K, V, causal):
    q, k, v, slopes = make(B, T, H, G, K, V)
    close(
        lightning_attention(q, k, v, slopes, scale=0.3, causal=causal),
        ref.quadratic(q, k, v, slopes, 0.3, causal),
    )


@pytest.mark.parametrize("T", [1, 63, 64, 65, 500, 1100])
def test_chunked_equals_recurrent_with_states(T):
    q, k, v, slopes = make(2, T, 4, 2, 8, 5)
    state = make_state(2, 4, 8, 5)
    options = {"initial_state": state, "output_final_state": True}
    output, left = lightning_attention(q, k, v, slopes, scale=0.7, **options)
    expected, expected_left = ref.recurrent(q, k, v, slopes, 0.7, state)
    close(output, expected)
    close(left, expected_left)


def test_state_hands_over_at_every_token():
    q, k, v, slopes = make(2, 131)
    whole, left = lightning_attention(q, k, v, slopes, output_final_state=True)
    for cut in range(132):
        head, state = lightning_attention(
            *(x[:, :, :cut] for x in (q, k, v)), slopes, output_final_state=True
        )
        tail, state = lightning_attention(
            *(x[:, :, cut:] for x in (q, k, v)), slopes, initial_state=state, output_final_state=True
        )
        close(torch.cat((head, tail), 2), whole)
        close(state, left)


def gradients(function, tensors, weights):
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(total, tensors)


def test_gradients_equal_those_of_the_recurrence():
    q, k, v, slopes = make(2, 130, 4, 2, 8, 5, grad=True)
    state = make_state(2, 4, 8, 5).requires_grad_()
    tensors = (q, k, v, slopes.requires_grad_(), state)
    weights = (torch.randn(2, 4, 130, 5, dtype=torch.float64), make_state(2, 4, 8, 5))

    def ours(q, k, v, slopes, state):
        return lightning_attention(q, k, v, slopes, scale=0.4, initial_state=state, output_final_state=True)

    _, actual = gradients(ours, tensors, weights)
    _, expected = gradients(lambda q, k, v, s, x: ref.recurrent(q, k, v, s, 0.4, x), tensors, weights)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e-11)


def test_gradients_equal_those_of_the_definition_without_causality():
    q, k, v, slopes = make(1, 150, 4, 1, 8, 5, grad=True)
    tensors, weights = (q, k, v, slopes.requires_grad_()), (torch.randn(1, 4, 150, 5, dtype=torch.float64),)
    _, actual = gradients(lambda *x: lightning_attention(*x, causal=False), tensors, weights)
    _, expected = gradients(lambda *x: ref.quadratic(*x, 1.0, False), tensors, weights)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e-11)


def test_gradcheck_twice():
    q, k, v, slopes = make(1, 5, 2, 1, 2, 3, grad=True)
    state = make_state(1, 2, 2, 3).requires_grad_()

    def run(q, k, v, state):
        return lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True)

    assert torch.autograd.gradcheck(run, (q, k, v, state))
    assert torch.autograd.gradgradcheck(run, (q, k, v, state))


@pytest.mark.parametrize("bounds", [[0, 70], [0, 0, 1, 65, 65, 70, 70], [0, 63, 70]], ids=str)
def test_packed_equals_separate(bounds):
    q, k, v, slopes = make(1, 70, 4, 2, grad=True)
    slopes.requires_grad_()
    states = make_state(len(bounds) - 1).requires_grad_()
    tensors = (q, k, v, slopes, states)

    def packed(q, k, v, slopes, states):
        options = {"cu_seqlens": torch.tensor(bounds), "initial_state": states, "output_final_state": True}
        return lightning_attention(q, k, v, slopes, **options)

    def separate(q, k, v, slopes, states):
        parts = []
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            piece = (x[:, :, begin:end] for x in (q, k, v))
            options = {"initial_state": states[i : i + 1], "output_final_state": True}
            parts.append(lightning_attention(*piece, slopes, **options))
        return torch.cat([o for o, _ in parts], 2), torch.cat([s for _, s in parts])

    weights = (torch.randn(1, 4, 70, 8, dtype=torch.float64), torch.randn_like(states))
    actual, actual_grads = gradients(packed, tensors, weights)
    expected, expected_grads = gradients(separate, tensors, weights)
    for a, b in zip((*actual, *actual_grads), (*expected, *expected_grads), strict=True):
        close(a, b)


def test_any_strides():
    q, k, v, slopes = make(2, 70)
    expected = lightning_attention(q, k, v, slopes)
    turned = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v)]
    close(lightning_attention(*turned, slopes), expected)
    q.requires_grad_()
    # The gradient of a sum has strides of 0.
    (grad,) = torch.autograd.grad(lightning_attention(q, k, v, slopes).sum(), q)
    (expected,) = torch.autograd.grad(ref.quadratic(q, k, v, slopes, 1.0).sum(), q)
    close(grad, expected)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
def test_low_precision_is_one_rounding_away(dtype):
    q, k, v, slopes = make(2, 300, 4, 2, 48, 96, dtype, grad=True)
    weight = torch.randn(2, 4, 300, 96).to(dtype)
    output = lightning_attention(q, k, v, slopes)
    grads = torch.autograd.grad(output, (q, k, v), weight)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = ref.quadratic(*wide, slopes.double(), 1.0)
    expected_grads = torch.autograd.grad(expected, wide, weight.double())
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    standard = ref.quadratic(*single, slopes, 1.0)
    standard_grads = torch.autograd.grad(standard, single, weight.float())
    rows = zip((output, *grads), (expected, *expected_grads), (standard, *standard_grads), strict=True)
    for actual, exact, plain in rows:
        assert error(actual, exact) <= 1.5 * (error(plain.to(dtype), exact) + FP32_EPS)


def test_combine_states_is_associative_and_joins_pieces():
    q, k, v, slopes = make(2, 90)
    cuts = [0, 17, 64, 90]
    parts = [
        lightning_attention(*(x[:, :, a:b] for x in (q, k, v)), slopes, output_final_state=True)[1]
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    whole = lightning_attention(q, k, v, slopes, output_final_state=True)[1]
    left = combine_states(combine_states(parts[0], parts[1], 47, slopes), parts[2], 26, slopes)
    right = combine_states(parts[0], combine_states(parts[1], parts[2], 26, slopes), 73, slopes)
    close(left, whole)
    close(right, whole)
    lengths = torch.tensor([47, 47])
    close(combine_states(parts[0], parts[1], lengths, slopes), combine_states(parts[0], parts[1], 47, slopes))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_any_cut(data):
    T = data.draw(st.integers(0, 200))
    G, share = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2]))
    K, V = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    q, k, v, slopes = make(1, T, G * share, G, K, V)
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, T), max_size=5))), T]
    packed, states = lightning_attention(
        q, k, v, slopes, cu_seqlens=torch.tensor(bounds), output_final_state=True
    )
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        output, state = ref.recurrent(*(x[:, :, a:b] for x in (q, k, v)), slopes, 1.0)
        close(packed[:, :, a:b], output)
        close(states[i : i + 1], state)


def test_compiles_without_breaks_or_recompiles():
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def run(q, k, v, slopes, state):
        output, left = lightning_attention(
            q, k, v, slopes, initial_state=state, output_final_state=True, impl="reference"
        )
        return output + lightning_attention_step(q, k, v, slopes, left.clone(), impl="reference"), left

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for B, T in ((2, 65), (3, 70), (4, 131)):
        q, k, v, slopes = make(B, T)
        state = make_state(B)
        for a, b in zip(compiled(q, k, v, slopes, state), run(q, k, v, slopes, state), strict=True):
            close(a, b)
    assert len(seen) == 1


def test_gradients_compile():
    torch.compiler.reset()
    q, k, v, slopes = make(1, 66, grad=True)

    def run(q, k, v):
        return lightning_attention(q, k, v, slopes, impl="reference")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        close(a, b)


def test_operators_are_well_formed():
    q, k, v, slopes = make(1, 20, 4, 2, grad=True)
    bounds, states = torch.tensor([0, 5, 20]), make_state(2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    scan = torch.ops.hf_longattn.lightning_scan
    for arguments in (
        (None, None, 1.0, 1, False, False),
        (states, bounds, 0.5, 1, True, False),
        (None, None, 0.5, 0, False, True),
    ):
        torch.library.opcheck(scan, (q, k, v, slopes, *arguments, "reference"), test_utils=tests)
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.hf_longattn.lightning_step, (*plain, slopes, make_state(), 1.0, "reference")
    )


@pytest.mark.parametrize("T", [1, 3])
def test_step_continues_a_prefill(T):
    q, k, v, slopes = make(2, 66 + T, 4, 2, 8, 5)
    whole, left = lightning_attention(q, k, v, slopes, scale=0.3, output_final_state=True)
    _, state = lightning_attention(*(x[:, :, :66] for x in (q, k, v)), slopes, output_final_state=True)
    # A slice of a larger buffer, updated in place.
    buffer = torch.zeros(2, 4, 2, 8, 5, dtype=torch.float64)
    buffer[:, :, 1] = state
    output = lightning_attention_step(*(x[:, :, 66:] for x in (q, k, v)), slopes, buffer[:, :, 1], scale=0.3)
    close(output, whole[:, :, 66:])
    close(buffer[:, :, 1], left)
    assert buffer[:, :, 0].abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"key": torch.randn(1, 3, 9, 8)}, "`key`"),
        ({"key": torch.randn(1, 2, 9, 7)}, "`key`"),
        ({"value": torch.randn(1, 4, 9, 8)}, "`value`"),
        ({"value": torch.randn(1, 2, 9, 8).half()}, "`value`"),
        ({"slopes": torch.ones(4).bfloat16()}, "`slopes`"),
        ({"slopes": torch.ones(2)}, "`slopes`"),
        ({"scale": 0.0}, "`scale`"),
        ({"initial_state": torch.randn(1, 4, 8, 8).half()}, "`initial_state`"),
        ({"initial_state": torch.randn(2, 4, 8, 8)}, "`initial_state`"),
        ({"causal": False, "output_final_state": True}, "`output_final_state`"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "`cu_seqlens`"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "`cu_seqlens` must rise"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 9])}, "`cu_seqlens` must rise"),
        ({"cu_seqlens": [0, 9]}, "`cu_seqlens`"),
        ({"query": torch.randn(1, 4, 9, 8).to(torch.float8_e4m3fn)}, "`query` must be bf16"),
        ({"query": [[0.0]]}, "`query`"),
        ({"key": torch.randn(1, 2, 9, 8, device="meta")}, "`key` is on meta"),
        ({"slopes": torch.ones(4, device="meta")}, "`slopes` is on meta"),
        ({"slopes": -torch.ones(4)}, "`slopes` must be finite"),
        ({"slopes": torch.full((4,), float("inf"))}, "`slopes` must be finite"),
        ({"scale": None}, "`scale`"),
        ({"scale": torch.tensor(0.5, requires_grad=True)}, "`scale`"),
        ({"initial_state": torch.randn(1, 4, 8, 8, device="meta")}, "`initial_state` is on meta"),
        ({"impl": "fast"}, "`impl`"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x.strip("`"),
)
def test_refusals_name_the_argument(change, word):
    arguments = {
        "query": torch.randn(1, 4, 9, 8),
        "key": torch.randn(1, 2, 9, 8),
        "value": torch.randn(1, 2, 9, 8),
        "slopes": torch.ones(4),
    }
    with pytest.raises((ValueError, TypeError), match=word):
        lightning_attention(**{**arguments, **change})


@pytest.mark.parametrize("state", [None, torch.zeros(1, 4, 8, 8).bfloat16(), torch.zeros(1, 1, 8, 8)])
def test_a_step_refuses_states_that_it_cannot_write(state):
    q, k, v, slopes = make(1, 1, dtype=torch.float32)
    state = state.expand(1, 4, 8, 8) if isinstance(state, torch.Tensor) else state
    with pytest.raises((ValueError, TypeError), match="`state`"):
        lightning_attention_step(q, k, v, slopes, state)


def test_the_gradient_of_slopes_has_none_itself():
    q, k, v, slopes = make(grad=True)
    slopes.requires_grad_()
    (grad,) = torch.autograd.grad(lightning_attention(q, k, v, slopes).sum(), slopes, create_graph=True)
    with pytest.raises(NotImplementedError, match="`slopes` has no second derivative"):
        torch.autograd.grad(grad.sum(), q)


def test_packing_needs_one_row():
    q, k, v, slopes = make(2, 9)
    with pytest.raises(ValueError, match="one row"):
        lightning_attention(q, k, v, slopes, cu_seqlens=torch.tensor([0, 9]))


def million(dims):
    k, v = torch.randn(1, 4, 1 << 20, dims), torch.randn(1, 4, 1 << 20, dims)
    slopes = torch.tensor([0.84, 3.9e-3, 3.9e-5, 3.9e-8])
    exact = lightning_attention(
        *(x.double() for x in (k, k, v)), slopes.double(), output_final_state=True, impl="reference"
    )[1]
    return k, v, slopes, exact


def head_errors(state, exact):
    return [error(state[:, h], exact[:, h]) for h in range(state.shape[1])]


@pytest.mark.slow
def test_state_after_a_million_tokens_in_chunks():
    k, v, slopes, exact = million(4)
    _, state = lightning_attention(k, k, v, slopes, output_final_state=True, impl="reference")
    assert max(head_errors(state, exact)) <= 1e-6


def kernel_errors(q, k, v, slopes, state=None, **options):
    """(kernel, plain torch) errors against fp64 of output, state and gradients; plain torch rounds once."""
    tensors = [q, k, v] if state is None else [q, k, v, state]
    rows = []
    weights = None
    for impl, wide in (("reference", True), ("reference", False), ("triton", False)):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in tensors]
        given_state = (
            {} if state is None else {"initial_state": leaves[3].to(torch.float64 if wide else torch.float32)}
        )
        given_state |= {} if state is None else {"output_final_state": True}
        results = lightning_attention(
            *leaves[:3], slopes.double() if wide else slopes, impl=impl, **given_state, **options
        )
        results = results if isinstance(results, tuple) else (results,)
        weights = weights or [torch.randn(x.shape).to(q.dtype) for x in results]
        grads = torch.autograd.grad(
            results, leaves, [w.to(r.dtype) for w, r in zip(weights, results, strict=True)]
        )
        rows.append([*results, *grads])
    exact, standard, kernel = rows
    return [(error(a, e), error(s, e)) for a, s, e in zip(kernel, standard, exact, strict=True)]


def within(errors):
    for kernel, standard in errors:
        assert kernel <= 1.5 * (standard + FP32_EPS), errors


@interpreted
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "K", "V", "dtype"),
    [
        (2, 65, 2, 1, 16, 40, torch.float32),
        (1, 130, 2, 2, 48, 16, torch.float16),
        (1, 1, 2, 2, 16, 16, torch.float32),
    ],
    ids=["B1-T65-H2-K16-fp32", "B2-T66-H1-K48-fp16", "B1-T1-H2-K16-fp32"],
)
def test_interpreted_scan(B, T, H, G, K, V, dtype):
    q, k, v, slopes = make(B, T, H, G, K, V, dtype)
    within(kernel_errors(q, k, v, slopes, make_state(B, H, K, V, torch.float32), scale=0.5))


@interpreted
def test_interpreted_both_directions():
    within(kernel_errors(*make(1, 70, 2, 1, 16, 16, torch.float32), causal=False))


@interpreted
@pytest.mark.parametrize(
    ("bounds", "segments"),
    [(None, (128, 64)), ([0, 0, 20, 20, 140, 160, 200, 200], (128, 64)), ([0, 200], (64, 64))],
    ids=str,
)
def test_interpreted_segments(monkeypatch, bounds, segments):
    """Cut into segments: what enters each is summed from blocks, of the right document only."""
    from hf_longattn.kernels.lightning_attention import triton as kernels

    monkeypatch.setattr(kernels, "choose_segments", lambda *_: segments)
    q, k, v, slopes = make(1, 200, 2, 1, 16, 16, torch.float32)
    slopes[1] = SLOPES[2]
    count = 1 if bounds is None else len(bounds) - 1
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    within(kernel_errors(q, k, v, slopes, make_state(count, 2, 16, 16, torch.float32), **packed))


@interpreted
def test_interpreted_fp16_beyond_its_range():
    """Scores and states above 65504 in fp16 inputs: only the output has to fit."""
    q, k, v, slopes = make(1, 130, 2, 2, 16, 16, torch.float16)
    slopes[1] = 1e-3
    q, k, v = (q * 40).half(), (k * 100).half(), (v * 300).half()
    exact = lightning_attention(q.double(), k.double(), v.double(), slopes.double(), scale=1e-4)
    assert (q.float() @ k.float().transpose(-1, -2)).abs().max() > 65504
    assert error(lightning_attention(q, k, v, slopes, scale=1e-4), exact) <= 1.5 * error(exact.half(), exact)


@interpreted
def test_interpreted_step():
    q, k, v, slopes = make(2, 3, 4, 2, 20, 24, torch.float32)
    state = make_state(2, 4, 20, 24, torch.float32)
    exact, left = ref.recurrent(*(x.double() for x in (q, k, v, slopes)), 0.3, state.double())
    plain, plain_left = ref.recurrent(q, k, v, slopes, 0.3, state)
    output = lightning_attention_step(q, k, v, slopes, state, scale=0.3, impl="triton")
    within([(error(output, exact), error(plain, exact)), (error(state, left), error(plain_left, left))])


@interpreted
@pytest.mark.parametrize(
    ("K", "V", "T", "dtype"),
    [(20, 70, 3, torch.float32), (160, 40, 1, torch.float16)],
    ids=["K20-V70-T3-fp32", "K160-V40-T1-fp16"],
)
def test_interpreted_step_has_the_bits_of_torch(K, V, T, dtype):
    """Slopes of 0 leave nothing to the decay, which the two form differently."""
    q, k, v = (torch.randn(2, heads, T, dim).to(dtype) for heads, dim in ((4, K), (2, K), (2, V)))
    slopes, state = torch.zeros(4), torch.randn(2, 4, K, V)
    other, nearest = state.clone(), state.clone()
    output = lightning_attention_step(q, k, v, slopes, state, impl="triton")
    expected = lightning_attention_step(q, k, v, slopes, other, impl="reference")
    assert torch.equal(state, other)
    # Sums in another order, rounded to the dtype once.
    assert error(output, expected) <= 2 * torch.finfo(dtype).eps
    for t in range(T):
        change = k[:, :, t, :, None].float() * v[:, :, t, None].float()
        nearest += change.repeat_interleave(2, 1)
    assert 0.01 < (state != nearest).double().mean() < 0.7


def test_segments_waste_no_wave():
    """The cut of the sequence: multiples of the block, and never slower in waves than no cut."""
    triton = pytest.importorskip("triton")
    from hf_longattn.kernels.lightning_attention import triton as kernels

    for length in (1, 2048, 4097, 16384, 524288, 10**6 + 7):
        for programs in (1, 16, 64, 300, 4096):
            segment, block = kernels.choose_segments(length, programs, 264)
            count = triton.cdiv(length, segment)
            assert segment % block == 0 and block % 64 == 0
            assert count == 1 or segment >= 512
            assert triton.cdiv(programs * count, 264) / count <= triton.cdiv(programs, 264)
    assert triton.cdiv(16384, kernels.choose_segments(16384, 64, 264)[0]) == 4
