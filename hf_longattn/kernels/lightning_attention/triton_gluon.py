"""The scan of lightning attention for Hopper GPUs in Gluon: `triton.py`'s recurrence, chunk by chunk.

One program owns a whole head over a segment of tokens and holds S^T (V, K) in registers. All products are
transposed, so that what is computed (S^T, the decayed values) is the left operand, straight from registers,
and the loaded x, y, z are right operands where the copies from memory put them:

    P^T = (Y X^T) * M^T
    O^T = (S^T X^T) diag(enter) + Z^T P^T
    S^T <- lambda^C S^T + (Z^T diag(leave)) Y

Copies run STAGES chunks ahead: one barrier a chunk for x, whose place is free first, and one for y and z.
A factor that is rounded to bf16 may be multiplied as a sum of two bf16 numbers; `SPLIT` says which
(`tiling.py`).

Every chunk is taken for a whole one: rows past the end arrive as zeros and are not written. That is wrong
only for a state that enters or leaves behind a ragged end, and there the last few tokens go through the
Triton kernel.
"""

import functools
import threading

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_longattn.kernels.common import cdiv
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs
from hf_longattn.kernels.lightning_attention.tiling import (
    Tiling,
    choose_segments,
    choose_tiling,
    exact_columns,
)
from hf_longattn.kernels.lightning_attention.triton import (
    block_states,
    blocks_before,
    decay,
    forgotten,
    locate,
    scan_options,
    state_tile,
    strides_of,
)
from hf_longattn.kernels.lightning_attention.triton import scan as triton_scan

# Named so since Triton 3.8.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _powers(slope, position, CHUNK: gl.constexpr, AHEAD: gl.constexpr):
    """Two factors of lambda^(i+1) (`AHEAD`) or lambda^(C-1-i): few distinct numbers, so few registers."""
    fine, coarse = position % 8, position // 8 * 8
    return decay(slope, fine + 1 if AHEAD else 7 - fine), decay(
        slope, coarse if AHEAD else CHUNK - 8 - coarse
    )


@gluon.jit
def _first_token(begin, index, num_chunks, CHUNK: gl.constexpr, REVERSE: gl.constexpr):
    """Where the chunk that is walked as number `index` begins."""
    return begin + (num_chunks - 1 - index if REVERSE else index) * CHUNK


@gluon.jit
def _turned(base, strides, row, head, offs_v, offs_k):
    """Addresses of S^T (V, K)."""
    return state_tile(base, (strides[0], strides[1], strides[3], strides[2]), row, head, offs_v, offs_k)


