"""A join of the ranks' partial results in which each pushes its own to all others: one way, without fences.

A candidate for the place of `kernels/merge_partials/triton_peers.py`, whose kernel pulls; the library does
not use it. Every rank owns a board that its peers map. It holds the stop word, for every program the number
of its last call, and for each of two buffers a line for every rank and row: the row's lse and output. A word
of a line has 8 bytes, 4 of payload and 4 of the call's number, and is stored and loaded in one piece. Program
p of a rank

    1. raises its number by one,
    2. merges the splits of its rows, rounds them, and stores their words into the boards of all peers,
    3. reads its own board again and again until every word of every peer carries that number,
    4. keeps the merge of what it read last, in the order of the ranks. Its own words, rounded as those that
       travel, take part in their turn, so every rank has the same bits.

No fence: each word tells by itself whether it has come, in whatever order words come.

No acknowledgement: calls alternate between the two buffers, by the parity of the number. Rank A stores words
of call n + 2 where those of call n were. It does so after the end of its call n + 1, which waited for words
of n + 1 from every rank; rank B stored those after the end of its own call n, and so of all its reads of
call n's words. Nothing is written over that is still to be read, and no rank is two calls ahead.

Numbers belong to programs. A program without rows does not run and counts nothing, on all ranks alike, since
all launch the same shapes in the same order, on one stream at a time. The number lies on the board and the
kernel itself raises it, so a CUDA graph may replay the launch. After 2^31 - 1 comes 2: fresh memory holds 0,
and the parity must alternate. Padding rows travel too, so calls of one width write all the words that the
next but one waits for; only words that narrower calls left alone could be 2^31 - 2 calls old, and be taken
for new ones.

A rank whose peer is gone would wait for ever; the host sets the stop word, which ends every wait.

What a join should take (us; 2 GPUs, 32 rows of 128, in a graph), an estimate that is still to be measured:

    from the end of the kernel before to running programs        1.5    1.0 where it is launched early
    number and own splits from memory or L2, their merge         0.8
    stores through NVLink into the peer's memory, one way        1.0
    a poll that misses them, and one that sees them              0.5
    merge, stores, end of the kernel                             0.7
    all of it                                                    4.5

Waiting for the slower rank comes on top, as in every form. `push-fused` also saves the launch that merges the
splits of a rank, 2 to 3 more.

The words are those of NCCL's protocol LL (Hu et al., Demystifying NCCL, arXiv 2507.04786, section III); the
join is that of Shyam et al., Tree Attention, arXiv 2408.04093, section 4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, next_power_of_2, overlap, wait_for_previous

# Programs of a launch: fewer than a GPU has processors, since all must run at once.
PROGRAMS = 128
# The last number of a call before they begin again.
LAST = tl.constexpr(2**31 - 1)
# Bytes before the numbers, which hold the stop word.
_STOP_BYTES = 128
_HEAD = tl.constexpr(_STOP_BYTES)
# Words of a line: lse twice, and the output, 256 numbers at most.
_LINE = tl.constexpr(258)
# Elements that a thread holds while it merges splits.
_HELD = 32


def board_bytes(ranks: int, rows: int) -> int:
    """Bytes of a board for so many ranks, and rows a program."""
    return _STOP_BYTES + 4 * PROGRAMS + 2 * ranks * PROGRAMS * rows * 8 * _LINE.value


@triton.jit
def _lines(board, sender, number, rows, RANKS: tl.constexpr, LINES: tl.constexpr, PROGRAMS: tl.constexpr):
    """(ROWS, 1) addresses of the lines of a sender's rows in the buffer of a call."""
    first = (board + _HEAD + 4 * PROGRAMS).to(tl.pointer_type(tl.int64))
    line = ((number & 1) * RANKS + sender) * LINES + rows
    return tl.multiple_of(first, 16) + line[:, None] * _LINE


@triton.jit
def _numbered(bits, number):
    """Words of 4 bytes of payload (uint32) and the number of the call."""
    return bits.to(tl.int64) | (number.to(tl.int64) << 32)


