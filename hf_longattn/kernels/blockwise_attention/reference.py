"""Blockwise attention in plain PyTorch: the definition of correct, on every device, in every floating dtype.

For each block of queries, over the keys that it may see:

    z = softcap(scale * q k^T) + bias          hidden pairs: z = -inf
    lse = log(sum exp z + exp sink)            p = exp(z - lse)
    o = (p * keep / (1 - rate)) v

The backward recomputes z of one block at a time (Dao et al., arXiv 2205.14135, equation 6 onward), with

    dp = keep / (1 - rate) * (do v^T)          delta = sum(do * o) - dlse
    dz = p * (dp - delta)                      d(scores) = dz * (1 - tanh^2)

so that nothing of size T x S outlives a block. Query heads that share a key head are rows of one product.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import in_its_own_dtypes

from .philox import keep_tile
from .terms import Gradients, Terms, row_delta, sink_gradient, without_unseen

# Elements of a tile of scores: 16 M keeps the fp32 temporaries of a block near 64 MB each.
_TILE_ELEMENTS = 1 << 24


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _row_blocks(query: Tensor, num_keys: int) -> Iterator[slice]:
    num_rows = query.shape[2]
    block = max(1, min(512, _TILE_ELEMENTS // max(1, query.shape[0] * query.shape[1] * num_keys)))
    return (slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block))


def _fold(rows: Tensor, num_groups: int) -> Tensor:
    """(B, H, t, D) -> (B, G, H / G * t, D): the query heads of a group below one another."""
    batch, heads, length, dim = rows.shape
    return rows.reshape(batch, num_groups, heads // num_groups * length, dim)


class _Block(NamedTuple):
    """One block of queries with the keys and values it may see, all in the dtype of the computation."""

    query: Tensor  # (B, G, H / G * t, K)
    key: Tensor  # (B, G, s, K)
    value: Tensor  # (B, G, s, V)
    logits: Tensor  # (B, H, t, s)
    slope: Tensor | None  # (B, H, t, s), the derivative of the softcap
    keep: Tensor | None  # (B, H, t, s), 0 or 1 / (1 - rate)


def _load_block(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, rows: slice, columns: slice
) -> _Block:
    batch, heads, num_queries, _ = query.shape
    dtype = _compute_dtype(query.dtype)
    visible = terms.visible(rows, columns, (num_queries, key.shape[2]), query.device)
    k, v = key[:, :, columns].to(dtype), value[:, :, columns].to(dtype)
    if visible is not None:
        k, v = without_unseen(k, visible), without_unseen(v, visible)
    q = _fold(query[:, :, rows].to(dtype), key.shape[1])
    logits = (q @ k.mT).mul_(terms.scale).view(batch, heads, rows.stop - rows.start, k.shape[2])
    slope = None
    if terms.softcap is not None:
        bounded = torch.tanh(logits / terms.softcap)
        logits, slope = bounded * terms.softcap, 1 - bounded.square()
    bias = terms.bias_tile(rows, columns)
    if bias is not None and bias.dtype != torch.bool:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    keep = None
    if terms.dropout is not None:
        kept = keep_tile(terms.dropout, (batch, heads), rows, columns, query.device)
        keep = kept.to(dtype) / (1 - terms.dropout[0])
    return _Block(q, k, v, logits, slope, keep)


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for an empty row, so that exp(-inf - lse) is 0."""
    return lse.masked_fill(lse == -torch.inf, 0)


@in_its_own_dtypes
def forward(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Attention of every query block over the keys it may see.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K).
        value: (B, G, S, V).
        terms: options of the call.

    Returns:
        output (B, H, T, V) in the query's dtype, and lse (B, H, T) in fp32 (fp64 for fp64).
    """
    batch, heads, num_queries, _ = query.shape
    output = query.new_zeros(batch, num_queries, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, num_queries, dtype=_compute_dtype(query.dtype))
    for rows in _row_blocks(query, key.shape[2]):
        columns = terms.columns(rows, num_queries, key.shape[2])
        block = _load_block(query, key, value, terms, rows, columns)
        total = torch.logsumexp(block.logits, dim=-1)
        if terms.sinks is not None:
            total = torch.logaddexp(total, terms.sinks.to(total.dtype)[:, None])
        probs = torch.exp(block.logits - _finite(total)[..., None])
        probs = probs if block.keep is None else probs * block.keep
        rows_out = _fold(probs, key.shape[1]) @ block.value
        output[:, :, rows] = rows_out.view(*total.shape, value.shape[3]).to(query.dtype)
        lse[:, :, rows] = total
    return output, lse


def _sum_to(gradient: Tensor, into: Tensor) -> None:
    """Adds a (B, H, t, s) gradient into a tile that may be broadcast along any of the first three dims."""
    dims = [dim for dim in range(3) if into.shape[dim] == 1]
    into += gradient.sum(dim=dims, keepdim=True) if dims else gradient


@in_its_own_dtypes
def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    terms: Terms,
    bias_grad: bool = False,
) -> Gradients:
    """Gradients of `forward`, one block of queries at a time.

    Args:
        grad_output: (B, H, T, V).
        grad_lse: (B, H, T) or None.
        inputs: query, key and value of the forward.
        results: output and lse of the forward.
        terms: options of the forward.
        bias_grad: whether the floating bias wants its gradient.
    """
    query, key, value = inputs
    dtype = _compute_dtype(query.dtype)
    delta = row_delta(grad_output, results[0], grad_lse, dtype)
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    grad_bias = torch.zeros_like(terms.bias, dtype=dtype) if terms.bias is not None and bias_grad else None
    for rows in _row_blocks(query, key.shape[2]):
        columns = terms.columns(rows, query.shape[2], key.shape[2])
        block = _load_block(query, key, value, terms, rows, columns)
        probs = torch.exp(block.logits - _finite(results[1][:, :, rows])[..., None])
        grad_rows = _fold(grad_output[:, :, rows].to(dtype), key.shape[1])
        dropped = probs if block.keep is None else probs * block.keep
        grad_value[:, :, columns] += _fold(dropped, key.shape[1]).mT @ grad_rows
        grad_probs = (grad_rows @ block.value.mT).view_as(probs)
        grad_probs = grad_probs if block.keep is None else grad_probs * block.keep
        grad_logits = probs * (grad_probs - delta[:, :, rows, None])
        if grad_bias is not None:
            _sum_to(grad_logits, grad_bias[:, :, rows if grad_bias.shape[2] > 1 else slice(None), columns])
        if block.slope is not None:
            grad_logits = grad_logits * block.slope
        grad_scores = _fold(grad_logits * terms.scale, key.shape[1])
        grad_query[:, :, rows] = (
            (grad_scores @ block.key).view(*probs.shape[:3], query.shape[3]).to(query.dtype)
        )
        grad_key[:, :, columns] += grad_scores.mT @ block.query
    return Gradients(
        grad_query,
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        grad_bias if grad_bias is None or terms.bias is None else grad_bias.to(terms.bias.dtype),
        None if terms.sinks is None else sink_gradient(terms.sinks, results[1], delta),
    )
