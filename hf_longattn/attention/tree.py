"""`attn_implementation="tree_attention"`: exact attention whose pieces are joined by one associative
    reduction.

A few queries on a long cache (decoding) are cut along the keys and merged (arXiv 2408.04093); anything longer
runs block by block. The result is that of softmax attention, whatever the cut.
"""

from typing import Any

from torch import Tensor

from hf_longattn.attention.exact import exact_attention, read_options
from hf_longattn.attention.sharded import sharded_attention
from hf_longattn.attention.shared_prefix import shared_prefix_attention
from hf_longattn.cache.shared_prefix import SharedStates
from hf_longattn.cache.shares import ShardedStates
from hf_longattn.masking import LazyMask


def tree_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in the signature that transformers calls.

    Args:
        module: the attention module that calls.
        query: (B, H, T, K), after rotary embedding.
        key: (B, G, S, K), after the cache's update, heads not repeated.
        value: (B, G, S, V).
        attention_mask: what `lazy_mask` returned, or a dense mask, or None.
        dropout: probability of dropping an attention weight.
        scaling: factor on query . key.
        keywords: see `hf_longattn.attention.exact.read_options`.

    Returns:
        (output, None), output (B, T, H, V).

    Raises:
        TypeError: a keyword that would change the result and is not known.
        ValueError: the mask does not fit, or attention weights are asked for.
    """
    options = read_options(module, scaling, dropout, keywords)
    if isinstance(key, ShardedStates):
        return sharded_attention(query, key, value, attention_mask, options), None
    if isinstance(key, SharedStates) and isinstance(value, SharedStates):
        return shared_prefix_attention(query, key, value, attention_mask, options), None
    return exact_attention(query, key, value, attention_mask, options, split_kv=True), None
