"""Times `generate()` with one long prompt on one GPU: a prepared model beside transformers' own `sdpa`.

    python benchmarks/bench_generation.py --lengths 8192,32768,131072 --deadline 300

The model has the shape of Llama-3.1-8B and random weights. Each row holds the time to the first token, the
median time a token, the peak memory, and the floor: bytes of weights and cache over the copy rate measured in
the same run. Whether the tokens equal those of the first peer stands in each row. A prompt of more than 32768
tokens goes through one layer first, so that no shape that is timed is new to a library.

    python benchmarks/bench_generation.py --questions 16 --lengths 131072 --name questions
    python benchmarks/bench_generation.py --questions 16 --lengths 131072 --layers 4 --name questions_4_layers

times questions about one document: all of them on a cache forked with `rows`, one of them alone, and all on a
cache that repeats the document, for which four layers leave room. Each way asks twice: the row holds the
second time to the first token, and the first, where every shape is new to the libraries.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_generation.py --peers prepared --name two_gpus
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_generation.py --tp 2 --name two_gpus_tp
    python benchmarks/bench_generation.py --device-map --peers sdpa --name two_gpus_device_map

put each prompt on all GPUs: its tokens divided among them; weights and heads divided among `--tp` of them by
transformers' tensor parallelism, and tokens among the rest where the model is prepared; layers one GPU after
the other in one process, as `device_map="auto"` places them. The peak is that of the GPU that took most.
`--tiny` walks through all of it on a CPU.
"""

import argparse
import contextlib
import gc
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

# Multicast through the switch is never used. Read when the processes meet.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist
from _report import Report
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig
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
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1 << 20,
}
NEW_TOKENS = 48
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    """Bytes a second that this card moves, read and written, in a large copy; on a CPU a small one."""
    source = torch.randn(1 << (29 if DEVICE == "cuda" else 20), device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)
    if DEVICE == "cuda":
        seconds = do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3
    else:
        start = time.perf_counter()
        target.copy_(source)
        seconds = time.perf_counter() - start
    return 2 * source.numel() * 4 / seconds


def build(shape):
    """The model with random weights, the same in every process; bf16 on a GPU, fp32 on a CPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    return model


def meet(tp=1):
    """The mesh of all processes, or None for one alone; with `tp` > 1 its inner dimension divides weights."""
    if RANKS == 1:
        return None
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else None
    # A rank that waits for one that has failed must not hold its GPU for long.
    patience = timedelta(seconds=150)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", device_id=device, timeout=patience)
    shape, names = ((RANKS,), ("cp",)) if tp == 1 else ((RANKS // tp, tp), ("cp", "tp"))
    return dist.device_mesh.init_device_mesh(DEVICE, shape, mesh_dim_names=names)


def cut_weights(model, mesh):
    """Tensor parallelism as `from_pretrained(tp_plan="auto")` applies it, to weights that are there."""
    setting = DistributedConfig(tp_plan="auto", tp_size=mesh.size())
    model = type(model).maybe_distribute_model(model, setting, mesh)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                # A part may be a view, which would keep the whole alive.
                part = DTensor.from_local(weight.to_local().clone(), mesh, weight.placements, run_check=False)
                module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    return model


def balanced_map(model, memory):
    """Which device each layer goes to, as `device_map="auto"` has it, for devices of so many bytes."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {"no_split_module_classes": list(model._no_split_modules)}
    balanced = get_balanced_memory(model, max_memory=memory, **whole)
    return infer_auto_device_map(model, max_memory=balanced, **whole)


def spread(model):
    """The layers of the model one GPU after the other, all in this process."""
    from accelerate import dispatch_model

    count = torch.cuda.device_count()
    memory = {i: torch.cuda.get_device_properties(i).total_memory for i in range(count)}
    places = balanced_map(model, memory or {"cpu": 1 << 40})
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def free():
    gc.collect()
    for device in own_gpus():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def own_gpus():
    """The GPUs of this process: its own, or all where it is alone."""
    if DEVICE == "cpu":
        return []
    return range(torch.cuda.device_count()) if RANKS == 1 else [torch.cuda.current_device()]


def peak_bytes():
    """What the GPU that took most took, of all ranks."""
    peaks = [torch.cuda.max_memory_allocated(device) for device in own_gpus()]
    peak = torch.tensor(max(peaks, default=0), device=DEVICE)
    if RANKS > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


