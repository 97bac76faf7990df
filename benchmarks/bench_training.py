"""Times forward + backward of a decoder at long context: a prepared model beside its peers.

    python benchmarks/bench_training.py --lengths 32768,65536,131072 --peers ours,liger --deadline 120
    python benchmarks/bench_training.py --repeats 0 --lengths 65536,131072 --name training_memory \\
        --peers ours-lean,eager:2048/4096,sdpa:16384/32768,liger-tiled-offload
    python benchmarks/bench_training.py --repeats 0 --lengths 720896 --peers ours --name training_long
    python benchmarks/bench_training.py --repeats 0 --layers 1 --lengths 2097152 --peers ours-offload
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_training.py --alone --shape 8b --layers 8 \\
        --lora 16 --repeats 0 --lengths 131072,262144 --peers ours --name training_two_gpus

Random weights of the shape of Llama-3.2-1B (or `--shape 8b`), bf16, batch 1, no optimizer; with `--lora` the
weights are frozen and adapters train. Under torchrun every sequence lies on all GPUs; `--alone` runs the
lengths on the first of them before, in the same run. A row is saved as soon as it is there:

    tokens_per_s, step_s    of the median of the repeats; `--repeats 0` times the first step of a length,
                            behind one of 4096 tokens, so that it holds what pinning host memory takes
    floor_s                 operations without recomputation over 989 TFLOP/s a GPU: for a token six a weight
                            that trains and four a frozen one, and causal attention three and a half times
    peak_gib, host_gib      most bytes on the GPU, and bytes that a prepared model pins on the host; of the
                            rank that took most
    kib_per_token           peak less weights and gradients, over the tokens of the sequence
    slope_kib_per_token     the same between the two longest lengths of a peer: what does not grow is left out
    floor_kib_per_token     of one layer's backward: a gradient, keys and values, and their fp32 gradients
    fits                    (bytes the GPU has free without a model - peak) / slope + longest length: how many
                            tokens the GPU holds by the two measured peaks, host memory given; by the floor
                            where the slope is less. `fits_host_gib` is what the host would hold then,
                            `fits_layers` of how many layers that is

Between lengths up to 64K the slope counts gradients of keys of one attention call, which stop growing there;
at lengths at which the loss is the highest point, its two hidden states a token alone.
Before anything is timed, loss and gradients of a prepared model are compared with plain sdpa at 4K tokens,
against fp32. Peers: `ours` (layer inputs kept where they fit), `ours-gpu`, `ours-offload`, `ours-lean`
(offload, attention recomputed), `ours-liger` (Liger's norm, rope and MLP inside), `sdpa` (checkpointing),
`eager` (no checkpointing), `liger`, `liger-offload`, `liger-tiled` and `liger-tiled-offload` (its tiled MLP).
Name Liger's peers last: its rope replaces that of transformers for the whole process. `--shape tiny` walks
the same way on a CPU.
"""

import argparse
import gc
import importlib.util
import math
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# Multicast through the switch is never used. Read when the processes meet.
os.environ["NCCL_NVLS_ENABLE"] = "0"

import torch
import torch.distributed as dist
from _decoders import (
    DEVICE,
    OURS,
    SHAPES,
    build,
    decoder_layers,
    floor_bytes,
    held_bytes,
    operations,
    prepare,
    trained,
)
from _report import Report

import hf_longattn
from hf_longattn.cache.pinned import locked_bytes
from hf_longattn.instance import unwrap
from hf_longattn.training.groups import host_share

CUDA = torch.cuda.is_available()
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
# An H100's dense bf16 by its datasheet, and what steps of 128K tokens have reached, for what is announced.
PEAK, USUAL = 989e12, 450e12
# Tokens of the check, and of the step before a step that is timed at once.
SHORT = 4096 if CUDA else 128
GIB = 2**30


# ---- measuring


def meet():
    """The mesh of all processes, or None for one alone."""
    if RANKS == 1:
        return None
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else None
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=device)
    return dist.device_mesh.init_device_mesh(DEVICE, (RANKS,), mesh_dim_names=("cp",))


def free():
    """Forgets what is gone; the peak begins again."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize():
    """Waits for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def usable_bytes():
    """What tensors may take on this GPU: what the driver and the allocator have free, and what is held."""
    if not CUDA:
        return 0
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def over_ranks(value, mesh, operation="MAX"):
    """The most, or the least, of what the ranks have."""
    if mesh is None:
        return value
    found = torch.tensor(float(value), dtype=torch.float64, device=DEVICE)
    dist.all_reduce(found, getattr(dist.ReduceOp, operation))
    return found.item()


def tokens(length, vocab_size):
    """(1, length) random ids, the same in every process."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randint(0, vocab_size, (1, length), device=DEVICE, generator=generator)


def step(model, ids):
    """One forward and backward; gradients are added to those that are there."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


