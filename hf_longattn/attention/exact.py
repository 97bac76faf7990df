"""Exact softmax attention behind transformers' attention interface: what `tree` and `blockwise` attention
share.

Every keyword that a model of transformers passes is honoured, known to say nothing about the result, or
refused by name. The mask is a `LazyMask`, a dense mask that the caller made, or nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_longattn.attention.packing import check_documents, check_lengths, read_lengths
from hf_longattn.attention.padded_rows import attend_rows, empty_slots
from hf_longattn.attention.quantized import attend_pieces, bias_of, piece_of
from hf_longattn.cache.guarded_states import GuardedStates
from hf_longattn.cache.quantized import scales_of
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.masking import LazyMask, document_bounds, packed_bounds

# Rows of a general mask that are spelled out at a time: memory stays linear in the number of keys.
_TILE_ROWS = 512
# Queries that one read of the cache serves in the split-KV kernel.
MAX_DECODE_QUERIES = 16

# Arguments that reach attention functions and say nothing about the result.
_WITHOUT_EFFECT = frozenset(
    "cache_position deterministic ignore_index layer_idx logits_to_keep max_length_k max_length_q "
    "num_items_in_batch output_hidden_states output_router_logits position_embeddings return_dict "
    "shift_labels use_cache".split()
)


@dataclass
class Options:
    """What a call asks of attention beyond query, key and value; see `read_options`."""

    causal: bool
    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None
    documents: Tensor | None = None


def read_options(module: Any, scaling: float | None, dropout: float, keywords: dict[str, Any]) -> Options:
    """Sorts the keywords of transformers' attention interface.

    Args:
        module: the attention module; its `is_causal` counts where no keyword says otherwise.
        scaling: factor on query . key, K**-0.5 if None.
        dropout: probability of dropping an attention weight.
        keywords: the rest; emptied of what is understood.

    Returns:
        the `Options`.

    Raises:
        ValueError: `output_attentions=True`: the weights are never all in memory; or cumulative lengths
            that do not fit each other.
        TypeError: a keyword that would change the result and is not known here, or lengths of another type.
    """
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if keywords.pop("output_attentions", False):
        raise ValueError(
            "`output_attentions=True` needs the whole matrix of attention weights, which this "
            "implementation never builds; load the model with `attn_implementation='eager'` to get it."
        )
    causal = keywords.pop("is_causal", getattr(module, "is_causal", True))
    cu_seqlens = read_lengths(module, keywords)
    options = Options(
        causal=bool(causal),
        scale=scaling,
        dropout=dropout,
        window=keywords.pop("sliding_window", None),
        softcap=keywords.pop("softcap", None),
        sinks=keywords.pop("s_aux", None),
        bias=keywords.pop("position_bias", None),
        position_ids=keywords.pop("position_ids", None),
        documents=keywords.pop("seq_idx", None),
        cu_seqlens=cu_seqlens,
    )
    if unknown := sorted(set(keywords) - _WITHOUT_EFFECT):
        raise TypeError(
            f"unknown attention argument(s) {unknown} from {type(module).__name__}: they may change the "
            "result; load the model with `attn_implementation='sdpa'` or 'eager'."
        )
    return options


def unsupported(mask: LazyMask | Tensor | None, options: Options) -> str | None:
    """The first thing of a call that only attention on one whole cache can do, by its name, or None.

    Args:
        mask: of the call.
        options: of the call.
    """
    refused = {
        "dropout": options.dropout > 0,
        "position_bias": options.bias is not None,
        "cu_seq_lens_q": options.cu_seqlens is not None,
        "seq_idx": options.documents is not None,
        "attention_mask": not isinstance(mask, LazyMask) or mask.pattern is None,
    }
    return next((name for name, present in refused.items() if present), None)


def of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, where it is on, as torch's own attention casts them.

    Rotary embeddings promote queries and keys to fp32 there, while values stay in 16 bits.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # Autocast leaves fp64 as it is.
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask | Tensor | None,
    options: Options,
    *,
    split_kv: bool,
) -> Tensor:
    """softmax(scale * query key^T + bias, over the keys the mask lets through) value, in memory linear in the
    length.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K), H a multiple of G.
        value: (B, G, S, V).
        mask: a `LazyMask`, a dense (B or 1, H or 1, T, S) bool or additive mask, or None for `options.causal`
            alone.
        options: from `read_options`.
        split_kv: serve a few queries without gradient by the split-KV kernel.

    Returns:
        (B, T, H, V), contiguous, in the dtype of `query`.

    Raises:
        ValueError: the mask does not fit query and key, or the keys are a part of those that a cache has.
    """
    if isinstance(key, GuardedStates):
        key.refuse("one that needs all keys")
    scales = scales_of(key)
    query = of_one_dtype(query)[0]
    if scales is None:
        key, value = of_one_dtype(key, value)
    limits, bias = _limits(query, key, mask, options), _dense_bias(query, key, mask, options)
    if limits is None:
        assert isinstance(mask, LazyMask)
        packing = _pack(KeyRange(), query, key, mask, options, causal=False)
        return _attend_by_tiles(query, key, value, mask, packing, options).transpose(1, 2).contiguous()
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    # Documents are told apart by positions only where there are no keys before the queries.
    behind = query.shape[2] < key.shape[2] and options.cu_seqlens is None and scales is None
    if behind and bias is None and not (options.softcap or options.dropout or gradient):
        if (slots := empty_slots(mask)) is not None:
            output = attend_rows(query, key, value, slots, options.scale, options.sinks)
            return output.transpose(1, 2).contiguous()
    few = query.shape[2] <= MAX_DECODE_QUERIES
    if split_kv and few and bias is None and not options.dropout and not gradient:
        output, _ = decode_attention(
            query,
            key,
            value,
            scale=options.scale,
            mask=limits,
            softcap=options.softcap,
            sinks=options.sinks,
            scales=scales,
        )
    else:
        output, _ = attend_many(query, key, value, scales, limits, options, bias)
    return output.transpose(1, 2).contiguous()


def attend_many(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Tensor | None,
    limits: KeyRange | None,
    options: Options,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Blockwise attention of any number of queries, on keys and values as the cache keeps them.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K), in the dtype of `query` or in 8 bits.
        value: (B, G, S, V), as `key`.
        scales: (B, G, S, 2) fp32 of keys and values in 8 bits, else None.
        limits: which keys each query sees; all of them where None.
        options: its scale, softcap, sinks and dropout count.
        bias: (B or 1, H or 1, T or 1, S or 1), added to the scores.

    Returns:
        output (B, H, T, V) in the dtype of `query`, and lse (B, H, T).
    """
    if scales is None:
        return _attend(query, key, value, limits, bias, options)

    def attend(key: Tensor, value: Tensor, columns: slice, is_last: bool) -> tuple[Tensor, Tensor]:
        # A sink is one more logit of the row: it is counted once, with the first piece.
        terms = options if columns.start == 0 else replace(options, sinks=None)
        part = piece_of(limits, columns, is_last)
        return _attend(query, key, value, part, bias_of(bias, columns), terms)

    return attend_pieces(query, key, value, scales, attend)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, limits: KeyRange | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    dropout = None
    if options.dropout:
        # Drawn on the CPU: no synchronisation, and checkpointing replays it with the CPU's random state.
        dropout = (options.dropout, int(torch.randint(2**62, ()).item()))
    return blockwise_attention(
        query,
        key,
        value,
        scale=options.scale,
        mask=limits,
        bias=bias,
        softcap=options.softcap,
        sinks=options.sinks,
        dropout=dropout,
    )


