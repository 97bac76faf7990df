"""`attn_implementation="blockwise_attention"`: exact attention, a block at a time, forward and backward.

Memory is linear in the length in both directions (arXiv 2305.19370, section 3); the result is softmax
attention.
"""

from typing import Any

from torch import Tensor

from hf_longattn.attention.exact import exact_attention, read_options
from hf_longattn.attention.shared_prefix import shared_prefix_attention
from hf_longattn.cache.shared_prefix import SharedStates
from hf_longattn.masking import LazyMask


def blockwise_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in the signature that transformers calls; arguments as in
    `tree_attention_forward`."""
    options = read_options(module, scaling, dropout, keywords)
    if isinstance(key, SharedStates) and isinstance(value, SharedStates):
        return shared_prefix_attention(query, key, value, attention_mask, options), None
    return exact_attention(query, key, value, attention_mask, options, split_kv=False), None
