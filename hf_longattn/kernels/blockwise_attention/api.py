"""The public operator, its checks, and its registration with torch."""

import logging
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.direct import direct_operator
from hf_longattn.kernels.key_range import KeyRange, check_mask

from . import reference, sdpa
from .terms import Terms

_NAME = "blockwise_attention"
_IMPLS = ("auto", "triton", "sdpa", "reference")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Bytes of the widest rows whose tiles fit in shared memory.
_MOST_DIMS = 1024


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: KeyRange | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: tuple[float, int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention with its log-sum-exp, in memory linear in the length.

        z[t, s] = softcap * tanh(scale * q[t] . k[s] / softcap) + bias[t, s],   -inf for a pair that is hidden
        lse[t]  = log(sum_s exp z[t, s] + exp sink)
        o[t]    = sum_s exp(z[t, s] - lse[t]) v[s]

    Partial results over disjoint keys merge by their lse, and the merge is differentiable, for gradients flow
    through lse as well. Only the inputs, the output and lse are kept for the backward, which is
    deterministic.

    Args:
        query: (B, H, T, K), fp16, bf16, fp32 or fp64; any strides.
        key: (B, G, S, K), with H a multiple of G: query head h reads key head h // (H / G).
        value: (B, G, S, V).
        scale: factor on the scores, 0 or more; 1 / sqrt(K) if None.
        mask: the keys each query may see; all of them if None. Causal order is bottom-right: s <= t + S - T.
        bias: (B or 1, H or 1, T or 1, S), bool (True = may attend) or floating (added to the scores after the
            softcap; differentiable; -inf hides a key).
        softcap: bound on the scores, as in Gemma 2. For bf16 the Triton kernels take an NVIDIA GPU's
            tanh instruction, which errs by up to 2^-11 of a score; every other case is exact up to rounding.
        sinks: (H,) floating, one more logit a head that adds no value, as in GPT-OSS; differentiable.
        dropout: (probability, seed) on the normalised probabilities; lse is that without dropout. The same
            seed drops the same entries in every implementation.
        impl: "auto", "triton", "sdpa" (torch's own kernels, where they cover the case) or "reference".

    Returns:
        output (B, H, T, V) in the query's dtype and lse (B, H, T), the natural logarithm in fp32 (fp64 for
        fp64). A row that sees no key has output 0 and lse -inf (the sink, where there is one).

    Raises:
        ValueError: a shape, device, option or `impl` that does not fit, by name.
        TypeError: a dtype that does not fit, or a `mask` that is no `KeyRange`, by name.

    Source: Liu and Abbeel, "Blockwise Parallel Transformer", arXiv 2305.19370, section 3; the tiling is
    that of Dao, arXiv 2307.08691, algorithms 1 and 2.

    Example:
        >>> query, key, value = (torch.randn(1, 4, 128, 64) for _ in range(3))
        >>> output, lse = blockwise_attention(query, key, value, mask=KeyRange(causal=True))
    """
    _check_tensors(query, key, value)
    mask = KeyRange() if mask is None else mask
    check_mask(mask, query, key)
    _check_terms(query, key, scale, softcap, dropout)
    _check_bias(bias, query, key)
    if sinks is not None:
        _check_sinks(sinks, query)
    dispatch.check_impl(_NAME, impl, query.device, _IMPLS)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    dropout = dropout if dropout is not None and dropout[0] > 0 else None
    terms = Terms(scale, mask, bias, softcap, sinks, dropout)
    needs_bias_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    impl = _choose(impl, query, key, value, terms, needs_bias_grad)
    return _call(query, key, value, *_flatten(terms), impl)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(
                f"`{name}` must be (batch, heads, length, dim), got shape {tuple(tensor.shape)}."
            )
        if tensor.dtype not in _DTYPES or tensor.dtype != query.dtype:
            raise TypeError(
                f"`{name}` must be bf16, fp16, fp32 or fp64, as `query`, got {_describe(tensor)}; cast it."
            )
        _check_device(name, tensor, query)
    if query.shape[3] == 0:
        raise ValueError(f"`query` must have a head dim of at least 1, got shape {tuple(query.shape)}.")
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"`key` must share batch and dim with `query` {tuple(query.shape)}, got {tuple(key.shape)}."
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"`value` must be {tuple(key.shape[:3])} + (V,) as `key`, got {tuple(value.shape)}.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"`key` heads must divide the {query.shape[1]} query heads, got {key.shape[1]}.")


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    # A kernel would read the address of another device's memory.
    if tensor.device != query.device:
        raise ValueError(f"`{name}` is on {tensor.device}, `query` on {query.device}; move it there.")


def _check_terms(
    query: Tensor, key: Tensor, scale: float | None, softcap: float | None, dropout: tuple[float, int] | None
) -> None:
    if scale is not None and not (0 <= scale < math.inf):
        raise ValueError(
            f"`scale` must be finite and 0 or more, got {scale}; negate `query` for a negative one."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be positive, or None for no bound, got {softcap}.")
    if dropout is not None and not (isinstance(dropout, tuple) and len(dropout) == 2 and 0 <= dropout[0] < 1):
        raise ValueError(f"`dropout` must be (probability in [0, 1), seed), got {dropout}.")


def _check_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> None:
    if bias is None:
        return
    full = (*query.shape[:3], key.shape[2])
    fits = bias.ndim == 4 and bias.shape[3] == full[3]
    if not fits or any(got not in (1, want) for got, want in zip(bias.shape, full, strict=True)):
        raise ValueError(
            f"`bias` must broadcast over the first three of {full}, got shape {tuple(bias.shape)}."
        )
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise TypeError(f"`bias` must be bool or floating, got {bias.dtype}.")
    _check_device("bias", bias, query)


def _check_sinks(sinks: Tensor, query: Tensor) -> None:
    if sinks.shape != query.shape[1:2] or not sinks.is_floating_point():
        raise ValueError(f"`sinks` must be floating and (H,) = ({query.shape[1]},), got {_describe(sinks)}.")
    _check_device("sinks", sinks, query)


def _choose(impl: str, query: Tensor, key: Tensor, value: Tensor, terms: Terms, needs_bias_grad: bool) -> str:
    """The implementation that runs: the caller's, or the fastest one that computes exactly what was asked."""
    missing = sdpa.missing(query, key, value, terms, needs_bias_grad)
    if impl == "sdpa" and missing is not None:
        raise ValueError(f"`impl='sdpa'` of {_NAME} cannot take {missing}; use impl='auto'.")
    has_triton = dispatch.triton_runs_on(query.device)
    lacking = _beyond_triton(query, value)
    if impl == "triton" and lacking is not None:
        raise ValueError(f"`impl='triton'` of {_NAME} cannot take {lacking}; use impl='reference'.")
    if impl != "auto":
        return impl
    if missing is None:
        impl = "sdpa"
    elif query.device.type != "cpu" and has_triton and lacking is None:
        impl = "triton"
    else:
        impl = "reference"
        if query.device.type == "cuda":
            dispatch.warn_slow(
                _NAME, f"no Triton kernel takes {lacking}" if has_triton else "triton is not installed"
            )
    if not torch.compiler.is_compiling():
        dispatch.log_once(logging.DEBUG, f"{_NAME}: {impl} on {query.device.type}")
    return impl


def _beyond_triton(query: Tensor, value: Tensor) -> str | None:
    """What of a call no Triton kernel takes, in words, or None; the interpreter has room for any tile."""
    if query.dtype == torch.float64:
        return "float64"
    head_dim, most = max(query.shape[3], value.shape[3]), _MOST_DIMS // query.element_size()
    if query.device.type != "cpu" and head_dim > most:
        return f"a head dim of {head_dim} in {str(query.dtype).removeprefix('torch.')}, at most {most}"
    return None


def _flatten(terms: Terms) -> tuple:
    """The terms as arguments of the registered operator, in the order of `_unflatten`."""
    rate, seed = terms.dropout or (0.0, 0)
    mask = terms.mask
    tensors = (terms.bias, terms.sinks, mask.lower, mask.upper, mask.key_mask)
    return *tensors, mask.causal, terms.scale, terms.softcap, rate, seed


def _unflatten(
    tensors: tuple[Tensor | None, ...],
    causal: bool,
    scale: float,
    softcap: float | None,
    rate: float,
    seed: int,
) -> Terms:
    bias, sinks, lower, upper, key_mask = tensors
    mask = KeyRange(causal, lower, upper, key_mask)
    return Terms(scale, mask, bias, softcap, sinks, (rate, seed) if rate > 0 else None)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    """(B, H, T, V) laid out as (B, T, H, V), which is how transformers wants it next."""
    batch, heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, heads, value.shape[3]).transpose(1, 2)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    terms = _unflatten((bias, sinks, lower, upper, key_mask), causal, scale, softcap, dropout, seed)
    if query.numel() == 0 or key.shape[2] == 0 or value.shape[3] == 0:
        impl = "reference"
    output, lse = _implementation(impl).forward(query, key, value, terms)
    laid_out = output if output.transpose(1, 2).is_contiguous() else _empty_output(query, value).copy_(output)
    return laid_out, lse.contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, *terms: object) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


