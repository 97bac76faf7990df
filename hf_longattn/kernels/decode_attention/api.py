"""The public operator `decode_attention`: its contract, its checks and the choice of implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels.decode_attention.reference import decode_reference
from hf_longattn.kernels.dispatch import check_impl, interpreting, lacks_fp8, triton_runs_on, warn_slow
from hf_longattn.kernels.key_range import KeyRange, check_mask

MAX_QUERIES = 16
_MAX_HEAD_DIM = 256
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: KeyRange | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    scales: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact attention of at most 16 queries over a cache of any length, and its log-sum-exp for a merge.

        score[s] = scale * query . key[s], or softcap * tanh(that / softcap)
        lse = log(sum_s exp(score[s]) + exp(sink))        output = sum_s exp(score[s] - lse) value[s]

    over the keys s that the row sees. The keys of one sequence are divided among many programs, and their
    results merged. The time follows the keys between the first and the last visible one, not the size of the
    cache; nothing waits for the device, and a CUDA graph may be replayed after `mask.lower` or `mask.upper`
    changed. Slots that no query sees may hold anything: what is read of them counts for nothing. Usable in
    `torch.compile(fullgraph=True)`.

    Args:
        query: (B, H, T, K), T from 1 to 16; bf16, fp16, fp32, or fp64 (reference only). Any strides,
            for all three.
        key: (B, G, S, K) of the same dtype, H a multiple of G; a view of a larger cache is used in place.
            Where `scales` is given, int8 or float8_e4m3fn.
        value: (B, G, S, V) of the dtype of `key`. K and V from 1 to 256 on a GPU.
        scale: factor of the scores; K ** -0.5 where None.
        mask: which keys each query sees; all of them where None.
        softcap: positive bound of the scores, or None.
        sinks: (H,) floating-point logits that take part in the denominator and add no value, or None.
        num_splits: programs that share the keys of one sequence and key head (chunks, in the reference); None
            picks it from the shapes and the device. The result does not depend on it but for rounding.
        scales: (B, G, S, 2) fp32 factors of each key and of each value, as `quantized_states` makes them;
            what is attended to is then `key * scales[..., :1]` and `value * scales[..., 1:]`, worked out in
            registers. On a GPU the products are in fp16 (fp32 for fp32 queries), which no size of a query or
            of a scale leaves; fastest are rows that begin at even places.
        impl: "triton", "reference", or "auto" for the faster one that runs on the device.

    Returns:
        output (B, H, T, V) in the dtype of `query`, and lse (B, H, T) fp32 (fp64 for fp64), natural
        logarithm, the sink included. A row that sees nothing has output 0 and lse -inf (its sink, where it
        has one).

    Raises:
        ValueError: shapes or devices that do not fit, more than 16 queries, an `impl` that cannot run here,
            or an argument that requires a gradient: `blockwise_attention` has one.
        TypeError: dtypes that do not fit.

    Example:
        >>> output, lse = decode_attention(query, cache.keys[:, :, :length], cache.values[:, :, :length])

    Source: Shyam et al., Tree Attention, arXiv 2408.04093; sinks as in GPT-OSS.
    """
    _check_shapes(query, key, value)
    _check_dtypes(query, key, value, scales)
    _check_options(query, softcap, sinks, num_splits)
    mask = KeyRange() if mask is None else mask
    check_mask(mask, query, key)
    inputs = (query, key, value) if sinks is None else (query, key, value, sinks)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError(
            "`query`, `key`, `value` and `sinks` of decode_attention must not require a gradient: it has no "
            "backward. Use `blockwise_attention`, or run under `torch.no_grad()`."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _decode(
        query, key, value, scale, mask.causal, mask.lower, mask.upper, mask.key_mask,
        softcap, sinks, num_splits, impl, scales,
    )  # fmt: skip


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"`query`, `key` and `value` must be (B, H, T, K), (B, G, S, K) and (B, G, S, V), got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    B, H, T, K = query.shape
    if key.shape[0] != B or key.shape[3] != K or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"`key` must be (B, G, S, K) and `value` (B, G, S, V) with {B=} and {K=} of `query`, got shapes "
            f"{tuple(key.shape)} and {tuple(value.shape)}."
        )
    if K == 0:
        raise ValueError(f"`query` must have a head dim of at least 1, got shape {tuple(query.shape)}.")
    if key.shape[1] == 0 or H % key.shape[1]:
        raise ValueError(
            f"The heads of `query` must be a multiple of those of `key`, got {H} and {key.shape[1]}."
        )
    if not 1 <= T <= MAX_QUERIES:
        raise ValueError(
            f"`query` must hold 1 to {MAX_QUERIES} positions, got {T=}; use `blockwise_attention` for more."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"`query`, `key` and `value` must be on one device, got {query.device}, {key.device} "
            f"and {value.device}."
        )


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, scales: Tensor | None) -> None:
    if scales is None:
        known = query.dtype in _TRITON_DTYPES or query.dtype == torch.float64
        if not known or not query.dtype == key.dtype == value.dtype:
            raise TypeError(
                f"`query`, `key` and `value` must share one dtype of bf16, fp16, fp32 and fp64, got "
                f"{query.dtype}, {key.dtype} and {value.dtype}; convert them with `.to(dtype)`, or give the "
                "`scales` of keys and values in 8 bits."
            )
        return
    if key.dtype not in _EIGHT_BITS or value.dtype != key.dtype or not query.is_floating_point():
        raise TypeError(
            "`scales` belong to `key` and `value` that are both int8 or both float8_e4m3fn, for a "
            f"floating-point `query`, got {key.dtype}, {value.dtype} and {query.dtype}; leave `scales` out."
        )
    if scales.shape != (*key.shape[:3], 2) or scales.device != query.device:
        raise ValueError(
            f"`scales` must be {(*key.shape[:3], 2)} on {query.device}, one factor for each key and one for "
            f"each value, got {tuple(scales.shape)} on {scales.device}."
        )
    if scales.dtype != torch.float32:
        raise TypeError(f"`scales` must be float32, got {scales.dtype}.")


