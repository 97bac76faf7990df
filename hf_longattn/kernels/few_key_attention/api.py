"""The public operator `few_key_attention`: its contract, its checks and the choice of implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.few_key_attention.reference import attend

MAX_KEYS = 32
_NAME = "few_key_attention"
_MAX_HEAD_DIM = 256
Rotary = tuple[Tensor, Tensor]


def few_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held_keys: Tensor,
    held_values: Tensor,
    start: int,
    *,
    rotary: Rotary | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Puts new keys and values behind the few that are held, and attends to all of them in one launch.

        held_keys[start + t] = turned(key[t])          held_values[start + t] = value[t]
        p[t, s] = softmax_s(scale * turned(query[t]) . held_keys[s]),  s <= start + t and key_mask[s]
        output[t] = sum_s p[t, s] held_values[s]

    `turned` is the rotary embedding of the first R numbers of a head (RoFormer, arXiv 2104.09864, in the
    layout of GPT-NeoX); the others stay. Sums are fp32; keys and values are rounded to the dtype of the
    buffers before they are used. Forward only.

    Args:
        query: (B, H, T, K); bf16, fp16 or fp32 for "triton". Any strides, as for `key` and `value`: slices
            of one projection are read in place.
        key: (B, G, T, K), H a multiple of G.
        value: (B, G, T, V).
        held_keys: (B, G, S, K), S >= start + T, at most 32 for "triton"; written in place.
        held_values: (B, G, S, V), written in place.
        start: how many keys are held.
        rotary: (cos, sin) of the new tokens, (B or 1, T, R) each, the two halves equal; None turns nothing.
        scale: factor of the scores; K ** -0.5 where None.
        key_mask: (B, start + T) bool, False at keys that nobody sees; None: there are none.
        impl: "auto", "triton" or "reference".

    Returns:
        (B, T, H, V), in the dtype of `query`; 0 where a query sees no key.

    Raises:
        ValueError: shapes that do not fit, or what "triton" cannot do.

    Example:
        >>> output = few_key_attention(query, key, value, keys, values, start, rotary=(cos, sin))
    """
    dispatch.check_impl(_NAME, impl, query.device)
    _check_shapes(query, key, value, held_keys, held_values, start)
    _check_options(query, start, rotary, key_mask)
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    num_keys, width = held_keys.shape[2], max(query.shape[-1], value.shape[-1])
    many = (num_keys > MAX_KEYS, f"holds {MAX_KEYS} keys, got {num_keys}")
    wide = (width > _MAX_HEAD_DIM, f"holds head dims up to {_MAX_HEAD_DIM}, got {width}")
    if dispatch.takes_triton(_NAME, impl, (query, key, value, held_keys, held_values), many, wide):
        from hf_longattn.kernels.few_key_attention.triton import attend_forward

        return attend_forward(query, key, value, held_keys, held_values, start, rotary, factor, key_mask)
    return attend(query, key, value, held_keys, held_values, start, rotary, factor, key_mask)


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, held_keys: Tensor, held_values: Tensor, start: int
) -> None:
    B, H, T, K = query.shape
    G = key.shape[1]
    if key.shape != (B, G, T, K) or value.shape[:3] != key.shape[:3] or G == 0 or H % G:
        raise ValueError(
            f"`key` and `value` of {_NAME} must be (B, G, T, K) and (B, G, T, V) with a G that divides the "
            f"heads of `query`, got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    S = held_keys.shape[2]
    if held_keys.shape != (B, G, S, K) or held_values.shape != (B, G, S, value.shape[3]):
        raise ValueError(
            f"`held_keys` and `held_values` of {_NAME} must be {(B, G, 'S', K)} and "
            f"{(B, G, 'S', value.shape[3])}, got {tuple(held_keys.shape)} and {tuple(held_values.shape)}."
        )
    if not 0 <= start <= S - T:
        raise ValueError(
            f"`start` of {_NAME} must leave room for {T} new keys among {S} slots, got {start}; pass longer "
            "buffers."
        )


def _check_options(query: Tensor, start: int, rotary: Rotary | None, key_mask: Tensor | None) -> None:
    B, _, T, K = query.shape
    for tensor in rotary or ():
        shape = tensor.shape
        if tensor.ndim != 3 or shape[0] not in (1, B) or shape[1] != T or shape[2] % 2 or shape[2] > K:
            raise ValueError(
                f"`rotary` of {_NAME} must be two tensors ({B} or 1, {T}, R) with an even R of at most {K}, "
                f"got {tuple(shape)}."
            )
    if key_mask is not None and (key_mask.shape != (B, start + T) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"`key_mask` of {_NAME} must be {(B, start + T)} in torch.bool, got {tuple(key_mask.shape)} in "
            f"{key_mask.dtype}."
        )
