"""Times one decoding step of one attention layer over a cache cut along the sequence, on all GPUs of a host.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/bench_tree_decode.py
    ... benchmarks/bench_tree_decode.py --check        correctness alone; gloo where there is no GPU
    ... benchmarks/bench_tree_decode.py --forms local ours push push-fused --sizes 65536 --warps 1 4

32 query heads, 8 key heads, head dim 128, bf16, batch 1; 64K, 256K and 1M keys in all. Every form is first
checked against fp64. `ours` is decode_attention and one kernel that reads the peers' memory and merges;
`all-gather` is decode_attention, one packed all-gather of NCCL and the merge; `paper` is the three
all-reduces of arXiv 2408.04093; `ring` sends keys and values round (own key heads, K and V in one message,
overlapped with attention); `local` is decode_attention on the shard alone, and `flash` is torch's own kernel
on it. Eager times and times in a CUDA graph, the median over rounds of the slowest rank. `rate` is what the
ring's messages alone reach. Rows go to `$OUT/tree_decode.json` (or benchmarks/results).

`push` and `push-fused` are candidates for the place of `ours` (see `_push.py`), timed where `--forms` names
them: the ranks push their results to each other, in the second form by the launch that merges the splits of
decode_attention. There is one of each for every `--rows`, `--warps` and `--early`. Rows of chosen forms or
sizes go to `tree_decode_chosen.json`.
"""

import argparse
import itertools
import os
import statistics
import threading
import time
from functools import partial

# Multicast through the switch is never used; a ring gets the channels that its rate needs. Read at start.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ.setdefault("NCCL_MIN_P2P_NCHANNELS", "32")
os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", "32")

import torch
import torch.distributed as dist
from _report import Report

from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_partials
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.reduction import gather_merge, three_reductions, tree_merge

HEADS, KEY_HEADS, DIM = 32, 8, 128
SIZES = (2**16, 2**18, 2**20)
FORMS = ("local", "ours", "all-gather", "paper", "ring", "flash")
CANDIDATES = ("push", "push-fused")


def attend(query, states):
    """(output, lse) of the shard by our kernel; states (2, B, G, S, K) are keys and values."""
    return decode_attention(query, states[0], states[1])


def flash(query, states):
    """(output, lse) of the shard by torch's flash kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, states[0], states[1], 0.0, False)[:2]


def push(board, query, states):
    """The join by pushing, of a result that the rank has merged."""
    output, lse = attend(query, states)
    return board.merge(output[None], lse[None], query.dtype)


def push_fused(board, query, states):
    """The join by pushing, which merges the splits of the rank too."""
    from hf_longattn.kernels.decode_attention.triton import split_forward

    splits = split_forward(query, states[0], states[1], query.shape[-1] ** -0.5, KeyRange())
    return board.merge(*splits, query.dtype)


class Ring:
    """Ring attention for one query: every shard visits every rank, the next arrives during the current."""

    def __init__(self, group, states):
        self.group, self.states = group, states
        self.buffers = [torch.empty_like(states) for _ in range(min(2, group.world_size - 1))]

    def send(self, states, buffer):
        """Starts to pass `states` on and to receive the next shard; returns what to wait for."""
        size, rank = self.group.world_size, self.group.rank
        sent = dist.P2POp(dist.isend, states, (rank + 1) % size)
        received = dist.P2POp(dist.irecv, buffer, (rank - 1) % size)
        # One order for all would deadlock a backend that blocks.
        return dist.batch_isend_irecv([sent, received] if rank % 2 == 0 else [received, sent])

    def __call__(self, query):
        states, parts = self.states, []
        for step in range(self.group.world_size):
            last = step + 1 == self.group.world_size
            buffer = None if last else self.buffers[step % len(self.buffers)]
            pending = [] if last else self.send(states, buffer)
            parts.append(attend(query, states))
            for work in pending:
                work.wait()
            states = buffer
        return merge_partials(*(torch.stack(part) for part in zip(*parts, strict=True)))

    def move(self):
        """One message alone, for the rate."""
        for work in self.send(self.states, self.buffers[0]):
            work.wait()


def make_case(group, num_keys, device, dtype):
    """(query, states): the same query everywhere, this rank's share of the keys and values."""
    generator = torch.Generator(device).manual_seed(7)
    query = torch.randn(1, HEADS, 1, DIM, device=device, dtype=dtype, generator=generator)
    generator.manual_seed(100 + group.rank)
    share = num_keys // group.world_size
    states = torch.randn(2, 1, KEY_HEADS, share, DIM, device=device, dtype=dtype, generator=generator)
    return query, states


