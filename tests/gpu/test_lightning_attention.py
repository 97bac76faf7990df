"""Lightning attention on a GPU: the kernels against fp64, graphs, compilation, sizes beyond 2^31."""

import pytest
import torch

from hf_longattn.kernels.lightning_attention import lightning_attention, lightning_attention_step, reference
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs
from hf_longattn.kernels.lightning_attention.tiling import GLUON_TILINGS, gluon_runs

pytestmark = pytest.mark.gpu
SLOPES = [0.84, 0.11, 3.9e-3, 3.9e-8]
FP32_EPS = torch.finfo(torch.float32).eps
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or not gluon_runs(torch.device("cuda")), reason="needs a Hopper GPU"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rounding(dtype, key_dim):
    """What the kernels round of an fp32 result where plain torch rounds nothing, relative to its norm.

    bf16: a factor in fp32 is multiplied as a sum of two bf16 numbers. Rounding a mantissa between 1 and 2 to
    8 bits errs evenly up to 2^-8, in the mean square 2^-8 / sqrt(6) of the number; the second number errs by
    as much of what the first left, 2^-16 / 6 in all (2^-16 at worst). Of fp16, with 11 bits, that is less
    than fp32 rounds.
    fp32: products of TF32 numbers on tensor cores, which cut a sum off after every 8 terms instead of
    rounding it (Fasi et al., PeerJ CS 7:e330): 2^-24 of the sum so far in the mean, always towards zero. On
    the way to K terms the sum is half of the result on average: K / 8 * 2^-24 / 2.
    """
    return {torch.bfloat16: 2**-16 / 6, torch.float16: FP32_EPS, torch.float32: key_dim / 16 * 2**-24}[dtype]


def make(B, T, H, G, K, V, dtype, grad=False):
    """(B, T, heads, dim) in memory, as a model makes them."""
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V))
    tensors = [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes]
    slopes = torch.tensor((SLOPES * H)[:H], device="cuda")
    return [x.requires_grad_(grad) for x in tensors] + [slopes]


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def run(q, k, v, slopes, state, weights, impl, **options):
    leaves = [x.detach().requires_grad_() for x in ((q, k, v) if state is None else (q, k, v, state))]
    given = {} if state is None else {"initial_state": leaves[3], "output_final_state": True}
    results = lightning_attention(*leaves[:3], slopes, impl=impl, **given, **options)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [w.to(r.dtype) for w, r in zip(weights, results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, pairs)]


def compare(q, k, v, slopes, state=None, **options):
    """Each result and gradient is at most 1.5 times as far from fp64 as plain torch rounded to the dtype.

    Plain torch keeps the fp32 results of 16-bit inputs, states and their gradients, in fp32 throughout: there
    the kernel's own rounding of a term is what counts, as it is with fp32 inputs.
    """
    shape = (*q.shape[:3], v.shape[3])
    weights = [torch.randn(shape, device="cuda").to(q.dtype)] + (
        [] if state is None else [torch.randn_like(state)]
    )
    wide = [x.double() for x in (q, k, v, slopes)] + [None if state is None else state.double()]
    exact = run(*wide, weights, "reference", **options)
    standard = run(q, k, v, slopes, state, weights, "reference", **options)
    actual = run(q, k, v, slopes, state, weights, "triton", **options)
    for i, (a, s, e) in enumerate(zip(actual, standard, exact, strict=True)):
        own = max(FP32_EPS, rounding(q.dtype, q.shape[3])) if a.dtype == torch.float32 else FP32_EPS
        assert a.shape == e.shape, i
        assert error(a, e) <= 1.5 * (error(s, e) + own), (i, error(a, e), error(s, e))


CASES = [
    (2, 63, 4, 4, 64, 64, "bf16"),
    (1, 1, 4, 2, 128, 128, "bf16"),
    (2, 500, 4, 1, 128, 128, "bf16"),
    (1, 1000, 4, 4, 128, 64, "bf16"),
    (1, 300, 4, 4, 48, 96, "bf16"),
    (1, 300, 4, 2, 192, 256, "bf16"),
    (1, 300, 4, 4, 256, 16, "bf16"),
    (1, 500, 4, 4, 128, 128, "fp16"),
    (1, 500, 4, 4, 128, 128, "fp32"),
    (1, 300, 4, 2, 256, 64, "fp32"),
    (1, 20001, 4, 4, 128, 128, "bf16"),
]


