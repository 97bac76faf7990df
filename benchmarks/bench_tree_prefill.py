"""Times a prompt and 10 tokens of a whole model over all GPUs of a host: ours beside ring attention.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/bench_tree_prefill.py
    ... benchmarks/bench_tree_prefill.py --check       correctness alone; gloo where there is no GPU
    ... benchmarks/bench_tree_prefill.py --tiny        a walk through on a CPU

The form is that of the paper's table (arXiv 2408.04093): the shape of Llama-3.1-8B, random weights, bf16,
batch 1, greedy. `tree` is a prepared model; `tree-eager` the same without a CUDA graph; `ring` is ring
attention in every layer, for the prompt and for each token. The ring is written to be hard to beat: its own
key heads, never repeated; K and V in one message; the next share on its way while the current one is
attended; a zigzag share of the tokens, so that causal work is equal on every rank, and no pair of slices
computed that causal order hides; the same attention kernels, fused norms, gates and rotary embeddings as
ours; feed-forward layers in pieces, so that its peak is not theirs; no wait of the host for any token.

Before anything is timed, the ring's attention is held against fp64. A prompt goes through one layer first, so
that everything is compiled. Each row has the bytes that a rank receives and the operations that it carries
out: times over the rates of the machine, they are the floor. Rows go to `$OUT/tree_prefill.json`.
"""

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from _report import Report
from bench_generation import (
    DEVICE,
    SHAPE,
    TINY,
    Clock,
    build,
    cut_mask,
    free,
    meet,
    one_layer,
    peak_bytes,
    time_left,
    weight_bytes,
)

# Sets the channels that a ring needs, too, before the ranks meet.
from bench_tree_decode import Ring, relative
from transformers import AttentionInterface

import hf_longattn
from hf_longattn.cache.placement import Slices
from hf_longattn.fusion import fused_prompt
from hf_longattn.instance import Setup
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_over_first
from hf_longattn.parallel.cost import message_bytes
from hf_longattn.parallel.group import SequenceGroup

NEW_TOKENS = 10
NAME = "ring_baseline"
# Tokens of a feed-forward layer at a time; keys of the answer that a layer has room for.
PIECE, TAIL = 8192, 256


# ---- the ring


def by_tokens(query):
    """(B, H, T, K) with the heads of a token side by side: parts of it have the strides of a whole."""
    return query.transpose(1, 2).contiguous().transpose(1, 2)


class RingAttention(Ring):
    """Attention of every layer over shares that go round: a function that transformers calls.

    Args:
        group: the ranks.
    """

    def __init__(self, group):
        self.group = group
        self.forget()

    def forget(self):
        """Drops all keys and values."""
        self.shares, self.tails, self.buffers, self.received = {}, {}, [], 0

    def visits(self, states):
        """Every share in turn with the rank it belongs to; the next one arrives during the current."""
        size, rank = self.group.world_size, self.group.rank
        if not self.buffers:
            self.buffers = [torch.empty_like(states) for _ in range(min(2, size - 1))]
        for step in range(size):
            last = step + 1 == size
            buffer = None if last else self.buffers[step % len(self.buffers)]
            pending = [] if last else self.send(states, buffer)
            self.received += 0 if last else buffer.nbytes
            yield (rank - step) % size, states
            for work in pending:
                work.wait()
            states = buffer

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **keywords):
        """As transformers calls it: (B, H, T, K) and (B, G, T, K) of this rank -> (B, T, H, K)."""
        states, layer = torch.stack([key, value]), module.layer_idx
        if layer in self.shares:
            output = self.answer(query, self.keep(layer, states), self.shares[layer], scaling)
        else:
            self.shares[layer] = states
            output = self.read(by_tokens(query), states, scaling)
        return output.transpose(1, 2).contiguous(), None

    def keep(self, layer, states):
        """Keys and values of the answer so far, which are few and the same on every rank."""
        if layer not in self.tails:
            self.tails[layer] = states.new_empty(*states.shape[:3], TAIL, states.shape[4]), 0
        tail, held = self.tails[layer]
        tail[:, :, :, held : held + states.shape[3]] = states
        self.tails[layer] = tail, held + states.shape[3]
        return tail[:, :, :, : held + states.shape[3]]

    def answer(self, query, tail, share, scale):
        """One token, the same on every rank, over every share and the tail."""
        parts = [decode_attention(query, *tail, scale=scale)]
        parts += [decode_attention(query, *states, scale=scale) for _, states in self.visits(share)]
        return merge_over_first(parts)[0]

    def read(self, query, share, scale):
        """This rank's two slices of the prompt over every share."""
        rank, piece = self.group.rank, query.shape[2] // 2
        halves = {}
        for owner, states in self.visits(share):
            if owner == rank:
                # Both slices in the order of their positions: a triangle.
                part = blockwise_attention(query, *states, scale=scale, mask=KeyRange(causal=True))
                self.join(halves, 0, part, piece)
            elif owner < rank:
                # Its first slice lies before both of ours, its second one behind both.
                part = blockwise_attention(query, *states[:, :, :, :piece], scale=scale)
                self.join(halves, 0, part, piece)
            else:
                # Both of its slices lie between ours.
                part = blockwise_attention(query[:, :, piece:], *states, scale=scale)
                self.join(halves, 1, part, piece)
        return torch.cat([output.transpose(1, 2) for output, _ in (halves[0], halves[1])], 1).transpose(1, 2)

    def join(self, halves, first, part, piece):
        """Merges a result for the slices from `first` on into what there is."""
        pieces = zip(part[0].split(piece, 2), part[1].split(piece, 2), strict=True)
        for index, (output, lse) in enumerate(pieces, first):
            # Contiguous, so that the merge is written over what there is.
            lse = lse.contiguous()
            if index in halves:
                halves[index] = merge_over_first([halves[index], (output, lse)])
            else:
                halves[index] = output, lse


