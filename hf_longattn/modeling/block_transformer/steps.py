"""Fewer launches in a captured step of a Block Transformer: attention inside a block in one kernel.

While a step is being captured, the attention modules of a token decoder of GPT-NeoX take query, key and
value where the fused projection left them, and one launch turns them, keeps the new keys and attends. What a
step asks beyond that runs as the module's own forward.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.instance import Setup
from hf_longattn.kernels.few_key_attention import few_key_attention


@contextlib.contextmanager
def few_launches(model: Any) -> Iterator[None]:
    """Inside, attention within a block is one launch a layer.

    Args:
        model: a `BlockTransformerForCausalLM` in evaluation mode.
    """
    changes = Setup(model)
    for module in model.model.token_decoder.modules():
        if type(module) is GPTNeoXAttention and "forward" not in vars(module):
            changes.set(module, "forward", functools.partial(_attend, module, module.forward))
    try:
        yield
    finally:
        changes.undo()


def _attend(
    module: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Any = None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of GPT-NeoX's attention on the keys of one block."""
    layer = None if layer_past is None else layer_past.layers[module.layer_idx]
    if not isinstance(layer, PreallocatedLayer) or not _is_plain(module, layer, attention_mask):
        keywords |= {"layer_past": layer_past, "position_embeddings": position_embeddings}
        return original(hidden_states, attention_mask=attention_mask, **keywords)
    batch, length, _ = hidden_states.shape
    states = module.query_key_value(hidden_states).view(batch, length, -1, 3 * module.head_size)
    output = few_key_attention(
        *states.transpose(1, 2).chunk(3, dim=-1),
        layer._keys,
        layer._values,
        layer.end,
        rotary=position_embeddings,
        scale=module.scaling,
        # The last query is that of the newest token: what it does not see are pads.
        key_mask=None if attention_mask is None else attention_mask[:, 0, -1],
    )
    layer.advanced(length)
    return module.dense(output.flatten(2)), None


def _is_plain(module: Any, layer: PreallocatedLayer, attention_mask: Any) -> bool:
    """Whether the kernel computes what the module would: softmax over the visible keys, without dropout."""
    if module.training or layer._keys is None or torch.is_autocast_enabled():
        return False
    return attention_mask is None or (
        isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool and attention_mask.ndim == 4
    )
