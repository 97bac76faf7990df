"""Attention of a few queries over a long cache: split the keys, attend, merge.

    score[s] = scale * q . k[s]                     (softcap * tanh(score / softcap) where capped)
    m = max_s score[s]     l = sum_s exp(score[s] - m)     o = sum_s exp(score[s] - m) v[s] / l     lse = m +
    log l

One program computes BLOCK_R rows of one key head (the H/G query heads that share it times T positions) over
its share of the keys, BLOCK_N at a time. The rows' visible interval [first, last) is read on the device and
its blocks are dealt to the splits in turn, so the cost follows the visible keys whatever the size of the
cache, a replayed CUDA graph stays balanced while the interval grows, and what runs at the same time reads
memory that lies together. The partial results are fp32 and
joined by the kernel of `merge_partials`, where the sinks enter; one part without sinks is the result itself,
and is rounded as it is stored. The work is bound by reading K and V once:
everything else hides behind those loads. Tree Attention, arXiv 2408.04093; split keys as in Flash-Decoding.

Keys and values in 8 bits have a kernel of their own, in `triton_eight.py`; what both share is in
`triton_parts.py`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset
from hf_longattn.kernels.decode_attention.triton_eight import split_eight_kernel
from hf_longattn.kernels.decode_attention.triton_parts import (
    LN_2,
    key_exists,
    row_intervals,
    soft_cap,
    visible_keys,
)
from hf_longattn.kernels.dispatch import interpreting, num_processors
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials.triton import merge_forward

LOG2_E = 1.4426950408889634
_MAX_SPLITS = 128
# Share of the slots that keeps the memory busy.
_BUSY = 0.95


class DecodeConfig(NamedTuple):
    """How the work is cut: keys a step, warps, pipeline stages, programs that share a multiprocessor."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 1


# By head dim + value dim, each rounded up to a power of two. The first table keeps about 64 KiB a stage in
# flight, which the memory's bandwidth asks for; the second gives part of that to the scores of up to 64 rows;
# both avoid spills.
FEW_ROWS: dict[int, DecodeConfig] = {
    128: DecodeConfig(block_n=128, num_warps=8, programs_per_sm=2),
    256: DecodeConfig(block_n=128, num_warps=8),
    512: DecodeConfig(block_n=64, num_warps=8),
}
MANY_ROWS: dict[int, DecodeConfig] = {
    128: DecodeConfig(block_n=64, programs_per_sm=2),
    256: DecodeConfig(block_n=64, num_warps=8),
    512: DecodeConfig(block_n=32, num_warps=8),
}
# Keys and values in 8 bits, by the same two sums of head dims: half the time a key, so that several programs
# of few warps hide each other's reductions, which stop fewer warps each. They take all the registers of a
# multiprocessor and keep 120 to 140 KiB in flight there.
EIGHT_BITS_FEW_ROWS: dict[int, DecodeConfig] = {
    128: DecodeConfig(block_n=128, num_warps=2, programs_per_sm=4),
    256: DecodeConfig(block_n=64, num_warps=2, programs_per_sm=4),
    512: DecodeConfig(block_n=64, num_warps=4, programs_per_sm=2),
}
EIGHT_BITS_MANY_ROWS: dict[int, DecodeConfig] = {
    128: DecodeConfig(block_n=64, num_warps=4, programs_per_sm=2),
    256: DecodeConfig(block_n=64, num_warps=4, programs_per_sm=2),
    512: DecodeConfig(block_n=32, num_warps=8),
}
# Many short caches at once, of head dims of 128: three programs share a multiprocessor, so that one's loads
# hide behind another's; where one program has a step or two, nothing else hides them.
MANY_TILES = DecodeConfig(block_n=64)
TILES_A_PROCESSOR = 4
# Exact fp32 products take no tensor core, so tiles are small and hold 16 rows.
FULL_PRECISION = DecodeConfig(block_n=32, num_warps=8)


def pick_rows(num_rows: int, itemsize: int) -> int:
    """Rows that one program computes, padded to what a matrix product needs."""
    return min(64 if itemsize == 2 else 16, max(16, next_power_of_2(num_rows)))


def pick_config(
    head_dim: int, value_dim: int, itemsize: int, block_r: int, key_itemsize: int | None = None
) -> DecodeConfig:
    """The configuration for a pair of head dims, the element size of the queries in bytes, the rows of a
    program, and the element size of the keys where it is another."""
    if itemsize > 2:
        return FULL_PRECISION
    table = FEW_ROWS if block_r == 16 else MANY_ROWS
    if key_itemsize == 1:
        table = EIGHT_BITS_FEW_ROWS if block_r == 16 else EIGHT_BITS_MANY_ROWS
    width = _block_dim(head_dim) + _block_dim(value_dim)
    return table[min((bound for bound in table if bound >= width), default=max(table))]