@pytest.mark.parametrize(
    ("B", "T", "H", "G", "K", "V", "dtype"),
    CASES,
    ids=["B{}-T{}-H{}-G{}-K{}-V{}-{}".format(*c) for c in CASES],
)
def test_against_fp64(B, T, H, G, K, V, dtype):
    state = torch.randn(B, H, K, V, device="cuda")
    compare(*make(B, T, H, G, K, V, DTYPES[dtype]), state, scale=K**-0.5)


def test_both_directions():
    compare(*make(2, 1000, 4, 2, 96, 64, torch.bfloat16), causal=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_packed_documents_over_segments(dtype):
    bounds = torch.tensor([0, 0, 1, 64, 5000, 5001, 20000, 30000, 30000], device="cuda", dtype=torch.int32)
    state = torch.randn(8, 4, 64, 64, device="cuda")
    compare(*make(1, 30000, 4, 2, 64, 64, DTYPES[dtype]), state, cu_seqlens=bounds)


def test_error_targets():
    """With a model's slopes: 2.0e-3 forward and 2.2e-3 for the gradients in bf16."""
    q, k, v, _ = make(1, 4096, 32, 32, 128, 128, torch.bfloat16)
    slopes = torch.exp2(-8 * torch.arange(1, 33, device="cuda") / 32)
    weights = [torch.randn_like(q)]
    exact = run(q.double(), k.double(), v.double(), slopes.double(), None, weights, "reference")
    actual = run(q, k, v, slopes, None, weights, "triton")
    for bound, a, e in zip((2.0e-3, 2.2e-3, 2.2e-3, 2.2e-3), actual, exact, strict=True):
        assert error(a, e) <= bound


def test_any_strides():
    q, k, v, slopes = make(2, 300, 4, 4, 64, 64, torch.bfloat16)
    expected = lightning_attention(q, k, v, slopes)
    turned = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v)]
    assert torch.equal(lightning_attention(*turned, slopes), expected)


def test_slopes_have_gradients():
    q, k, v, slopes = make(1, 700, 4, 4, 32, 32, torch.float32)
    leaf, wide = slopes.clone().requires_grad_(), slopes.double().requires_grad_()
    (grad,) = torch.autograd.grad(lightning_attention(q, k, v, leaf).square().sum(), leaf)
    exact = lightning_attention(q.double(), k.double(), v.double(), wide, impl="reference")
    (expected,) = torch.autograd.grad(exact.square().sum(), wide)
    assert error(grad, expected) < 1e-5