def time_left(report):
    """Seconds until the deadline on the slowest rank: all must decide alike."""
    left = torch.tensor(report.time_left(), device=DEVICE)
    if RANKS > 1:
        dist.all_reduce(left, dist.ReduceOp.MIN)
    return left.item()


@contextlib.contextmanager
def one_layer(model):
    """Inside, the model has its first layer alone: a prompt meets every shape in a fraction of the time."""
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers = 1
    try:
        yield
    finally:
        model.config.num_hidden_layers = layers


def warm_up(model, ids, call):
    """Short prompts whole; of a long one the start with all layers, and the whole with one."""
    if ids.shape[1] <= 32768 or call.get("cache_implementation") == "static":
        start = ids.shape[1] if ids.shape[1] <= 32768 else 4096
        model.generate(ids[:, :start], max_new_tokens=4, **cut_mask(call, start))
        return
    model.generate(ids[:, :4096], max_new_tokens=4, **cut_mask(call, 4096))
    with one_layer(model):
        model.generate(ids, max_new_tokens=2, **call)


def cut_mask(call, length):
    """The arguments for the first `length` tokens."""
    return {**call, "attention_mask": call["attention_mask"][:, :length]}


def draw(model, shape, generator):
    """Random ids of ordinary tokens."""
    vocabulary = min(128000, model.config.vocab_size)
    return torch.randint(0, vocabulary, shape, device=DEVICE, generator=generator)


@torch.inference_mode()
def measure(model, length, batch, pad, new_tokens=NEW_TOKENS, **options):
    """(time to first token, median time a token, peak bytes, the tokens), in seconds and bytes."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    ids = draw(model, (batch, length), generator)
    mask = torch.ones_like(ids)
    mask[:1, :pad] = 0
    call = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    warm_up(model, ids, call)
    free()
    clock = Clock()
    tokens = model.generate(ids, max_new_tokens=new_tokens, streamer=clock, **call)
    # Another rank's clock saw nothing; what it would say is not reported.
    times = clock.times or [0.0, 0.0, 0.0]
    steps = sorted(b - a for a, b in zip(times[1:], times[2:], strict=False))
    return times[1] - times[0], steps[len(steps) // 2], peak_bytes(), tokens[:, length:].tolist()


@torch.inference_mode()
def ask(model, cache, rows, width):
    """As `measure`, for `rows` questions of `width` tokens behind the document that `cache` holds."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    ids = draw(model, (rows, width), generator)
    mask = torch.ones(rows, cache.get_seq_length() + width, dtype=torch.long, device=DEVICE)
    call = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    clock = Clock()
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, streamer=clock, **call)
    # The first step is eager where it makes the graph: the median leaves it out.
    steps = sorted(b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False))
    first = clock.times[1] - clock.times[0]
    return first, steps[len(steps) // 2], peak_bytes(), tokens[:, width:].tolist()


@torch.inference_mode()
def ask_all(model, length, arguments, rate, report):
    """One row for each way of asking: shared, alone, repeated."""
    hf_longattn.prepare_generation(model)
    document = hf_longattn.LongContextCache(model.config, capacity=length + 512)
    generator = torch.Generator(DEVICE).manual_seed(1)
    ids = draw(model, (1, length), generator)
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
            # A library sets itself up for every new shape: what a first question waits for, once.
            new_shape = ask(model, cache, rows, arguments.question_tokens)[0]
            cache.crop(length - cache.get_seq_length())
            first, step, peak, tokens = ask(model, cache, rows, arguments.question_tokens)
            first_row = tokens[0] if first_row is None else first_row
            row |= {"questions": rows, "question_tokens": arguments.question_tokens}
            row |= {"first_token_s": first, "new_shape_first_token_s": new_shape}
            row |= {"token_ms": 1e3 * step, "peak_gib": peak / 2**30}
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


def weight_bytes(model):
    """Bytes of this rank's parameters, all of them and those that a step reads."""
    weights = [w.to_local() if isinstance(w, DTensor) else w for w in model.parameters()]
    held = sum(weight.numel() * weight.element_size() for weight in weights)
    embedding = model.get_input_embeddings().weight
    return held, held - embedding.numel() * embedding.element_size()


def floor(model, length, batch, rate, cache_dtype=None):
    """Seconds a token at least takes: weights once, and every row's keys and values, a share on each rank."""
    config = model.config
    # A key or a value of one head: 16 bits a number, or 8 and a scale.
    row = 128 * 2 if cache_dtype is None else 128 + 4
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * row * (length + NEW_TOKENS // 2)
    return (weight_bytes(model)[1] + batch * cache / RANKS) / rate


def run_peer(peer, model, mesh, length, arguments):
    """What one peer measured at one length, and its tokens, None where memory ran out."""
    options = {"cache_implementation": "static"} if peer == "sdpa-static" else {}
    try:
        if "prepared" in peer:
            graph = False if peer.startswith("eager") else "auto"
            setup = {"cuda_graph": graph, "cache_dtype": cache_dtype_of(peer), "device_mesh": mesh}
            hf_longattn.prepare_generation(model, **setup)
        first, step, peak, tokens = measure(
            model, length, arguments.batch, arguments.pad, arguments.new_tokens, **options
        )
        return {"first_token_s": first, "token_ms": 1e3 * step, "peak_gib": peak / 2**30}, tokens
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0][:100]}, None
    finally:
        hf_longattn.restore(model)
        free()