def _block_dim(size: int) -> int:
    return max(16, next_power_of_2(size))


@functools.lru_cache(maxsize=4096)
def pick_num_splits(num_keys: int, num_tiles: int, num_slots: int, ragged: bool = False) -> int:
    """Programs that share the keys of one tile of rows, for `num_slots` programs that run at once.

    Where rows of the batch see keys of unlike numbers (`ragged`), a single wave would last as long as its
    longest program: many short programs, in full waves, even that out.

    The time is modelled as reading + waves * start-up + merge, all counted in keys. Reading takes the
    longer, the fewer of the slots are taken in a wave, up to where the memory is busy. The constants only
    have to make short caches prefer few splits, and long ones a single wave.
    """

    def cost(splits: int) -> float:
        waves = -(-num_tiles * splits // num_slots)
        if ragged:
            return waves * (num_keys / splits + 256) + 4 * splits
        taken = num_tiles * splits / (waves * num_slots)
        return num_keys * num_tiles / num_slots / min(taken, _BUSY) + waves * 256 + 4 * splits

    return min(range(1, min(_MAX_SPLITS, max(1, num_keys // 128)) + 1), key=cost)


@triton.jit(do_not_specialize=["T", "S"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, lower_ptr, upper_ptr, key_mask_ptr, o_ptr, lse_ptr,
    q_strides, k_strides, v_strides, lower_strides, upper_strides, key_mask_strides, o_strides, lse_strides,
    scale, cap, T, S,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, GAPS: tl.constexpr,
    ONE_QUERY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.cdiv(GROUP * T, BLOCK_R)
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1) // num_row_tiles
    offs_r = tl.program_id(1) % num_row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < GROUP * T
    head, t = group * GROUP + offs_r // T, offs_r % T
    offs_n, offs_k, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V

    # On its way while the interval is read: nothing else hides either wait.
    at = offset((batch, head, t, 0), q_strides)[:, None] + offs_k[None, :] * q_strides[3]
    q = tl.load(q_ptr + at, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
    first, last, begin, end = row_intervals(
        lower_ptr, upper_ptr, lower_strides, upper_strides, batch, t, mask_r, T, S, CAUSAL, ONE_QUERY
    )
    split, step = tl.program_id(0), tl.num_programs(0) * BLOCK_N
    begin += split * BLOCK_N
    # Within a tile int32 is enough; the tile's own place is int64.
    k_tile = offs_n[:, None] * k_strides[2] + offs_k[None, :] * k_strides[3]
    v_tile = offs_n[:, None] * v_strides[2] + offs_v[None, :] * v_strides[3]

    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if key_mask_ptr is not None:
        next_real = key_exists(key_mask_ptr, key_mask_strides, batch, begin + offs_n, end)
    for n0 in range(begin, end, step):
        keys = n0 + offs_n
        # What is loaded waits for no mask: that of the next step comes while this one computes.
        held = keys < end
        real = held
        if key_mask_ptr is not None:
            real = next_real
            next_real = key_exists(key_mask_ptr, key_mask_strides, batch, keys + step, end)
        visible, real = visible_keys(real, keys, first, last, ONE_QUERY, GAPS)
        k_base = k_ptr + offset((batch, group, n0, 0), k_strides)
        k = tl.load(k_base + k_tile, mask=held[:, None] & mask_k[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if cap is not None:
            score = soft_cap(score, cap)
        score = tl.where(visible, score, float("-inf"))
        peak = tl.maximum(m, tl.max(score, 1))
        # A row that has seen nothing yet has no peak; 0 keeps its differences defined.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(m - safe)
        v_base = v_ptr + offset((batch, group, n0, 0), v_strides)
        v = tl.load(v_base + v_tile, mask=held[:, None] & mask_v[None, :], other=0.0)
        if GAPS or key_mask_ptr is not None:
            # A slot that nobody sees may hold anything, and a probability of zero would let NaN through.
            v = tl.where(real[:, None], v, tl.zeros_like(v))
        l = l * shrink + tl.sum(p, 1)
        # The probabilities are rounded to the dtype of the queries; sums stay fp32.
        acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = peak

    lse = tl.where(l == 0.0, float("-inf"), m * LN_2 + tl.log(tl.where(l == 0.0, 1.0, l)))
    tl.store(lse_ptr + offset((split, batch, head, t), lse_strides), lse, mask=mask_r)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    at = offset((split, batch, head, t, 0), o_strides)[:, None] + offs_v[None, :] * o_strides[4]
    tl.store(o_ptr + at, acc.to(o_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_v[None, :])


def _per_batch(tensor: torch.Tensor | None, batch: int) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """`tensor` (batch or 1, n) and its strides, with the batch stride 0 where one row serves all."""
    if tensor is None:
        return None, (0, 0)
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return tensor, (tensor.stride(0) if tensor.shape[0] == batch else 0, tensor.stride(1))


def _words(states: torch.Tensor) -> torch.Tensor:
    """`states` in words of two neighbours, or in single bytes where its rows are not made of such words."""
    places = (states.shape[3], *states.stride()[:3], states.storage_offset())
    in_words = states.stride(3) == 1 and not any(place % 2 for place in places)
    return states.view(torch.int16 if in_words else torch.int8)


def _eight_bit_options(key: torch.Tensor, scales: torch.Tensor) -> dict[str, object]:
    """What the kernel for keys in 8 bits takes beside the arguments of the other one."""
    ptx = key.device.type == "cuda" and torch.version.hip is None and not interpreting()
    numbers = ("int8" if key.dtype == torch.int8 else "fp8") + " by ptx" * ptx
    return {"scales_ptr": scales, "scales_strides": scales.stride(), "NUMBERS": numbers}


def decode_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: KeyRange,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    scales: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the split kernel and the merge; arguments as in `decode_attention`, `config` for tuning."""
    if query.shape[0] == 0:
        output = query.new_empty((*query.shape[:3], value.shape[3]))
        return output, query.new_empty(query.shape[:3], dtype=torch.float32)
    outputs, lse = split_forward(
        query, key, value, scale, mask, softcap, num_splits, scales, config, whole=sinks is None
    )
    if len(outputs) == 1 and sinks is None:
        return outputs[0], lse[0]
    return merge_forward(outputs, lse, query.dtype, sinks)


def split_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: KeyRange,
    softcap: float | None = None,
    num_splits: int | None = None,
    scales: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    whole: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the split kernel alone.

    Args:
        query: (B, H, T, K), B at least 1; this and what follows as in `decode_attention`.
        key: (B, G, S, K).
        value: (B, G, S, V).
        scale: factor of the scores.
        mask: which keys each query sees.
        softcap: positive bound of the scores, or None.
        num_splits: programs that share the keys, or None.
        scales: (B, G, S, 2) factors of keys and values in 8 bits, or None.
        config: for tuning.
        whole: whether one split alone is the result, and so is rounded.

    Returns:
        outputs (splits, B, H, T, V), fp32, or of the dtype of `query` where one is the result, and lse
        (splits, B, H, T) fp32.
    """
    B, H, T, K = query.shape
    G, S, V = key.shape[1], key.shape[2], value.shape[3]
    block_r = pick_rows(H // G * T, query.element_size())
    row_tiles = cdiv(H // G * T, block_r)
    processors, tiles = num_processors(query.device), B * G * row_tiles
    config = config or pick_config(K, V, query.element_size(), block_r, key.element_size())
    if config is FEW_ROWS[256] and tiles >= TILES_A_PROCESSOR * processors:
        config = MANY_TILES
    if num_splits is None:
        slots = processors * config.programs_per_sm
        ragged = mask.lower is not None and min(B, mask.lower.shape[0]) > 1
        num_splits = pick_num_splits(next_power_of_2(S), tiles, slots, ragged)
    dtype = query.dtype if whole and num_splits == 1 else torch.float32
    outputs = query.new_empty((num_splits, B, H, T, V), dtype=dtype)
    lse = query.new_empty((num_splits, B, H, T), dtype=torch.float32)
    lower, lower_strides = _per_batch(mask.lower, B)
    upper, upper_strides = _per_batch(mask.upper, B)
    key_mask, key_mask_strides = _per_batch(mask.key_mask, B)
    gaps = T > 1 and lower is not None and (upper is not None or mask.causal)
    kernel, least_block, options = _split_kernel, 16, {}
    if scales is not None:
        # The even columns are one product and the odd ones another, of no fewer than 16 columns each.
        kernel, least_block, options = split_eight_kernel, 32, _eight_bit_options(key, scales)
        key, value = _words(key), _words(value)
    kernel[(num_splits, G * row_tiles, B)](
        query, key, value, lower, upper, key_mask, outputs, lse,
        query.stride(), key.stride(), value.stride(), lower_strides, upper_strides, key_mask_strides,
        outputs.stride(), lse.stride(),
        scale=scale / softcap if softcap else scale * LOG2_E, cap=softcap * LOG2_E if softcap else None,
        T=T, S=S, GROUP=H // G, K=K, V=V, CAUSAL=mask.causal and T > 1, GAPS=gaps, ONE_QUERY=T == 1,
        BLOCK_R=block_r, BLOCK_K=max(least_block, _block_dim(K)),
        BLOCK_V=max(least_block, _block_dim(V)), BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, **options,
    )  # fmt: skip
    return outputs, lse
