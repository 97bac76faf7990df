"""The merge of the partial results of several GPUs that read each other's memory, in one launch.

Every rank owns a board in memory that its peers map: flags, and a region a program. Program p of a rank

    1. waits until every peer has read what its region held before,
    2. writes its rows of (output, lse) there,
    3. raises its `ready` flag on the board of every peer, and waits until all have raised theirs on its own,
    4. reads the rows of all ranks once, in the order of the ranks, which makes the bits those of every other,
    5. raises its `read` flag on the board of every peer.

A flag goes from 0 to 1 by its sender and back by its receiver, so nothing counts calls and a CUDA graph may
replay the launch. Flags are set with release and taken with acquire semantics at system scope. No multicast
is involved. Whoever waits also looks at the board's stop word, which the host sets when a rank is gone.

Shyam et al., Tree Attention, arXiv 2408.04093, section 4; the exchange is a pull of all parts by everyone.
"""

import torch
import triton
import triton.language as tl

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset

# Rows a program and the most programs of a launch: all must run at once, since they wait for each other.
ROWS = 4
MOST_PROGRAMS = 64
# Bytes of one row of output, and what a board takes with `ranks` members.
ROW_BYTES = 1024
_WORD = 4
_STOP_BYTES = 128


def board_bytes(ranks: int) -> int:
    """Bytes of a board: the stop word, two flags a program and rank, and regions of outputs and of lse."""
    flags = 2 * ranks * MOST_PROGRAMS * _WORD
    return _STOP_BYTES + flags + MOST_PROGRAMS * ROWS * (ROW_BYTES + _WORD)


def fits(num_rows: int, row_bytes: int) -> bool:
    """Whether partial results of so many rows, of so many bytes each, find room on a board."""
    return 0 < num_rows <= ROWS * MOST_PROGRAMS and row_bytes <= ROW_BYTES