@contextlib.contextmanager
def ringed(model, ring):
    """Inside, the model attends by the ring; fused, and with feed-forward layers in pieces."""
    AttentionInterface.register(NAME, ring)
    changes = Setup(model)
    changes.use_attention(NAME)
    try:
        with fused_prompt(model), contextlib.ExitStack() as pieces:
            for layer in model.model.layers:
                pieces.enter_context(patch.object(layer.mlp, "forward", in_pieces(layer.mlp.forward)))
            yield
    finally:
        changes.undo()
        ring.forget()


def in_pieces(forward):
    """The forward of a feed-forward layer, so many tokens at a time."""
    return lambda hidden: torch.cat([forward(part) for part in hidden.split(PIECE, 1)], 1)


def next_token(model, ring, ids, positions):
    """The token behind those, of which this rank has its own; rank 0 has the last."""
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return ring.group.broadcast(model.lm_head(hidden[:, -1:]).argmax(-1))


def ring_tokens(model, ring, ids, count, note=lambda: None):
    """`count` greedy tokens; `note` is called behind the first and the last."""
    length = ids.shape[1]
    slices = Slices(0, length, ring.group.rank, ring.group.world_size)
    positions = torch.arange(length + count, device=ids.device)[None]
    tokens = [next_token(model, ring, slices.take(ids, 1), slices.take(positions[:, :length], 1))]
    note()
    for place in range(length, length + count - 1):
        tokens.append(next_token(model, ring, tokens[-1], positions[:, place : place + 1]))
    note()
    return torch.cat(tokens, 1).tolist()


# ---- what is measured


@contextlib.contextmanager
def counting():
    """Inside, a list whose only entry counts the bytes that this rank receives from the others."""
    total = [0]
    gather, exchange, join = SequenceGroup._gather, SequenceGroup.begin_exchange, SequenceGroup.join

    def counted_gather(self, link, tensor, async_op):
        total[0] += 0 if link is None else (len(link.members) - 1) * tensor.nbytes
        return gather(self, link, tensor, async_op)

    def counted_exchange(self, parts):
        total[0] += 0 if self.world_size == 1 else parts.nbytes
        return exchange(self, parts)

    def counted_join(self, output, lse, level):
        joined = join(self, output, lse, level)
        if joined is not None:
            others = len(self._connections.levels[level].members) - 1
            total[0] += others * (output.nbytes + lse.nbytes)
        return joined

    counted = {"_gather": counted_gather, "begin_exchange": counted_exchange, "join": counted_join}
    with patch.multiple(SequenceGroup, **counted):
        yield total


