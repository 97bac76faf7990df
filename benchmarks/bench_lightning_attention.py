"""Times lightning attention on one GPU against the memory it must move, and against its peers.

    python benchmarks/bench_lightning_attention.py --sections check,shipped,peers --deadline 200
    python benchmarks/bench_lightning_attention.py --best --deadline 270
    python benchmarks/bench_lightning_attention.py --sections steps --deadline 90

Correctness against fp64 comes first, and a wrong kernel is not timed. `--best` searches the tilings of every
case, the most important first; one row a case (`role` best) holds the fastest that keeps the error's target.
Without a GPU, `TRITON_INTERPRET=1` and `--best` walk through tiny cases in fp32; their times mean nothing.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import triton.errors
from _report import Report
from triton.testing import do_bench, do_bench_cudagraph

from hf_longattn.kernels.lightning_attention import lightning_attention, lightning_attention_step
from hf_longattn.kernels.lightning_attention import triton as kernels
from hf_longattn.kernels.lightning_attention import triton_step as step_kernels
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs
from hf_longattn.kernels.lightning_attention.tiling import GLUON_TILINGS, Tiling, choose_tiling, gluon_serves

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
LONG = (32, 32, 16384, 128)
# Where errors are measured, what the output's may be in bf16, and what only a broken kernel passes.
ERROR_CASE = (1, 32, 4096, 128) if CUDA else (1, 2, 200, 16)
ERROR_TARGET, BROKEN = 2.0e-3, 4.0e-3


class Rows(Report):
    """Rows, some of which may fail."""

    def attempt(self, label: dict, function: Callable, *args):
        """Runs one measurement; what goes wrong in it becomes a row, and the others go on."""
        if self.time_left() < 5:
            return self.add(**label, error="deadline")
        try:
            return function(*args)
        except (RuntimeError, ValueError, TypeError, triton.errors.TritonError) as error:
            return self.add(**label, error=f"{type(error).__name__}: {error}"[:300])
        finally:
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()


def tnl_slopes(heads, layer=0, layers=24):
    """TransNormerLLM's slopes: 2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)."""
    base = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=DEVICE, dtype=torch.float64) / heads)
    return (base * (1 - layer / (layers - 1) + 1e-5)).float()


def inputs(case, dtype=DTYPE, grad=False):
    """Query, key, value as a model makes them: (B, T, H, D) in memory, (B, H, T, D) to the eye."""
    batch, heads, length, dim = case
    shape = (batch, length, heads, dim)
    tensors = [torch.randn(shape, device=DEVICE, dtype=dtype).mul_(dim**-0.25) for _ in range(3)]
    return [x.transpose(1, 2).requires_grad_(grad) for x in tensors]


def name(case):
    return "B{}-H{}-T{}-D{}".format(*case)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def milliseconds(function, graph=False, rep=100):
    """Median time; small problems in a CUDA graph, where the launches do not count."""
    if not CUDA:
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    if graph:
        return do_bench_cudagraph(function, rep=20, return_mode="median")
    # Long enough for the clock to rise again after the compiler kept the GPU waiting.
    return do_bench(function, warmup=100, rep=rep, return_mode="median")


def peak(function):
    """GiB at the peak of a call, everything alive included."""
    if not CUDA:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() / 2**30


def check_case(rows, case, dtype, heads_kv, **options):
    """Output and gradients against fp64; returns the worst error in units of its standard."""
    q, k, v = inputs(case, dtype, grad=True)
    k, v = (x.detach()[:, :heads_kv].requires_grad_() for x in (k, v))
    slopes = tnl_slopes(case[1])
    grad = torch.randn_like(q)
    output = lightning_attention(q, k, v, slopes, **options)
    grads = torch.autograd.grad(output, (q, k, v), grad)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = lightning_attention(*wide, slopes=slopes.double(), impl="reference", **options)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    errors = [error(output, expected), *(error(a, b) for a, b in zip(grads, expected_grads, strict=True))]
    # The standard: plain torch in fp32 on the same inputs, rounded to the dtype at the end.
    standard = lightning_attention(q, k, v, slopes, impl="reference", **options)
    standard = [standard, *torch.autograd.grad(standard, (q, k, v), grad)]
    reached = [error(a, b) for a, b in zip(standard, (expected, *expected_grads), strict=True)]
    eps = torch.finfo(torch.float32).eps
    ratio = max(a / (b + eps) for a, b in zip(errors, reached, strict=True))
    rows.add(
        section="check", case=name(case), dtype=str(dtype), kv=heads_kv, options=str(sorted(options)),
        o=errors[0], dq=errors[1], dk=errors[2], dv=errors[3], ratio=ratio, good=ratio <= 1.5,
    )  # fmt: skip
    return ratio


