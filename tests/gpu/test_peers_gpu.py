"""The join through memory that GPUs read from each other, with two or more ranks on streams of one GPU."""

import pytest
import torch

from hf_longattn.kernels.merge_partials import merge_partials

gpu = pytest.mark.gpu


class Ranks:
    """As many boards as ranks, and a stream for each, so that their launches run at the same time."""

    def __init__(self, count):
        from hf_longattn.kernels.merge_partials import triton_peers

        self.module, self.count = triton_peers, count
        size = triton_peers.board_bytes(count)
        self.boards = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(count)]
        for rank, board in enumerate(self.boards):
            triton_peers.open_board(board, rank, count)
        self.addresses = torch.tensor([board.data_ptr() for board in self.boards], device="cuda")
        self.streams = [torch.cuda.Stream() for _ in range(count)]
        torch.cuda.synchronize()

    def launch(self, rank, output, lse):
        with torch.cuda.stream(self.streams[rank]):
            return self.module.pull_merge(self.addresses, rank, output, lse)


def parts(count, shape, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    outputs = torch.randn(count, *shape, device="cuda", generator=generator).to(dtype)
    lse = 3 * torch.randn(count, *shape[:-1], device="cuda", generator=generator)
    # Empty parts, and a row that is empty everywhere; what they hold is never read.
    lse[0, ..., ::3, :] = -torch.inf
    lse[:, ..., -1, :] = -torch.inf
    outputs[lse == -torch.inf] = torch.nan
    return outputs, lse


def apart(tensors):
    """Each in memory of its own: launches that differ in alignment would each load a kernel, and a load waits
    for what runs, which waits for the launch."""
    return [tensor.clone() for tensor in tensors]


@gpu
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 1, 128), (2, 6, 5, 96), (1, 1, 1, 256), (4, 64, 1, 64)], ids=str)
def test_every_rank_has_the_bits_of_the_merge(shape, dtype, count):
    ranks = Ranks(count)
    for seed in range(20):
        outputs, lse = parts(count, shape, dtype, seed)
        given = list(zip(apart(outputs), apart(lse), strict=True))
        torch.cuda.synchronize()
        results = [ranks.launch(rank, *given[rank]) for rank in range(count)]
        torch.cuda.synchronize()
        exact, exact_lse = merge_partials(outputs.double(), lse.double(), impl="reference")
        plain, plain_lse = merge_partials(outputs, lse)
        for output, found in results:
            assert torch.equal(output, results[0][0]) and torch.equal(found, results[0][1])
        output, found = results[0]
        eps = torch.finfo(dtype).eps * exact.norm()
        assert (output.double() - exact).norm() <= 1.5 * ((plain.double() - exact).norm() + eps)
        live = exact_lse > -torch.inf
        assert torch.equal(found > -torch.inf, live) and (output[~live] == 0).all()
        eps = torch.finfo(torch.float32).eps * exact_lse[live].norm()
        error = (plain_lse.double() - exact_lse)[live].norm()
        assert (found.double() - exact_lse)[live].norm() <= 1.5 * (error + eps)


@gpu
def test_a_graph_replays_it():
    ranks, (outputs, lse) = Ranks(2), parts(2, (1, 32, 1, 128), torch.bfloat16)
    for rank in range(2):
        ranks.launch(rank, outputs[rank], lse[rank])
    torch.cuda.synchronize()
    graphs, results = [], []
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=ranks.streams[rank], capture_error_mode="thread_local"):
            results.append([ranks.launch(rank, outputs[rank], lse[rank]) for _ in range(5)])
        graphs.append(graph)
    for seed in range(1, 6):
        fresh, fresh_lse = parts(2, (1, 32, 1, 128), torch.bfloat16, seed)
        outputs.copy_(fresh)
        lse.copy_(fresh_lse)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, ranks.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        want = merge_partials(fresh, fresh_lse)[0]
        for output, _ in [*results[0], *results[1]]:
            torch.testing.assert_close(output, want, rtol=0.02, atol=1e-6)


@gpu
def test_a_wait_ends_when_it_is_stopped():
    ranks, (outputs, lse) = Ranks(2), parts(2, (1, 32, 1, 128), torch.bfloat16)
    torch.cuda.synchronize()
    ranks.launch(0, outputs[0], lse[0])
    stop = torch.cuda.Stream()
    with torch.cuda.stream(stop):
        ranks.boards[0][:4].view(torch.int32).fill_(1)
    ranks.streams[0].synchronize()


def test_what_finds_room_on_a_board():
    pytest.importorskip("triton")
    from hf_longattn.kernels.merge_partials.triton_peers import (
        MOST_PROGRAMS,
        ROWS,
        board_bytes,
        fits,
        open_board,
    )

    assert fits(32, 256) and fits(ROWS * MOST_PROGRAMS, 1024)
    assert not fits(0, 256) and not fits(ROWS * MOST_PROGRAMS + 1, 256) and not fits(1, 1025)
    board = torch.empty(board_bytes(3), dtype=torch.uint8)
    open_board(board, 1, 3)
    flags = board[128 : 128 + 2 * 3 * MOST_PROGRAMS * 4].view(torch.int32).view(2, 3, MOST_PROGRAMS)
    assert (flags[0] == 0).all() and (flags[1] == 1).all() and (board[:128] == 0).all()
    # Regions of outputs and lse lie behind the flags, all of them inside.
    assert board.numel() == 128 + flags.numel() * 4 + MOST_PROGRAMS * ROWS * (1024 + 4)
