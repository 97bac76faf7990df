"""Times blockwise attention on one GPU beside torch's own kernels, on the pairs that a mask leaves visible.

    python benchmarks/bench_blockwise_attention.py --deadline 170
    python benchmarks/bench_blockwise_attention.py --tune --deadline 170

Correctness against fp64 comes first: outputs and gradients, bf16 and fp16, every option, head dims 48 to 256.
A wrong kernel is not timed. `--tune` sweeps tile sizes instead. TFLOP/s count 4 operations a pair and head
dim forward and 10 backward. Rows are saved after each measurement.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _report import Report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from hf_longattn.kernels.blockwise_attention import blockwise_attention, sdpa, triton_backward, triton_forward
from hf_longattn.kernels.blockwise_attention.terms import Terms
from hf_longattn.kernels.blockwise_attention.triton_tiles import Config
from hf_longattn.kernels.key_range import KeyRange

DEVICE = "cuda"
CHECK_LENGTH = 777
LENGTH, HEADS, GROUPS = 32768, 32, 8
WARM_TURNS, TURNS = 8, 40


def positions(length: int) -> Tensor:
    return torch.arange(length, device=DEVICE, dtype=torch.int32)[None]


def masks(length: int) -> dict[str, KeyRange]:
    document = length // 8
    start = positions(length) // document * document
    return {
        "causal": KeyRange(causal=True),
        "window": KeyRange(causal=True, lower=positions(length) - document + 1),
        "packed": KeyRange(causal=True, lower=start),
        "left-padding": KeyRange(causal=True, lower=torch.full_like(start, length // 32)),
        "full": KeyRange(),
    }


def options(length: int) -> dict[str, dict]:
    sinks = torch.linspace(-2, 2, HEADS, device=DEVICE)
    plain = {name: {"mask": mask} for name, mask in masks(length).items()}
    causal = {"mask": KeyRange(causal=True)}
    return plain | {"softcap": causal | {"softcap": 30.0}, "sinks": causal | {"sinks": sinks}}


def make_inputs(length: int, head_dim: int, dtype: torch.dtype, keys: int | None = None) -> list[Tensor]:
    shapes = ((1, HEADS, length, head_dim), *[(1, GROUPS, keys or length, head_dim)] * 2)
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)
        for shape in shapes
    ]


def num_pairs(mask: KeyRange, length: int) -> int:
    lower = 0 if mask.lower is None else mask.lower.clamp(min=0).long()
    upper = positions(length).long() + 1 if mask.causal else torch.full((1, length), length, device=DEVICE)
    return int((upper - lower).clamp(min=0).sum())


def outcome(function: Callable, tensors: list[Tensor], seed: Tensor, extra: dict) -> list[Tensor]:
    """Output and gradients, those of floating extras too."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    extra = dict(extra)
    for name in ("bias", "sinks"):
        if name in extra and extra[name].is_floating_point():
            extra[name] = extra[name].to(tensors[0].dtype).detach().requires_grad_()
            leaves.append(extra[name])
    output = function(*leaves[:3], **extra)
    return [output.detach(), *torch.autograd.grad(output, leaves, seed.to(output.dtype))]


def relative_errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(got, exact, strict=True)
    ]