def check_split(rows):
    """The forward error for each choice of what is rounded, with the tiling that ships."""
    for split in (0, 3, 5, 6, 7):
        tiling = replace(shipped_tiling(LONG), split=split)
        rows.add(section="split", case=name(ERROR_CASE), split=split, o=output_error(tiling, 128))


def check_states(rows):
    """Segments, hand-over of the state, packing, and a million steps."""
    q, k, v = inputs((1, 8, 65536 + 77, 64), torch.float32)
    slopes = tnl_slopes(8)
    slopes[-1] = 3.9e-8
    state = torch.randn(1, 8, 64, 64, device=DEVICE)
    wide = [x.double() for x in (q, k, v, slopes)]
    options = {"initial_state": state.double(), "output_final_state": True}
    expected = lightning_attention(*wide, **options, impl="reference")
    for segments in ((kernels.triton.cdiv(q.shape[2], 64) * 64, 512), (16384, 512), (4096, 1024)):
        output, left = torch.empty_like(q), torch.empty_like(state)
        kernels.scan(
            ScanInputs(q, k, v, slopes, state, None), output, left, 1.0, False, False, None, segments
        )
        errors = {"o": error(output, expected[0]), "state": error(left, expected[1])}
        rows.add(section="segments", segments=str(segments), **errors)
    bounds = torch.tensor([0, 1, 1, 5000, 5063, 40000, q.shape[2]], device=DEVICE)
    packed = lightning_attention(q, k, v, slopes, cu_seqlens=bounds)
    expected = lightning_attention(*wide, cu_seqlens=bounds, impl="reference")
    rows.add(section="packed", o=error(packed, expected))


def check_million_steps(rows):
    """Relative error of the state after a million single steps in a replayed graph."""
    count, inner = 1 << 20, 64
    slopes = torch.tensor([0.84, 3.9e-3, 3.9e-5, 3.9e-8], device=DEVICE)
    q, k, v = (torch.randn(1, 4, inner, 16, device=DEVICE) for _ in range(3))
    state = torch.zeros(1, 4, 16, 16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    one = lambda t: [x[:, :, t : t + 1] for x in (q, k, v)]  # noqa: E731
    lightning_attention_step(*one(0), slopes=slopes, state=state.clone())
    with torch.cuda.graph(graph):
        for t in range(inner):
            lightning_attention_step(*one(t), slopes=slopes, state=state)
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
    cases = (((1, 32, 1000, 128), 32), ((2, 8, 500, 64), 2))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    ratios = [check_case(rows, case, dtype, heads) for dtype in dtypes for case, heads in cases]
    ratios.append(check_case(rows, (1, 4, 20001, 128), torch.bfloat16, 4))
    ratios.append(check_case(rows, (1, 4, 1000, 96), torch.bfloat16, 4, causal=False))
    ratios.append(check_case(rows, (1, 4, 500, 256), torch.bfloat16, 4))
    for function in (check_split, check_states, check_million_steps):
        rows.attempt({"section": "check", "name": function.__name__}, function, rows)
    refuse(ratios, 1.5)


def section_quick(rows):
    """What `--best` stands on: every kind of kernel once, and what rounding costs."""
    cases = [((1, 32, 1000, 128), DTYPE, 32), ((2, 8, 500, 64), DTYPE, 2), ((1, 4, 20001, 128), DTYPE, 4)]
    ratios = [check_case(rows, *case) for case in (cases if CUDA else [((1, 2, 80, 16), DTYPE, 1)])]
    if CUDA:
        rows.attempt({"section": "split"}, check_split, rows)
    # A tiling may miss the bar by a rounding, and the search finds another; a wrong kernel misses it by far.
    refuse(ratios, 3.0)


def refuse(ratios, bound):
    """Ends the run where a result is further from fp64 than `bound` times plain torch in fp32."""
    if not max(ratios) <= bound:
        raise SystemExit("wrong results: not timed")


def copy_time(case, passes, small=False):
    """The floor: the time to move `passes` tensors of the case, at the speed of a plain copy."""
    source = torch.randn(case, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), small) * passes / 2


def section_shipped(rows):
    """Every goal as the package runs it."""
    for goal in GOALS if CUDA else SMOKE_GOALS:
        rows.attempt({"section": goal.kind, "case": name(goal.case)}, time_shipped, rows, goal)


