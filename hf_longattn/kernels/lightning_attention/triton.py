"""Triton kernels of lightning attention (arXiv 2401.04658): one scan for the forward and the backward pass.

One program owns a tile of value columns of one head and walks a stretch of tokens chunk by chunk with its
slice of the state S (K, BLOCK_V) in registers. For a chunk of L tokens, i = 0..L-1, with lambda =
exp(-slope),

    forward    O = ((X Y^T) * M) Z + diag(lambda^(i+1)) X S       S <- lambda^L S + Y^T diag(lambda^(L-1-i)) Z
    reverse    O = ((X Y^T) * M^T) Z + diag(lambda^(L-1-i)) X S   S <- lambda^L S + Y^T diag(lambda^(i+1)) Z

with M_ij = lambda^(i-j) for i >= j. The forward pass is X, Y, Z = q, k, v; dq is the forward scan of (do, v,
k), dk and dv are the reverse scans of (v, do, q) and (k, q, do). Every pass reads three tensors and writes
one: the operator waits for memory, so nothing is saved and S is recomputed.

Where batch x heads do not fill the GPU, the sequence is cut into segments walked at once. What enters a
segment comes from `_block_state_kernel`, which sums short blocks of tokens before it. A head forgets what
lies `REACH / slope` tokens back (exp(-25) is 2^-36, far under fp32's rounding), so only the blocks in reach
are summed: a few percent of the work.

Packed documents restart the state inside the walk, and chunks never cross a bound. No exponent is ever
positive.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs
from hf_longattn.kernels.lightning_attention.tiling import (
    PROGRAMS_PER_SM,
    Tiling,
    choose_segments,
    choose_tiling,
    gluon_serves,
)

REACH = tl.constexpr(25.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def decay(slope, steps):
    """exp(-slope * steps) in fp32 for steps >= 0; negative steps (masked tails) count as 0."""
    return tl.exp2(-slope * LOG2E * tl.maximum(steps, 0).to(tl.float32))


@triton.jit
def forgotten(slope, steps):
    """1 - exp(-slope * steps) without cancellation: decays of slow heads lie within an ulp of 1."""
    x = slope * steps.to(tl.float32)
    series = x * (1 - x * (1 / 2) * (1 - x * (1 / 3) * (1 - x * (1 / 4) * (1 - x * (1 / 5)))))
    return tl.where(x < 0.03, series, 1 - tl.exp2(-x * LOG2E))


@triton.jit
def _reach(slope):
    """How many tokens back a head can see before its decay leaves fp32."""
    return tl.minimum(1.0 / tl.maximum(slope, 1e-9) * REACH, 1e9).to(tl.int64) + 1


@triton.jit
def _load_tile(base, rows, mask_rows, columns, strides, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A (rows, BLOCK) tile of a head, zero outside. The columns need a mask only where BLOCK does not divide
    DIM."""
    ptrs = base + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    mask = mask_rows[:, None] if DIM % BLOCK == 0 else mask_rows[:, None] & (columns[None, :] < DIM)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr):
    """left @ right in fp32."""
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _unit(wide, dtype: tl.constexpr):
    """`wide` brought to a maximum of 1 for fp16, whose range sums outgrow or fall under, and the factor."""
    factor = 1.0
    if dtype == tl.float16:
        factor = tl.maximum(tl.max(tl.max(tl.abs(wide), 1), 0), 1e-30)
        wide = wide / factor
    return wide, factor


@triton.jit
def _rest(wide, high):
    """What rounding `wide` to `high` lost, in the dtype of `high`."""
    return (wide - high.to(tl.float32)).to(high.dtype)


