"""Blockwise attention by torch's own kernels, the ATen operators that hand out the log-sum-exp.

On CUDA they cover dense attention: full in one call, with the keys in parts where few queries do not fill
the GPU, causal with T = S in one call, causal with T < S as a full prefix (in a few pieces, long ones of
whole tiles of keys) and a square diagonal, merged by their lse. On the CPU a block of queries and the keys it
may see make one call with a mask tile, so any mask goes. A sink enters afterwards: with
l' = log(exp l + exp sink) the output shrinks by exp(l - l'). The backward of every part runs with the lse and
output of the whole row, which makes its probabilities the global ones, and its gradients add up.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import num_processors
from hf_longattn.kernels.merge_partials import merge_over_first

from .key_parts import cut_keys, pick_parts
from .terms import Gradients, Terms, row_delta, sink_gradient, without_unseen

_ATEN = torch.ops.aten
# Rows of a mask tile on the CPU: enough to feed two cores, 32 MB of mask at 32 K keys in fp32.
_CPU_ROWS = 256
# Keys in a tile of cuDNN. Where the last tile is not full, it checks the bounds of all of them, which takes a
# tenth longer. The keys that do not fill a tile are then a part of their own: one more pass over queries and
# outputs, as long as that tenth of some 3000 keys, and launches that only many queries outweigh.
_KEY_TILE = 128
# Queries of one program of cuDNN.
_QUERY_TILE = 128
_LONG_PREFIX, _MANY_QUERIES = 4096, 1024
# Pairs of queries and keys, all heads together, from which on a shape that is met once is worth a plan of
# cuDNN's. A plan takes some 50 ms, 1.5 ms for each of 32 layers. Flash needs none and is slower: at 350 in
# place of 600 TFLOP/s and 512 operations a pair, by 1.5 ms for 2.5e9 pairs.
_PLANNED_PAIRS = 1 << 31


def missing(query: Tensor, key: Tensor, value: Tensor, terms: Terms, needs_bias_grad: bool) -> str | None:
    """What this implementation cannot do of a call, in words, or None if it can do it all."""
    on_cpu = query.device.type == "cpu"
    checks = (
        (query.device.type not in ("cpu", "cuda"), f"tensors on {query.device.type}"),
        (terms.softcap is not None, "`softcap`"),
        (terms.dropout is not None, "`dropout`"),
        (needs_bias_grad, "a gradient of `bias`"),
        (
            query.shape[3] != value.shape[3] or query.shape[3] == 0,
            "a value dim that differs from the key dim",
        ),
        (query.dtype == torch.float64, "float64"),
        (
            not on_cpu and not (terms.mask.is_dense and terms.bias is None),
            "a mask other than causal order on CUDA",
        ),
        (not on_cpu and query.dtype == torch.float32, "float32 on CUDA"),
        (not on_cpu and (query.shape[3] % 8 != 0 or query.shape[3] > 256), "this head dim on CUDA"),
        (not on_cpu and any(x.stride(3) != 1 for x in (query, key, value)), "a strided last dim on CUDA"),
    )
    return next((words for fails, words in checks if fails), None)


def _is_met_once(query: Tensor, num_keys: int, num_seen: int) -> bool:
    """Whether a part of a call, the queries on `num_seen` of `num_keys` keys, is not worth a plan of cuDNN's.

    So is a question about a long document, and a turn of a conversation: unlike those of chunks and batches,
    its length and that of what lies before it do not come back.
    """
    batch, heads, num_queries, _ = query.shape
    is_turn = batch == 1 and num_queries < _MANY_QUERIES and num_keys >= _LONG_PREFIX
    return is_turn and heads * num_queries * num_seen < _PLANNED_PAIRS


class _Part(NamedTuple):
    """One call of a kernel: these rows against these columns."""

    rows: slice
    columns: slice
    is_causal: bool = False
    visible: Tensor | None = None


def _parts(query: Tensor, key: Tensor, terms: Terms, tile: int = 1) -> Iterator[_Part]:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if terms.bias is not None or not terms.mask.is_dense:
        yield from _masked_parts(query, key, terms)
    elif not terms.mask.causal:
        yield _Part(slice(0, num_queries), slice(0, num_keys))
    else:
        prefix = max(0, num_keys - num_queries)
        if prefix:
            unit = 0 if _is_met_once(query, num_keys, prefix) else num_queries
            for columns in prefix_pieces(prefix, unit, tile):
                yield _Part(slice(0, num_queries), columns)
        yield _Part(
            slice(max(0, num_queries - num_keys), num_queries), slice(prefix, num_keys), is_causal=True
        )


def key_tile(query: Tensor, key: Tensor) -> int:
    """Keys of which a full call should have a whole number: a tile of cuDNN's where that serves it, or 1.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K).
    """
    return _KEY_TILE if query.device.type == "cuda" and _uses_cudnn(query, key) else 1


def prefix_pieces(prefix: int, unit: int, tile: int = 1) -> Iterator[slice]:
    """The keys before the diagonal, cut so that a prompt read in chunks meets few different shapes.

    cuDNN builds a plan for every shape it has not seen, some 50 ms each. Behind k chunks of `unit` queries
    lie k times `unit` keys: the binary digits of k give pieces whose lengths come back at every chunk. What
    lies before the first chunk (an earlier turn, or a chunk of which padding is a part) comes first: the keys
    that fill no tile, which a kernel without plans serves, and the rest, the same at every chunk.

    Args:
        prefix: keys before the diagonal.
        unit: keys that every chunk adds.
        tile: from `key_tile`; a long prefix is cut into multiples of it, but for its first piece.

    Returns:
        the pieces, which cover the prefix.
    """
    tiled = tile > 1 and prefix >= _LONG_PREFIX and unit >= _MANY_QUERIES
    ragged = prefix % tile if tiled else 0
    # Most lengths that are no multiple of a tile are those of a prompt's last chunk, and do not come back.
    if unit and (prefix % unit == 0 or (tiled and unit % tile == 0)):
        length = unit // tile * tile if tiled else unit
        chunks, rest = divmod(prefix - ragged, length)
    else:
        length, chunks, rest = 0, 0, prefix - ragged
    digits = [digit for digit in reversed(range(chunks.bit_length())) if chunks >> digit & 1]
    start = 0
    for size in (ragged, rest, *(length << digit for digit in digits)):
        if size:
            yield slice(start, start + size)
            start += size


def _masked_parts(query: Tensor, key: Tensor, terms: Terms) -> Iterator[_Part]:
    sizes = (query.shape[2], key.shape[2])
    for start in range(0, sizes[0], _CPU_ROWS):
        rows = slice(start, min(start + _CPU_ROWS, sizes[0]))
        columns = terms.columns(rows, *sizes)
        if columns.stop > columns.start:
            yield _Part(rows, columns, visible=terms.visible(rows, columns, sizes, query.device))


def _mask_tile(part: _Part, terms: Terms, dtype: torch.dtype) -> Tensor | None:
    if part.visible is None:
        return None
    bias = terms.bias_tile(part.rows, part.columns)
    tile = torch.zeros((), dtype=dtype) if bias is None or bias.dtype == torch.bool else bias.to(dtype)
    return torch.where(part.visible, tile, -torch.inf)


def _slots(key: Tensor, value: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
    k, v = key[:, :, part.columns], value[:, :, part.columns]
    if part.visible is None or part.visible.all():
        return k, v
    return without_unseen(k, part.visible), without_unseen(v, part.visible)


def _uses_cudnn(query: Tensor, key: Tensor) -> bool:
    """cuDNN is 1.3 to 1.8 times as fast as ATen's flash kernel on Hopper, at lengths that fill its tiles."""
    long = min(query.shape[2], key.shape[2]) >= 128 and query.shape[3] <= 128
    return long and torch.backends.cuda.cudnn_sdp_enabled() and _has_fast_cudnn(query.device)


