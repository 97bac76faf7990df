"""Times `generate()` with one long prompt on one GPU: a prepared model beside transformers' own `sdpa`.

    python benchmarks/bench_generation.py --lengths 8192,32768,131072 --deadline 300

The model has the shape of Llama-3.1-8B and random weights. Each row holds the time to the first token, the
median time a token, the peak memory, and the floor: bytes of weights and cache over the copy rate measured in
the same run. Whether the tokens equal those of the first peer stands in each row.

    python benchmarks/bench_generation.py --questions 16 --lengths 131072 --name questions
    python benchmarks/bench_generation.py --questions 16 --lengths 131072 --layers 4 --name questions_4_layers

times questions about one document: all of them on a cache forked with `rows`, one of them alone, and all on a
cache that repeats the document, for which four layers leave room.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_generation.py --peers prepared --name two_gpus

puts each prompt on all GPUs; the peak is that of the rank that took most.
"""

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

# Multicast through the switch is never used. Read when the processes meet.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist
from _report import Report
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation.streamers import BaseStreamer
from triton.testing import do_bench

import hf_longattn

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 20,
}
NEW_TOKENS = 48
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


class Clock(BaseStreamer):
    """When the prompt and every token arrived; on the first rank alone."""

    def __init__(self):
        self.times = []

    def put(self, value):
        # `value` lies on the host: the token is there.
        assert value.device.type == "cpu"
        self.times.append(time.perf_counter())

    def end(self):
        pass


def copy_rate():
    """Bytes a second that this card moves, read and written, in a large copy."""
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def build(layers):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    return model


def meet():
    """The mesh of all processes, or None for one alone."""
    if RANKS == 1:
        return None
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    return dist.device_mesh.init_device_mesh("cuda", (RANKS,), mesh_dim_names=("cp",))


def free():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@torch.inference_mode()
def measure(model, length, batch, pad, **options):
    """(time to first token, median time a token, peak bytes, the tokens), in seconds and bytes."""
    ids = torch.randint(
        0, 128000, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    mask = torch.ones_like(ids)
    mask[:1, :pad] = 0
    call = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    if length <= 32768:
        model.generate(ids, max_new_tokens=4, **call)
    else:
        model.generate(ids[:, :4096], max_new_tokens=4, **{**call, "attention_mask": mask[:, :4096]})
    free()
    clock = Clock()
    tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, streamer=clock, **call)
    peak = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
    if RANKS > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    # Another rank's clock saw nothing; what it would say is not reported.
    times = clock.times or [0.0, 0.0, 0.0]
    steps = sorted(b - a for a, b in zip(times[1:], times[2:], strict=False))
    return times[1] - times[0], steps[len(steps) // 2], peak.item(), tokens[:, length:].tolist()


@torch.inference_mode()
def ask(model, cache, rows, width):
    """As `measure`, for `rows` questions of `width` tokens behind the document that `cache` holds."""
    generator = torch.Generator("cuda").manual_seed(2)
    ids = torch.randint(0, 128000, (rows, width), device="cuda", generator=generator)
    mask = torch.ones(rows, cache.get_seq_length() + width, dtype=torch.long, device="cuda")
    call = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    clock = Clock()
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, streamer=clock, **call)
    # The first step is eager where it makes the graph: the median leaves it out.
    steps = sorted(b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False))
    first = clock.times[1] - clock.times[0]
    return first, steps[len(steps) // 2], torch.cuda.max_memory_allocated(), tokens[:, width:].tolist()


@torch.inference_mode()
def ask_all(model, length, arguments, rate, report):
    """One row for each way of asking: shared, alone, repeated."""
    hf_longattn.prepare_generation(model)
    document = hf_longattn.LongContextCache(model.config, capacity=length + 512)
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 128000, (1, length), device="cuda", generator=generator)
    model.generate(ids, past_key_values=document, max_new_tokens=1, do_sample=False, pad_token_id=0)
    ways = {
        "alone": lambda: (document.fork(), 1),
        "shared": lambda: (document.fork(rows=arguments.questions), arguments.questions),
        "repeated": lambda: (document.fork(arguments.questions), arguments.questions),
    }
    first_row = None
    for way, make in ways.items():
        row = {"peer": way, "prompt": length, "layers": arguments.layers, "copy_rate": rate}
        free()
        try:
            cache, rows = make()
            ask(model, cache, rows, 8)
            cache.crop(length - cache.get_seq_length())
            first, step, peak, tokens = ask(model, cache, rows, arguments.question_tokens)
            first_row = tokens[0] if first_row is None else first_row
            row |= {"questions": rows, "question_tokens": arguments.question_tokens}
            row |= {"first_token_s": first, "token_ms": 1e3 * step, "peak_gib": peak / 2**30}
            repeats = rows if way == "repeated" else 1
            row |= {"floor_ms": 1e3 * floor(model, length, repeats, rate)}
            row |= {"same_tokens_as_alone": tokens[0] == first_row}
        except torch.OutOfMemoryError as error:
            row |= {"error": str(error).splitlines()[0][:100]}
        cache = None
        report.add(**row)
    hf_longattn.restore(model)