@triton.jit
def _dot_wide_left(wide, tile, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """wide @ tile with the fp32 `wide` rounded to the tile's dtype; SPLIT multiplies the lost rest too."""
    wide, factor = _unit(wide, tile.dtype)
    high = wide.to(tile.dtype)
    acc = _dot(high, tile, PRECISION)
    if SPLIT and tile.dtype != tl.float32:
        acc = tl.dot(_rest(wide, high), tile, acc, input_precision=PRECISION)
    return acc * factor


@triton.jit
def _dot_wide_right(tile, wide, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """tile @ wide, as `_dot_wide_left`."""
    wide, factor = _unit(wide, tile.dtype)
    high = wide.to(tile.dtype)
    acc = _dot(tile, high, PRECISION)
    if SPLIT and tile.dtype != tl.float32:
        acc = tl.dot(tile, _rest(wide, high), acc, input_precision=PRECISION)
    return acc * factor


@triton.jit
def _next_state(state, y, z, leave, length, slope, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """lambda^length S + Y^T diag(leave) Z in fp32. `leave` is at most 1, so fp16 needs no scaling here."""
    wide = z.to(tl.float32) * leave[:, None]
    high = wide.to(y.dtype)
    added = _dot(tl.trans(y), high, PRECISION)
    if SPLIT and y.dtype != tl.float32:
        added = tl.dot(tl.trans(y), _rest(wide, high), added, input_precision=PRECISION)
    return state + (added - state * forgotten(slope, length))


@triton.jit
def state_tile(base, strides, row, head, rows, columns):
    """Addresses of a (K, BLOCK_V) tile of one head's state."""
    tile = rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3]
    return base + offset((row, head), (strides[0], strides[1])) + tile


@triton.jit
def locate(num_heads, num_pieces, num_tiles):
    """(tile, head, piece, batch row) of this program; tiles of one head are neighbours and share x and y in
    L2."""
    program = tl.program_id(0).to(tl.int64)
    head = program // num_tiles % num_heads
    piece = program // (num_tiles * num_heads) % num_pieces
    return program % num_tiles, head, piece, program // (num_tiles * num_heads * num_pieces)


@triton.jit
def _document(bounds_ptr, document, row, length):
    """(begin, end, state row) of a document; without packing each batch row is one."""
    begin, end, state_row = tl.cast(0, tl.int64), tl.cast(length, tl.int64), row
    if bounds_ptr is not None:
        begin = tl.load(bounds_ptr + document).to(tl.int64)
        end = tl.load(bounds_ptr + document + 1).to(tl.int64)
        state_row = document
    return begin, end, state_row


@triton.jit
def blocks_before(begin, end, edge, slope, block_length, REVERSE: tl.constexpr):
    """(first block, number, whether they reach the document's bound) of the blocks that enter a segment at
    `edge`."""
    if REVERSE:
        bound = tl.cdiv(end, block_length)
        stop = tl.minimum(bound, tl.cdiv(edge + _reach(slope), block_length))
        first, number = stop - 1, stop - edge // block_length
        reached = stop == bound
    else:
        bound = begin // block_length
        first = tl.maximum(bound, (edge - _reach(slope)) // block_length)
        number = edge // block_length - first
        reached = first == bound
    crossing = (end > edge) if REVERSE else (begin < edge)
    return first, tl.where(crossing, number, 0), reached | (crossing == 0)


@triton.jit(do_not_specialize=["length", "num_segments", "segment_length", "block_length", "scale"])
def _scan_kernel(
    x_ptr, y_ptr, z_ptr, slope_ptr, state_ptr, block_ptr, bounds_ptr, ranges_ptr, o_ptr, left_ptr,
    x_strides, y_strides, z_strides, o_strides, state_strides, block_strides, left_strides,
    shares, length, num_heads, num_segments, segment_length, block_length, scale,
    DIMS: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value columns of one head, over one segment of tokens."""
    tile, head, segment, row = locate(num_heads, num_segments, tl.cdiv(DIMS[1], BLOCK_V))
    slope = tl.load(slope_ptr + head).to(tl.float32)
    x_ptr += offset((row, head // shares[0]), (x_strides[0], x_strides[1]))
    y_ptr += offset((row, head // shares[1]), (y_strides[0], y_strides[1]))
    z_ptr += offset((row, head // shares[2]), (z_strides[0], z_strides[1]))
    o_ptr += offset((row, head), (o_strides[0], o_strides[1]))
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_state = (offs_k[:, None] < DIMS[0]) & (offs_v[None, :] < DIMS[1])

    offs_c = tl.arange(0, CHUNK)
    steps = offs_c[:, None] - offs_c[None, :]
    steps = -steps if REVERSE else steps
    keep = steps > 0 if STRICT else steps >= 0

    segment_begin = segment * segment_length
    segment_end = tl.minimum(segment_begin + segment_length, length)
    edge = segment_end if REVERSE else segment_begin
    first_document, stop = tl.cast(0, tl.int64), tl.cast(1, tl.int64)
    if bounds_ptr is not None:
        first_document = tl.load(ranges_ptr + 2 * segment)
        stop = tl.load(ranges_ptr + 2 * segment + 1)
    for document in tl.range(first_document, stop, num_stages=1):
        doc_begin, doc_end, state_row = _document(bounds_ptr, document, row, length)
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        first, number, reached = blocks_before(doc_begin, doc_end, edge, slope, block_length, REVERSE)
        if state_ptr is not None:
            state_ptrs = state_tile(state_ptr, state_strides, state_row, head, offs_k, offs_v)
            state = tl.load(state_ptrs, mask=mask_state & reached, other=0.0)
        if block_ptr is not None:
            for step in tl.range(0, number, num_stages=1):
                block = first - step if REVERSE else first + step
                tokens = tl.minimum((block + 1) * block_length, doc_end) - tl.maximum(
                    block * block_length, doc_begin
                )
                block_row = row * tl.cdiv(length, block_length) + block
                block_ptrs = state_tile(block_ptr, block_strides, block_row, head, offs_k, offs_v)
                state += tl.load(block_ptrs, mask=mask_state, other=0.0) - state * forgotten(slope, tokens)

        begin, end = tl.maximum(doc_begin, segment_begin), tl.minimum(doc_end, segment_end)
        num_chunks = tl.cdiv(end - begin, CHUNK)
        for index in tl.range(0, num_chunks):
            start = begin + (num_chunks - 1 - index if REVERSE else index) * CHUNK
            count = tl.minimum(end - start, CHUNK).to(tl.int32)
            rows, mask_c = start + offs_c, offs_c < count
            x = _load_tile(x_ptr, rows, mask_c, offs_k, x_strides, DIMS[0], BLOCK_K)
            y = _load_tile(y_ptr, rows, mask_c, offs_k, y_strides, DIMS[0], BLOCK_K)
            z = _load_tile(z_ptr, rows, mask_c, offs_v, z_strides, DIMS[1], BLOCK_V)
            to_start, to_end = decay(slope, offs_c + 1), decay(slope, count - 1 - offs_c)
            enter, leave = (to_end, to_start) if REVERSE else (to_start, to_end)
            # Both products are issued before either is used, so that they overlap.
            o = _dot_wide_right(x, state, SPLIT & 2, PRECISION)
            p = _dot(x, tl.trans(y), PRECISION)
            o = o * enter[:, None]
            p = p * tl.where(keep, decay(slope, steps), 0.0)
            o = (o + _dot_wide_left(p, z, SPLIT & 1, PRECISION)) * scale
            # Not the loads' mask and rows: values shared with them would be kept for every stage.
            mask_o = (offs_c < end - start)[:, None] & (offs_v[None, :] < DIMS[1])
            o_ptrs = o_ptr + start * o_strides[2] + offs_c[:, None] * o_strides[2]
            o_ptrs += offs_v[None, :] * o_strides[3]
            tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask_o)
            state = _next_state(state, y, z, leave, count, slope, SPLIT & 4, PRECISION)

        if left_ptr is not None:
            ends = (doc_begin >= segment_begin) if REVERSE else (doc_end <= segment_end)
            left_ptrs = state_tile(left_ptr, left_strides, state_row, head, offs_k, offs_v)
            tl.store(left_ptrs, state, mask=mask_state & ends)


@triton.jit(do_not_specialize=["length", "num_blocks", "segment_length", "block_length"])
def _block_state_kernel(
    y_ptr, z_ptr, slope_ptr, block_ptr, bounds_ptr, documents_ptr,
    y_strides, z_strides, block_strides,
    shares, length, num_heads, num_blocks, segment_length, block_length,
    DIMS: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of one block alone, where a segment ahead can still see it; of the document that leaves the
    block."""
    tile, head, block, row = locate(num_heads, num_blocks, tl.cdiv(DIMS[1], BLOCK_V))
    slope = tl.load(slope_ptr + head).to(tl.float32)
    segment = block * block_length // segment_length
    document = tl.cast(0, tl.int64)
    if bounds_ptr is not None:
        document = tl.load(documents_ptr + block)
    begin, end, _ = _document(bounds_ptr, document, row, length)
    begin = tl.maximum(begin, block * block_length)
    end = tl.minimum(tl.minimum(end, (block + 1) * block_length), length)
    # Tokens that the segment ahead has forgotten are left out; nothing lies ahead of the outermost segment.
    if REVERSE:
        edge = segment * segment_length
        end = tl.minimum(end, edge + _reach(slope))
        useful = (segment > 0) & (begin < end)
    else:
        edge = (segment + 1) * segment_length
        begin = tl.maximum(begin, edge - _reach(slope))
        useful = (edge < length) & (begin < end)
    num_chunks = tl.where(useful, tl.cdiv(end - begin, CHUNK), 0)
    y_ptr += offset((row, head // shares[1]), (y_strides[0], y_strides[1]))
    z_ptr += offset((row, head // shares[2]), (z_strides[0], z_strides[1]))
    offs_c, offs_k = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for index in tl.range(0, num_chunks):
        start = begin + (num_chunks - 1 - index if REVERSE else index) * CHUNK
        count = tl.minimum(end - start, CHUNK).to(tl.int32)
        rows, mask_c = start + offs_c, offs_c < count
        y = _load_tile(y_ptr, rows, mask_c, offs_k, y_strides, DIMS[0], BLOCK_K)
        z = _load_tile(z_ptr, rows, mask_c, offs_v, z_strides, DIMS[1], BLOCK_V)
        leave = decay(slope, offs_c + 1 if REVERSE else count - 1 - offs_c)
        state = _next_state(state, y, z, leave, count, slope, SPLIT & 4, PRECISION)
    ptrs = state_tile(block_ptr, block_strides, row * num_blocks + block, head, offs_k, offs_v)
    mask = (offs_k[:, None] < DIMS[0]) & (offs_v[None, :] < DIMS[1]) & (num_chunks > 0)
    tl.store(ptrs, state, mask=mask)


def _num_slots(device: torch.device) -> int:
    """Programs that run at once."""
    if device.type != "cuda":
        return 256
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _ranges(cu_seqlens: Tensor | None, length: int, segment_length: int) -> Tensor | None:
    """(segments, 2) int64: the first document that meets a segment, and one past the last, or None."""
    if cu_seqlens is None:
        return None
    begin = torch.arange(0, length, segment_length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    first = torch.searchsorted(cu_seqlens[1:].contiguous(), begin, right=True)
    stop = torch.searchsorted(cu_seqlens[:-1].contiguous(), begin + segment_length)
    return torch.stack((first, stop), 1)


def _block_documents(cu_seqlens: Tensor, length: int, block_length: int, reverse: bool) -> Tensor:
    """(blocks,) int64: the document that leaves each block, at its end or (`reverse`) at its beginning."""
    begin = torch.arange(0, length, block_length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    if reverse:
        return torch.searchsorted(cu_seqlens[1:].contiguous(), begin, right=True)
    return torch.searchsorted(cu_seqlens[:-1].contiguous(), begin + block_length) - 1


def block_states(inputs: ScanInputs, segment: int, block: int, options: dict) -> Tensor:
    """(B * blocks, H, K, V) fp32: each block's state that a segment ahead can see; the others stay
    unwritten."""
    _, key, value, slopes, _, cu_seqlens = inputs
    batch, _, length, key_dim = key.shape
    num_heads, value_dim = slopes.shape[0], value.shape[3]
    num_blocks = cdiv(length, block)
    shape = (batch * num_blocks, num_heads, key_dim, value_dim)
    states = torch.empty(shape, device=key.device, dtype=torch.float32)
    documents = None
    if cu_seqlens is not None:
        documents = _block_documents(cu_seqlens, length, block, options["REVERSE"])
    grid = (cdiv(value_dim, options["BLOCK_V"]) * num_heads * num_blocks * batch,)
    _block_state_kernel[grid](
        y_ptr=key,
        z_ptr=value,
        slope_ptr=slopes,
        block_ptr=states,
        bounds_ptr=cu_seqlens,
        documents_ptr=documents,
        y_strides=key.stride(),
        z_strides=value.stride(),
        block_strides=states.stride(),
        num_blocks=num_blocks,
        segment_length=segment,
        block_length=block,
        **options,
    )
    return states


def scan_options(inputs: ScanInputs, tiling: Tiling, reverse: bool) -> dict:
    """The arguments that both kernels take."""
    query, value = inputs.query, inputs.value
    num_heads = inputs.slopes.shape[0]
    return {
        "shares": tuple(num_heads // x.shape[1] for x in inputs[:3]),
        "length": query.shape[2],
        "num_heads": num_heads,
        "DIMS": (query.shape[3], value.shape[3]),
        "REVERSE": reverse,
        "CHUNK": tiling.chunk,
        "BLOCK_K": max(16, next_power_of_2(query.shape[3])),
        "BLOCK_V": tiling.block_v,
        "SPLIT": tiling.split,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 and query.is_cuda else "ieee",
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides of a state, zeros where there is none."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def _choose(inputs: ScanInputs, output: Tensor) -> Tiling:
    """The tiling of a scan, and with it the kernel."""
    query, value = inputs.query, inputs.value
    sequences = query.shape[0] * inputs.slopes.shape[0]
    problem = (query.shape[3], value.shape[3], query.dtype, query.shape[2], sequences)
    return choose_tiling(*problem, gluon_serves(inputs, output))


def scan(
    inputs: ScanInputs,
    output: Tensor,
    final_state: Tensor | None,
    scale: float,
    reverse: bool,
    strict: bool,
    tiling: Tiling | None = None,
    segments: tuple[int, int] | None = None,
) -> None:
    """The scan of `api.py`.

    Args:
        inputs: what is read.
        output: (B, H, T, V), written.
        final_state: (B or documents, H, K, V) fp32, or None. Filled first: empty documents meet no program.
        scale: factor on the output.
        reverse: whether time runs backwards.
        strict: whether a token's own key and value are left out of its output.
        tiling: instead of `choose_tiling`'s.
        segments: instead of `choose_segments`'s.
    """
    query, key, value, slopes, state, cu_seqlens = inputs
    length, sequences = query.shape[2], query.shape[0] * slopes.shape[0]
    if final_state is not None and (cu_seqlens is not None or length == 0):
        final_state.copy_(state) if state is not None else final_state.zero_()
    if output.numel() == 0:
        return
    tiling = tiling or _choose(inputs, output)
    if tiling.gluon:
        from hf_longattn.kernels.lightning_attention.triton_gluon import scan as gluon_scan

        return gluon_scan(inputs, output, final_state, scale, reverse, strict, tiling, segments)
    options = scan_options(inputs, tiling, reverse)
    num_programs = cdiv(value.shape[3], tiling.block_v) * sequences
    segment, block = segments or choose_segments(length, num_programs, _num_slots(query.device))
    num_segments = cdiv(length, segment)
    blocks = block_states(inputs, segment, block, options) if num_segments > 1 else None
    _scan_kernel[(num_programs * num_segments,)](
        x_ptr=query,
        y_ptr=key,
        z_ptr=value,
        slope_ptr=slopes,
        state_ptr=state,
        block_ptr=blocks,
        bounds_ptr=cu_seqlens,
        ranges_ptr=_ranges(cu_seqlens, length, segment),
        o_ptr=output,
        left_ptr=final_state,
        x_strides=query.stride(),
        y_strides=key.stride(),
        z_strides=value.stride(),
        o_strides=output.stride(),
        state_strides=strides_of(state),
        block_strides=strides_of(blocks),
        left_strides=strides_of(final_state),
        num_segments=num_segments,
        segment_length=segment,
        block_length=block,
        scale=scale,
        STRICT=strict,
        **options,
    )