def test_no_sync_no_recompile_and_graphs():
    """A packed call waits for nothing, so it can be captured; other lengths compile nothing new."""
    from hf_longattn.kernels.lightning_attention.triton import _scan_kernel

    def call(T):
        q, k, v, slopes = make(1, T, 4, 4, 64, 64, torch.bfloat16)
        bounds = torch.tensor([0, T // 3, T], device="cuda")
        return (q, k, v, slopes), {"cu_seqlens": bounds, "impl": "triton"}

    arguments, options = call(9000)
    expected = lightning_attention(*arguments, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lightning_attention(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = lightning_attention(*arguments, **options)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)

    compiled = sum(len(cache[0]) for cache in _scan_kernel.device_caches.values())
    for T in (9001, 9008, 12345):
        arguments, options = call(T)
        lightning_attention(*arguments, **options)
    assert sum(len(cache[0]) for cache in _scan_kernel.device_caches.values()) == compiled


def test_compiles_as_one_graph():
    q, k, v, slopes = make(2, 300, 4, 2, 64, 64, torch.bfloat16, grad=True)

    def layer(q, k, v):
        return lightning_attention(q * 2, k, v, slopes).relu()

    compiled = torch.compile(layer, fullgraph=True)
    for function in (compiled, layer):
        output = function(q, k, v)
        grads = torch.autograd.grad(output.float().sum(), (q, k, v))
        if function is compiled:
            first = (output, *grads)
    for a, b in zip(first, (output, *grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [1, 4])
def test_step_in_a_graph(T):
    q, k, v, slopes = make(3, T, 4, 2, 128, 96, torch.bfloat16)
    state = torch.randn(3, 4, 128, 96, device="cuda")
    exact_state = state.double()
    graph = torch.cuda.CUDAGraph()
    lightning_attention_step(q, k, v, slopes, state.clone())
    with torch.cuda.graph(graph):
        output = lightning_attention_step(q, k, v, slopes, state, scale=0.5)
    for _ in range(5):
        graph.replay()
        wide = (x.double() for x in (q, k, v, slopes))
        exact = lightning_attention_step(*wide, exact_state, scale=0.5, impl="reference")
    # Five replays: the bound of `rounding.py`, and the rounding of the changes.
    assert error(state, exact_state) < 2**-24 * (5 * T) ** 0.5 + FP32_EPS
    assert error(output, exact) <= 1.5 * error(exact.bfloat16(), exact)


def test_states_of_a_million_equal_steps():
    """Within the bound of `rounding.py` where tokens repeat; rounded to the nearest, it is missed tenfold."""
    count, part, dim = 1 << 20, 1 << 16, 32
    slopes = torch.tensor([0.84, 3.9e-3, 3.9e-5, 3.9e-8, 0.0], device="cuda")
    k, v = (torch.randn(1, 5, 1, dim, device="cuda").expand(-1, -1, part, -1) for _ in range(2))
    state = torch.zeros(1, 5, dim, dim, device="cuda")
    for _ in range(count // part):
        lightning_attention_step(k, k, v, slopes, state)
    wide = slopes.double()
    total = torch.where(wide > 0, torch.expm1(-wide * count) / torch.expm1(-wide), count)
    exact = k[:, :, 0, :, None].double() * v[:, :, 0, None].double() * total[:, None, None]
    assert all(error(state[:, h], exact[:, h]) <= 1e-4 for h in range(5))


def test_step_rounds_as_torch_does():
    """The bits of plain torch where nothing decays; elsewhere products and sums are fused in another way."""
    q, k, v, slopes = make(2, 1, 4, 4, 128, 128, torch.bfloat16)
    state = torch.randn(2, 4, 128, 128, device="cuda")
    other = state.clone()
    lightning_attention_step(q, k, v, slopes, state, impl="triton")
    lightning_attention_step(q, k, v, slopes, other, impl="reference")
    assert error(state, other) < FP32_EPS
    slopes, again = torch.zeros_like(slopes), (state.clone(), state.clone())
    for left, impl in zip(again, ("triton", "reference"), strict=True):
        lightning_attention_step(q, k, v, slopes, left, impl=impl)
    assert torch.equal(*again)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """The last head of the last tokens is right where offsets pass 2^31."""
    q, k, v, _ = make(1, 600_000, 32, 32, 128, 128, torch.bfloat16)
    slopes = torch.exp2(-8 * torch.arange(1, 33, device="cuda") / 32)
    assert q.numel() > 2**31
    output = lightning_attention(q, k, v, slopes)
    # The slowest head forgets 20000 tokens to exp(-78).
    tail = [x[:, -1:, -20000:].double() for x in (q, k, v)]
    exact = lightning_attention(*tail, slopes[-1:].double(), impl="reference")[:, :, -1000:]
    assert error(output[:, -1:, -1000:], exact) <= 2.2e-3


def scan(inputs, *, gluon=True, reverse=False, strict=False, wide=False, final=False, segments=None):
    """(output, final state) of one scan, by the Gluon kernel whether or not it would be chosen."""
    from hf_longattn.kernels.lightning_attention import tiling, triton

    B, _, T, K = inputs.query.shape
    H, V = inputs.slopes.shape[0], inputs.value.shape[3]
    dtype = torch.float32 if wide else inputs.query.dtype
    output = torch.full((B, T, H, V), float("nan"), device="cuda", dtype=dtype).transpose(1, 2)
    state = torch.full((B, H, K, V), float("nan"), device="cuda") if final else None
    chosen = GLUON_TILINGS[128] if gluon else tiling.choose_tiling(K, V, inputs.query.dtype, T, B * H)
    triton.scan(inputs, output, state, 0.3, reverse, strict, chosen, segments)
    return output, state


def definition(inputs, dtype, reverse=False, strict=False):
    """(output, final state) in plain torch, accumulated in the slopes' dtype."""
    tensors = [None if x is None else x.to(dtype) for x in inputs[:3]]
    full = torch.promote_types(dtype, torch.float32)
    slopes, state = inputs.slopes.to(full), None if inputs.state is None else inputs.state.to(full)
    output = torch.empty_like(inputs.value[:, :1].expand(-1, slopes.shape[0], -1, -1), dtype=dtype)
    left = torch.empty(*output.shape[:2], tensors[0].shape[3], output.shape[3], device="cuda", dtype=full)
    reference.scan(ScanInputs(*tensors, slopes, state, None), output, left, 0.3, reverse, strict)
    return output, left


def compare_scan(inputs, *, reverse=False, strict=False, final=False, **options):
    output, state = scan(inputs, reverse=reverse, strict=strict, final=final, **options)
    exact, exact_state = definition(inputs, torch.float64, reverse, strict)
    standard, standard_state = definition(inputs, torch.bfloat16, reverse, strict)
    assert error(output, exact) <= 1.5 * (error(standard, exact) + FP32_EPS)
    if final:
        own = rounding(torch.bfloat16, inputs.query.shape[3])
        assert error(state, exact_state) <= 1.5 * (error(standard_state, exact_state) + own)


def inputs_of(B, T, H, G, state=False):
    q, k, v, slopes = make(B, T, H, G, 128, 128, torch.bfloat16)
    entering = torch.randn(B, H, 128, 128, device="cuda").transpose(2, 3) if state else None
    return ScanInputs(q, k, v, slopes, entering, None)


@hopper
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gluon_at_every_length(reverse):
    for T in [*range(1, 201), 255, 256, 257, 1000, 4095, 4097]:
        compare_scan(inputs_of(1, T, 4, 4), reverse=reverse, strict=T % 2 == 0)
        if T >= 64:
            compare_scan(inputs_of(2, T, 4, 2, state=True), reverse=reverse, final=True)


@hopper
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("T", [6144, 7000], ids="T{}".format)
def test_gluon_in_segments(T, reverse):
    for segments in ((1024, 512), (2048, 256)):
        options = {"reverse": reverse, "final": True, "segments": segments}
        compare_scan(inputs_of(1, T, 4, 2, state=True), **options)
        compare_scan(inputs_of(2, T, 4, 1), wide=True, strict=True, **options)


@hopper
def test_gluon_gives_the_same_bits_in_any_layout():
    inputs = inputs_of(3, 1000, 32, 8, state=True)
    output, state = scan(inputs, final=True)
    turned = inputs._replace(
        **{name: getattr(inputs, name).contiguous() for name in ("query", "key", "value")}
    )
    for again in (inputs, turned):
        others = scan(again, final=True)
        assert torch.equal(others[0], output) and torch.equal(others[1], state)


@hopper
def test_gluon_leaves_the_state_of_the_other_kernel():
    inputs = inputs_of(2, 5000, 16, 16, state=True)
    for reverse in (False, True):
        states = [scan(inputs, gluon=gluon, reverse=reverse, final=True)[1] for gluon in (True, False)]
        # Each keeps the bound of `compare`.
        assert error(*states) <= 2 * 1.5 * rounding(torch.bfloat16, 128)


@pytest.fixture
def gluon_calls(monkeypatch):
    """The scans that the Gluon kernel was chosen for."""
    from hf_longattn.kernels.lightning_attention import triton_gluon

    calls, own = [], triton_gluon.scan

    def spy(inputs, *rest):
        calls.append(inputs)
        return own(inputs, *rest)

    monkeypatch.setattr(triton_gluon, "scan", spy)
    return calls


@hopper
@pytest.mark.parametrize("G", [32, 8], ids="G{}".format)
@pytest.mark.parametrize("T", [1000, 1024], ids="T{}".format)
def test_gluon_is_chosen_for_many_rows(gluon_calls, T, G):
    """The output and every gradient, with and without states."""
    arguments = make(3, T, 32, G, 128, 128, torch.bfloat16)
    compare(*arguments, scale=128**-0.5)
    assert len(gluon_calls) == 4
    compare(*arguments, torch.randn(3, 32, 128, 128, device="cuda"))
    assert len(gluon_calls) == 8


@hopper
def test_gluon_is_chosen_for_long_rows(gluon_calls):
    compare(*make(1, 20001, 32, 32, 128, 128, torch.bfloat16), causal=False)
    # Two directions, forward and in each of three gradients.
    assert len(gluon_calls) == 8


@hopper
def test_gluon_error_targets(gluon_calls):
    """With a model's slopes: 2.0e-3 forward and 2.2e-3 for the gradients."""
    q, k, v, _ = make(3, 2048, 32, 32, 128, 128, torch.bfloat16)
    slopes = torch.exp2(-8 * torch.arange(1, 33, device="cuda") / 32)
    weights = [torch.randn_like(q)]
    exact = run(q.double(), k.double(), v.double(), slopes.double(), None, weights, "reference")
    actual = run(q, k, v, slopes, None, weights, "triton")
    assert len(gluon_calls) == 4
    for bound, a, e in zip((2.0e-3, 2.2e-3, 2.2e-3, 2.2e-3), actual, exact, strict=True):
        assert error(a, e) <= bound


@hopper
def test_gluon_leaves_expanded_gradients_to_triton(gluon_calls):
    """The gradient of a sum has strides of 0, which tile copies do not take."""
    leaves = [x.requires_grad_() for x in make(3, 512, 32, 32, 128, 128, torch.bfloat16)[:3]]
    slopes = torch.full((32,), 0.1, device="cuda")
    ones = torch.ones(3, 32, 512, 128, device="cuda", dtype=torch.bfloat16)
    given = torch.autograd.grad(lightning_attention(*leaves, slopes), leaves, ones)
    count = len(gluon_calls)
    expanded = torch.autograd.grad(lightning_attention(*leaves, slopes).sum(), leaves)
    assert (count, len(gluon_calls)) == (4, 5)
    for a, b in zip(given, expanded, strict=True):
        # Both are within 2.2e-3 of the exact gradient.
        assert error(a, b) <= 2 * 2.2e-3


@hopper
def test_gluon_without_sync_or_recompile_and_in_graphs(gluon_calls):
    from hf_longattn.kernels.lightning_attention.triton_gluon import _scan_kernel

    def compiled():
        return sum(len(cache[0]) for cache in _scan_kernel.device_caches.values())

    # One chunk is partial and two segments meet: all of the launches.
    arguments = make(1, 9001, 64, 64, 128, 128, torch.bfloat16)
    expected = lightning_attention(*arguments, output_final_state=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lightning_attention(*arguments, output_final_state=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = lightning_attention(*arguments, output_final_state=True)
    for result in results:
        result.zero_()
    graph.replay()
    assert all(map(torch.equal, results, expected)) and len(gluon_calls) == 3
    number = compiled()
    for B, T in ((1, 12345), (5, 9001), (5, 8192), (1, 65536)):
        lightning_attention(*make(B, T, 64, 64, 128, 128, torch.bfloat16), output_final_state=True)
    assert compiled() == number and len(gluon_calls) == 7


@hopper
@pytest.mark.slow
def test_gluon_state_after_a_million_tokens():
    inputs = inputs_of(1, 1 << 20, 4, 4)
    output, state = scan(inputs, final=True, segments=(65536, 2048))
    exact = standard = None
    for part in range(16):
        piece = [x[:, :, part << 16 : (part + 1) << 16] for x in inputs[:3]]
        given = ScanInputs(*piece, inputs.slopes, exact, None)
        last, exact = definition(given, torch.float64)
        _, standard = definition(given._replace(state=standard), torch.bfloat16)
    own = rounding(torch.bfloat16, 128)
    assert error(state, exact) <= 1.5 * (error(standard, exact) + own)
    assert error(output[:, :, -(1 << 16) :], last) <= 1.5 * (error(last.bfloat16(), last) + FP32_EPS)