def cache_dtype_of(peer):
    """What the name of a peer ends in, of "int8" and "fp8", or None."""
    return next((dtype for dtype in ("int8", "fp8") if peer.endswith(dtype)), None)


def floor(model, length, batch, rate, cache_dtype=None):
    """Seconds a token at least takes: weights once, and every row's keys and values, a share on each rank."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * 2
    # A key or a value of one head: 16 bits a number, or 8 and a scale.
    row = 128 * 2 if cache_dtype is None else 128 + 4
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * row * (length + NEW_TOKENS // 2)
    return (weights + batch * cache / RANKS) / rate


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pad", type=int, default=0, help="padding tokens on the left of the first row")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--peers",
        default="prepared,sdpa",
        help="of prepared, eager-prepared, prepared-int8, prepared-fp8, sdpa, sdpa-static",
    )
    parser.add_argument("--questions", type=int, default=0, help="time so many questions about one prompt")
    parser.add_argument("--question-tokens", type=int, default=64)
    parser.add_argument("--name", default="generation")
    parser.add_argument("--deadline", type=float, default=300)
    arguments = parser.parse_args()
    mesh = meet()
    # Reports of the other ranks go nowhere.
    folder = None if int(os.environ.get("RANK", "0")) == 0 else Path(tempfile.mkdtemp())
    report = Report(arguments.name, deadline=arguments.deadline, folder=folder)
    rate = copy_rate()
    model = build(arguments.layers)
    for length in map(int, arguments.lengths.split(",")):
        if arguments.questions:
            ask_all(model, length, arguments, rate, report)
            continue
        tokens = {}
        for peer in arguments.peers.split(","):
            if report.time_left() < 10:
                return
            options = {"cache_implementation": "static"} if peer == "sdpa-static" else {}
            if "prepared" in peer:
                graph = False if peer.startswith("eager") else "auto"
                setup = {"cuda_graph": graph, "cache_dtype": cache_dtype_of(peer), "device_mesh": mesh}
                hf_longattn.prepare_generation(model, **setup)
            row = {
                "peer": peer,
                "prompt": length,
                "batch": arguments.batch,
                "pad": arguments.pad,
                "copy_rate": rate,
            }
            row |= {"layers": arguments.layers} | ({"ranks": RANKS} if RANKS > 1 else {})
            row["floor_ms"] = 1e3 * floor(model, length, arguments.batch, rate, cache_dtype_of(peer))
            try:
                first, step, peak, tokens[peer] = measure(
                    model, length, arguments.batch, arguments.pad, **options
                )
                row |= {"first_token_s": first, "token_ms": 1e3 * step, "peak_gib": peak / 2**30}
                row |= {"same_tokens_as_first_peer": tokens[peer] == next(iter(tokens.values()))}
            except torch.OutOfMemoryError as error:
                row |= {"error": str(error).splitlines()[0][:100]}
            finally:
                hf_longattn.restore(model)
                free()
            if folder is None:
                report.add(**row)
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
