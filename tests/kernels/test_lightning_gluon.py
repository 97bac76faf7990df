"""The Gluon scan of lightning attention without a GPU: its kernel in plain torch, its launcher, its users."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_longattn.kernels.dispatch import interpreting, triton_version
from hf_longattn.kernels.lightning_attention import api, reference, tiling
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs

if interpreting() or triton_version() < tiling.GLUON_VERSIONS[0]:
    pytest.skip("needs Triton's own functions, of a version that runs the kernel", allow_module_level=True)

from gluon_on_torch import emulate  # noqa: E402

from hf_longattn.kernels import common  # noqa: E402
from hf_longattn.kernels.lightning_attention import triton as triton_scan  # noqa: E402
from hf_longattn.kernels.lightning_attention import triton_gluon as gluon  # noqa: E402

SLOPES = [0.84, 0.11, 3.9e-3, 3.9e-8]
FP32_EPS = torch.finfo(torch.float32).eps
D = 128


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def make(B, T, H, G=None, state=False, dim=D):
    """(B, T, heads, dim) in memory."""
    q, k, v = (torch.randn(B, T, h, dim).bfloat16().transpose(1, 2) for h in (H, G or H, G or H))
    entering = torch.randn(B, H, dim, dim).transpose(2, 3) if state else None
    return ScanInputs(q, k, v, torch.tensor((SLOPES * H)[:H]), entering, None)


def widen(inputs):
    return ScanInputs(*(None if x is None else x.double() for x in inputs))


def block_states(inputs, segment, block, options):
    """What the Triton kernel of this name writes, from the definition."""
    rows = []
    for begin in range(0, inputs.query.shape[2], block):
        part = ScanInputs(*(x[:, :, begin : begin + block] for x in inputs[:3]), inputs.slopes, None, None)
        state = torch.empty(part.query.shape[0], inputs.slopes.shape[0], D, D)
        reference.scan(part, output_like(part), state, 1.0, options["REVERSE"], False)
        rows.append(state)
    return torch.stack(rows, 1).flatten(0, 1)


def output_like(inputs, dtype=torch.bfloat16):
    B, _, T, dim = inputs.query.shape
    return torch.full((B, T, inputs.slopes.shape[0], dim), float("nan"), dtype=dtype).transpose(1, 2)


@pytest.fixture(params=[True, False], ids=["late_reads", "late_loads"])
def on_torch(request, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=9)
    )
    monkeypatch.setattr(gluon, "block_states", block_states)
    monkeypatch.setattr(gluon, "triton_scan", lambda *a: reference.scan(*a[:6]))
    emulate(monkeypatch, [gluon, triton_scan, common], gluon, "_scan_kernel", request.param)


def compare(inputs, *, reverse=False, strict=False, final=False, dtype=torch.bfloat16, **options):
    """The output is at most 1.5 times as far from fp64 as plain torch in bf16; states keep their promise."""
    chosen = tiling.GLUON_TILINGS[D]
    output = output_like(inputs, dtype)
    state = torch.full((*output.shape[:2], D, D), float("nan")) if final else None
    gluon.scan(inputs, output, state, 0.3, reverse, strict, chosen, **options)
    exact, standard = output_like(inputs, torch.float64), output_like(inputs)
    exact_state = torch.empty(*output.shape[:2], D, D, dtype=torch.float64)
    reference.scan(widen(inputs), exact, exact_state, 0.3, reverse, strict)
    reference.scan(inputs, standard, None, 0.3, reverse, strict)
    assert error(output, exact) <= 1.5 * (error(standard, exact) + FP32_EPS)
    if final:
        # Decayed values are sums of two bf16 numbers (`rounding` of the GPU tests).
        assert error(state, exact_state) <= 1.5 * 2**-16 / 6


LENGTHS = [1, 63, 64, 65, 200, 256, 449]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("T", LENGTHS, ids="T{}".format)
def test_lengths_and_states(on_torch, T, reverse):
    compare(make(1, T, 4), reverse=reverse)
    if T >= 64:
        compare(make(2, T, 2, state=True), reverse=reverse, final=True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_segments_shared_heads_and_wide_outputs(on_torch, reverse):
    options = {"reverse": reverse, "final": True, "segments": (256, 128)}
    compare(make(1, 700, 4, 2, state=True), **options)
    compare(make(2, 512, 4, 1), dtype=torch.float32, strict=True, **options)


def test_choice_of_segments(on_torch):
    """Two heads on nine multiprocessors: four segments; only blocks in reach enter."""
    inputs = make(1, 8200, 2)._replace(slopes=torch.tensor([0.03, 1e-4]))
    compare(inputs, final=True)


def test_splits_round_what_they_say(on_torch):
    """Without the rounding of the output, which would cover it. A part of the state errs by its share."""
    inputs = make(1, 320, 4)._replace(slopes=torch.full((4,), 1e-3))
    exact, errors = output_like(inputs, torch.float64), {}
    reference.scan(widen(inputs), exact, None, 1.0, False, False)
    quarter, half = tiling.QUARTER_STATE, tiling.HALF_STATE
    for split in (0, 5, 5 + quarter, 5 + half, 6, 7):
        output = output_like(inputs, torch.float32)
        chosen = replace(tiling.GLUON_TILINGS[D], split=split)
        gluon.scan(inputs, output, None, 1.0, False, False, chosen)
        errors[split] = error(output, exact)
    # Three factors, each the sum of two bf16 numbers.
    assert errors[7] <= 1.5 * 3**0.5 * 2**-16 / 6
    assert errors[0] > max(errors[5], errors[6]) and min(errors[5], errors[6]) > 100 * errors[7]
    for split, share in ((5 + quarter, 0.75), (5 + half, 0.5)):
        assert (errors[split] / errors[5]) ** 2 == pytest.approx(share, abs=0.05)


def test_autograd_of_shared_heads(on_torch, monkeypatch):
    """The operator and its gradients, all by this kernel: those of shared heads are summed in fp32."""
    monkeypatch.setattr(triton_scan, "gluon_serves", lambda *_: True)
    inputs, weight = make(2, 140, 4, 2), torch.randn(2, 4, 140, D).bfloat16()

    def run(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
        slopes = inputs.slopes.to(torch.promote_types(dtype, torch.float32))
        output, _ = api._scan(*leaves, slopes, None, None, 0.5, api.FORWARD, False, False, backend)
        return [output, *torch.autograd.grad(output, leaves, weight.to(dtype))]

    exact = run(torch.float64, "reference")
    standard, actual = run(torch.bfloat16, "reference"), run(torch.bfloat16, "triton")
    for a, s, e in zip(actual, standard, exact, strict=True):
        assert a.shape == e.shape and error(a, e) <= 1.5 * (error(s, e) + FP32_EPS)


def serves(inputs, dtype=torch.bfloat16):
    return tiling.gluon_serves(inputs, output_like(inputs, dtype))


def test_who_is_served(monkeypatch):
    monkeypatch.setattr(tiling, "gluon_runs", lambda device: True)
    good = make(3, 256, 32)
    assert serves(good) and serves(make(3, 300, 32, 8)) and serves(make(1, 6144, 32), torch.float32)
    assert serves(good._replace(query=good.query.contiguous()))
    # Too short, too few, other dims, packed, another dtype.
    assert (
        not serves(make(3, 255, 32))
        and not serves(make(1, 6143, 32))
        and not serves(make(8, 256, 32, dim=64))
    )
    assert not serves(good._replace(value=good.value[..., :64]))
    assert not serves(good._replace(cu_seqlens=torch.tensor([0, 256])))
    assert not serves(ScanInputs(*(x.half() for x in good[:3]), *good[3:]))
    # Tiles that the hardware cannot copy: columns apart, rows that repeat, rows or bases off 16 bytes.
    odd = torch.zeros(3, 256, 32, 136, dtype=torch.bfloat16).transpose(1, 2)
    assert serves(good._replace(query=odd[..., 8:]))
    assert not serves(good._replace(query=odd[..., 1:129]))
    assert not serves(good._replace(query=odd.transpose(2, 3).contiguous().transpose(2, 3)[..., :D]))
    assert not serves(good._replace(query=good.query[:, :, :1].expand(-1, -1, 256, -1)))
    rows = torch.zeros(3, 256, 32, 129, dtype=torch.bfloat16).transpose(1, 2)[..., :D]
    assert not serves(good._replace(query=rows))


@pytest.mark.parametrize(
    ("version", "capability", "runs"),
    [((3, 6), (9, 0), True), ((3, 5), (9, 0), False), ((3, 10), (9, 0), False), ((3, 7), (10, 0), False)]
    + [((3, 7), (8, 0), False), ((), (9, 0), False)],
    ids=str,
)
def test_where_it_runs(monkeypatch, version, capability, runs):
    monkeypatch.setattr(tiling, "triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tiling.gluon_runs.__wrapped__(torch.device("cuda")) is runs
    assert not tiling.gluon_runs.__wrapped__(torch.device("cpu"))


def test_tiling_says_which_kernel():
    problem = (D, D, torch.bfloat16, 16384, 1024)
    assert tiling.choose_tiling(*problem, gluon=True) == tiling.GLUON_TILINGS[D]
    assert not tiling.choose_tiling(*problem).gluon