def _run_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: int,
    impl: str,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms = _unflatten((bias, sinks, lower, upper, key_mask), causal, scale, softcap, dropout, seed)
    if query.numel() == 0 or key.shape[2] == 0 or value.shape[3] == 0:
        impl = "reference"
    if impl == "sdpa" and grad_lse is not None:
        # torch's kernels take no gradient of lse.
        impl = (
            "triton" if query.device.type != "cpu" and dispatch.triton_runs_on(query.device) else "reference"
        )
    gradients = _implementation(impl).backward(
        grad_output, grad_lse, (query, key, value), (output, lse), terms, bias_grad
    )
    return (
        _laid_out(gradients.query, query, query),
        _laid_out(gradients.key, key, query),
        _laid_out(gradients.value, value, query),
        _laid_out(gradients.bias, bias, query),
        _laid_out(gradients.sinks, sinks, query),
    )


def _laid_out(gradient: Tensor | None, like: Tensor | None, query: Tensor) -> Tensor:
    """A gradient with the strides that `empty_like` gives its input, an empty tensor for an absent one."""
    if gradient is None or like is None:
        return query.new_empty(0)
    if gradient.stride() == torch.empty_like(like, device="meta").stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)


def _backward_fake(grad_output: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    query, key, value, _, _, bias, sinks = args[:7]
    wanted = (query, key, value, bias if args[-1] else None, sinks)
    return tuple(query.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in wanted)


_call_backward = direct_operator("hf_longattn::blockwise_attention_backward", _run_backward, _backward_fake)


def _implementation(impl: str) -> ModuleType:
    """The module that holds `forward` and `backward`."""
    if impl == "triton":
        from . import triton as module

        return module
    return {"sdpa": sdpa, "reference": reference}[impl]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.options = inputs[8:]


def _gradients(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:
    saved = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[3])
    bias, sinks = saved[5:7]
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    gradients = _call_backward(grad_output, grad_lse, *saved, *ctx.options, bias_grad)
    kept = (*gradients[:3], gradients[3] if bias_grad else None, gradients[4] if sinks is not None else None)
    return *kept, *[None] * 9


_call = direct_operator("hf_longattn::blockwise_attention", _run, _fake, _save, _gradients)
