"""The merge of N partial attention results in one pass.

    m = max_n lse_n        w_n = exp(lse_n - m)        z = sum_n w_n
    output = sum_n w_n o_n / z                         lse = m + log z

One program computes BLOCK_R of the B*H*T rows and loops over the parts, BLOCK_N at a time: many parts of few
rows (decoding) and few parts of many rows (prefill) both fill the machine. An empty part (lse -inf) is not
even read. A sink is one more part of every row, with output 0 and a logit known beforehand. Sums are kept in
the dtype of
lse: fp32, or fp64 for fp64 inputs. Tree Attention, arXiv 2408.04093, section 4.

A few parts that lie apart, as torch leaves them, are joined over the first of them: every element
is read once, where stacking them would read and write all of it before. Rows are taken in the order in which
they lie in memory, so that neighbours make long runs whatever the order of the dimensions.
"""

import torch
import triton
import triton.language as tl

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset

# Elements of outputs that one program holds at a time: 32 registers a thread in fp32.
_TILE = 4096


@triton.jit
def _load_lse(lse_ptr, part, row, mask, strides):
    """(BLOCK_N, BLOCK_R) lse of some parts of some rows; -inf outside."""
    at = offset((part[:, None], row[0][None, :], row[1][None, :], row[2][None, :]), strides)
    return tl.load(lse_ptr + at, mask=mask, other=float("-inf"))


