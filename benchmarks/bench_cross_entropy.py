"""Times the cross-entropy on one GPU beside torch's, Liger's where it is installed, and a copy of the logits.

    python benchmarks/bench_cross_entropy.py --deadline 90
    TRITON_INTERPRET=1 python benchmarks/bench_cross_entropy.py --check    tiny shapes, on a CPU

Losses and gradients are held against fp64 first, and a wrong kernel is not timed. What is timed is the summed
loss of n rows of V logits in bf16 with its gradient, or alone. `torch` takes it of an fp32 copy and goes
backward, as models of transformers do; `liger` writes the gradient over the logits, as `in place` does. The
floor reads every logit once and writes every gradient once, at the rate of a copy of the same logits in the
same run. Times of `--check` mean nothing.
"""

import argparse
import gc
import importlib.util
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from _report import Report
from triton.testing import do_bench

from hf_longattn.kernels.cross_entropy import cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter reads bf16 wrongly.
HALF = torch.bfloat16 if CUDA else torch.float16
SHAPES = [(8192, 32000), (2048, 128256), (5000, 50304), (4096, 262144)]
TINY = [(4, 300), (2, 9001)]
# (dtype, n, V, label smoothing); one step of the kernel is 4096 columns in fp32 and 8192 in 16 bits.
CHECKS = [(HALF, n, V, e) for n, V in ((128, 32000), (32, 128256), (3, 262144)) for e in (0.0, 0.1)]
CHECKS += [(HALF, 32, 50257, 0.0), (torch.float16, 64, 32000, 0.0)]
CHECKS += [(torch.float32, 64, 32000, 0.0), (torch.float32, 32, 128256, 0.1)]
TINY_CHECKS = [(dtype, n, V, e) for dtype in (HALF, torch.float32) for n, V in TINY for e in (0.0, 0.1)]


def make(n, V, dtype=HALF):
    """Logits with a standard deviation of 4, and targets."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(n, V, generator=generator, device=DEVICE, dtype=dtype).mul_(4)
    return logits, torch.randint(V, (n,), generator=generator, device=DEVICE)


# ---- correctness


def by_torch(logits, targets, smoothing, dtype):
    """Losses, and the gradient of their sum, taken in `dtype`."""
    leaf = logits.detach().to(dtype, copy=True).requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def relative(result, exact):
    """‖result - exact‖ / ‖exact‖, in fp64; infinite where it is NaN."""
    error = ((result.double() - exact).norm() / exact.norm()).item()
    return math.inf if math.isnan(error) else error


def check_case(report, dtype, n, V, smoothing):
    """Whether losses and gradient err at most 1.5 times as much as torch in fp32, and one rounding."""
    logits, targets = make(n, V, dtype)
    if not smoothing:
        # As of a masked vocabulary.
        logits[0, : V // 2], targets[0] = -math.inf, V - 1
    exact = by_torch(logits, targets, smoothing, torch.float64)
    losses, gradient = by_torch(logits, targets, smoothing, torch.float32)
    standard = [relative(*pair) for pair in zip((losses, gradient.to(dtype)), exact, strict=True)]
    options = {"label_smoothing": smoothing, "impl": "triton"}
    alone, _ = cross_entropy(logits, targets, **options)
    apart = cross_entropy(logits, targets, gradient=True, **options)
    inside = cross_entropy(logits, targets, gradient=True, overwrite=True, **options)
    errors = [max(relative(found[i], exact[i]) for found in (apart, inside)) for i in range(2)]
    errors[0] = max(errors[0], relative(alone, exact[0]))
    roundings = (torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    bounds = [1.5 * (error + eps) for error, eps in zip(standard, roundings, strict=True)]
    good = all(error <= bound < math.inf for error, bound in zip(errors, bounds, strict=True))
    good &= inside[1].data_ptr() == logits.data_ptr()
    report.add(
        section="check", case=f"n{n}-V{V}", dtype=str(dtype).removeprefix("torch."), smoothing=smoothing,
        loss=errors[0], standard_loss=standard[0], gradient_error=errors[1], standard_gradient=standard[1],
        good=good,
    )  # fmt: skip
    return good


def check(report, tiny):
    """Every check; refuses to go on where one fails."""
    results = [check_case(report, *case) for case in (TINY_CHECKS if tiny else CHECKS)]
    if not all(results):
        raise SystemExit(f"{results.count(False)} of {len(results)} are wrong: nothing is timed")


# ---- times


def ours(logits, targets, **options):
    """The summed loss, and the gradient or None."""
    losses, gradient = cross_entropy(logits, targets, impl="triton", **options)
    return losses.sum(), gradient


def by_fp32_copy(logits, targets):
    """The summed loss as models of transformers take it, and its gradient."""
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf.float(), targets, reduction="sum")
    return loss, torch.autograd.grad(loss, leaf)[0]


def alone_by_fp32_copy(logits, targets):
    """The summed loss of an fp32 copy."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def by_liger(logits, targets):
    """The summed loss and its gradient as Liger takes them, over the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    leaf = logits.detach().requires_grad_()
    loss = liger_cross_entropy(leaf, targets, reduction="sum")
    return loss, torch.autograd.grad(loss, leaf)[0]


def peers():
    """(peer, where the gradient is, function), those that write over the logits last."""
    yield "torch", "none", alone_by_fp32_copy
    yield "kernel", "none", ours
    yield "torch", "apart", by_fp32_copy
    yield "kernel", "apart", partial(ours, gradient=True)
    yield "kernel", "in place", partial(ours, gradient=True, overwrite=True)
    if CUDA and importlib.util.find_spec("liger_kernel") is not None:
        yield "liger", "in place", by_liger


def milliseconds(call):
    """The median of many calls, caches flushed before each; of one on a CPU."""
    if not CUDA:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    return do_bench(call, warmup=50, rep=150, return_mode="median")


def extra_gib(call):
    """GiB that a call takes at its peak beyond what was there before."""
    if not CUDA:
        return 0.0
    call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_rate(logits):
    """Bytes a second, read and written, of a copy of the logits."""
    target = torch.empty_like(logits)
    return 2 * logits.nbytes / (1e-3 * milliseconds(lambda: target.copy_(logits)))


def time_shape(report, n, V):
    """A row a peer."""
    logits, targets = make(n, V)
    rate = copy_rate(logits)
    for peer, gradient, function in peers():
        if report.time_left() < 5:
            return
        call = partial(function, logits, targets)
        gib, ms = extra_gib(call), milliseconds(call)
        moved = logits.nbytes * (1 if gradient == "none" else 2)
        floor = 1e3 * moved / rate
        report.add(
            section="time", case=f"n{n}-V{V}", peer=peer, gradient=gradient, ms=ms, floor=floor,
            over_floor=ms / floor, extra_gib=gib, copy_rate=rate,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="correctness, and rows of tiny shapes")
    parser.add_argument("--deadline", type=float, default=90, help="seconds after which nothing is begun")
    arguments = parser.parse_args()
    report = Report("cross_entropy", arguments.deadline)
    check(report, arguments.check)
    for n, V in TINY if arguments.check else SHAPES:
        gc.collect()
        time_shape(report, n, V)


if __name__ == "__main__":
    main()