@functools.cache
def _has_fast_cudnn(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _attend_cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    results = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return results[0], results[1].reshape(q.shape[:3])


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    return output, lse.masked_fill(lse == torch.inf, -torch.inf)


def _attend_cuda(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, num_keys: int
) -> list[tuple[Tensor, Tensor]]:
    """Results over parts of these keys, to be merged. Flash cuts the keys of few queries by itself."""
    if not _uses_cudnn(q, k) or _is_met_once(q, num_keys, k.shape[2]):
        return [_attend_flash(q, k, v, is_causal, scale)]
    parts = 1
    if q.shape[0] == 1 and not is_causal and k.shape[2] >= _LONG_PREFIX:
        tiles = q.shape[1] * -(-q.shape[2] // _QUERY_TILE)
        parts = pick_parts(tiles, k.shape[2], num_processors(q.device))
    return attend_in_parts(q, k, v, scale, parts) if parts > 1 else [_attend_cudnn(q, k, v, is_causal, scale)]


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: int) -> list[tuple[Tensor, Tensor]]:
    """Full attention on CUDA by one call of cuDNN over `parts` of whole tiles, and one over the other keys.

    Args:
        q: (1, H, T, K).
        k: (1, G, S, K).
        v: (1, G, S, K).
        scale: factor on the scores.
        parts: 2 or more.

    Returns:
        output (1, H, T, K) and lse (1, H, T) of each part, the keys left over last.
    """
    # Between lengths that leave the same whole tiles a plan is the same.
    length = k.shape[2] // (parts * _KEY_TILE) * _KEY_TILE
    # The output lies in memory as the queries do: positions before heads, as flash has it.
    rows = q.transpose(1, 2).expand(parts, -1, -1, -1).contiguous().transpose(1, 2)
    cut_k, cut_v = (cut_keys(states, parts, length) for states in (k, v))
    output, lse = _attend_cudnn(rows, cut_k, cut_v, False, scale)
    results = list(zip(output.split(1), lse.split(1), strict=True))
    if (end := parts * length) < k.shape[2]:
        results.append(_attend_flash(q, k[:, :, end:], v[:, :, end:], False, scale))
    return results


def _cpu_heads(query: Tensor, key: Tensor) -> Iterator[tuple[slice, ...]]:
    """Indices of the query heads that face each key head once: H / G calls, none of which repeats keys."""
    group = query.shape[1] // key.shape[1]
    return ((slice(None), slice(first, None, group)) for first in range(group))


def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, part: _Part, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    for heads in _cpu_heads(q, k):
        tile = mask[heads] if mask is not None and mask.shape[1] > 1 else mask
        output[heads], lse[heads] = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q[heads], k, v, 0.0, part.is_causal, attn_mask=tile, scale=scale
        )
    if part.visible is not None:
        lse = lse.masked_fill(~part.visible.any(dim=3), -torch.inf)
    return output, lse


