"""The public function that turns queries and keys and keeps keys and values."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.rotary_cache_write.reference import write

_NAME = "rotary_cache_write"


def rotary_cache_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Turns the queries and keys of new tokens by their positions and keeps keys and values, in one launch.

        keys[b, :, index[b, t]] = turned(key[b, :, t])        values[b, :, index[b, t]] = value[b, :, t]

    `turned` is that of `rotary_embedding` (RoFormer, arXiv 2104.09864, in the layout of GPT-NeoX), and the
    result has the bits of `rotary_embedding` and `cache_write` one after the other. Nothing waits for the
    device, so a CUDA graph may be replayed after `index` changed. Forward only.

    Args:
        query: (B, H, T, K); bf16, fp16 or fp32 for "triton". Any strides, for all tensors: slices of one
            projection are read in place.
        key: (B, G, T, K) of the dtype of `keys`.
        value: (B, G, T, V) of the dtype of `values`.
        cos: (B or 1, T, R), the two halves equal; R even, at most K. The first R elements of a head turn, the
            others are copied.
        sin: (B or 1, T, R), the two halves equal.
        keys: (B, G, S, K), written in place.
        values: (B, G, S, V), written in place; V may be 0.
        index: (B or 1, T) int64, a slot for each new token, from 0 to S - 1; a slot given twice in a row
            holds either token. On a GPU, a token whose slot is outside is not written.
        impl: "auto", "triton" (no float64) or "reference".

    Returns:
        The turned query, (B, H, T, K).

    Raises:
        ValueError: shapes that do not fit, a gradient asked of it, or what "triton" does not do.
        TypeError: dtypes that do not fit.

    Example:
        >>> query = rotary_cache_write(query, key, value, cos, sin, keys, values, places)
    """
    dispatch.check_impl(_NAME, impl, query.device)
    _check_heads(query, key, cos, sin, index)
    _check_buffers(key, value, keys, values)
    given = query, key, value, cos, sin
    if torch.is_grad_enabled() and any([x.requires_grad for x in given]):
        raise ValueError(
            f"what {_NAME} is given, such as `key`, must not require a gradient; run under `torch.no_grad()`."
        )
    if dispatch.takes_triton(_NAME, impl, given):
        from hf_longattn.kernels.rotary_cache_write.triton import write_forward

        return write_forward(query, key, value, cos, sin, keys, values, index)
    return write(query, key, value, cos, sin, keys, values, index)


def _check_heads(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, index: Tensor) -> None:
    B, _, T, K = query.shape
    if key.shape != (B, key.shape[1], T, K):
        raise ValueError(
            f"`key` of {_NAME} must have the batch, length and head dim of `query`, got {tuple(key.shape)} "
            f"and {tuple(query.shape)}."
        )
    R = cos.shape[-1]
    if cos.shape not in ((1, T, R), (B, T, R)) or sin.shape != cos.shape or R % 2 or not 0 < R <= K:
        raise ValueError(
            f"`cos` and `sin` of {_NAME} must be ({B} or 1, {T}, R) with an even R of at most {K}, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if index.shape not in ((1, T), (B, T)):
        raise ValueError(
            f"`index` of {_NAME} must be ({B} or 1, {T}), one slot a token, got {tuple(index.shape)}."
        )


def _check_buffers(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
    B, G, T, _ = key.shape
    for name, buffer, states in (("key", keys, key), ("value", values, value)):
        wanted = (B, G, keys.shape[2], states.shape[3])
        if states.shape[:3] != (B, G, T) or buffer.shape != wanted:
            raise ValueError(
                f"`{name}s` of {_NAME} must be {wanted} for a `{name}` of {(B, G, T, states.shape[3])}, got "
                f"{tuple(buffer.shape)} and {tuple(states.shape)}."
            )
        if states.dtype != buffer.dtype:
            raise TypeError(
                f"`{name}` of {_NAME} must have the dtype of `{name}s`, {buffer.dtype}, got {states.dtype}; "
                f"convert with `.to({buffer.dtype})`."
            )