def sdpa_errors(tensors: list[Tensor], seed: Tensor, mask: KeyRange) -> list[float]:
    """What torch's own attention errs on the same inputs and mask."""
    length, keys = tensors[0].shape[2], tensors[1].shape[2]
    visible = mask.tile(slice(0, length), slice(0, keys), length, keys, tensors[0].device)
    # A padding row sees nothing, where SDPA's softmax is NaN: it is left out of both.
    visible = visible | ~visible.any(dim=3, keepdim=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    exact = outcome(attend, [x.double() for x in tensors], seed, {})
    return relative_errors(outcome(attend, tensors, seed, {}), exact)


def check(report: Report, case: str, tensors: list[Tensor], extra: dict, impl: str) -> bool:
    """Whether every relative error is at most 1.5 times SDPA's on the same mask, plus rounding."""
    seed = torch.randn(*tensors[0].shape, device=DEVICE)
    exact = outcome(
        lambda *x, **k: blockwise_attention(*x, **k, impl="reference")[0],
        [x.double() for x in tensors],
        seed,
        extra,
    )
    got = outcome(lambda *x, **k: blockwise_attention(*x, **k, impl=impl)[0], tensors, seed, extra)
    allowed = sdpa_errors(tensors, seed, extra["mask"])
    eps = torch.finfo(tensors[0].dtype).eps
    # Gradients of bias and sinks sum what the query's gradient is made of.
    allowed += [allowed[1]] * (len(got) - len(allowed))
    errors = relative_errors(got, exact)
    good = all(error <= 1.5 * (bound + eps) for error, bound in zip(errors, allowed, strict=True))
    report.add(section="check", case=case, impl=impl, good=good, errors=errors, sdpa=allowed)
    return good


def check_lse(report: Report, tensors: list[Tensor]) -> bool:
    """The log-sum-exp of torch's kernels, whose layout and base nobody documents."""
    exact = blockwise_attention(*(x.double() for x in tensors), mask=KeyRange(causal=True), impl="reference")[
        1
    ]
    good = True
    for impl in ("sdpa", "triton"):
        lse = blockwise_attention(*tensors, mask=KeyRange(causal=True), impl=impl)[1]
        worst = (lse.double() - exact).abs().max().item()
        good &= worst < 1e-3
        report.add(section="check", case="lse", impl=impl, good=worst < 1e-3, errors=[worst])
    return good


def check_all(report: Report) -> bool:
    good = check_lse(report, make_inputs(1024, 128, torch.bfloat16))
    bf16, length = torch.bfloat16, CHECK_LENGTH
    square = make_inputs(length, 128, bf16)
    generator = torch.Generator(DEVICE).manual_seed(1)
    bias = torch.randn(1, HEADS, length, length, generator=generator, device=DEVICE)
    causal = {"mask": KeyRange(causal=True)}
    cases = options(length) | {"bias": causal | {"bias": bias}, "dropout": causal | {"dropout": (0.2, 7)}}
    for name, extra in cases.items():
        good &= check(report, f"D128-bf16-{name}", square, extra, "triton")
    for impl in ("sdpa", "triton"):
        good &= check(report, "D128-bf16-T300-S777", make_inputs(300, 128, bf16, length), causal, impl)
    for name in ("causal", "full", "sinks"):
        good &= check(report, f"D128-bf16-{name}", square, cases[name], "sdpa")
    for head_dim in (48, 64, 80, 96, 192, 256):
        good &= check(
            report, f"D{head_dim}-bf16-window", make_inputs(length, head_dim, bf16), cases["window"], "triton"
        )
    good &= check(
        report, "D128-fp16-window", make_inputs(length, 128, torch.float16), cases["window"], "triton"
    )
    good &= check(report, "D64-fp32-causal", make_inputs(length, 64, torch.float32), causal, "triton")
    return good


def milliseconds(function: Callable) -> float:
    return do_bench(function, warmup=30, rep=150, return_mode="median")


def time_case(report: Report, case: str, *runs: tuple[Any, list[Tensor]], terms: Terms) -> None:
    """A row for each implementation and its inputs, forward and backward.

    Several are timed in turns, and each gets its median: the clock of a GPU that has just become warm is not
    that of one that has been busy for a while, which is worth several per cent.
    """
    forwards, backwards = [], []
    for module, tensors in runs:
        results = module.forward(*tensors, terms)
        grad = torch.randn_like(results[0])
        forwards.append(partial(module.forward, *tensors, terms))
        backwards.append(partial(module.backward, grad, None, tensors, results, terms))
    times = zip(*(median_times(functions) for functions in (forwards, backwards)), strict=True)
    length, head_dim = runs[0][1][0].shape[2:]
    operations = num_pairs(terms.mask, length) * head_dim * HEADS
    for (module, _), (forward, backward) in zip(runs, times, strict=True):
        report.add(
            section="time",
            case=case,
            impl=module.__name__.rsplit(".", 1)[-1],
            forward_ms=forward,
            backward_ms=backward,
            forward_tflops=4e-9 * operations / forward,
            backward_tflops=10e-9 * operations / backward,
        )


def median_times(functions: list[Callable]) -> list[float]:
    """Milliseconds of each: `do_bench`, or medians of single calls in turns, each turn the other way."""
    if not functions[1:]:
        return [milliseconds(functions[0])]
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(WARM_TURNS + TURNS):
        for index in sorted(range(len(functions)), reverse=turn % 2 == 1):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            functions[index]()
            stop.record()
            stop.synchronize()
            times[index].append(start.elapsed_time(stop))
    return [statistics.median(calls[WARM_TURNS:]) for calls in times]


class TritonKernels:
    """The two Triton modules as one, as the operator sees them."""

    __name__ = "triton"
    forward, backward = staticmethod(triton_forward.forward), staticmethod(triton_backward.backward)


class FlashKernels:
    """ATen's flash kernel in place of cuDNN."""

    __name__ = "flash"

    @staticmethod
    def forward(*args) -> tuple[Tensor, Tensor]:
        with without_cudnn():
            return sdpa.forward(*args)

    @staticmethod
    def backward(*args):
        with without_cudnn():
            return sdpa.backward(*args)


class PlainTorch:
    """`scaled_dot_product_attention` as a user of torch calls it, by cuDNN, with its autograd."""

    __name__ = "torch-cudnn"

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),)

    @staticmethod
    def backward(grad: Tensor, _: None, tensors: list[Tensor], results: tuple, terms: Terms) -> None:
        torch.autograd.grad(results[0], tensors, grad, retain_graph=True)