def forward(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Attention as a merge of kernel calls.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K).
        value: (B, G, S, K).
        terms: options of the call, none of those that `missing` names.

    Returns:
        output (B, H, T, K) in the query's dtype and lse (B, H, T) in fp32.
    """
    results: tuple[Tensor, Tensor] | None = None
    whole: list[tuple[Tensor, Tensor]] = []
    for part in _parts(query, key, terms, key_tile(query, key)):
        q, (k, v) = query[:, :, part.rows], _slots(key, value, part)
        if query.device.type == "cpu":
            rows = [_attend_cpu(q, k, v, part, _mask_tile(part, terms, query.dtype), terms.scale)]
        else:
            rows = _attend_cuda(q, k, v, part.is_causal, terms.scale, key.shape[2])
        if part.visible is None and q.shape == query.shape:
            whole += rows
            continue
        results = _empty_results(query) if results is None else results
        results[0][:, :, part.rows], results[1][:, :, part.rows] = merge_over_first(rows)
    output, lse = merge_over_first(whole) if whole else _empty_results(query) if results is None else results
    if terms.sinks is None:
        return output, lse
    total = torch.logaddexp(lse, terms.sinks.float()[:, None])
    return (output * torch.exp(lse - total)[..., None]).to(output.dtype), total


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)


def _laid_out_like(query: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the layout that cuDNN's forward gives its output, which follows from the query's."""
    strides = torch.empty_like(query, device="meta").stride()
    fits = all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )
    return tensor if fits else tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _gradients_cuda(grad: Tensor, inputs: tuple, results: tuple, is_causal: bool, scale: float) -> tuple:
    query, key, value = inputs
    # Both kernels read lse as a packed (B, H, T), whatever its strides say.
    output, lse = results[0], results[1].contiguous()
    sizes = (query.shape[2], key.shape[2])
    nothing = torch.zeros((), dtype=torch.int64, device=query.device)
    if _uses_cudnn(query, key):
        # torch finds cuDNN's plans by the layouts of query, key and value alone. Those of output and gradient
        # are built in too: a plan made for other strides reads past the end of a tensor.
        grad, output = _laid_out_like(query, grad), _laid_out_like(query, output)
        return _ATEN._scaled_dot_product_cudnn_attention_backward(
            grad,
            *inputs,
            output,
            lse[..., None],
            nothing,
            nothing,
            None,
            None,
            None,
            *sizes,
            0.0,
            is_causal,
            scale=scale,
        )
    return _ATEN._scaled_dot_product_flash_attention_backward(
        grad, *inputs, output, lse, None, None, *sizes, 0.0, is_causal, nothing, nothing, scale=scale
    )