@gluon.jit
def _leading(wide, COLUMNS: gl.constexpr):
    """The first columns of `wide`, by halving: each thread keeps a part of its registers."""
    rows: gl.constexpr = wide.shape[0]
    columns: gl.constexpr = wide.shape[1]
    if COLUMNS < columns:
        half, _ = gl.split(wide.reshape([rows, 2, columns // 2]).permute((0, 2, 1)))
        half = _leading(half, COLUMNS)
    else:
        half = wide
    return half


@gluon.jit
def _enter(
    state, state_ptr, block_ptr, state_strides, block_strides, row, head, slope,
    begin, end, length, block_length, offs_v, offs_k, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state that enters a segment: the given one where it is in reach, and the blocks before."""
    edge = end if REVERSE else begin
    first, number, reached = blocks_before(gl.to_tensor(0), length, edge, slope, block_length, REVERSE)
    if state_ptr is not None:
        state = gl.load(_turned(state_ptr, state_strides, row, head, offs_v, offs_k), mask=reached, other=0.0)
    if block_ptr is not None:
        for step in range(number):
            block = first - step if REVERSE else first + step
            tokens = gl.minimum((block + 1) * block_length, length) - block * block_length
            block_row = row * gl.cdiv(length, block_length) + block
            added = gl.load(_turned(block_ptr, block_strides, block_row, head, offs_v, offs_k))
            state += added - state * forgotten(slope, tokens)
    return state


@gluon.jit
def _load_x(desc, row, head, token, xs, bars, slot, pred):
    """Starts the copy of a chunk of x."""
    mbarrier.expect(bars.index(slot), desc.block_type.nbytes, pred=pred)
    copy_in(desc, [row, head, token, 0], bars.index(slot), xs.index(slot), pred=pred)


@gluon.jit
def _load_yz(y_desc, z_desc, row, y_head, z_head, token, ys, zs, bars, slot, pred):
    """Starts the copies of a chunk of y and z."""
    mbarrier.expect(bars.index(slot), y_desc.block_type.nbytes + z_desc.block_type.nbytes, pred=pred)
    copy_in(y_desc, [row, y_head, token, 0], bars.index(slot), ys.index(slot), pred=pred)
    copy_in(z_desc, [row, z_head, token, 0], bars.index(slot), zs.index(slot), pred=pred)


@gluon.jit(do_not_specialize=["length", "num_segments", "segment_length", "block_length", "scale"])
def _scan_kernel(
    x_desc, y_desc, z_desc, o_desc, slope_ptr, state_ptr, block_ptr, left_ptr,
    state_strides, block_strides, left_strides,
    shares, length, num_heads, num_segments, segment_length, block_length, scale,
    REVERSE: gl.constexpr, STRICT: gl.constexpr,
    SPLIT: gl.constexpr, EXACT_K: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One head over one segment of tokens."""
    C: gl.constexpr = x_desc.block_shape[2]
    K: gl.constexpr = x_desc.block_shape[3]
    V: gl.constexpr = z_desc.block_shape[3]
    dtype: gl.constexpr = x_desc.dtype
    # Registers: P^T (source, target), O^T (value, target), S^T (value, key) and the left operands.
    mma_p: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, C * 4 // num_warps, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, K, 16])
    op_s: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    op_z: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)

    _, head, segment, row = locate(num_heads, num_segments, 1)
    slope = gl.load(slope_ptr + head).to(gl.float32)
    begin = segment * segment_length
    end = gl.minimum(begin + segment_length, length)
    num_chunks = gl.cdiv(end - begin, C).to(gl.int32)
    first, at_row, at_head = begin.to(gl.int32), row.to(gl.int32), head.to(gl.int32)
    at_x, at_y, at_z = at_head // shares[0], at_head // shares[1], at_head // shares[2]

    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, K], x_desc.layout)
    ys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, K], y_desc.layout)
    zs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, V], z_desc.layout)
    rows_of_128: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ps = gl.allocate_shared_memory(dtype, [2 if SPLIT & 1 else 1, C, C], rows_of_128)
    os = gl.allocate_shared_memory(o_desc.dtype, [1, 1, C, V], o_desc.layout)
    x_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    yz_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(x_bars.index(i), count=1)
        mbarrier.init(yz_bars.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        at = _first_token(first, i, num_chunks, C, REVERSE)
        _load_x(x_desc, at_row, at_x, at, xs, x_bars, i, i < num_chunks)
        _load_yz(y_desc, z_desc, at_row, at_y, at_z, at, ys, zs, yz_bars, i, i < num_chunks)

    source = gl.arange(0, C, layout=gl.SliceLayout(1, mma_p))
    target = gl.arange(0, C, layout=gl.SliceLayout(0, mma_p))
    steps = source[:, None] - target[None, :] if REVERSE else target[None, :] - source[:, None]
    between = gl.where(steps > 0 if STRICT else steps >= 0, decay(slope, steps), 0.0) * scale
    enter, enter_8 = _powers(slope, gl.arange(0, C, layout=gl.SliceLayout(0, mma_o)), C, not REVERSE)
    leave, leave_8 = _powers(slope, gl.arange(0, C, layout=gl.SliceLayout(0, op_z)), C, REVERSE)
    enter *= scale
    lost = forgotten(slope, gl.to_tensor(C))
    offs_v = gl.arange(0, V, layout=gl.SliceLayout(1, mma_s))
    offs_k = gl.arange(0, K, layout=gl.SliceLayout(0, mma_s))
    state = _enter(
        gl.zeros([V, K], gl.float32, layout=mma_s), state_ptr, block_ptr, state_strides, block_strides,
        row, head, slope, begin, end, length, block_length, offs_v, offs_k, REVERSE,
    )  # fmt: skip
    p_zero = gl.zeros([C, C], gl.float32, layout=mma_p)
    o_zero = gl.zeros([V, C], gl.float32, layout=mma_o)
    slot, phase = 0, 0
    for index in range(num_chunks):
        x, y = xs.index(slot).reshape((C, K)), ys.index(slot).reshape((C, K))
        xt, zt = x.permute((1, 0)), zs.index(slot).reshape((C, V)).permute((1, 0))
        ahead = _first_token(first, index + STAGES, num_chunks, C, REVERSE)
        more = index + STAGES < num_chunks
        mbarrier.wait(x_bars.index(slot), phase)
        mbarrier.wait(yz_bars.index(slot), phase)
        high = gl.convert_layout(state.to(dtype), op_s)
        p = warpgroup_mma(y, xt, p_zero, use_acc=False, is_async=True)
        o = warpgroup_mma(high, xt, o_zero, use_acc=False, is_async=True)
        p = warpgroup_mma_wait(1, [p]) * between
        p_high = p.to(dtype)
        ps.index(0).store(p_high)
        if SPLIT & 1:
            ps.index(1).store((p - p_high.to(gl.float32)).to(dtype))
        fence_async_shared()
        if EXACT_K > 0:
            part = _leading(state, EXACT_K)
            low = gl.convert_layout((part - part.to(dtype).to(gl.float32)).to(dtype), op_s)
            o = warpgroup_mma(low, x.slice(0, EXACT_K, 1).permute((1, 0)), o, is_async=True)
        wide = zt.load(op_z).to(gl.float32) * leave_8[None, :] * leave[None, :]
        z_high = wide.to(dtype)
        o = warpgroup_mma_wait(0, [o])
        _load_x(x_desc, at_row, at_x, ahead, xs, x_bars, slot, more)
        o = o * enter_8[None, :] * enter[None, :]
        z_low = (wide - z_high.to(gl.float32)).to(dtype)
        o = warpgroup_mma(zt, ps.index(0), o, is_async=True)
        if SPLIT & 1:
            o = warpgroup_mma(zt, ps.index(1), o, is_async=True)
        added = warpgroup_mma(z_high, y, state, use_acc=False, is_async=True)
        if SPLIT & 4:
            added = warpgroup_mma(z_low, y, added, is_async=True)
        o = warpgroup_mma_wait(2 if SPLIT & 4 else 1, [o])
        tma.store_wait(0)
        os.reshape((C, V)).permute((1, 0)).store(o.to(o_desc.dtype))
        fence_async_shared()
        at = _first_token(first, index, num_chunks, C, REVERSE)
        copy_out(o_desc, [at_row, at_head, at, 0], os)
        state = state - state * lost
        added = warpgroup_mma_wait(0, [added])
        state = state + added
        _load_yz(y_desc, z_desc, at_row, at_y, at_z, ahead, ys, zs, yz_bars, slot, more)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    tma.store_wait(0)
    if left_ptr is not None:
        if begin == 0 if REVERSE else end == length:
            gl.store(_turned(left_ptr, left_strides, row, head, offs_v, offs_k), state)


_THREAD = threading.local()


def _enter_context(device: torch.device) -> None:
    """Makes the context of a device current in this thread, once: autograd calls from threads of its own.

    The driver encodes descriptors only inside a context, which nothing before a first launch has to enter.
    """
    entered = vars(_THREAD).setdefault("devices", set())
    if device not in entered:
        torch.zeros((), device=device)
        entered.add(device)


@functools.cache
def _layout(element_size: int) -> gl.NVMMASharedLayout:
    """How chunks lie in shared memory. Made once: checking its fields takes as long as a launch."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * element_size, rank=4)


def _descriptor(tensor: Tensor, chunk: int) -> TensorDescriptor:
    """How chunks of one head of a (B, H, T, D) tensor are copied. Strides of dims of size 1 do not count."""
    *_, width = shape = tensor.shape
    strides = [stride if size > 1 else width for size, stride in zip(shape, tensor.stride(), strict=True)]
    sizes = [1, 1, chunk, width]
    return TensorDescriptor(tensor, list(shape), [*strides[:3], 1], sizes, _layout(tensor.element_size()))


def _scan_chunks(
    inputs: ScanInputs,
    output: Tensor,
    final_state: Tensor | None,
    scale: float,
    flags: tuple[bool, bool],
    tiling: Tiling,
    segments: tuple[int, int] | None,
) -> None:
    """The scan where no state enters or leaves behind a partial chunk; `flags` are reverse and strict."""
    query, key, value, slopes, state, _ = inputs
    _enter_context(query.device)
    sequences, length, key_dim = query.shape[0] * slopes.shape[0], query.shape[2], query.shape[3]
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    segment, block = segments or choose_segments(length, sequences, multiprocessors)
    num_segments = cdiv(length, segment)
    blocks = None
    if num_segments > 1:
        before = choose_tiling(key_dim, key_dim, query.dtype, length, sequences)
        blocks = block_states(inputs, segment, block, scan_options(inputs, before, flags[0]))
    _scan_kernel[(sequences * num_segments,)](
        x_desc=_descriptor(query, tiling.chunk),
        y_desc=_descriptor(key, tiling.chunk),
        z_desc=_descriptor(value, tiling.chunk),
        o_desc=_descriptor(output, tiling.chunk),
        slope_ptr=slopes,
        state_ptr=state,
        block_ptr=blocks,
        left_ptr=final_state,
        state_strides=strides_of(state),
        block_strides=strides_of(blocks),
        left_strides=strides_of(final_state),
        shares=tuple(slopes.shape[0] // x.shape[1] for x in inputs[:3]),
        length=length,
        num_heads=slopes.shape[0],
        num_segments=num_segments,
        segment_length=segment,
        block_length=block,
        scale=scale,
        REVERSE=flags[0],
        STRICT=flags[1],
        SPLIT=tiling.split,
        EXACT_K=exact_columns(tiling.split, key_dim),
        STAGES=tiling.num_stages,
        num_warps=tiling.num_warps,
    )


def scan(
    inputs: ScanInputs,
    output: Tensor,
    final_state: Tensor | None,
    scale: float,
    reverse: bool,
    strict: bool,
    tiling: Tiling,
    segments: tuple[int, int] | None = None,
) -> None:
    """The scan of `api.py`, for what `tiling.gluon_serves` takes.

    Args:
        inputs: what is read, without bounds of documents.
        output: (B, H, T, V) in the inputs' dtype or fp32, written.
        final_state: (B, H, K, V) fp32, written, or None.
        scale: factor on the output.
        reverse: whether time runs backwards.
        strict: whether a token's own key and value are left out of its output.
        tiling: one of `GLUON_TILINGS`.
        segments: instead of `choose_segments`'s.
    """
    length, flags = inputs.query.shape[2], (reverse, strict)
    whole = length // tiling.chunk * tiling.chunk
    if whole == length or (inputs.state if reverse else final_state) is None:
        _scan_chunks(inputs, output, final_state, scale, flags, tiling, segments)
        return
    # The state between is what the partial chunk leaves (reverse) or what enters it.
    query, slopes, dim = inputs.query, inputs.slopes, inputs.query.shape[3]
    between = torch.empty(query.shape[0], slopes.shape[0], dim, dim, device=query.device, dtype=slopes.dtype)
    head, tail = (
        inputs._replace(**{name: getattr(inputs, name)[:, :, part] for name in ("query", "key", "value")})
        for part in (slice(whole), slice(whole, None))
    )
    small = choose_tiling(dim, dim, query.dtype, length - whole, query.shape[0] * slopes.shape[0])
    if reverse:
        triton_scan(tail, output[:, :, whole:], between, scale, reverse, strict, small)
        head = head._replace(state=between)
        _scan_chunks(head, output[:, :, :whole], final_state, scale, flags, tiling, segments)
    else:
        _scan_chunks(head, output[:, :, :whole], between, scale, flags, tiling, segments)
        tail = tail._replace(state=between)
        triton_scan(tail, output[:, :, whole:], final_state, scale, reverse, strict, small)