@triton.jit
def _flag(board, kind, rank, program, num_ranks, PROGRAMS: tl.constexpr, STOP: tl.constexpr):
    """Address of the flag that `rank` raises for `program`; kind 0 is ready, 1 is read."""
    index = (kind * num_ranks + rank) * PROGRAMS + program
    return (board + STOP + index * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def _region(board, start: tl.constexpr, dtype: tl.constexpr):
    """Where a region of a board starts, which is at whole vectors: an address from memory says nothing."""
    return tl.multiple_of((board + start).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _take(flag, stop):
    """Waits for a flag and lowers it."""
    taken = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
    while (taken != 1) & (tl.load(stop, volatile=True) == 0):
        taken = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")


@triton.jit(do_not_specialize=["rank", "num_heads", "num_queries", "num_rows"])
def _pull_merge_kernel(
    boards_ptr, output_ptr, lse_ptr, merged_ptr, merged_lse_ptr,
    output_strides, lse_strides,
    rank, num_heads, num_queries, num_rows,
    RANKS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, PROGRAMS: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    offs_r, offs_v = tl.arange(0, ROWS), tl.arange(0, BLOCK_V)
    rows = program.to(tl.int64) * ROWS + offs_r
    mask_r = rows < num_rows
    mask = mask_r[:, None] & (offs_v < V)[None, :]
    place = (rows // num_queries // num_heads, rows // num_queries % num_heads, rows % num_queries)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    regions: tl.constexpr = STOP + 2 * RANKS * PROGRAMS * 4
    at = rows[:, None] * (ROW_BYTES // (dtype.primitive_bitwidth // 8)) + offs_v[None, :]
    lse_region: tl.constexpr = regions + PROGRAMS * ROWS * ROW_BYTES
    own = tl.load(boards_ptr + rank)
    stop = own.to(tl.pointer_type(tl.int32))

    row_at = offset((place[0], place[1], place[2], 0), output_strides)
    output = tl.load(output_ptr + row_at[:, None] + offs_v[None, :] * output_strides[3], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + offset(place, lse_strides), mask=mask_r, other=float("-inf"))
    # An empty part may hold anything.
    output = tl.where((lse == float("-inf"))[:, None], 0.0, output)
    for peer in tl.static_range(RANKS):
        if peer != rank:
            _take(_flag(own, 1, peer, program, RANKS, PROGRAMS, STOP), stop)
    tl.store(_region(own, regions, dtype) + at, output, mask=mask)
    tl.store(_region(own, lse_region, tl.float32) + rows, lse, mask=mask_r)
    # Every thread has written before one of them says so.
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if peer != rank:
            board = tl.load(boards_ptr + peer)
            tl.atomic_xchg(
                _flag(board, 0, rank, program, RANKS, PROGRAMS, STOP), 1, sem="release", scope="sys"
            )
    for peer in tl.static_range(RANKS):
        if peer != rank:
            _take(_flag(own, 0, peer, program, RANKS, PROGRAMS, STOP), stop)
    tl.debug_barrier()

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for peer in tl.static_range(RANKS):
        # Nothing that is read depends on what was read before: one way to the peers and back for all of it.
        board = tl.load(boards_ptr + peer)
        found = _region(board, lse_region, tl.float32) + rows
        lse = tl.load(found, mask=mask_r, other=float("-inf"), volatile=True)
        part = tl.load(_region(board, regions, dtype) + at, mask=mask, other=0.0, volatile=True)
        higher = tl.maximum(peak, lse)
        # A row whose parts are all empty has no peak; any finite stand-in gives it weights of zero.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp(peak - base), tl.exp(lse - base)
        total = total * shrink + weight
        merged = merged * shrink[:, None] + part.to(tl.float32) * weight[:, None]
        peak = higher
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if peer != rank:
            board = tl.load(boards_ptr + peer)
            tl.atomic_xchg(
                _flag(board, 1, rank, program, RANKS, PROGRAMS, STOP), 1, sem="release", scope="sys"
            )
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(merged_ptr + rows[:, None] * V + offs_v[None, :], merged.to(dtype), mask=mask)
    # All parts empty: -inf + log 0.
    tl.store(merged_lse_ptr + rows, peak + tl.log(total), mask=mask_r)


def open_board(board: torch.Tensor, rank: int, ranks: int) -> None:
    """Lowers all flags of a fresh board but the `read` flags of the peers: nothing is waiting to be read.

    Args:
        board: (board_bytes(ranks),) uint8.
        rank: whose board it is.
        ranks: how many read it.
    """
    board.zero_()
    flags = board[_STOP_BYTES:][: 2 * ranks * MOST_PROGRAMS * _WORD].view(torch.int32)
    flags.view(2, ranks, MOST_PROGRAMS)[1] = 1


def pull_merge(
    boards: torch.Tensor, rank: int, output: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes this rank's partial result on its board, reads those of the others, and joins them.

    Args:
        boards: (ranks,) int64, the addresses of all boards as this GPU sees them.
        rank: which of them is this rank's own.
        output: (B, H, T, V) fp16, bf16 or fp32, this rank's; any strides.
        lse: (B, H, T) fp32, -inf where the rank has no key.

    Returns:
        output (B, H, T, V) and lse (B, H, T) over the keys of all ranks; the same bits on each.
    """
    *shape, width = output.shape
    merged, merged_lse = output.new_empty((*shape, width)), lse.new_empty(shape)
    num_rows = merged_lse.numel()
    _pull_merge_kernel[(cdiv(num_rows, ROWS),)](
        boards, output, lse, merged, merged_lse, output.stride(), lse.stride(),
        rank, shape[1], shape[2], num_rows,
        RANKS=boards.numel(), V=width, BLOCK_V=next_power_of_2(width), ROWS=ROWS,
        ROW_BYTES=ROW_BYTES, PROGRAMS=MOST_PROGRAMS, STOP=_STOP_BYTES, num_warps=4,
    )  # fmt: skip
    return merged, merged_lse