def time_shipped(rows, goal):
    one = Search(rows, goal)
    one.time(one.shipped, "shipped")


def section_peers(rows):
    for goal in GOALS:
        if goal.kind != "decode":
            label = {"section": "peers", "case": name(goal.case)}
            rows.attempt(label, time_peers, rows, goal.case, goal.kind == "backward")


def time_peers(rows, case, grad):
    """flash-linear-attention where it is installed, and softmax attention by cuDNN where it is affordable."""
    q, k, v = inputs(case, grad=grad)
    slopes, runs = tnl_slopes(case[1]), {}
    if case[0] * case[1] * case[2] ** 2 * case[3] * 2 < 6e13:
        runs["softmax, cuDNN"] = lambda: softmax_attention(q, k, v)
    if importlib.util.find_spec("fla") is None:
        rows.add(section="peers", case=name(case), error="fla-core is not installed")
    elif rows.time_left() > 30:
        from fla.ops.simple_gla import chunk_simple_gla

        flat = [x.transpose(1, 2) for x in (q, k, v)]
        runs["fla chunk_simple_gla"] = lambda: chunk_simple_gla(*flat, g_gamma=-slopes, scale=1.0)[0]
    for peer, forward in runs.items():
        weight = torch.ones_like(forward())
        call = (lambda f=forward, w=weight: torch.autograd.grad(f(), (q, k, v), w)) if grad else forward
        ms = milliseconds(call, not grad and case[0] * case[2] <= 16384, rep=60)
        rows.add(section="peers", case=name(case), peer=peer, backward=grad, ms=ms, gib=peak(call))


def softmax_attention(q, k, v):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


# ---- the search


@dataclass(frozen=True)
class Choice:
    """How one measurement is cut: a tiling of the scan and its segments, or (columns, warps) of a step."""

    tiling: Tiling | tuple[int, int]
    cut: tuple[int, int] | None = None

    def words(self) -> dict:
        """The fields of its row."""
        if isinstance(self.tiling, tuple):
            return {"tiling": str(self.tiling)}
        return {"tiling": str(self.tiling), "split": self.tiling.split, "cut": str(self.cut or "auto")}


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[None]:
    """The public operators run with `choice` instead of the package's own tiling."""
    saved = kernels.choose_tiling, kernels.choose_segments, step_kernels.choose_step_tiling
    if isinstance(choice.tiling, tuple):
        step_kernels.choose_step_tiling = lambda *_: choice.tiling
    else:
        kernels.choose_tiling = lambda *_: choice.tiling
    if choice.cut:
        kernels.choose_segments = lambda *_: choice.cut
    try:
        yield
    finally:
        kernels.choose_tiling, kernels.choose_segments, step_kernels.choose_step_tiling = saved


def shipped_tiling(case):
    x = torch.empty(case[0], case[2], case[1], case[3], device=DEVICE, dtype=DTYPE).transpose(1, 2)
    gluon = gluon_serves(ScanInputs(x, x, x, tnl_slopes(case[1]), None, None), x)
    return choose_tiling(case[3], case[3], DTYPE, case[2], case[0] * case[1], gluon)


@functools.cache
def error_case(dim):
    """Inputs with a model's slopes, and the exact output."""
    q, k, v = inputs((*ERROR_CASE[:3], dim))
    slopes = tnl_slopes(ERROR_CASE[1])
    exact = lightning_attention(*(x.double() for x in (q, k, v, slopes)), impl="reference")
    return ScanInputs(q, k, v, slopes, None, None), exact


@functools.cache
def output_error(tiling, dim):
    """The error of one tiling against fp64."""
    tensors, exact = error_case(dim)
    output = torch.empty_like(tensors.query)
    kernels.scan(tensors, output, None, 1.0, False, False, tiling)
    return error(output, exact)


@functools.cache
def step_error(tiling, dim):
    """The error of a step's output and state against fp64."""
    q, k, v = inputs((2, 4, 1, dim))
    slopes, state = tnl_slopes(4), torch.randn(2, 4, dim, dim, device=DEVICE)
    wide_state = state.double()
    with using(Choice(tiling)):
        output = lightning_attention_step(q, k, v, slopes, state, impl="triton")
    wide = (x.double() for x in (q, k, v, slopes))
    exact = lightning_attention_step(*wide, state=wide_state, impl="reference")
    return max(error(output, exact), 1e3 * error(state, wide_state))