def forms(group, query, states, names=FORMS, boards=()):
    """The chosen forms by name, as calls that return (output, lse); candidates once for each of `boards`."""
    calls = {
        "local": lambda: attend(query, states),
        "ours": lambda: tree_merge(group, *attend(query, states)),
        "all-gather": lambda: gather_merge(group, *attend(query, states)),
        "paper": lambda: three_reductions(group, *attend(query, states)),
    }
    if "ring" in names:
        calls["ring"] = partial(Ring(group, states), query)
    if query.is_cuda:
        calls["flash"] = lambda: flash(query, states)
    for board in boards:
        calls[f"push {board.name}"] = partial(push, board, query, states)
        calls[f"push-fused {board.name}"] = partial(push_fused, board, query, states)
    return {name: call for name, call in calls.items() if name.split()[0] in names}


def open_boards(group, device, arguments):
    """A board for each setting of the candidates, where one of them is asked for and there are GPUs."""
    if device.type != "cuda" or not set(CANDIDATES) & set(arguments.forms):
        return []
    from _push import PushBoards

    settings = itertools.product(arguments.rows, arguments.warps, map(bool, arguments.early))
    return [PushBoards.open(dist.group.WORLD, device, *setting) for setting in settings]


def stop(boards):
    """Ends the waits of ranks that wait for each other without end."""
    for board in boards:
        board.stop()


def relative(result, exact):
    """‖result - exact‖ / ‖exact‖, in fp64."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def check(group, device, dtype, names=FORMS, boards=()):
    """Refuses a form whose error passes 1.5 times that of one process and a rounding, or bits that differ.

    Every form is asked three questions in turn, twice, and from a graph: what it kept of the last call or of
    the one before answers another.
    """
    query, states = make_case(group, 8192, device, dtype)
    whole = torch.cat(list(group.gather(states)), 3)
    questions = [query.clone(), -query, query.flip(1)]
    exact = [decode_attention(one.double(), *whole.double(), impl="reference")[0] for one in questions]
    cases = list(zip(questions, exact, strict=True))
    alone = max(relative(decode_attention(one, *whole)[0], right) for one, right in cases)
    bound = 1.5 * (alone + torch.finfo(dtype).eps)
    errors = {}
    for name, call in forms(group, query, states, names, boards).items():
        if name in ("local", "flash"):
            continue
        errors[name] = 0.0
        ways = [lambda call=call: call()[0]]
        if query.is_cuda and name != "ring":
            ways.append(answers_of_graph(call))
        for answer, (question, right) in itertools.product(ways, 2 * cases):
            query.copy_(question)
            output = answer()
            errors[name] = max(errors[name], relative(output, right))
            assert errors[name] <= bound, f"{name}: error {errors[name]:.2e} > {bound:.2e}"
            same = all(torch.equal(other, output) for other in group.gather(output))
            assert same or name == "ring", f"{name}: the ranks have different bits"
    return {**errors, "alone": alone, "bound": bound}


def answers_of_graph(call):
    """A function that replays `call` and returns its output."""
    outputs = []
    replay = in_graph(lambda: outputs.append(call()[0]), 1)

    def answer():
        replay()
        return outputs[-1]

    return answer


def in_graph(call, calls):
    """A function that replays `calls` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The thread that watches NCCL queries events, which a global capture would forbid.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return graph.replay


