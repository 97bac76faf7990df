"""Times decode_attention on one GPU against SDPA and against the bytes that it must read.

    python benchmarks/bench_decode_attention.py --deadline 150            check, then time
    python benchmarks/bench_decode_attention.py --tune --deadline 150     check, then sweep the configurations
    python benchmarks/bench_decode_attention.py --tune --keys int8        the same on a cache in 8 bits
    python benchmarks/bench_decode_attention.py --tune --short            the same on many rows of few keys

32 query heads, 8 key heads, head dim 128, bf16. Rows `int8` and `fp8` have keys and values in 8 bits, whose
bytes are counted with their scales; `quantise` times what writes one such token of every row. Correctness
against fp64 comes first and a wrong kernel is not timed. Times are medians of `do_bench`, which flushes the
L2 cache before each call; `share` is that of 3.35 TB/s. Rows go to `$OUT/decode_attention.json` (or
benchmarks/results) one by one, so that the deadline loses nothing.
"""

import argparse
import gc
import itertools
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from _report import Report
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.decode_attention import triton as kernels
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.quantized_states import quantized_states

DEVICE = "cuda"
BANDWIDTH = 3.35e12
HEADS, KEY_HEADS, DIM = 32, 8, 128
CALLS_A_GRAPH = 8
SIZES = [(1, 2**16), (1, 2**18), (1, 2**20), (8, 2**16), (8, 2**18), (8, 2**20)]
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TUNED = [(128, 1, 2**16), (128, 1, 2**20), (128, 8, 2**16), (64, 1, 2**18), (256, 1, 2**17), (128, 8, 2**18)]
# Many rows of few keys, as the blocks of a Block Transformer are: (head dim, heads, batch, room, keys seen).
SHORT = [(128, 16, 512, 160, 96), (128, 16, 512, 608, 96), (128, 16, 512, 608, 512), (64, 12, 512, 608, 96)]
CONFIGS = list(itertools.product((32, 64, 128, 256), (4, 8), (2, 3, 4, 5), (1, 2, 3)))
# In 8 bits, eight warps of few rows take all registers of a multiprocessor.
EIGHT_CONFIGS = [
    (block_n, warps, stages, 8 // warps)
    for block_n, warps, stages in itertools.product((32, 64, 128, 256), (1, 2, 4, 8), (3, 4))
]
SHORT_CONFIGS = itertools.product((32, 64, 128), (2, 4, 8), (1, 2, 3), (1,))
# (H, G, T, S, K, V), every head dim and number of rows that takes another path in the kernel.
CHECKS = [
    (32, 8, 1, 5000, 128, 128),
    (8, 2, 1, 3001, 48, 48),
    (8, 2, 2, 3001, 64, 64),
    (8, 1, 16, 3001, 80, 80),
    (8, 2, 5, 3001, 96, 96),
    (8, 2, 1, 3001, 192, 128),
    (16, 2, 16, 3001, 128, 128),
    (4, 4, 1, 3001, 256, 256),
    (16, 2, 8, 3001, 256, 256),
]


def make(B, H, G, T, S, K, V, dtype):
    """Random query, key and value."""
    shapes = (B, H, T, K), (B, G, S, K), (B, G, S, V)
    return [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]


def in_8_bits(key, value, kind):
    """The keywords of `decode_attention` for a cache in 8 bits."""
    key, value, scales = quantized_states(key, value, EIGHT_BITS[kind])
    return {"key": key, "value": value, "scales": scales}


def masks(B, T, S):
    """Each mask that is timed or checked; `window-4096` reads too little for the rate of memory."""
    position = torch.arange(T, device=DEVICE, dtype=torch.int32)[None] + S - T
    padding = torch.linspace(S // 16, S // 2, B, device=DEVICE).int()[:, None].expand(B, T)
    return {
        "dense": KeyRange(causal=T > 1),
        "padding": KeyRange(causal=True, lower=padding),
        "window": KeyRange(causal=True, lower=position - S // 8 * 7 + 1),
        "window-4096": KeyRange(causal=True, lower=(position - 4095).clamp(min=0)),
        "capacity": KeyRange(upper=position - S // 3),
        "holes": KeyRange(causal=True, key_mask=torch.rand(B, S, device=DEVICE) > 0.2),
    }


def exact(query, key, value, visible, softcap=None, sinks=None, dtype=torch.float64):
    """Dense softmax attention in fp64."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    lse = lse if sinks is None else torch.logaddexp(lse, sinks.to(dtype)[None, :, None])
    return torch.exp(scores - lse.unsqueeze(-1)) @ value.repeat_interleave(group, 1), lse


def sdpa_masked(query, key, value, visible):
    """What transformers calls where there is a mask: keys repeated for every query head."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


def relative(result, exact_result):
    """‖result - exact‖ / ‖exact‖, in fp64."""
    return ((result.double() - exact_result).norm() / exact_result.norm()).item()


def check_case(shape, dtype, kind, options):
    """(error, bound) of the output and of lse; the bound is 1.5 times the error of SDPA and one rounding.

    Errors of the output are norms over all of it: the largest single one says little beside another kernel's.
    """
    query, key, value = make(2, *shape, dtype=dtype)
    T, S = shape[2], shape[3]
    mask = masks(2, T, S)[kind]
    visible = mask.tile(slice(0, T), slice(0, S), T, S, query.device)
    want, want_lse = exact(query, key, value, visible, options.get("softcap"), options.get("sinks"))
    # SDPA knows neither caps nor sinks; its error on the same inputs without them stands in.
    plain, _ = exact(query, key, value, visible)
    peer = relative(sdpa_masked(query, key, value, visible), plain)
    dead = ~visible.any(2).expand(key.shape[:3])
    key[dead], value[dead] = torch.nan, torch.inf
    output, lse = decode_attention(query, key, value, mask=mask, impl="triton", **options)
    eps = torch.finfo(dtype).eps
    lse_bound = 1.5 * 8 * torch.finfo(torch.float32).eps * want_lse.abs().max().item()
    lse_error = (lse - want_lse).abs().max().item()
    return relative(output, want), 1.5 * (peer + eps), lse_error, lse_bound


def check_eight(shape, dtype, kind):
    """(error, bound) on a cache in 8 bits; SDPA reads it dequantised to `dtype`."""
    query, key, value = make(2, *shape, dtype=dtype)
    T, S = shape[2], shape[3]
    mask = masks(2, T, S)["padding"]
    visible = mask.tile(slice(0, T), slice(0, S), T, S, query.device)
    cache = in_8_bits(key, value, kind)
    scales = cache["scales"].double()
    key, value = cache["key"].double() * scales[..., :1], cache["value"].double() * scales[..., 1:]
    want, _ = exact(query, key, value, visible)
    peer = relative(sdpa_masked(query, key.to(dtype), value.to(dtype), visible), want)
    cache["scales"][~visible.any(2).expand(key.shape[:3])] = torch.nan
    output, _ = decode_attention(query, **cache, mask=mask, impl="triton")
    return relative(output, want), 1.5 * (peer + torch.finfo(dtype).eps)


def check_runs(dtype, shape):
    """(mask, options) to check: everything at two bf16 shapes, one mask elsewhere, as each run compiles."""
    runs = [("padding", {})]
    if dtype == torch.bfloat16 and shape in (CHECKS[0], CHECKS[6]):
        runs += [(kind, {}) for kind in ("dense", "window", "capacity", "holes")]
        sinks = torch.randn(shape[0], device=DEVICE)
        runs += [("padding", {"softcap": 20.0}), ("dense", {"sinks": sinks}), ("window", {"num_splits": 3})]
    return runs


def check(report):
    """Every check; returns whether all passed."""
    passed = True
    for dtype, shape in itertools.product((torch.bfloat16, torch.float16, torch.float32), CHECKS):
        for kind, options in check_runs(dtype, shape):
            error, bound, lse_error, lse_bound = check_case(shape, dtype, kind, options)
            if error <= bound and lse_error <= lse_bound:
                continue
            passed = False
            case = f"check-{'x'.join(map(str, shape))}-{dtype}-{kind}-{','.join(options)}"
            report.add(case=case, error=error, bound=bound, lse_error=lse_error, lse_bound=lse_bound)
        for kind in EIGHT_BITS:
            error, bound = check_eight(shape, dtype, kind)
            if error <= bound:
                continue
            passed = False
            report.add(case=f"check-{'x'.join(map(str, shape))}-{dtype}-{kind}", error=error, bound=bound)
    report.add(case="check", passed=passed, seconds=time.time() - report.start)
    return passed


def graph_of(call):
    """`call` captured in a CUDA graph, as a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_us(call, rep=60):
    return do_bench(call, warmup=15, rep=rep, return_mode="median") * 1e3


def host_us(call, count=50):
    """Microseconds a call from the host's side, calls back to back."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count * 1e6


def steady_us(calls):
    """Microseconds a call in a graph that runs them one after the other, each on memory of its own.

    No cache is flushed in between, whose write-back would share the bus with the call; no input is still in
    L2, since the other calls have read more than that holds. A step of decoding replays a call for every
    layer, so the few microseconds that the replay itself takes are shared by several here too.
    """
    calls = calls * -(-CALLS_A_GRAPH // len(calls))

    def run():
        for call in calls:
            call()

    graph = graph_of(run)
    times = []
    for _ in range(25):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[5:])


def time_case(report, name, calls, num_bytes, graph=True, **extra):
    """One row: one eager call after a flush of the cache, and the steady rate in a CUDA graph."""
    row = {"case": name, "us": median_us(calls[0]), **extra}
    if graph:
        row["graph_us"] = steady_us(calls)
    best = min(row["us"], row.get("graph_us", row["us"]))
    report.add(
        **row, bytes=num_bytes, gb_per_s=num_bytes / best / 1e3, share=num_bytes / best / 1e-6 / BANDWIDTH
    )


def visible_keys(mask, B, T, S):
    """Keys that must be read, over all sequences."""
    first = 0 if mask.lower is None else mask.lower.long().expand(B, T).amin(1)
    last = S if mask.upper is None else mask.upper.long().expand(B, T).amax(1).clamp(max=S)
    return int((torch.zeros(B, device=DEVICE).long() + last - first).clamp(min=0).sum())


def time_size(report, B, S):
    """All cases of one batch and length."""
    bytes_a_key = KEY_HEADS * DIM * 2 * 2
    size, dense = f"B{B}-S{S}", bytes_a_key * B * S
    # Sets of inputs that together are many times the L2.
    sets = [
        make(B, HEADS, KEY_HEADS, 1, S, DIM, DIM, torch.bfloat16)
        for _ in range(max(1, min(6, 2**30 // dense)))
    ]
    query, key, value = sets[0]
    for kind, mask in masks(B, 1, S).items():
        if report.time_left() < 3:
            return
        calls = [partial(decode_attention, *tensors, mask=mask) for tensors in sets]
        extra = {"host_us": host_us(calls[0])} if (B, S, kind) == (1, 2**16, "dense") else {}
        time_case(report, f"decode-{kind}-{size}", calls, bytes_a_key * visible_keys(mask, B, 1, S), **extra)
    calls = [partial(decode_attention, *tensors, softcap=30.0) for tensors in sets]
    time_case(report, f"decode-softcap-{size}", calls, dense)
    sdpa = [partial(F.scaled_dot_product_attention, *tensors, enable_gqa=True) for tensors in sets]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            time_case(report, f"sdpa-{backend.name.lower()}-{size}", sdpa, dense)
    time_eight(report, size, sets, B * S)
    if B * S <= 2**18:
        visible = torch.ones(B, 1, 1, S, dtype=torch.bool, device=DEVICE)
        masked = [partial(sdpa_masked, query, key, value, visible)]
        time_case(report, f"sdpa-masked-{size}", masked, dense, graph=False)


def time_eight(report, size, sets, num_keys):
    """A cache in 8 bits, and what makes one token of it."""
    num_bytes = num_keys * KEY_HEADS * (2 * DIM + 8)
    for kind in EIGHT_BITS:
        if report.time_left() < 3:
            return
        caches = [(query, in_8_bits(key, value, kind)) for query, key, value in sets]
        calls = [partial(decode_attention, query, **cache) for query, cache in caches]
        time_case(report, f"decode-{kind}-{size}", calls, num_bytes)
        new = [(key[:, :, :1], value[:, :, :1]) for _, key, value in sets]
        calls = [partial(quantized_states, *states, EIGHT_BITS[kind]) for states in new]
        report.add(case=f"quantise-{kind}-{size}", us=median_us(calls[0]), graph_us=steady_us(calls))
        del caches, calls


def tune_case(report, dim, B, S, kind):
    """Sweeps the configurations of one shape and reports the fastest."""
    query, key, value = make(B, HEADS, KEY_HEADS, 1, S, dim, dim, torch.bfloat16)
    if kind == "bf16":
        cache = {"key": key, "value": value}
    else:
        cache = in_8_bits(key, value, kind)
    del key, value
    num_bytes, best = sum(part.numel() * part.element_size() for part in cache.values()), None
    for block_n, warps, stages, programs in EIGHT_CONFIGS if kind in EIGHT_BITS else CONFIGS:
        shared = block_n * dim * 2 * cache["key"].element_size() * (stages - 1)
        if report.time_left() < 3:
            return
        if shared * programs > 220 * 1024:
            continue
        config = kernels.DecodeConfig(block_n, warps, stages, programs)
        terms = {"scale": dim**-0.5, "mask": KeyRange(), "config": config}
        call = partial(kernels.decode_forward, query, **cache, **terms)
        try:
            us = median_us(call, rep=15)
        except OutOfResources:
            continue
        share = num_bytes / us / 1e-6 / BANDWIDTH
        report.add(case=f"tune-{kind}-K{dim}-B{B}-S{S}", us=us, share=share, **config._asdict())
        best = min(best or (us, config), (us, config))
    if best:
        report.add(case=f"best-{kind}-K{dim}-B{B}-S{S}", us=best[0], **best[1]._asdict())


def tune_short(report):
    """Sweeps the configurations where the rows alone fill the machine; a key head a query head, one split."""
    configs = [kernels.DecodeConfig(*fields) for fields in SHORT_CONFIGS]
    for dim, heads, B, S, seen in SHORT:
        inputs = make(B, heads, heads, 1, S, dim, dim, torch.bfloat16)
        mask = KeyRange(upper=torch.full((B, 1), seen, device=DEVICE, dtype=torch.long))
        case, num_bytes = f"K{dim}-H{heads}-B{B}-S{S}-seen{seen}", B * heads * seen * dim * 4
        rows = []
        for config in (None, *configs):
            call = partial(kernels.decode_forward, *inputs, dim**-0.5, mask, config=config)
            if report.time_left() < 3:
                return
            try:
                us = median_us(call, rep=10)
            except OutOfResources:
                continue
            fields = {} if config is None else config._asdict()
            rows.append((us, len(rows), fields))
            name = "own-" if config is None else "tune-"
            report.add(case=name + case, us=us, share=num_bytes / us / 1e-6 / BANDWIDTH, **fields)
        us, _, fields = min(rows)
        report.add(case=f"best-{case}", us=us, share=num_bytes / us / 1e-6 / BANDWIDTH, **fields)
        del inputs


def main():
    parser = argparse.ArgumentParser(description="Times decode_attention.")
    parser.add_argument("--tune", action="store_true", help="sweep configurations in place of timing")
    parser.add_argument("--short", action="store_true", help="sweep on many rows of few keys")
    parser.add_argument("--keys", default="bf16", choices=("bf16", *EIGHT_BITS), help="of the sweep")
    parser.add_argument("--deadline", type=float, default=150, help="seconds after which nothing new starts")
    parser.add_argument("--skip-check", action="store_true", help="when the check passed just before")
    parser.add_argument(
        "--most", type=int, default=2**23, help="keys of all rows together in the largest case"
    )
    parser.add_argument("--least", type=int, default=0, help="the same of the smallest case")
    arguments = parser.parse_args()
    if arguments.short and not arguments.tune:
        parser.error("--short belongs to --tune")
    torch.manual_seed(0)
    name = "decode_attention_tune" if arguments.tune else "decode_attention"
    report = Report(name, arguments.deadline)
    if not arguments.skip_check and not check(report):
        raise SystemExit("decode_attention is wrong on this machine; nothing was timed.")
    for B, S in () if arguments.tune else SIZES:
        if report.time_left() > 8 and arguments.least <= B * S <= arguments.most:
            time_size(report, B, S)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.tune and arguments.short:
        tune_short(report)
        return
    for dim, B, S in TUNED if arguments.tune else ():
        tune_case(report, dim, B, S, arguments.keys)


if __name__ == "__main__":
    main()