def _limits(query: Tensor, key: Tensor, mask: LazyMask | Tensor | None, options: Options) -> KeyRange | None:
    if isinstance(mask, LazyMask):
        _check_lengths("attention_mask", mask.shape[2:], query, key)
        limits = mask.key_range(query.device)
        if limits is None:
            return None
        causal = mask.pattern is not None and mask.pattern.causal
        return _pack(limits, query, key, mask, options, causal)
    if mask is not None:
        return KeyRange()
    limits = KeyRange(causal=options.causal and query.shape[2] > 1)
    if options.window is not None:
        limits = _narrow_to_window(limits, query, key, options.window, options.causal)
    return _pack(limits, query, key, None, options, options.causal)


def _narrow_to_window(limits: KeyRange, query: Tensor, key: Tensor, window: int, causal: bool) -> KeyRange:
    if not causal:
        raise ValueError(
            f"`sliding_window`={window} came without a mask to a layer that is not causal, so which "
            "side it cuts is unknown; pass an `attention_mask` made by transformers' mask functions."
        )
    last = torch.arange(query.shape[2], device=query.device)[None] + (key.shape[2] - query.shape[2])
    return limits.narrowed(lower=last - window + 1)


def _pack(
    limits: KeyRange, query: Tensor, key: Tensor, mask: LazyMask | None, options: Options, causal: bool
) -> KeyRange:
    """Keeps packed documents apart: by cumulative lengths, document ids, or positions that restart at 0."""
    if options.cu_seqlens is not None:
        sizes = queries, batch, keys = query.shape[2], query.shape[0], key.shape[2]
        alike = causal and queries == keys
        check_lengths(options.cu_seqlens, batch * queries, batch * keys, mask, alike)
        lower, upper, diagonal = packed_bounds(*options.cu_seqlens, *sizes)
        return limits.narrowed(lower=lower, upper=torch.minimum(upper, diagonal) if causal else upper)
    if query.shape[2] != key.shape[2] or query.shape[2] == 1:
        return limits
    if options.documents is not None:
        check_documents(options.documents, query.shape[0], query.shape[2])
        return limits.narrowed(*document_bounds(options.documents))
    if mask is None or options.position_ids is None or not causal:
        return limits
    return mask.apart(limits, options.position_ids)


