"""Fewer launches for a prompt and for a captured step of a Block Transformer whose decoders are GPT-NeoX.

While a prompt is read or a step being captured, the attention modules of the token decoder take query, key
and value where the fused projection left them, and one launch turns them, keeps the new keys and attends. It
knows causal order, so that no mask is spelled out. In the block decoder, one launch turns those of a step's
block, or of the blocks of a prompt, and keeps their keys and values, another attends. In layers with parallel
branches, one launch adds both branches to the residual stream and takes the two norms of the next layer,
unless a `FewRowLayer` runs them. The rotary embedding of positions is looked up: there are as many as keys
have room. What a call asks beyond that runs as the module's own forward.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXLayer,
    GPTNeoXModel,
    eager_attention_forward,
)

from hf_longattn.branches import FewRowLayer
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.instance import Setup
from hf_longattn.kernels.few_key_attention import few_key_attention
from hf_longattn.kernels.residual_norms import residual_norms
from hf_longattn.kernels.rotary_cache_write import rotary_cache_write

from .held import FirstBlocks, HeldBlocks

# What a graph reads as long as it reads the keys of a layer, or of blocks, so that it lives as long.
_ROTATIONS: weakref.WeakKeyDictionary[PreallocatedLayer | HeldBlocks, tuple[Tensor, Tensor]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def few_launches(model: Any) -> Iterator[None]:
    """Inside, attention within a block is one launch a layer, and what lies between two layers another.

    In front of attention to earlier blocks, rotation and cache are one launch.

    Args:
        model: a `BlockTransformerForCausalLM` in evaluation mode.
    """
    changes = Setup(model)
    for decoder, attend in (
        (model.model.token_decoder, _attend),
        (model.model.block_decoder, _attend_to_blocks),
    ):
        for module in decoder.modules():
            if type(module) is GPTNeoXAttention and "forward" not in vars(module):
                changes.set(module, "forward", functools.partial(attend, module, module.forward))
    for decoder in (model.model.block_decoder, model.model.token_decoder.decoder):
        if type(decoder) is not GPTNeoXModel:
            continue
        if decoder.rotary_emb.rope_type == "default":
            _look_rotations_up(changes, decoder)
        if _attends_within_blocks(decoder):
            _leave_mask_out(changes, decoder)
        if _has_parallel_branches(decoder):
            _join_layers(changes, decoder)
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
    layer: Any = None if layer_past is None else layer_past.layers[module.layer_idx]
    if not _is_plain(module, layer, attention_mask):
        keywords |= {"layer_past": layer_past, "position_embeddings": position_embeddings}
        return original(hidden_states, attention_mask=attention_mask, **keywords)
    query, key, value = _projected(module, hidden_states)
    if layer._keys is None:
        layer.lazy_initialization(key, value)
    keys, values = cast(tuple[Tensor, Tensor], (layer._keys, layer._values))
    output = few_key_attention(
        query,
        key,
        value,
        keys,
        values,
        layer.end,
        rotary=position_embeddings,
        scale=module.scaling,
        key_mask=_key_mask(attention_mask),
    )
    layer.advanced(hidden_states.shape[1])
    return module.dense(output.flatten(2)), None


def _key_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The keys (B, S) that are no pads, of a mask (B, 1, T, S); None: all."""
    if attention_mask is None or attention_mask.numel() == 0:
        return None
    # The last query is that of the newest token: what it does not see are pads.
    return attention_mask[:, 0, -1]