class Progress:
    """Says every half a minute how far a long step is, from a thread of its own."""

    def __init__(self, model, expected, every=30.0):
        self.firsts = [trained(layer)[0] for layer in decoder_layers(model)]
        self.expected, self.every, self.done = expected, every, 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._talk, daemon=True)

    def _count(self, parameter):
        self.done += 1

    def _talk(self):
        start = time.time()
        while not self.ended.wait(self.every):
            gpu = torch.cuda.memory_allocated() / GIB if CUDA else 0.0
            print(
                f"  {time.time() - start:.0f} s of about {self.expected:.0f}: backward of {self.done} of "
                f"{len(self.firsts)} layers issued, {gpu:.1f} GiB on the GPU, "
                f"{locked_bytes() / GIB:.1f} GiB pinned",
                flush=True,
            )

    def __enter__(self):
        # Hooks of layers would change what runs: a gradient's arrival tells as much.
        self.handles = [p.register_post_accumulate_grad_hook(self._count) for p in self.firsts]
        if RANK == 0:
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class Measured:
    """One length: seconds a step, bytes on the GPU and on the host, and those of weights and gradients."""

    seconds: float
    peak: float
    host: float
    held: float

    @property
    def activations(self):
        """Bytes of a step beyond weights and gradients, wherever they are."""
        return self.peak - self.held + self.host


def measure(model, length, repeats, expected, mesh=None):
    """What steps of one length take."""
    ids = tokens(length, unwrap(model).config.vocab_size)
    step(model, ids if repeats else ids[:, :SHORT])
    free()
    times = []
    with Progress(model, expected):
        for _ in range(max(repeats, 1)):
            synchronize()
            over_ranks(0, mesh)
            start = time.perf_counter()
            loss = step(model, ids)
            synchronize()
            times.append(over_ranks(time.perf_counter() - start, mesh))
    if not math.isfinite(loss.item()):
        raise SystemExit(f"{length} tokens: the loss is {loss.item()}")
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    most, host = (over_ranks(number, mesh) for number in (peak, locked_bytes()))
    return Measured(statistics.median(times), most, host, held_bytes(model))


# ---- correctness


def gradients(model):
    """All gradients in one vector on the host."""
    return torch.cat([p.grad.flatten().float().cpu() for p in trained(model)])


