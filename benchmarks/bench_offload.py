"""Times `generate()` with some layers of the cache in host memory, beside the same steps without.

    python benchmarks/bench_offload.py --lengths 32768,131072 --offload 0,4,8,16,32 --deadline 300

The model has the shape of Llama-3.1-8B and random weights. Each row holds the time to the first token, the
median time a token, the peak memory, and the floor: the bytes of the offloaded layers over the rate of a
large copy from page-locked memory, measured in the same run. Steps are not captured in either case. A run
whose tokens differ from those without offload is an error. `--tiny` walks through all of it on a CPU.
"""

import argparse

import torch
from _report import Report
from bench_generation import DEVICE, SHAPE, TINY, build, copy_rate, free, measure
from triton.testing import do_bench

import hf_longattn
from hf_longattn.generation.sizes import layer_bytes


def host_rate():
    """Bytes a second of a large copy from page-locked memory; on a CPU of one within its memory."""
    if DEVICE == "cpu":
        return copy_rate()
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    milliseconds = do_bench(lambda: target.copy_(source, non_blocking=True), return_mode="median")
    return source.numel() / (milliseconds * 1e-3)


def measure_row(model, length, count, rate, expected):
    """One row and the tokens; `expected` are the tokens without offload, or None."""
    hf_longattn.prepare_generation(model, offload_layers=count, cuda_graph=False)
    free()
    first, token, peak, tokens = measure(model, length, batch=1, pad=0)
    if expected is not None and tokens != expected:
        raise RuntimeError(f"{count} layers in host memory changed the tokens at {length=}")
    # Two layers stay in the two buffers.
    fetched = count * layer_bytes(model.config, length, model.dtype) if count > 2 else 0
    row = {
        "prompt": length,
        "offloaded": count,
        "first_token_s": first,
        "token_ms": 1e3 * token,
        "peak_gib": peak / 2**30,
        "floor_ms": 1e3 * fetched / rate,
        "host_gb_s": rate / 1e9,
    }
    return row, tokens


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--offload", default="0,4,8,16,32", help="layers in host memory, 0 first")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to walk through on a CPU")
    parser.add_argument("--deadline", type=float, default=300)
    arguments = parser.parse_args()
    report = Report("offload", deadline=arguments.deadline)
    shape = {**(TINY if arguments.tiny else SHAPE), "num_hidden_layers": arguments.layers}
    model, rate = build(shape), host_rate()
    for length in map(int, arguments.lengths.split(",")):
        expected = None
        for count in map(int, arguments.offload.split(",")):
            if report.time_left() < 20:
                return
            row, tokens = measure_row(model, length, count, rate, expected)
            expected = expected or tokens
            report.add(**row)


if __name__ == "__main__":
    main()