class without_cudnn:
    """Makes `sdpa` take the flash kernel."""

    def __enter__(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)


def time_all(report: Report, head_dims: list[int]) -> None:
    for head_dim in head_dims:
        tensors = make_inputs(LENGTH, head_dim, torch.bfloat16)
        for name, extra in options(LENGTH).items():
            if name == "full" or (head_dim == 64 and name not in ("causal", "window", "packed")):
                continue
            terms = Terms(1 / math.sqrt(head_dim), **extra)
            if report.time_left() < 8:
                return
            if name == "causal":
                leaves = [tensor.clone().requires_grad_() for tensor in tensors]
                time_case(report, f"D{head_dim}-{name}", (sdpa, tensors), (PlainTorch, leaves), terms=terms)
                time_case(report, f"D{head_dim}-{name}", (FlashKernels, tensors), terms=terms)
            time_case(report, f"D{head_dim}-{name}", (TritonKernels(), tensors), terms=terms)


def peak_memory(report: Report) -> None:
    """Bytes a token above the inputs, forward and backward with a window: flat if memory is linear."""
    for length in (8192, 16384, 32768, 65536):
        if report.time_left() < 4:
            return
        tensors = [x.requires_grad_() for x in make_inputs(length, 128, torch.bfloat16)]
        mask = KeyRange(causal=True, lower=positions(length) - 1023)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        blockwise_attention(*tensors, mask=mask)[0].sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        report.add(section="memory", case=f"T{length}", bytes_per_token=peak / length)


FORWARD_TILES = {
    128: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3),
          (64, 128, 4, 2), (128, 64, 4, 3)],
    64: [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3),
         (128, 64, 4, 3)],
    256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)],
}  # fmt: skip
DKDV_TILES = {
    128: [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2),
          (128, 64, 8, 2), (128, 128, 8, 2)],
    64: [(64, 128, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2),
         (32, 128, 4, 3)],
    256: [(32, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 3), (16, 64, 4, 2)],
}  # fmt: skip
DQ_TILES = {
    128: [(128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
          (128, 128, 8, 2)],
    64: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2)],
    256: [(128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
}  # fmt: skip


def tune(report: Report, head_dim: int, length: int = 16384) -> None:
    """Times every tiling of every kernel on a windowed causal mask."""
    tensors = make_inputs(length, head_dim, torch.bfloat16)
    terms = Terms(1 / math.sqrt(head_dim), KeyRange(causal=True, lower=positions(length) - length // 2))
    results = triton_forward.forward(*tensors, terms=terms)
    prepared = triton_backward.prepare(torch.randn_like(results[0]), None, tensors, results, terms)
    kernels = {
        "forward": (FORWARD_TILES, lambda c: triton_forward.forward(*tensors, terms=terms, config=c)),
        "dkdv": (DKDV_TILES, lambda c: triton_backward.run_dkdv(prepared, terms, c)),
        "dq": (DQ_TILES, lambda c: triton_backward.run_dq(prepared, c)),
    }
    for kernel, (tiles, launch) in kernels.items():
        tune_kernel(report, kernel, head_dim, [Config(*c) for c in tiles[head_dim]], launch)


def tune_kernel(report: Report, kernel: str, head_dim: int, configs: list[Config], launch: Callable) -> None:
    best = None
    for config in configs:
        if report.time_left() < 5:
            return
        try:
            time = milliseconds(lambda: launch(config))  # noqa: B023
        except RuntimeError as error:
            report.add(
                section="tune", case=f"D{head_dim}-{kernel}", config=list(config), failed=str(error)[:80]
            )
            continue
        report.add(section="tune", case=f"D{head_dim}-{kernel}", config=list(config), ms=time)
        best = min(best or (time, config), (time, config))
    if best:
        report.add(section="best", case=f"D{head_dim}-{kernel}", config=list(best[1]), ms=best[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deadline", type=float, default=170)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--skip-check", action="store_true", help="only to look at a kernel that is known to be right"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64], help="of those that are timed")
    arguments = parser.parse_args()
    report = Report(
        "blockwise_attention_tune" if arguments.tune else "blockwise_attention", arguments.deadline
    )
    if arguments.tune:
        for head_dim in (128, 64, 256):
            tune(report, head_dim)
        return
    if not arguments.skip_check and not check_all(report):
        sys.exit("A kernel is wrong: see the rows with good=False. Nothing was timed.")
    time_all(report, arguments.head_dims)
    peak_memory(report)


if __name__ == "__main__":
    main()
