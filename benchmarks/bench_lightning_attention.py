"""Times lightning attention on one GPU against the memory it must move, and against its peers.

    python benchmarks/bench_lightning_attention.py --sections check,forward,backward --deadline 200

Correctness against fp64 comes first, and a wrong kernel is not timed. `--tune` sweeps the tilings instead.
Rows are saved to `$OUT/lightning_attention.json` after each measurement, so that a deadline loses nothing.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
import triton.errors
from triton.testing import do_bench, do_bench_cudagraph

from hf_longattn.kernels.lightning_attention import lightning_attention, lightning_attention_step
from hf_longattn.kernels.lightning_attention import triton as kernels
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs
from hf_longattn.kernels.lightning_attention.tiling import Tiling

START = time.time()
# (B, H, T, D), target in milliseconds.
FORWARD = [
    ((512, 32, 1024, 128), 5.95),
    ((32, 32, 16384, 128), 5.95),
    ((8, 32, 65536, 128), 5.95),
    ((1, 32, 524288, 128), 7.1),
    ((32, 32, 16384, 64), 2.95),
    ((1, 32, 524288, 64), 3.6),
    ((1, 32, 16384, 128), 0.22),
    ((1, 32, 1024, 128), 0.033),
]
BACKWARD = [
    ((256, 32, 1024, 128), 13.5),
    ((16, 32, 16384, 128), 13.5),
    ((1, 32, 262144, 128), 16.0),
    ((4, 32, 131072, 64), 13.5),
    ((1, 32, 1024, 128), None),
]
DECODE = [((1, 64, 1, 128), 6e-3), ((16, 64, 1, 128), 50e-3), ((256, 64, 1, 128), 780e-3)]


class Rows:
    """The measurements, saved after each."""

    def __init__(self, folder: Path, deadline: float):
        self.path, self.deadline, self.rows = folder / "lightning_attention.json", deadline, []
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        self.machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": commit,
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python", *sys.argv]),
        }

    def late(self, seconds=5.0):
        return time.time() - START + seconds > self.deadline

    def add(self, **row):
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1))

    def attempt(self, label, function, *args):
        """Runs one measurement; what goes wrong in it becomes a row, and the others go on."""
        if self.late():
            return self.add(**label, error="deadline")
        try:
            return function(*args)
        except (RuntimeError, ValueError, TypeError, triton.errors.TritonError) as error:
            return self.add(**label, error=f"{type(error).__name__}: {error}"[:300])
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def tnl_slopes(heads, layer=0, layers=24):
    """TransNormerLLM's slopes: 2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)."""
    base = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device="cuda", dtype=torch.float64) / heads)
    return (base * (1 - layer / (layers - 1) + 1e-5)).float()


def inputs(case, dtype=torch.bfloat16, grad=False):
    """Query, key, value as a model makes them: (B, T, H, D) in memory, (B, H, T, D) to the eye."""
    batch, heads, length, dim = case
    shape = (batch, length, heads, dim)
    tensors = [torch.randn(shape, device="cuda", dtype=dtype).mul_(dim**-0.25) for _ in range(3)]
    return [x.transpose(1, 2).requires_grad_(grad) for x in tensors]


def name(case):
    return "B{}-H{}-T{}-D{}".format(*case)


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def milliseconds(function, graph=False, rep=100):
    """Median time; small problems in a CUDA graph, where the launches do not count."""
    if graph:
        return do_bench_cudagraph(function, rep=20, return_mode="median")
    return do_bench(function, warmup=25, rep=rep, return_mode="median")


