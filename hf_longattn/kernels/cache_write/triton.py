"""Keys and values of new tokens into the slots of a cache, in one launch where plain torch takes two.

    keys[b, g, index[t]] = key[b, g, t]        values[b, g, index[t]] = value[b, g, t]

One program copies one token of one head, key and value. A decoding step writes a few KiB a layer and is bound
by the launch alone. Nothing is rounded, and there is no backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import next_power_of_2, offset, overlap, wait_for_previous


@triton.jit
def _copy_row(from_ptr, to_ptr, from_stride, to_stride, wanted, N: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = (offs < N) & wanted
    tl.store(to_ptr + offs * to_stride, tl.load(from_ptr + offs * from_stride, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["T", "S"])
def _write_kernel(
    key_ptr, value_ptr, index_ptr, keys_ptr, values_ptr,
    key_strides, value_strides, index_stride, keys_strides, values_strides,
    T, S, K: tl.constexpr, V: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    batch, head, t = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot = tl.load(index_ptr + t * index_stride)
    wanted = (slot >= 0) & (slot < S)
    source, target = (batch, head, t, 0), (batch, head, slot, 0)
    key_row, keys_row = key_ptr + offset(source, key_strides), keys_ptr + offset(target, keys_strides)
    _copy_row(key_row, keys_row, key_strides[3], keys_strides[3], wanted, K, BLOCK_K)
    if V > 0:
        value_row = value_ptr + offset(source, value_strides)
        values_row = values_ptr + offset(target, values_strides)
        _copy_row(value_row, values_row, value_strides[3], values_strides[3], wanted, V, BLOCK_V)


def write_forward(keys: Tensor, values: Tensor, index: Tensor, key: Tensor, value: Tensor) -> None:
    """Launches the kernel; arguments as in `cache_write`."""
    B, G, T, K = key.shape
    V = value.shape[3]
    if key.numel() + value.numel() == 0:
        return
    _write_kernel[(T, G, B)](
        key_ptr=key, value_ptr=value, index_ptr=index, keys_ptr=keys, values_ptr=values,
        key_strides=key.stride(), value_strides=value.stride(), index_stride=index.stride(0),
        keys_strides=keys.stride(), values_strides=values.stride(),
        T=T, S=keys.shape[2], K=K, V=V,
        BLOCK_K=next_power_of_2(max(K, 1)), BLOCK_V=next_power_of_2(max(V, 1)), num_warps=1,
        **overlap(key.device),
    )  # fmt: skip
