"""The gradients of blockwise attention from a saved output and lse, for callers that keep their own books."""

import math

from torch import Tensor

from hf_longattn.kernels.key_range import KeyRange

from .api import _call_backward, _choose, _flatten
from .terms import Gradients, Terms


def blockwise_attention_gradients(
    grad_output: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    mask: KeyRange | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: tuple[float, int] | None = None,
) -> Gradients:
    """The gradients of `blockwise_attention` without a second forward.

        p = exp(z - lse)      delta = sum(do * o)      dz = p * (do v^T - delta)

    Args:
        grad_output: (B, H, T, V), the gradient of the output.
        inputs: query (B, H, T, K), key (B, G, S, K) and value (B, G, S, V) of the forward.
        results: output (B, H, T, V) and lse (B, H, T) of the forward.
        scale: as in the forward.
        mask: as in the forward.
        bias: as in the forward; it gets no gradient.
        softcap: as in the forward.
        sinks: as in the forward.
        dropout: as in the forward, with the same seed.

    Returns:
        the gradients of query, key and value in their dtypes, None for the bias, and that of the sinks (None
        without sinks).

    Source: Dao et al., arXiv 2205.14135, equations 6 onward.
    """
    query = inputs[0]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    dropout = dropout if dropout is not None and dropout[0] > 0 else None
    terms = Terms(scale, KeyRange() if mask is None else mask, bias, softcap, sinks, dropout)
    impl = _choose("auto", *inputs, terms, needs_bias_grad=False)
    query_grad, key_grad, value_grad, _, sinks_grad = _call_backward(
        grad_output, None, *inputs, *results, *_flatten(terms), impl, False
    )
    return Gradients(query_grad, key_grad, value_grad, None, None if sinks is None else sinks_grad)