def check(arguments, mesh):
    """Errors of prepared models and of sdpa against fp32, on two layers."""
    errors, exact = {}, None
    for name in ("fp32", "sdpa", "ours-gpu", "ours-offload"):
        model = build(arguments, layers=2)
        ids = tokens(SHORT, unwrap(model).config.vocab_size)
        if name == "fp32":
            model = model.float()
        elif name in OURS:
            hf_longattn.prepare_training(model, device_mesh=mesh, block_size=SHORT // 4 - 24, **OURS[name])
        step(model, ids)
        found = gradients(model)
        exact = found if exact is None else exact
        errors[name] = over_ranks(((found - exact).norm() / exact.norm()).item(), mesh)
        del model
        free()
    worst = max(errors["ours-gpu"], errors["ours-offload"])
    if not worst <= 1.5 * (errors["sdpa"] + torch.finfo(torch.bfloat16).eps):
        raise SystemExit(f"wrong gradients, not timed: {errors}")
    return errors


# ---- rows


def length_row(found, length, floor, is_ours):
    """What one length gave."""
    row = {"tokens_per_s": length / found.seconds, "step_s": found.seconds, "floor_s": floor}
    if not found.peak:
        return row
    # How much others pin is not known.
    row |= {"host_gib": found.host / GIB} if is_ours else {}
    row |= {"peak_gib": found.peak / GIB, "held_gib": found.held / GIB}
    return row | {"kib_per_token": (found.peak - found.held) / length / 1024}


def slope_row(measured, floor):
    """Memory a token between the two longest lengths."""
    (a, first), (b, second) = sorted(measured.items())[-2:]
    slope = (second.peak - first.peak) / (b - a)
    row = {"between": f"{a}-{b}", "slope_kib_per_token": slope / 1024, "floor_kib_per_token": floor / 1024}
    return row, slope


def fits_row(measured, slope, usable, missing, layer_held):
    """Tokens that the GPU holds by the measured peaks, were `missing` more layers there."""
    length, longest = max(measured.items())
    room = usable - longest.peak - missing * layer_held
    return {"fits": max(int(length + room / slope), 0), "usable_gib": usable / GIB}


def host_at(measured, fits, layers, full):
    """GiB on the host at the longest length that fits, by those of the longest that ran."""
    length, longest = max(measured.items())
    return longest.host / length * fits * full / layers / GIB


def memory_rows(add, model, measured, peer, arguments):
    """The slope and what follows from it, where two lengths ran."""
    if len(measured) < 2 or not max(measured.items())[1].peak:
        return
    floor = floor_bytes(model)
    row, slope = slope_row(measured, floor)
    add(**row)
    # What "auto" keeps on the GPU goes to the host before the GPU is full: no line through two lengths.
    if OURS.get(peer, {"offload": False}).get("offload", "auto") == "auto":
        return
    layers, full = decoder_layers(model), SHAPES[arguments.shape]["num_hidden_layers"]
    row = fits_row(measured, max(slope, floor), usable_bytes(), full - len(layers), held_bytes(layers[0]))
    row |= {"fits_layers": full}
    if peer in OURS:
        row |= {"fits_host_gib": host_at(measured, row["fits"], len(layers), full)}
    add(**row)


def run_peer(report, peer, lengths, arguments, mesh=None):
    """The rows of one peer, and what was measured by length."""
    ranks = RANKS if mesh is not None else 1
    model = build(arguments, implementation="eager" if peer == "eager" else "sdpa")
    model = prepare(model, peer, arguments, mesh)
    shape = {"shape": arguments.shape, "layers": len(decoder_layers(model)), "peer": peer}
    shape |= ({"lora": arguments.lora} if arguments.lora else {}) | ({"ranks": ranks} if RANKS > 1 else {})

    def add(**row):
        if RANK == 0:
            report.add(**shape, **row)

    measured = {}
    for length in lengths:
        needed, done = operations(model, length, peer)
        expected = done / USUAL / ranks if CUDA else 0.0
        if RANK == 0:
            print(f"  {peer}, {length} tokens: about {expected:.0f} s a step", flush=True)
        if over_ranks(report.time_left() - 1.2 * expected * (1 + arguments.repeats) - 5, mesh, "MIN") < 0:
            add(tokens=length, error="no time left")
            break
        try:
            measured[length] = measure(model, length, arguments.repeats, expected, mesh)
        except torch.OutOfMemoryError as error:
            add(tokens=length, error=str(error).splitlines()[0][:100])
            if mesh is not None:
                # The others wait for this rank.
                raise
            break
        add(tokens=length, **length_row(measured[length], length, needed / PEAK / ranks, peer in OURS))
    memory_rows(add, model, measured, peer, arguments)
    return measured


def run_alone(report, peer, lengths, arguments, mesh):
    """The rows of one GPU, those of all, and how they compare."""
    alone = run_peer(report, peer, lengths, arguments) if RANK == 0 else {}
    free()
    dist.barrier()
    shared = run_peer(report, peer, lengths, arguments, mesh)
    for length in sorted(alone.keys() & shared.keys()):
        one, all_ = alone[length], shared[length]
        row = {"times_one_gpu": one.seconds / all_.seconds}
        if one.peak:
            row |= {"activations_of_one_gpu": all_.activations / one.activations}
        report.add(shape=arguments.shape, peer=peer, ranks=RANKS, tokens=length, **row)


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--peers", default="ours,ours-offload,sdpa,liger", help="PEER, or PEER:LENGTH/LENGTH")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; the weights are frozen then")
    parser.add_argument("--block-size", type=int, help="tokens of a block (picked by the width)")
    parser.add_argument("--keep-every", type=int, help="layers that share a kept input (as they fit)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="timed steps; 0 times the first, for steps of minutes"
    )
    parser.add_argument("--skip-check", action="store_true", help="when the check passed just before")
    parser.add_argument("--alone", action="store_true", help="under torchrun: on the first GPU alone before")
    parser.add_argument("--name", default="training")
    parser.add_argument("--deadline", type=float, default=500)
    arguments = parser.parse_args()
    if arguments.alone and RANKS == 1:
        parser.error("--alone compares one GPU with several: use torchrun")
    if RANKS > 1 and any(peer not in OURS for peer, _ in wanted(arguments)):
        parser.error("only prepared models put one sequence on several GPUs")
    return arguments


def wanted(arguments):
    """(peer, lengths) of every peer that was asked for."""
    for peer in arguments.peers.split(","):
        name, _, own = peer.partition(":")
        yield name, [int(n) for n in (own.split("/") if own else arguments.lengths.split(","))]


def main():
    arguments = parse()
    mesh = meet()
    # Reports of the other ranks go nowhere.
    folder = None if RANK == 0 else Path(tempfile.mkdtemp())
    report = Report(arguments.name, deadline=arguments.deadline, folder=folder)
    if not arguments.skip_check:
        errors = check(arguments, mesh)
        if RANK == 0:
            report.add(check=f"gradients at {SHORT} tokens", **errors)
    run = run_alone if arguments.alone else run_peer
    if RANK == 0 and CUDA:
        print(f"  {host_share() / GIB:.0f} GiB of the host for each process", flush=True)
    for peer, lengths in wanted(arguments):
        if "liger" in peer and importlib.util.find_spec("liger_kernel") is None:
            print(f"{peer}: left out, liger-kernel is not installed", flush=True)
            continue
        run(report, peer, lengths, arguments, mesh)
        free()
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