def microseconds(group, run, calls, rounds=7):
    """Median time of one of `calls` calls that `run` makes, of the slowest rank."""
    run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        dist.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    slowest = group.reduce(torch.tensor(times, device="cuda"), dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def repeat(call, calls):
    """A function that makes `calls` calls."""

    def run():
        for _ in range(calls):
            call()

    return run


def time_sizes(report, group, device, arguments, boards):
    """Every chosen form at every size, eager and in a graph."""
    for num_keys in arguments.sizes:
        query, states = make_case(group, num_keys, device, torch.bfloat16)
        peaks = {}
        for name, call in forms(group, query, states, arguments.forms, boards).items():
            # Every rank must decide alike: the clock of the slowest counts.
            left = torch.tensor([report.time_left() if report else 1e9], device=device)
            if group.reduce(left, dist.ReduceOp.MIN).item() < 10:
                return
            calls = 4 if name == "ring" and num_keys == SIZES[-1] else 20
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            eager = microseconds(group, repeat(call, calls), calls)
            peaks[name] = torch.cuda.max_memory_allocated() - before
            # Messages between pairs are captured last, below: a capture that fails takes the process with it.
            graph = microseconds(group, in_graph(call, calls), calls) if name != "ring" else None
            assert not any(board.stopped for board in boards), f"{name}: the ranks waited without end"
            if report:
                report.add(
                    case=f"S{num_keys}-B1", form=name, ranks=group.world_size, eager_us=eager, graph_us=graph,
                    extra_mib=peaks[name] / 2**20,
                )  # fmt: skip
        if "ring" in arguments.forms:
            time_messages(report, group, states, f"S{num_keys}-B1")
        del query, states, call


def time_messages(report, group, states, case):
    """What the ring's messages alone reach."""
    moved = microseconds(group, repeat(Ring(group, states).move, 5), 5)
    if report:
        rate = states.numel() * states.element_size() / moved / 1e3
        report.add(case=case, form="rate", ranks=group.world_size, gb_per_s=rate, graph_us=moved)


def time_ring_in_graph(report, group, device, sizes):
    """The ring once more, in a graph."""
    for num_keys in sizes:
        query, states = make_case(group, num_keys, device, torch.bfloat16)
        calls = 20 if num_keys < SIZES[-1] else 4
        graph = microseconds(group, in_graph(partial(Ring(group, states), query), calls), calls)
        if report:
            report.add(case=f"S{num_keys}-B1", form="ring in a graph", ranks=group.world_size, graph_us=graph)


def read_arguments():
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--ring-graph", action="store_true", help="capture the ring too, at the end")
    parser.add_argument("--deadline", type=float, default=150, help="seconds after which no case is begun")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="keys on all GPUs together")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=(*FORMS, *CANDIDATES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="rows a program, of push")
    parser.add_argument("--warps", type=int, nargs="+", default=[1], help="warps a program, of push")
    parser.add_argument("--early", type=int, nargs="+", default=[0], help="1: push is launched early")
    return parser.parse_args()


@torch.no_grad()
def main():
    arguments = read_arguments()
    started = time.time()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    group = SequenceGroup(dist.group.WORLD)
    boards = open_boards(group, device, arguments)
    patience = threading.Timer(arguments.deadline + 30, stop, [boards])
    patience.daemon = True
    patience.start()
    dtype = torch.bfloat16 if cuda else torch.float32
    errors = check(group, device, dtype, arguments.forms, boards)
    default = tuple(arguments.forms) == FORMS and tuple(arguments.sizes) == SIZES
    name = "tree_decode" if default else "tree_decode_chosen"
    report = Report(name, arguments.deadline) if group.rank == 0 and not arguments.check else None
    if group.rank == 0:
        print("errors", {name: f"{error:.1e}" for name, error in errors.items()}, flush=True)
    if cuda and not arguments.check:
        if report:
            report.start = started
        time_sizes(report, group, device, arguments, boards)
        if arguments.ring_graph:
            time_ring_in_graph(report, group, device, arguments.sizes)
    patience.cancel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