@triton.jit
def _pack(low, high, dtype: tl.constexpr):
    """The payload (uint32) of fp32 numbers: one as it is, or two that are rounded to 16 bits."""
    if dtype == tl.float32:
        return low.to(tl.uint32, bitcast=True)
    else:
        low = low.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def _unpack(words, dtype: tl.constexpr):
    """The fp32 numbers of words: twice the one, or the two."""
    bits = words.to(tl.uint32)
    if dtype == tl.float32:
        low = bits.to(tl.float32, bitcast=True)
        return low, low
    else:
        low = bits.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        return low, (bits >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _nothing(ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The sum of no parts: its peak and weight (ROWS, WIDTH), and the two halves of its output."""
    peak, total = tl.full([ROWS, WIDTH], float("-inf"), tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    return peak, total, tl.zeros([ROWS, BLOCK_W], tl.float32), tl.zeros([ROWS, BLOCK_W], tl.float32)


@triton.jit
def _add(peak, total, low, high, other_peak, other_total, other_low, other_high):
    """Joins two sums of weighted parts, each relative to its own peak."""
    higher = tl.maximum(peak, other_peak)
    # A row whose parts are all empty has no peak; any finite stand-in gives it weights of zero.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink, weight = tl.exp(peak - base), tl.exp(other_peak - base)
    total = total * shrink + other_total * weight
    return higher, total, low * shrink + other_low * weight, high * shrink + other_high * weight


@triton.jit
def _weighted(parts, weight):
    """The weighted sum over the parts of a chunk; those of weight 0 may hold anything."""
    weight = weight[:, :, None]
    return tl.sum(tl.where(weight == 0.0, 0.0, parts.to(tl.float32) * weight), 0)


@triton.jit
def _merge_splits(
    outputs_ptr, lse_ptr, rows, num_rows, num_parts, dtype: tl.constexpr, V: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse (ROWS, 1) and the output of a rank's own rows; numbers w and WORDS + w of a row make a word."""
    offs_n, offs_w = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    peak, total, low, high = _nothing(ROWS, 1, BLOCK_W)
    for n0 in range(0, num_parts, BLOCK_N):
        parts = n0 + offs_n
        mask = (parts < num_parts)[:, None] & (rows < num_rows)[None, :]
        at = parts[:, None] * num_rows + rows[None, :]
        lse = tl.load(lse_ptr + at, mask=mask, other=float("-inf"))
        at = at[:, :, None] * V + offs_w[None, None, :]
        # All on its way at once: an empty part is read too, whatever it holds.
        inside = mask[:, :, None] & (offs_w < WORDS)[None, None, :]
        parts_low = tl.load(outputs_ptr + at, mask=inside, other=0.0)
        parts_high = parts_low
        if dtype != tl.float32:
            inside = mask[:, :, None] & (offs_w < V - WORDS)[None, None, :]
            parts_high = tl.load(outputs_ptr + at + WORDS, mask=inside, other=0.0)
        chunk = tl.max(lse, 0)
        weight = tl.exp(lse - tl.where(chunk == float("-inf"), 0.0, chunk)[None, :])
        chunk_total, chunk_low = tl.sum(weight, 0)[:, None], _weighted(parts_low, weight)
        chunk_high = _weighted(parts_high, weight)
        peak, total, low, high = _add(
            peak, total, low, high, chunk[:, None], chunk_total, chunk_low, chunk_high
        )
    whole = tl.where(total == 0.0, 1.0, total)
    # All parts empty: -inf + log 0.
    return peak + tl.log(total), low / whole, high / whole


@triton.jit(do_not_specialize=["rank", "num_parts", "num_rows"])
def _push_merge_kernel(
    outputs_ptr, lse_ptr, board_ptr, addresses, merged_ptr, merged_lse_ptr, rank, num_parts, num_rows,
    V: tl.constexpr, WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, PROGRAMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    RANKS: tl.constexpr = len(addresses)
    LINES: tl.constexpr = ROWS * PROGRAMS
    dtype: tl.constexpr = merged_ptr.dtype.element_ty
    # int32 is enough for what fits on a board.
    program = tl.program_id(0)
    offs_w = tl.arange(0, BLOCK_W)
    rows = program * ROWS + tl.arange(0, ROWS)
    mask_r, mask_w = rows < num_rows, (offs_w < WORDS)[None, :]
    stop = board_ptr.to(tl.pointer_type(tl.int32))
    number_at = (board_ptr + _HEAD).to(tl.pointer_type(tl.int32)) + program
    number = tl.load(number_at)
    # From the last, which is odd, to 2.
    number = tl.where(number == LAST, 1, number) + 1

    lse, low, high = _merge_splits(
        outputs_ptr, lse_ptr, rows, num_rows, num_parts, dtype, V, WORDS, BLOCK_W, BLOCK_N, ROWS
    )
    own = _numbered(_pack(low, high, dtype), number)
    # Every thread reads the lse of its rows, in pairs as the words that it weighs: nothing is handed from one
    # thread to another between the loads from peers.
    offs_l = offs_w[None, :] % 2
    own_lse = _numbered(_pack(lse, lse, tl.float32), number) + tl.zeros([ROWS, BLOCK_W], tl.int64)
    for peer in tl.static_range(RANKS):
        lines = _lines(addresses[peer], rank, number, rows, RANKS, LINES, PROGRAMS)
        tl.store(lines + 2 + offs_w[None, :], own, mask=mask_w & (peer != rank))
        tl.store(lines + offs_l, own_lse, mask=(offs_w < 2)[None, :] & (peer != rank))

    peak, total, low, high = _nothing(ROWS, BLOCK_W, BLOCK_W)
    late = 1
    while late > 0:
        # What is read is merged at once, complete or not: the last round has all of it.
        peak, total, low, high = _nothing(ROWS, BLOCK_W, BLOCK_W)
        missing = tl.zeros([ROWS, BLOCK_W], tl.int32)
        for peer in tl.static_range(RANKS):
            lines = _lines(board_ptr.to(tl.int64), peer, number, rows, RANKS, LINES, PROGRAMS)
            words = tl.load(
                lines + 2 + offs_w[None, :], mask=mask_w & (peer != rank), other=own, volatile=True
            )
            lse_words = tl.load(lines + offs_l, mask=peer != rank, other=own_lse, volatile=True)
            missing |= ((words >> 32) != number) | ((lse_words >> 32) != number)
            part_low, part_high = _unpack(words, dtype)
            part_lse = lse_words.to(tl.uint32).to(tl.float32, bitcast=True)
            peak, total, low, high = _add(peak, total, low, high, part_lse, 1.0, part_low, part_high)
        late = tl.where(tl.load(stop, volatile=True) == 0, tl.sum(missing), 0)

    whole = tl.where(total == 0.0, 1.0, total)
    at, mask = merged_ptr + rows[:, None] * V + offs_w[None, :], mask_r[:, None] & mask_w
    tl.store(at, (low / whole).to(dtype), mask=mask)
    if dtype != tl.float32:
        tl.store(at + WORDS, (high / whole).to(dtype), mask=mask & (offs_w < V - WORDS)[None, :])
    lse_at = merged_lse_ptr + rows[:, None] + offs_l
    tl.store(lse_at, peak + tl.log(total), mask=mask_r[:, None] & (offs_w == 0)[None, :])
    tl.store(number_at, number)


class PushBoards:
    """This rank's board and the addresses of all, for one number of rows a program.

    Args:
        board: (board_bytes(ranks, rows),) uint8 of zeros, which all peers map.
        addresses: of all boards, as this GPU sees them, in the order of the ranks.
        rank: whose board it is.
        rows: a power of two that a program joins.
        num_warps: of a program.
        early: whether a launch may begin while the kernel before it ends.
        handle: what keeps the mapping alive.
    """

    def __init__(
        self,
        board: Tensor,
        addresses: list[int],
        rank: int,
        rows: int = 1,
        num_warps: int = 1,
        early: bool = False,
        handle: Any = None,
    ) -> None:
        self.board, self.addresses, self.rank, self.handle = board, tuple(addresses), rank, handle
        self.rows, self.num_warps, self.early = rows, num_warps, early
        self.name = f"r{rows} w{num_warps}" + " early" * early
        self.stopped = False
        # Copied by the copy engine: a kernel might first have to be loaded, which waits for what runs.
        self._one = torch.ones(4, dtype=torch.uint8, pin_memory=board.is_cuda)
        self._stream = torch.cuda.Stream(board.device) if board.is_cuda else None

    @classmethod
    def open(cls, group: Any, device: torch.device, rows: int, num_warps: int, early: bool) -> "PushBoards":
        """Boards for the ranks of a process group whose GPUs map each other's memory; every rank calls it."""
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symmetric_memory

        size = board_bytes(dist.get_world_size(group), rows)
        board = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(board, group)
        board.zero_()
        # Nobody writes to a board that its owner still clears.
        torch.cuda.synchronize(device)
        dist.barrier(group)
        return cls(board, handle.buffer_ptrs, dist.get_rank(group), rows, num_warps, early, handle)

    def merge(self, outputs: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Merges this rank's splits, sends what comes of it to all peers, and joins what they send.

        Args:
            outputs: (N, B, H, T, V), contiguous, V to 256 and to `PROGRAMS` times `rows` rows.
            lse: (N, B, H, T) fp32, contiguous, -inf where a split has no key.
            dtype: bf16, fp16 or fp32, in which outputs travel and of the result.

        Returns:
            output (B, H, T, V) and lse (B, H, T) over the keys of all ranks; the same bits on each.
        """
        num_parts, *shape, width = outputs.shape
        merged, merged_lse = outputs.new_empty((*shape, width), dtype=dtype), lse.new_empty(shape)
        num_rows, words = merged_lse.numel(), cdiv(width, 4 // dtype.itemsize)
        programs, block_w = cdiv(num_rows, self.rows), next_power_of_2(words)
        assert 0 < programs <= PROGRAMS and 2 + words <= _LINE.value and outputs.numel() < 2**31
        assert lse.dtype == torch.float32 and outputs.is_contiguous() and lse.is_contiguous()
        room = _HELD * 32 * self.num_warps // (self.rows * block_w)
        begin = overlap(outputs.device) if self.early else {"OVERLAP": False}
        _push_merge_kernel[(programs,)](
            outputs, lse, self.board, self.addresses, merged, merged_lse, self.rank, num_parts, num_rows,
            V=width, WORDS=words, BLOCK_W=block_w, BLOCK_N=max(1, min(room, next_power_of_2(num_parts))),
            ROWS=self.rows, PROGRAMS=PROGRAMS, num_warps=self.num_warps, **begin,
        )  # fmt: skip
        return merged, merged_lse

    def stop(self) -> None:
        """Ends every wait of this rank's launches, under way or to come; what they return has no meaning."""
        self.stopped = True
        with torch.cuda.stream(self._stream):
            self.board[:4].copy_(self._one, non_blocking=True)
