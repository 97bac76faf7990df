"""`paged|tree_attention`: the same attention under transformers' continuous batching (`generate_batch`).

All running requests lie end to end in one row of queries and one row of keys; cumulative lengths tell them
apart. A step that only decodes reads each request's keys once, through the split-KV kernel.
"""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.attention.exact import read_options
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.masking import packed_bounds

# What continuous batching passes beside the attention arguments proper.
_PAGING = (
    "cache",
    "read_index",
    "write_index",
    "block_table",
    "max_seqlen_q",
    "max_seqlen_k",
    "logits_indices",
    "logits_processor_args",
)


def paged_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of packed requests on the paged cache, in the signature that continuous batching calls.

    Args:
        module: the attention module that calls; `layer_idx` and `sliding_window` are read.
        query: (1, H, T, K), all requests end to end.
        key: (1, G, T, K), the new keys.
        value: (1, G, T, V), the new values.
        attention_mask: unused, the cumulative lengths say all.
        dropout: must be 0.
        scaling: factor on query . key.
        keywords: `cache`, `read_index`, `write_index`, `cu_seq_lens_q`, `cu_seq_lens_k` from continuous
            batching.

    Returns:
        (output, None), output (1, T, H, V).

    Raises:
        ValueError: called outside continuous batching.
        TypeError: a keyword that would change the result and is not known.
    """
    paging = {name: keywords.pop(name, None) for name in _PAGING}
    if paging["cache"] is None or keywords.get("cu_seq_lens_q") is None:
        raise ValueError(
            "`attn_implementation='paged|tree_attention'` serves `generate_batch` and needs its paged "
            "cache; use 'tree_attention' for an ordinary forward or `generate`."
        )
    window = keywords.pop("sliding_window", None) or getattr(module, "sliding_window", None)
    lengths_k = keywords.pop("cu_seq_lens_k")
    if isinstance(lengths_k, dict):
        keywords["cu_seq_lens_k"] = lengths_k["sliding_attention" if window else "full_attention"]
    else:
        keywords["cu_seq_lens_k"] = lengths_k
    options = read_options(module, scaling, dropout, keywords)
    key, value = paging["cache"].update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=paging["read_index"],
        write_index=paging["write_index"],
    )
    key, value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    assert options.cu_seqlens is not None
    lower, upper, diagonal = packed_bounds(*options.cu_seqlens, query.shape[2])
    limits = KeyRange().narrowed(lower=lower, upper=torch.minimum(upper, diagonal))
    if window:
        limits = limits.narrowed(lower=diagonal - window)
    shared = {"scale": options.scale, "softcap": options.softcap, "sinks": options.sinks}
    if paging["max_seqlen_q"] == 1:
        output = _decode(query, key, value, limits, shared)
    else:
        output = blockwise_attention(query, key, value, mask=limits, **shared)[0].transpose(1, 2)
    return output.contiguous(), None


def _decode(query: Tensor, key: Tensor, value: Tensor, limits: KeyRange, shared: dict[str, Any]) -> Tensor:
    """One query a request: each becomes a row of a batch over the same keys, which are not copied."""
    rows = query.shape[2]
    by_request = KeyRange(lower=_column(limits.lower), upper=_column(limits.upper))
    output, _ = decode_attention(
        query.permute(2, 1, 0, 3),
        key.expand(rows, -1, -1, -1),
        value.expand(rows, -1, -1, -1),
        mask=by_request,
        **shared,
    )
    return output.permute(2, 0, 1, 3)


def _column(bounds: Tensor | None) -> Tensor | None:
    return None if bounds is None else bounds.transpose(0, 1)