def synchronize():
    """Waits for the device, if it is one to wait for."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def note_in(notes, read):
    """A function that notes the time and what `read` returns, once all is done that was launched."""

    def note():
        synchronize()
        notes.append((time.perf_counter(), read()))

    return note


class CountingClock(Clock):
    """A clock that also notes what `total` held at every token."""

    def __init__(self, total):
        super().__init__()
        self.total, self.counts = total, []

    def put(self, value):
        super().put(value)
        self.counts.append(self.total[0])


def greedy(ids):
    """Arguments of `generate`; no id means padding."""
    return {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


def run_tree(model, mesh, ids, count, graph):
    """(times, bytes received so far) at the start, the first token and the last one; the tokens; no more."""
    hf_longattn.prepare_generation(model, device_mesh=mesh, cuda_graph=graph)
    call = greedy(ids)
    try:
        model.generate(ids[:, :4096], max_new_tokens=4, **cut_mask(call, 4096))
        with one_layer(model):
            # As many tokens as below: the strides of a cache are its room, and plans are built for strides.
            model.generate(ids, max_new_tokens=count, **call)
        free()
        with counting() as total:
            # Streamers of the other ranks stay silent: what they received is what rank 0 did.
            clock = CountingClock(total)
            tokens = model.generate(ids, max_new_tokens=count, streamer=clock, **call)
    finally:
        hf_longattn.restore(model)
    notes = list(zip(clock.times, clock.counts, strict=True)) or [(0.0, 0)] * 3
    return [notes[0], notes[1], notes[-1]], tokens[:, ids.shape[1] :].tolist(), {}


def run_ring(model, group, ids, count):
    """As `run_tree`, for the ring; and the rate of its messages alone."""
    ring, notes = RingAttention(group), []
    with ringed(model, ring):
        with one_layer(model):
            ring_tokens(model, ring, ids, 2)
        ring.forget()
        free()
        note = note_in(notes, lambda: ring.received)
        # No rank is timed while it waits for another to come from its warm-up.
        group.gather(ids[0, :1])
        note()
        tokens = ring_tokens(model, ring, ids, count, note)
        rate = message_rate(ring)
    return notes, tokens, {"message_gb_per_s": rate}


def message_rate(ring, rounds=8):
    """GB a second that a rank receives while shares go round and nothing is attended."""
    share, notes = ring.shares[0], []
    note = note_in(notes, lambda: ring.received)
    for _ in range(rounds + 1):
        for _ in ring.visits(share):
            pass
        if not notes:
            # The first round waits for the others.
            note()
    note()
    (start, before), (end, after) = notes
    return (after - before) / (end - start) / 1e9


def step_bytes(peer, model, length, ranks):
    """Bytes that a rank receives for a token: partial results of the others, or all of their shares."""
    config = model.config
    if peer == "ring":
        return state_bytes(model, length) * (ranks - 1) // ranks
    message = message_bytes(1, config.num_attention_heads, config.head_dim, model.dtype.itemsize)
    return config.num_hidden_layers * message * (ranks - 1)


def state_bytes(model, length):
    """Bytes of the keys and values of so many tokens."""
    config = model.config
    row = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return row * config.num_hidden_layers * length


@torch.inference_mode()
def measure(peer, model, mesh, ids, count):
    """The fields of one row that are measured, and the tokens."""
    group, length = SequenceGroup.from_mesh(mesh), ids.shape[1]
    if peer == "ring":
        notes, tokens, more = run_ring(model, group, ids, count)
    else:
        notes, tokens, more = run_tree(model, mesh, ids, count, False if peer == "tree-eager" else "auto")
    (start, _), (first, received), (end, _) = notes
    peak = peak_bytes()
    held = weight_bytes(model)[0] + state_bytes(model, length) / group.world_size
    return {
        "first_token_s": first - start,
        "token_ms": 1e3 * (end - first) / (count - 1),
        "total_s": end - start,
        "peak_gib": peak / 2**30,
        # What is not weights and this rank's keys and values.
        "extra_gib": (peak - held) / 2**30 if peak else None,
        "prompt_received_mib": received / 2**20,
        # A replay receives without a word to the host: this follows from the shapes, see `check_tokens`.
        "token_received_kib": step_bytes(peer, model, length, group.world_size) / 2**10,
        **more,
    }, tokens


def operations(model, length):
    """Operations of all ranks for a prompt, in units of 1e12: products of weights, and visible pairs."""
    config = model.config
    weights = sum(w.numel() for layer in model.model.layers for w in layer.parameters())
    pairs = 2 * config.num_attention_heads * config.head_dim * length**2 * config.num_hidden_layers
    return (2 * weights * length + pairs) / 1e12


def time_lengths(model, mesh, arguments, report):
    """A row for each length and peer."""
    group = SequenceGroup.from_mesh(mesh)
    for length in map(int, arguments.lengths.split(",")):
        generator, firsts = torch.Generator(DEVICE).manual_seed(1), None
        vocabulary = min(128000, model.config.vocab_size)
        ids = torch.randint(0, vocabulary, (1, length), device=DEVICE, generator=generator)
        for peer in arguments.peers.split(","):
            if time_left(report) < 10:
                return
            row = {"peer": peer, "prompt": length, "ranks": group.world_size}
            row |= {"layers": model.config.num_hidden_layers, "new_tokens": arguments.tokens}
            row |= {"tflop_a_rank": operations(model, length) / group.world_size}
            try:
                measured, tokens = measure(peer, model, mesh, ids, arguments.tokens)
                firsts = tokens if firsts is None else firsts
                row |= {**measured, "same_tokens_as_first_peer": tokens == firsts}
            except torch.OutOfMemoryError as error:
                row |= {"error": str(error).splitlines()[0][:100]}
            free()
            if group.rank == 0:
                report.add(**row)


# ---- correctness first


def check_attention(group, dtype):
    """Holds what the ring finds for a prompt and for a token behind it against fp64; returns the errors.

    The bound is 1.5 times the error of the same kernels in one process and a rounding.
    """
    generator, length = torch.Generator(DEVICE).manual_seed(7), 512 * group.world_size
    shapes = [(1, heads, length + 1, 64) for heads in (8, 2, 2)]
    query, *states = (torch.randn(shape, device=DEVICE, dtype=dtype, generator=generator) for shape in shapes)
    causal, errors = KeyRange(causal=True), {}
    exact = blockwise_attention(query.double(), *(x.double() for x in states), mask=causal, impl="reference")
    ring, layer = RingAttention(group), argparse.Namespace(layer_idx=0)
    slices = Slices(0, length, group.rank, group.world_size)
    alone = {
        "prompt": slices.take(blockwise_attention(query, *states, mask=causal)[0], 2),
        "token": decode_attention(query[:, :, length:], *states)[0],
    }
    for name, part in (("prompt", lambda x: slices.take(x, 2)), ("token", lambda x: x[:, :, length:])):
        wanted = part(exact[0])
        found = ring(layer, *(part(x) for x in (query, *states)))[0].transpose(1, 2)
        bound = 1.5 * (relative(alone[name], wanted) + torch.finfo(dtype).eps)
        errors[name] = relative(found, wanted)
        assert errors[name] <= bound, f"ring, {name}: error {errors[name]:.2e} > {bound:.2e}"
    return errors


@torch.inference_mode()
def check_tokens(mesh, length=160, count=10):
    """The ring and ours give the tokens of one process, and ours receives what is reported for a token."""
    model, group = build(TINY), SequenceGroup.from_mesh(mesh)
    length += -length % (2 * group.world_size)
    ids = torch.randint(0, 128, (1, length), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    wanted = model.generate(ids, max_new_tokens=count, **greedy(ids))[:, length:].tolist()
    found = {"ring": run_ring(model, group, ids, count), "tree": run_tree(model, mesh, ids, count, False)}
    for peer, (notes, tokens, _) in found.items():
        assert tokens == wanted, f"{peer}: {tokens} in place of {wanted}"
        step = (notes[2][1] - notes[1][1]) / (count - 1)
        assert group.rank or step == step_bytes(peer, model, length, group.world_size), (
            f"{peer}: {step} bytes"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--peers", default="tree,ring", help="of tree, tree-eager, ring")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to walk through on a CPU")
    parser.add_argument("--name", default="tree_prefill")
    parser.add_argument("--deadline", type=float, default=150, help="seconds after which no case is begun")
    arguments = parser.parse_args()
    folder = None if os.environ["RANK"] == "0" else Path(tempfile.mkdtemp())
    report = Report(arguments.name, arguments.deadline, folder)
    mesh = meet()
    group = SequenceGroup.from_mesh(mesh)
    errors = check_attention(group, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    if group.rank == 0:
        print("errors", {name: f"{error:.1e}" for name, error in errors.items()}, flush=True)
    if arguments.check and DEVICE == "cpu":
        # In bf16 a tie may fall either way.
        check_tokens(mesh)
    if not arguments.check:
        model = build({**SHAPE, "num_hidden_layers": arguments.layers} if not arguments.tiny else TINY)
        free()
        time_lengths(model, mesh, arguments, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