def describe(peer, length, arguments):
    """The fields of a row that are known before it is measured."""
    placed = ("-tp" if arguments.tp > 1 else "") + ("-device-map" if arguments.device_map else "")
    row = {"peer": peer + placed, "prompt": length, "batch": arguments.batch, "pad": arguments.pad}
    row |= {"layers": arguments.layers}
    row |= {"ranks": RANKS} if RANKS > 1 else {}
    row |= {"tp": arguments.tp} if arguments.tp > 1 else {}
    return row | ({"gpus": torch.cuda.device_count()} if arguments.device_map else {})


def time_peers(model, mesh, length, arguments, rate, report):
    """A row for each peer; whether the deadline leaves time for more."""
    firsts = None
    for peer in arguments.peers.split(","):
        if time_left(report) < 10:
            return False
        row = describe(peer, length, arguments) | {"copy_rate": rate}
        row["floor_ms"] = 1e3 * floor(model, length, arguments.batch, rate, cache_dtype_of(peer))
        measured, tokens = run_peer(peer, model, mesh, length, arguments)
        if tokens is not None:
            firsts = tokens if firsts is None else firsts
            measured["same_tokens_as_first_peer"] = tokens == firsts
        if RANKS == 1 or dist.get_rank() == 0:
            report.add(**row, **measured)
    return True


def read_arguments():
    """What the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pad", type=int, default=0, help="padding tokens on the left of the first row")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument(
        "--peers",
        default="prepared,sdpa",
        help="of prepared, eager-prepared, prepared-int8, prepared-fp8, sdpa, sdpa-static",
    )
    parser.add_argument("--tp", type=int, default=1, help="processes that divide weights and heads")
    parser.add_argument("--device-map", action="store_true", help="one process, layers over all GPUs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to walk through on a CPU")
    parser.add_argument("--questions", type=int, default=0, help="time so many questions about one prompt")
    parser.add_argument("--question-tokens", type=int, default=64)
    parser.add_argument("--name", default="generation")
    parser.add_argument("--deadline", type=float, default=300)
    return parser.parse_args()


def main():
    arguments = read_arguments()
    mesh = meet(arguments.tp)
    # Reports of the other ranks go nowhere.
    folder = None if int(os.environ.get("RANK", "0")) == 0 else Path(tempfile.mkdtemp())
    report = Report(arguments.name, deadline=arguments.deadline, folder=folder)
    rate = copy_rate()
    shape = TINY if arguments.tiny else {**SHAPE, "num_hidden_layers": arguments.layers}
    arguments.layers = shape["num_hidden_layers"]
    model = build(shape)
    if arguments.tp > 1:
        model = cut_weights(model, mesh["tp"])
    if arguments.device_map:
        model = spread(model)
    free()
    for length in map(int, arguments.lengths.split(",")):
        if arguments.questions:
            ask_all(model, length, arguments, rate, report)
        elif not time_peers(model, mesh, length, arguments, rate, report):
            break
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