def _gradients_cpu(
    grad: Tensor, inputs: tuple, results: tuple, part: _Part, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (
        torch.zeros_like(key, dtype=torch.float32),
        torch.zeros_like(value, dtype=torch.float32),
    )
    # exp(-inf - lse) of an empty row must be 0, and -inf would make it NaN.
    lse = results[1].masked_fill(results[1] == -torch.inf, 0)
    for heads in _cpu_heads(query, key):
        tile = mask[heads] if mask is not None and mask.shape[1] > 1 else mask
        grad_query[heads], key_part, value_part = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[heads],
            query[heads],
            key,
            value,
            results[0][heads],
            lse[heads],
            0.0,
            part.is_causal,
            attn_mask=tile,
            scale=scale,
        )
        grad_key += key_part
        grad_value += value_part
    return grad_query, grad_key, grad_value


def _part_gradients(
    grad_output: Tensor, inputs: tuple, results: tuple, part: _Part, terms: Terms
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs
    k, v = _slots(key, value, part)
    q, grad, output, lse = (x[:, :, part.rows] for x in (query, grad_output, *results))
    if query.device.type == "cpu":
        mask = _mask_tile(part, terms, query.dtype)
        return _gradients_cpu(grad, (q, k, v), (output, lse), part, mask, terms.scale)
    return _gradients_cuda(grad, (q, k, v), (output, lse), part.is_causal, terms.scale)


def backward(
    grad_output: Tensor,
    grad_lse: None,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    terms: Terms,
    bias_grad: bool = False,
) -> Gradients:
    """Gradients of `forward`, a sum over the same parts.

    Args:
        grad_output: (B, H, T, K).
        grad_lse: always None, for these kernels take no gradient of lse.
        inputs: query, key and value of the forward.
        results: output and lse of the forward.
        terms: options of the forward.
        bias_grad: always False.
    """
    assert grad_lse is None and not bias_grad
    query = inputs[0]
    grad_sinks = None
    if terms.sinks is not None:
        delta = row_delta(grad_output, results[0], None, torch.float32)
        grad_sinks = sink_gradient(terms.sinks, results[1], delta)
    sums: list[Tensor] | None = None
    for part in _parts(*inputs[:2], terms):
        gradients = _part_gradients(grad_output, inputs, results, part, terms)
        whole = part.visible is None and all(
            new.shape == x.shape for new, x in zip(gradients, inputs, strict=True)
        )
        if sums is None and whole:
            sums = list(gradients)
            continue
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in inputs] if sums is None else sums
        for total, new, index in zip(sums, gradients, (part.rows, part.columns, part.columns), strict=True):
            total[:, :, index] += new
    sums = [torch.zeros_like(x) for x in inputs] if sums is None else sums
    grad_query, grad_key, grad_value = (total.to(query.dtype) for total in sums)
    return Gradients(grad_query, grad_key, grad_value, None, grad_sinks)