@triton.jit(do_not_specialize=["num_parts", "num_heads", "num_queries", "num_rows"])
def _merge_kernel(
    outputs_ptr, lse_ptr, sinks_ptr, output_ptr, merged_lse_ptr,
    outputs_strides, lse_strides, output_strides, merged_lse_strides,
    num_parts, num_heads, num_queries, num_rows,
    V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    dtype = lse_ptr.dtype.element_ty
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    head = offs_r // num_queries % num_heads
    row = (offs_r // num_queries // num_heads, head, offs_r % num_queries)
    offs_n = tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    peak = tl.full([BLOCK_R], float("-inf"), dtype)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=mask_r, other=0.0).to(dtype)
        peak = tl.maximum(peak, sink)
    for n0 in range(0, num_parts, BLOCK_N):
        part = n0 + offs_n
        lse = _load_lse(lse_ptr, part, row, (part < num_parts)[:, None] & mask_r[None, :], lse_strides)
        peak = tl.maximum(peak, tl.max(lse, 0))
    # A row whose parts are all empty has no peak; any finite stand-in gives it weights of zero.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_R], dtype)
    if sinks_ptr is not None:
        total += tl.exp(sink - peak)
    merged = tl.zeros([BLOCK_R, BLOCK_V], dtype)
    for n0 in range(0, num_parts, BLOCK_N):
        part = n0 + offs_n
        lse = _load_lse(lse_ptr, part, row, (part < num_parts)[:, None] & mask_r[None, :], lse_strides)
        weight = tl.exp(lse - peak[None, :])
        total += tl.sum(weight, 0)
        base = offset((part[:, None], row[0][None, :], row[1][None, :], row[2][None, :], 0), outputs_strides)
        mask = (lse != float("-inf"))[:, :, None] & mask_v[None, None, :]
        at = base[:, :, None] + offs_v[None, None, :] * outputs_strides[4]
        parts = tl.load(outputs_ptr + at, mask=mask, other=0.0)
        merged += tl.sum(parts.to(dtype) * weight[:, :, None], 0)
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    at = offset((row[0], row[1], row[2], 0), output_strides)
    at = at[:, None] + offs_v[None, :] * output_strides[3]
    tl.store(output_ptr + at, merged.to(output_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_v[None, :])
    tl.store(merged_lse_ptr + offset(row, merged_lse_strides), peak + tl.log(total), mask=mask_r)


@triton.jit(do_not_specialize=["num_middle", "num_inner", "num_rows"])
def _join_kernel(
    outputs_ptrs, lse_ptrs, outputs_strides, lse_strides, num_middle, num_inner, num_rows,
    V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # int32 divides several times as fast, and so many rows fit in no memory; offsets are int64.
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < num_rows
    row = (rows // num_inner // num_middle, rows // num_inner % num_middle, rows % num_inner)
    lse_at = offset(row, lse_strides)
    offs_v = tl.arange(0, BLOCK_V)
    at = offset((row[0], row[1], row[2], 0), outputs_strides)
    at = at[:, None] + offs_v[None, :] * outputs_strides[3]
    mask = mask_r[:, None] & (offs_v < V)[None, :]
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for n in tl.static_range(len(lse_ptrs)):
        peak = tl.maximum(peak, tl.load(lse_ptrs[n] + lse_at, mask=mask_r, other=float("-inf")))
    # A row whose parts are all empty has no peak; any finite stand-in gives it weights of zero.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_R], tl.float32)
    merged = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for n in tl.static_range(len(lse_ptrs)):
        lse = tl.load(lse_ptrs[n] + lse_at, mask=mask_r, other=float("-inf"))
        weight = tl.exp(lse - peak)
        total += weight
        # What an empty part holds is undefined: it is not read.
        part = tl.load(outputs_ptrs[n] + at, mask=mask & (lse != float("-inf"))[:, None], other=0.0)
        merged += part.to(tl.float32) * weight[:, None]
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    # Another thread may still read the lse that this one is about to write over.
    tl.debug_barrier()
    tl.store(outputs_ptrs[0] + at, merged.to(outputs_ptrs[0].dtype.element_ty), mask=mask)
    tl.store(lse_ptrs[0] + lse_at, peak + tl.log(total), mask=mask_r)


def merge_over_first(outputs: list[torch.Tensor], lse: list[torch.Tensor]) -> None:
    """Writes the merge of a few parts over the first of them.

    Args:
        outputs: each (B, H, T, V), of one dtype and one set of strides.
        lse: each (B, H, T) fp32, of one set of strides.
    """
    *shape, width = outputs[0].shape
    num_rows = lse[0].numel()
    if num_rows == 0:
        return
    order = sorted(range(3), key=outputs[0].stride, reverse=True)
    block_v = next_power_of_2(width)
    block_r = max(1, _TILE // 2 // block_v)
    _join_kernel[(cdiv(num_rows, block_r),)](
        tuple(outputs), tuple(lse),
        tuple(outputs[0].stride(dim) for dim in (*order, 3)), tuple(lse[0].stride(dim) for dim in order),
        shape[order[1]], shape[order[2]], num_rows,
        V=width, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip


def merge_forward(
    outputs: torch.Tensor,
    lse: torch.Tensor,
    dtype: torch.dtype | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the merge.

    Args:
        outputs: (N, B, H, T, V) parts.
        lse: (N, B, H, T) fp32 or fp64.
        dtype: of the output; that of `outputs` where None.
        sinks: (H,) one more logit a head, which adds no value.

    Returns:
        output (B, H, T, V) and lse (B, H, T).
    """
    num_parts, *shape, width = outputs.shape
    output = outputs.new_empty((*shape, width), dtype=dtype or outputs.dtype)
    merged_lse = lse.new_empty(shape)
    num_rows = merged_lse.numel()
    if num_rows == 0 or width == 0:
        return output, merged_lse.fill_(-torch.inf)
    block_v = next_power_of_2(width)
    block_n = min(64, next_power_of_2(num_parts))
    # Rows share a program only where there are more than enough of them for every processor.
    block_r = max(1, _TILE // (block_n * block_v)) if num_rows >= 8192 else 1
    _merge_kernel[(cdiv(num_rows, block_r),)](
        outputs, lse, sinks, output, merged_lse,
        outputs.stride(), lse.stride(), output.stride(), merged_lse.stride(),
        num_parts, shape[1], shape[2], num_rows,
        V=width, BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip
    return output, merged_lse
