"""How wide keys, values and feed-forward layers are, which may differ from layer to layer (Gemma4)."""

from typing import Any

from transformers import PreTrainedConfig

Sizes = tuple[int, int, int, int]
# Names of one thing in the configs of transformers: widths of dense layers, the number of experts that a
# token goes through, and of those that every token goes through the width or the number.
_DENSE = ("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")
_SHARED_NUMBERS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def head_sizes(config: PreTrainedConfig) -> Sizes:
    """(query heads, key heads, width of a key, width of a value) of an attention layer's cache.

    Args:
        config: the text config.

    Returns:
        the largest of each, where the layers differ.
    """
    if _differs(config):
        heads, groups, keys, values = zip(*layer_sizes(config), strict=True)
        return max(heads), max(groups), max(keys), max(values)
    return _sizes(config)


def layer_sizes(config: PreTrainedConfig) -> list[Sizes]:
    """`head_sizes` of every layer.

    Args:
        config: the text config.
    """
    if _differs(config):
        return [_sizes(layer) for layer in config.per_layer_config]
    return [_sizes(config)] * config.num_hidden_layers


def field_of(config: PreTrainedConfig, name: str) -> Any:
    """A field of a config, one value a layer where the layers differ in it, or None.

    Args:
        config: the text config.
        name: of the field.
    """
    if _differs(config) and name in config._heterogeneity_spec.per_layer_attributes:
        return [getattr(layer, name) for layer in config.per_layer_config]
    return getattr(config, name, None)


def feed_forward_width(config: PreTrainedConfig, biases: bool = False) -> int:
    """Width of the dense, gated feed-forward layer that takes as much as the largest layer of a model.

    Such a layer of width F takes 5 F numbers a token in its backward. Of k experts of width F beside a hidden
    state of width D, transformers' grouped products take the more of two moments, and 4 F for an expert that
    every token goes through:

        end of the forward     5 k D + 4 k F      copies of the token on their way in and out
        backward of the gate   k D + 6 k F

    or 7 and 10 k F where experts have biases, which are copied for every token.

    Args:
        config: the text config.
        biases: whether its experts have any.
    """
    dense = max(_most(config, name) for name in _DENSE)
    chosen = max(_most(config, name) for name in _CHOSEN)
    if not chosen:
        dense = dense or 4 * config.hidden_size
    if getattr(config, "use_double_wide_mlp", False) and getattr(config, "num_kv_shared_layers", 0):
        # Layers that read the keys of others are twice as wide (Gemma4).
        dense *= 2
    expert = _most(config, "moe_intermediate_size") or dense
    shared = max(_most(config, name) for name in _SHARED_WIDTHS)
    shared = shared or expert * max(_most(config, name) for name in _SHARED_NUMBERS)
    copies, inner = chosen * config.hidden_size, chosen * expert
    end, gate = (7, 10) if biases else (4, 6)
    routed = max(5 * copies + end * inner, copies + gate * inner)
    return max(dense, (routed + 4 * bool(chosen) * shared) // 5)


def _most(config: PreTrainedConfig, name: str) -> int:
    """A field, or the largest of its values where layers differ in it; 0 where there is none."""
    found = field_of(config, name)
    values = found if isinstance(found, list | tuple) else [found]
    return max([value or 0 for value in values], default=0)


def _differs(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_heterogeneous", False))


def _sizes(config: PreTrainedConfig) -> Sizes:
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "kv_lora_rank", None):
        # Latent attention: keys and values are kept spelled out.
        return heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, groups, width, width