def _attend_to_blocks(
    module: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Any = None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of GPT-NeoX's attention on one new block of every row, or on the blocks of prompts."""
    in_place = isinstance(layer_past, HeldBlocks) or (
        isinstance(layer_past, FirstBlocks) and layer_past.in_place
    )
    if not in_place or module.training or torch.is_autocast_enabled():
        keywords |= {"layer_past": layer_past, "position_embeddings": position_embeddings}
        return original(hidden_states, attention_mask=attention_mask, **keywords)
    query, key, value = _projected(module, hidden_states)
    (cos, sin), (keys, values) = position_embeddings, layer_past.views(module.layer_idx)
    query = rotary_cache_write(query, key, value, cos, sin, keys, values, layer_past.places)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    output, weights = attend(
        module, query, keys, values, attention_mask, dropout=0.0, scaling=module.scaling, **keywords
    )
    return module.dense(output.flatten(2)), weights


def _projected(module: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value (B, H, T, K), where the fused projection left them."""
    states = module.query_key_value(hidden_states)
    return states.unflatten(-1, (-1, 3 * module.head_size)).transpose(1, 2).chunk(3, dim=-1)


def _attends_within_blocks(decoder: Any) -> bool:
    """Whether every attention module is one of those that `_attend` stands in for."""
    forwards = [vars(layer.attention).get("forward") for layer in decoder.layers]
    # The masks of others than SDPA are not bool, and those modules attend themselves.
    plain = decoder.config._attn_implementation == "sdpa"
    return plain and all(getattr(forward, "func", None) is _attend for forward in forwards)


def _leave_mask_out(changes: Setup, decoder: Any) -> None:
    """Has steps inside a block spell no mask out: the kernel knows causal order, and only reads of pads."""
    run, attentions = decoder.forward, [layer.attention for layer in decoder.layers]
    none = decoder.final_layer_norm.weight.new_empty((1, 1, 0, 0), dtype=torch.bool)

    def forward(**keywords: Any) -> Any:
        cache: Any = keywords.get("past_key_values")
        pads: Any = keywords.get("attention_mask")
        layers = [] if cache is None else [cache.layers[module.layer_idx] for module in attentions]
        if layers and all(map(_is_plain, attentions, layers)):
            # transformers hands a mask of four dimensions on as it is; one without rows leaves no key out.
            keywords["attention_mask"] = none if pads is None else pads[:, None, None]
        return run(**keywords)

    changes.set(decoder, "forward", forward)


def _look_rotations_up(changes: Setup, decoder: Any) -> None:
    """Has a decoder take cosines and sines from a table: inside a block, of blocks and of prompts."""
    rotate, run, found = decoder.rotary_emb.forward, decoder.forward, []

    def look_up(states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return found.pop() if found else rotate(states, position_ids)

    def forward(**keywords: Any) -> Any:
        cache: Any = keywords.get("past_key_values")
        inputs: Any = keywords.get("inputs_embeds")
        layer = None if cache is None else cache.layers[0]
        given = keywords.get("position_ids")
        found.clear()
        if isinstance(cache, HeldBlocks) and given is cache.places:
            _, table = _rotations(cache, cache.room, inputs, rotate)
            found.append(table[0, given].unbind(-2))
        elif isinstance(cache, FirstBlocks) and given is cache.places:
            _, table = _rotations(cache.held, cache.held.room, inputs, rotate)
            found.append(table[:, cache.start : cache.end].unbind(-2))
        elif isinstance(layer, PreallocatedLayer) and given is None:
            places = slice(layer.end, layer.end + inputs.shape[1])
            positions, table = _rotations(layer, layer.capacity, inputs, rotate)
            found.append(table[:, places].unbind(-2))
            keywords["position_ids"] = positions[:, places]
        return run(**keywords)

    changes.set(decoder.rotary_emb, "forward", look_up)
    changes.set(decoder, "forward", forward)


def _rotations(
    owner: PreallocatedLayer | HeldBlocks, slots: int, states: Tensor, rotate: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """Positions (1, S) and their cosines and sines (1, S, 2, R), of all slots of a layer or of blocks."""
    made = _ROTATIONS.get(owner)
    if made is None or (made[1].dtype, made[1].device) != (states.dtype, states.device):
        positions = torch.arange(slots, device=states.device)[None]
        made = _ROTATIONS[owner] = positions, torch.stack(rotate(states, positions), dim=-2)
    return made


def _is_plain(module: Any, layer: Any, attention_mask: Any = None) -> bool:
    """Whether the kernel computes what the module would: softmax over the visible keys, without dropout."""
    if not isinstance(layer, PreallocatedLayer) or module.training or torch.is_autocast_enabled():
        return False
    return attention_mask is None or (
        isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool and attention_mask.ndim == 4
    )


def _has_parallel_branches(decoder: Any) -> bool:
    """Whether its layers are plain ones that add attention and feed-forward to the same states."""
    norms = [decoder.final_layer_norm]
    for layer in decoder.layers:
        stands_in = vars(layer).get("forward")
        if type(layer) is not GPTNeoXLayer or not layer.use_parallel_residual:
            return False
        if stands_in is not None and type(stands_in) is not FewRowLayer:
            return False
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    plain = all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
    return plain and not decoder.training and not torch.is_autocast_enabled()


def _join_layers(changes: Setup, decoder: Any) -> None:
    """Has each layer take the norms of the next one together with its own sum."""
    made: dict[str, tuple[Tensor, ...]] = {}
    layers = list(decoder.layers)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        norms = [decoder.final_layer_norm]
        if following is not None:
            norms = [following.input_layernorm, following.post_attention_layernorm]
        run, few_rows = functools.partial(_run_layer, layer, norms, made), vars(layer).get("forward")
        if few_rows is None:
            changes.set(layer, "forward", run)
        else:
            changes.set(few_rows, "many_rows", run)
    final = decoder.final_layer_norm
    changes.set(final, "forward", functools.partial(_normed, made, 1, final.forward))


def _run_layer(
    layer: Any, norms: list[Any], made: dict[str, tuple[Tensor, ...]], hidden_states: Tensor, **keywords: Any
) -> Tensor:
    """A layer of GPT-NeoX with parallel branches; leaves the norms that come next in `made`."""
    states = _normed(made, 1, layer.input_layernorm, hidden_states)
    attended, _ = layer.attention(states, **keywords)
    branch = layer.mlp(_normed(made, 2, layer.post_attention_layernorm, hidden_states))
    pairs = [(norm.weight, norm.bias) for norm in norms]
    made["last"] = residual_norms(hidden_states, (branch, attended), *pairs, eps=norms[0].eps)  # pyright: ignore[reportArgumentType]
    return made["last"][0]


def _normed(
    made: dict[str, tuple[Tensor, ...]], which: int, norm: Callable[[Tensor], Tensor], states: Tensor
) -> Tensor:
    """The norm of `states`, taken before where they are the last sum."""
    last = made.get("last")
    return last[which] if last is not None and last[0] is states else norm(states)