def _check_options(
    query: Tensor, softcap: float | None, sinks: Tensor | None, num_splits: int | None
) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be positive, got {softcap}; pass None for no cap.")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"`num_splits` must be at least 1, got {num_splits}; pass None to have it picked.")
    if sinks is None:
        return
    if sinks.shape != query.shape[1:2] or sinks.device != query.device:
        raise ValueError(
            f"`sinks` must be ({query.shape[1]},) on {query.device}, one logit a query head, got "
            f"{tuple(sinks.shape)} on {sinks.device}."
        )
    if not sinks.is_floating_point():
        raise TypeError(f"`sinks` must be floating point, got {sinks.dtype}.")


def _use_triton(impl: str, query: Tensor, key: Tensor, value: Tensor) -> bool:
    check_impl("decode_attention", impl, query.device)
    head_dim = max(query.shape[-1], value.shape[-1])
    reason = None
    if query.dtype not in _TRITON_DTYPES:
        reason = f"the kernel knows bf16, fp16 and fp32, not {query.dtype}"
    elif head_dim > _MAX_HEAD_DIM:
        reason = f"the kernel holds head dims up to {_MAX_HEAD_DIM}, not {head_dim}"
    elif key.dtype == torch.float8_e4m3fn and lacks_fp8(key.device):
        reason = "this GPU has no fp8; int8 runs on it"
    if impl == "triton" and reason:
        raise ValueError(
            f"`impl='triton'` of decode_attention cannot run: {reason}; use 'auto' or 'reference'."
        )
    if impl == "reference" or not triton_runs_on(query.device):
        return False
    if reason:
        warn_slow("decode_attention", reason)
    # The interpreter computes bf16 products wrongly, so only an explicit choice runs them there.
    return not reason and not (impl == "auto" and interpreting() and query.dtype == torch.bfloat16)


@torch.library.custom_op("hf_longattn::decode_attention", mutates_args=())
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    lower: Tensor | None,
    upper: Tensor | None,
    key_mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    impl: str,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    mask = KeyRange(causal, lower, upper, key_mask)
    if not _use_triton(impl, query, key, value):
        return decode_reference(query, key, value, scale, mask, softcap, sinks, num_splits, scales)
    from hf_longattn.kernels.decode_attention.triton import decode_forward

    return decode_forward(query, key, value, scale, mask, softcap, sinks, num_splits, scales)


@_decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    lower: Tensor | None,
    upper: Tensor | None,
    key_mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    impl: str,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=dtype)