def _dense_bias(
    query: Tensor, key: Tensor, mask: LazyMask | Tensor | None, options: Options
) -> Tensor | None:
    dense = mask if isinstance(mask, Tensor) else None
    if dense is not None:
        if dense.ndim != 4:
            raise ValueError(
                f"`attention_mask` must be (B, H, T, S) or lazy, got shape {tuple(dense.shape)}."
            )
        _check_lengths("attention_mask", dense.shape[2:], query, key)
    if options.bias is None or dense is None:
        return dense if options.bias is None else options.bias
    if dense.dtype == torch.bool:
        return torch.where(dense, options.bias, -torch.inf)
    return options.bias + dense


def _check_lengths(name: str, lengths: torch.Size, query: Tensor, key: Tensor) -> None:
    rows, columns = lengths
    if rows not in (1, query.shape[2]) or columns not in (1, key.shape[2]):
        raise ValueError(
            f"`{name}` covers {rows} queries and {columns} keys, but the layer has {query.shape[2]} queries "
            f"and {key.shape[2]} keys; was the mask made for another cache or prompt?"
        )


def _attend_by_tiles(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, packing: KeyRange, options: Options
) -> Tensor:
    """Attention under any mask function: rows are spelled out, used, dropped, and recomputed backward."""
    scales = scales_of(key)

    def block(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        rows = slice(start, start + query.shape[2])
        tile = mask.tile(rows).to(query.device)
        if not packing.is_dense:
            sizes = (mask.q_length, mask.kv_length)
            tile = tile & packing.tile(rows, slice(0, mask.kv_length), *sizes, query.device)
        bias = tile if options.bias is None else torch.where(tile, options.bias[:, :, rows], -torch.inf)
        return attend_many(query, key, value, scales, None, options, bias)[0]

    outputs = []
    for start in range(0, query.shape[2], _TILE_ROWS):
        part = query[:, :, start : start + _TILE_ROWS]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            outputs.append(checkpoint(block, part, key, value, start, use_reentrant=False))
        else:
            outputs.append(block(part, key, value, start))
    return torch.cat(outputs, dim=2)