def prepare(kind, case):
    """(call to time, whether in a graph, milliseconds of the floor) of a case."""
    q, k, v = inputs(case, grad=kind == "backward")
    slopes = tnl_slopes(case[1])
    if kind == "decode":
        state = torch.zeros(case[0], case[1], case[3], case[3], device=DEVICE)
        other = torch.empty_like(state)
        floor = milliseconds(lambda: other.copy_(state), True)
        return lambda: lightning_attention_step(q, k, v, slopes, state, impl="triton"), True, floor
    small = case[0] * case[2] <= 16384 and kind == "forward"
    floor = copy_time(case, 4 if kind == "forward" else 14, small)
    forward = lambda: lightning_attention(q, k, v, slopes, impl="triton")  # noqa: E731
    if kind == "forward":
        return forward, small, floor
    grad = torch.randn_like(q)
    return lambda: torch.autograd.grad(forward(), (q, k, v), grad), False, floor


def cuts(length, counts):
    """(segment, block) for each number of segments, with blocks of 512 and of 2048 tokens."""
    pairs = [(-(-length // count // block) * block, block) for count in counts for block in (512, 2048)]
    return [p for p in dict.fromkeys(pairs) if p[0] < length and p[0] // p[1] <= 256]


class Search:
    """The search of one case: tilings, then what is rounded, then the cut; every measurement is a row."""

    def __init__(self, rows, goal):
        self.rows, self.kind, self.case, self.target = rows, goal.kind, goal.case, goal.target
        self.call, self.small, self.floor = prepare(goal.kind, goal.case)
        self.label = {"section": goal.kind, "case": name(goal.case)}
        self.times = {}
        if goal.kind == "decode":
            self.shipped = Choice(step_kernels.choose_step_tiling(goal.case[3], goal.case[3]))
        else:
            self.shipped = Choice(shipped_tiling(goal.case))

    def error(self, choice):
        """Of the output. A tiling far from every rounding is broken, and not timed."""
        measure = step_error if self.kind == "decode" else output_error
        reached = measure(choice.tiling, self.case[3])
        if not reached <= BROKEN:
            raise ValueError(f"error {reached:.3g}: not timed")
        return reached

    def time(self, choice, role):
        """One measurement; a choice that was timed before is not timed again."""
        if choice not in self.times:
            self.rows.attempt({**self.label, "role": role, **choice.words()}, self._time, choice, role)

    def _time(self, choice, role):
        reached = self.error(choice)
        with using(choice):
            self.times[choice] = milliseconds(self.call, self.small, rep=60)
        self._add(choice, role, self.times[choice], reached)

    def _add(self, choice, role, ms, reached, **more):
        words = {**choice.words(), "error": reached, "ms": ms, "floor": self.floor, "target": self.target}
        self.rows.add(**self.label, role=role, **words, over_floor=ms / self.floor, **more)

    def ranked(self):
        """The choices timed so far, the fastest first; those within the error's target before the others."""
        return sorted(self.times, key=lambda c: (self.error(c) > ERROR_TARGET, self.times[c]))

    def finish(self):
        """The row of the case: the fastest choice that keeps the error's target, timed again."""
        for choice in self.ranked()[:1]:
            with using(choice):
                ms = milliseconds(self.call, self.small, rep=200)
                more = {"gib": peak(self.call)} if self.kind == "backward" else {}
            self._add(choice, "best", ms, self.error(choice), **more)


@dataclass(frozen=True)
class Goal:
    """One case of the search: the tilings tried beside those found best before, roundings and cuts."""

    kind: str
    case: tuple[int, int, int, int]
    target: float
    tilings: tuple = ()
    splits: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def tilings(*sizes):
    """(chunk, value columns, warps, stages) of each. Long chunks round more scores: theirs are split too."""
    return tuple(Tiling(*size, split=7 if size[0] > 64 else 6) for size in sizes)


# Two programs of two stages share a multiprocessor; with more stages or eight warps one has it alone.
WIDE = tilings(
    (64, 64, 4, 2), (64, 64, 8, 4), (64, 128, 8, 4), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)
)
# The scan in Gluon, by what it rounds.
GLUON = tuple(replace(GLUON_TILINGS[128], split=split) for split in (5, 13, 21, 7))
NARROW = tilings((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 4), (64, 32, 4, 4))
SHORT = tilings((64, 16, 4, 4), (64, 32, 4, 2), (128, 32, 8, 2), (64, 16, 4, 2), (64, 32, 8, 3))
STEPS = ((64, 8), (64, 16), (16, 4), (16, 8), (32, 4), (128, 16))
# The most important first: what a deadline cuts off matters least.
GOALS = [
    Goal("forward", LONG, 5.95, (*GLUON, *WIDE), splits=(0, 3, 7)),
    Goal("forward", (1, 32, 524288, 128), 7.1, (*GLUON, *WIDE[-1:]), counts=(2, 4, 8)),
    Goal("backward", (16, 32, 16384, 128), 13.5),
    Goal("decode", (1, 64, 1, 128), 6e-3, STEPS),
    Goal("decode", (16, 64, 1, 128), 50e-3, STEPS),
    Goal("decode", (256, 64, 1, 128), 780e-3, STEPS),
    Goal("forward", (1, 32, 524288, 64), 3.6, NARROW, splits=(7,), counts=(8,)),
    Goal("forward", (512, 32, 1024, 128), 5.95, (*GLUON, *WIDE[:1])),
    Goal("forward", (1, 32, 16384, 128), 0.22, (*GLUON, *WIDE[-1:]), counts=(2, 4, 8)),
    Goal("forward", (1, 32, 1024, 128), 0.033, SHORT, splits=(7,), counts=(2,)),
    Goal("forward", (32, 32, 16384, 64), 2.95, splits=(0, 7)),
    Goal("backward", (1, 32, 262144, 128), 16.0),
    Goal("backward", (4, 32, 131072, 64), 13.5),
    Goal("backward", (256, 32, 1024, 128), 13.5),
    Goal("forward", (8, 32, 65536, 128), 5.95),
]
SMOKE_GOALS = [
    Goal("forward", (2, 2, 300, 16), 1.0, tilings((64, 16, 4, 2)), splits=(0, 7), counts=(2,)),
    Goal("backward", (1, 2, 300, 16), 1.0),
    Goal("decode", (2, 2, 1, 16), 1.0, ((16, 2),)),
]


def search(rows, goal, known):
    """Every tiling of the goal, the fastest with other roundings, and the two best in other cuts."""
    one, dim = Search(rows, goal), goal.case[3]
    one.time(one.shipped, "shipped")
    # What does best for long sequences is of no use to few short ones.
    long = goal.kind != "decode" and goal.case[0] * goal.case[2] > 1024
    for tiling in dict.fromkeys([*(known.get(dim, [])[:3] if long else []), *goal.tilings]):
        one.time(Choice(tiling), "alternative")
    for choice in one.ranked()[:1]:
        for split in goal.splits:
            one.time(Choice(replace(choice.tiling, split=split)), "rounding")
    for choice in one.ranked()[:2] if goal.counts else ():
        for cut in cuts(goal.case[2], goal.counts):
            one.time(replace(choice, cut=cut), "cut")
    one.finish()
    if goal.kind == "forward":
        # The first goal of a head dim leads the order in which the others try.
        found = [choice.tiling for choice in one.ranked()]
        known[dim] = list(dict.fromkeys([*known.get(dim, []), *found]))


def section_best(rows):
    """The search, then the gradients' errors with the winners, then the peers."""
    known = {}
    for goal in GOALS if CUDA else SMOKE_GOALS:
        rows.attempt({"section": goal.kind, "case": name(goal.case)}, search, rows, goal, known)
    for dim, found in known.items():
        for tiling in found[:1]:
            with using(Choice(tiling)):
                rows.attempt({"section": "check"}, check_case, rows, (1, 4, 1000, dim), DTYPE, 4)
    if CUDA:
        section_peers(rows)


def section_steps(rows):
    """The search of the decoding steps alone."""
    for goal in GOALS if CUDA else SMOKE_GOALS:
        if goal.kind == "decode":
            rows.attempt({"section": goal.kind, "case": name(goal.case)}, search, rows, goal, {})


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sections", default="check,shipped,peers")
    parser.add_argument("--best", action="store_true", help="search the tilings of every case")
    parser.add_argument("--deadline", type=float, default=200.0, help="seconds; nothing new starts after")
    args = parser.parse_args()
    rows = Rows("lightning_attention_best" if args.best else "lightning_attention", args.deadline)
    for section in ["quick", "best"] if args.best else args.sections.split(","):
        rows.attempt({"section": section}, globals()[f"section_{section}"], rows)
    print(f"{args.deadline - rows.time_left():.0f} s, saved to {rows.path}")


if __name__ == "__main__":
    main()
