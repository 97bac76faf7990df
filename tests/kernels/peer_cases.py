"""The join through peers' memory in the interpreter, a process a rank. Run as `python peer_cases.py P,P...`.

The boards are memory that all processes share, at one address in each of them.
"""

import multiprocessing
import os
import random
import sys
import time

os.environ["TRITON_INTERPRET"] = "1"

import torch

from hf_longattn.kernels.merge_partials import triton_peers
from hf_longattn.kernels.merge_partials.reference import merge_reference

FORK = multiprocessing.get_context("fork")
# (B, H, T, V): the number of programs goes up and down from call to call.
SHAPES = [(1, 6, 2, 16), (1, 6, 2, 16), (2, 3, 1, 24), (1, 1, 1, 16), (1, 32, 1, 8), (1, 6, 2, 16)] * 2


def shared(tensor):
    return tensor.share_memory_()


def open_boards(size):
    boards = [shared(torch.empty(triton_peers.board_bytes(size), dtype=torch.uint8)) for _ in range(size)]
    for rank, board in enumerate(boards):
        triton_peers.open_board(board, rank, size)
    return boards


def parts(size):
    """For each call the outputs (P, B, H, T, V) and lse (P, B, H, T) of all ranks, some of them empty."""
    for shape in SHAPES:
        outputs, lse = torch.randn(size, *shape), 3 * torch.randn(size, *shape[:-1])
        lse[0, :, ::3] = -torch.inf
        lse[..., -1, :] = lse[..., -1, :] if shape[1] == 1 else -torch.inf
        outputs[lse == -torch.inf] = torch.nan
        yield shared(outputs), shared(lse)


def join(rank, boards, calls, results):
    torch.set_num_threads(1)
    addresses, pause = torch.tensor([board.data_ptr() for board in boards]), random.Random(rank)
    for (outputs, lse), (joined, joined_lse) in zip(calls, results, strict=True):
        # Now one rank is late and then another.
        time.sleep(pause.choice((0, 0, 0.03)))
        output, total = triton_peers.pull_merge(addresses, rank, outputs[rank], lse[rank])
        joined[rank], joined_lse[rank] = output, total


def start(size, boards, calls, results, ranks):
    processes = [FORK.Process(target=join, args=(rank, boards, calls, results)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def every_rank_has_the_bits(size):
    torch.manual_seed(size)
    boards, calls = open_boards(size), list(parts(size))
    results = [tuple(shared(torch.zeros_like(part)) for part in call) for call in calls]
    processes = start(size, boards, calls, results, range(size))
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, codes
    for index, (call, found) in enumerate(zip(calls, results, strict=True)):
        exact = merge_reference(*(part.double() for part in call))
        for got, plain, want in zip(found, merge_reference(*call), exact, strict=True):
            assert torch.equal(got, got[:1].expand_as(got)), f"call {index}: bits differ"
            live = want > -torch.inf
            assert torch.equal(got[0] > -torch.inf, live), f"call {index}"
            error, least = (x.double()[live].sub(want[live]).norm() for x in (got[0], plain))
            assert error <= 1.5 * (least + torch.finfo(got.dtype).eps * want[live].norm()), f"call {index}"


def a_wait_ends_when_it_is_stopped(size):
    boards, calls = open_boards(size), list(parts(size))[:1]
    results = [tuple(shared(torch.zeros_like(part)) for part in call) for call in calls]
    (process,) = start(size, boards, calls, results, [0])
    process.join(2)
    assert process.is_alive(), "rank 0 did not wait for the others"
    boards[0][:4].view(torch.int32).fill_(1)
    process.join(30)
    assert process.exitcode == 0
    process.kill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in map(int, sys.argv[1].split(",")):
        every_rank_has_the_bits(size)
    a_wait_ends_when_it_is_stopped(2)