def peak(function):
    """GiB at the peak of a call, everything alive included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() / 2**30


def check_case(rows, case, dtype, heads_kv, **options):
    """Output and gradients against fp64; returns whether every error stays within its bound."""
    q, k, v = inputs(case, dtype, grad=True)
    k, v = (x.detach()[:, :heads_kv].requires_grad_() for x in (k, v))
    slopes = tnl_slopes(case[1])
    grad = torch.randn_like(q)
    output = lightning_attention(q, k, v, slopes, **options)
    grads = torch.autograd.grad(output, (q, k, v), grad)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = lightning_attention(*wide, slopes.double(), impl="reference", **options)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    errors = [error(output, expected), *(error(a, b) for a, b in zip(grads, expected_grads, strict=True))]
    # The standard: plain torch in fp32 on the same inputs, rounded to the dtype at the end.
    standard = lightning_attention(q, k, v, slopes, impl="reference", **options)
    standard = [standard, *torch.autograd.grad(standard, (q, k, v), grad)]
    reached = [error(a, b) for a, b in zip(standard, (expected, *expected_grads), strict=True)]
    bounds = [1.5 * (x + torch.finfo(torch.float32).eps) for x in reached]
    good = all(a <= b for a, b in zip(errors, bounds, strict=True))
    rows.add(
        section="check", case=name(case), dtype=str(dtype), kv=heads_kv, options=str(sorted(options)),
        o=errors[0], dq=errors[1], dk=errors[2], dv=errors[3], good=good,
    )  # fmt: skip
    return good


def check_split(rows):
    """The forward error for each choice of what is rounded."""
    case = (1, 32, 4096, 128)
    q, k, v = inputs(case)
    slopes = tnl_slopes(32)
    expected = lightning_attention(q.double(), k.double(), v.double(), slopes.double(), impl="reference")
    for split in range(8):
        output = torch.empty_like(q)
        scan_with(q, k, v, slopes, output, dataclasses.replace(TILINGS[0], split=split))
        rows.add(section="split", case=name(case), split=split, o=error(output, expected))


def check_states(rows):
    """Segments, hand-over of the state, packing, and a million steps."""
    q, k, v = inputs((1, 8, 65536 + 77, 64), torch.float32)
    slopes = tnl_slopes(8)
    slopes[-1] = 3.9e-8
    state = torch.randn(1, 8, 64, 64, device="cuda")
    wide = [x.double() for x in (q, k, v, slopes)]
    expected = lightning_attention(
        *wide, initial_state=state.double(), output_final_state=True, impl="reference"
    )
    for segments in ((kernels.triton.cdiv(q.shape[2], 64) * 64, 512), (16384, 512), (4096, 1024)):
        output, left = torch.empty_like(q), torch.empty_like(state)
        kernels.scan(
            ScanInputs(q, k, v, slopes, state, None), output, left, 1.0, False, False, None, segments
        )
        rows.add(
            section="segments",
            segments=str(segments),
            o=error(output, expected[0]),
            state=error(left, expected[1]),
        )
    bounds = torch.tensor([0, 1, 1, 5000, 5063, 40000, q.shape[2]], device="cuda")
    packed = lightning_attention(q, k, v, slopes, cu_seqlens=bounds)
    expected = lightning_attention(*wide, cu_seqlens=bounds, impl="reference")
    rows.add(section="packed", o=error(packed, expected))


def check_million_steps(rows):
    """Relative error of the state after a million single steps in a replayed graph."""
    count, inner = 1 << 20, 64
    slopes = torch.tensor([0.84, 3.9e-3, 3.9e-5, 3.9e-8], device="cuda")
    q, k, v = (torch.randn(1, 4, inner, 16, device="cuda") for _ in range(3))
    state = torch.zeros(1, 4, 16, 16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    one = lambda t: [x[:, :, t : t + 1] for x in (q, k, v)]  # noqa: E731
    lightning_attention_step(*one(0), slopes, state.clone())
    with torch.cuda.graph(graph):
        for t in range(inner):
            lightning_attention_step(*one(t), slopes, state)
    state.zero_()
    for _ in range(count // inner):
        graph.replay()
    wide = lightning_attention(
        *(x.double() for x in (q, k, v, slopes)), output_final_state=True, impl="reference"
    )[1]
    # Periodic inputs: the sum over the periods is a geometric series.
    exponent = -slopes.double()
    factor = torch.expm1(exponent * count) / torch.expm1(exponent * inner)
    exact = wide * factor[:, None, None]
    rows.add(section="million steps", errors=[f"{error(state[:, h], exact[:, h]):.2e}" for h in range(4)])


def section_check(rows):
    good = True
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case, heads_kv in (((1, 32, 1000, 128), 32), ((2, 8, 500, 64), 2)):
            good &= check_case(rows, case, dtype, heads_kv)
    good &= check_case(rows, (1, 4, 20001, 128), torch.bfloat16, 4)
    good &= check_case(rows, (1, 4, 1000, 96), torch.bfloat16, 4, causal=False)
    good &= check_case(rows, (1, 4, 500, 256), torch.bfloat16, 4)
    for function in (check_split, check_states, check_million_steps):
        rows.attempt({"section": "check", "name": function.__name__}, function, rows)
    if not good:
        raise SystemExit("wrong results: not timed")


def copy_time(case, passes):
    """The floor: the time to move `passes` tensors of the case, at the speed of a plain copy."""
    source = torch.randn(case, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source)) * passes / 2


def section_forward(rows):
    for case, target in FORWARD:
        rows.attempt({"section": "forward", "case": name(case)}, time_forward, rows, case, target)


def time_forward(rows, case, target):
    q, k, v = inputs(case)
    slopes = tnl_slopes(case[1])
    small = case[0] * case[2] <= 16384
    floor = copy_time(case, 4)
    ms = milliseconds(lambda: lightning_attention(q, k, v, slopes), small)
    rows.add(section="forward", case=name(case), ms=ms, target=target, floor=floor, graph=small)
    if case[0] == 1 and not small:
        slow = tnl_slopes(case[1], layer=23)
        ms = milliseconds(lambda: lightning_attention(q, k, v, slow))
        rows.add(section="forward, last layer's slopes", case=name(case), ms=ms, floor=floor)


def section_backward(rows):
    for case, target in BACKWARD:
        rows.attempt({"section": "backward", "case": name(case)}, time_backward, rows, case, target)


def time_backward(rows, case, target):
    q, k, v = inputs(case, grad=True)
    slopes = tnl_slopes(case[1])
    grad = torch.randn_like(q)
    run = lambda: torch.autograd.grad(lightning_attention(q, k, v, slopes), (q, k, v), grad)  # noqa: E731
    small = case[0] * case[2] <= 16384
    ms = milliseconds(run, False)
    row = {"gib": peak(run), "gib_inputs_and_outputs": 8 * q.numel() * q.element_size() / 2**30}
    if small:
        row["graph_ms"] = milliseconds(run, True)
    rows.add(section="backward", case=name(case), ms=ms, target=target, floor=copy_time(case, 14), **row)


def section_decode(rows):
    for case, target in DECODE:
        rows.attempt({"section": "decode", "case": name(case)}, time_decode, rows, case, target)


def time_decode(rows, case, target):
    q, k, v = inputs(case)
    slopes = tnl_slopes(case[1])
    state = torch.zeros(case[0], case[1], case[3], case[3], device="cuda")
    other = torch.empty_like(state)
    floor = do_bench_cudagraph(lambda: other.copy_(state), rep=20, return_mode="median")
    ms = do_bench_cudagraph(
        lambda: lightning_attention_step(q, k, v, slopes, state), rep=20, return_mode="median"
    )
    rows.add(section="decode", case=name(case), ms=ms, target=target, floor=floor)


def section_peers(rows):
    for case, _ in FORWARD:
        rows.attempt({"section": "peers", "case": name(case)}, time_peers, rows, case, False)
    for case, _ in BACKWARD:
        rows.attempt({"section": "peers", "case": name(case)}, time_peers, rows, case, True)


def time_peers(rows, case, grad):
    """flash-linear-attention where it is installed, and softmax attention by cuDNN where it is affordable."""
    q, k, v = inputs(case, grad=grad)
    slopes = tnl_slopes(case[1])
    runs = {}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        rows.add(section="peers", case=name(case), error="fla-core is not installed")
    else:
        flat = [x.transpose(1, 2) for x in (q, k, v)]
        runs["fla chunk_simple_gla"] = lambda: chunk_simple_gla(*flat, g_gamma=-slopes, scale=1.0)[0]
    if case[0] * case[1] * case[2] ** 2 * case[3] * 2 < 6e13:
        runs["softmax, cuDNN"] = lambda: softmax_attention(q, k, v)
    for peer, forward in runs.items():
        weight = torch.ones_like(forward())
        call = (lambda f=forward, w=weight: torch.autograd.grad(f(), (q, k, v), w)) if grad else forward
        ms = milliseconds(call, rep=60)
        rows.add(section="peers", case=name(case), peer=peer, backward=grad, ms=ms, gib=peak(call))


def softmax_attention(q, k, v):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


TILINGS = [
    Tiling(64, 64, 4, 4, 7),
    Tiling(64, 64, 4, 4, 0),
    Tiling(64, 64, 4, 4, 3),
    Tiling(64, 64, 4, 4, 6),
    Tiling(64, 64, 4, 3, 7),
    Tiling(64, 64, 4, 2, 7),
    Tiling(64, 64, 4, 2, 6),
    Tiling(64, 64, 8, 4, 7),
    Tiling(64, 64, 8, 2, 7),
    Tiling(64, 32, 4, 4, 7),
    Tiling(64, 32, 4, 3, 7),
    Tiling(64, 32, 4, 2, 7),
    Tiling(64, 128, 8, 2, 7),
    Tiling(64, 128, 8, 3, 7),
    Tiling(128, 64, 8, 2, 7),
    Tiling(32, 64, 4, 4, 7),
]


def scan_with(q, k, v, slopes, output, tiling, segments=None, reverse=False):
    kernels.scan(ScanInputs(q, k, v, slopes, None, None), output, None, 1.0, reverse, False, tiling, segments)


def section_tune(rows):
    """Every tiling at the head dims that count, then the cut into segments at batch 1."""
    for case in ((32, 32, 16384, 128), (32, 32, 16384, 64)):
        rows.attempt({"section": "tune", "case": name(case)}, tune_tiling, rows, case, TILINGS)
    narrow = [Tiling(64, b, w, s, 7) for b in (16, 32, 64) for w, s in ((4, 4), (4, 2))]
    rows.attempt({"section": "tune", "case": "short"}, tune_tiling, rows, (1, 32, 1024, 128), narrow)
    for case in ((1, 32, 524288, 128), (1, 32, 524288, 64), (1, 32, 16384, 128)):
        rows.attempt({"section": "tune segments", "case": name(case)}, tune_segments, rows, case)


def tune_tiling(rows, case, tilings):
    q, k, v = inputs(case)
    slopes, output = tnl_slopes(case[1]), torch.empty_like(q)
    small = case[0] * case[2] <= 16384
    for tiling in tilings:
        for reverse in (False, True) if tiling is tilings[0] else (False,):
            label = {"section": "tune", "case": name(case), "tiling": str(tiling), "reverse": reverse}
            time_one = lambda t=tiling, r=reverse, l=label: rows.add(  # noqa: E731
                **l, ms=milliseconds(lambda: scan_with(q, k, v, slopes, output, t, None, r), small)
            )
            rows.attempt(label, time_one)


def tune_segments(rows, case):
    q, k, v = inputs(case)
    slopes, output = tnl_slopes(case[1]), torch.empty_like(q)
    small = case[0] * case[2] <= 16384
    for tiling in (TILINGS[0], TILINGS[5], TILINGS[9]):
        for count in (1, 2, 4, 8, 16):
            for block in (512, 1024, 4096):
                tokens = case[2] // count
                if block > tokens or (count == 1 and block > 512) or tokens // block > 128:
                    continue
                label = {
                    "section": "segments",
                    "case": name(case),
                    "tiling": str(tiling),
                    "cut": f"{count}x{block}",
                }
                time_one = lambda t=tiling, s=(tokens, block), l=label: rows.add(  # noqa: E731
                    **l, ms=milliseconds(lambda: scan_with(q, k, v, slopes, output, t, s), small, rep=50)
                )
                rows.attempt(label, time_one)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", default="check,forward,backward,decode,peers")
    parser.add_argument("--tune", action="store_true", help="only sweep the tilings")
    parser.add_argument(
        "--deadline", type=float, default=200.0, help="seconds after which nothing new starts"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmarks/results")))
    args = parser.parse_args()
    rows = Rows(args.out, args.deadline)
    for section in ["tune"] if args.tune else args.sections.split(","):
        rows.attempt({"section": section}, globals()[f"section_{section}"], rows)
    print(f"{time.time() - START:.0f} s, saved to {rows.path}")


if __name__ == "__main__":
    main()
