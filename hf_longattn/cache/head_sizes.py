"""How wide keys, values and feed-forward layers are, which may differ from layer to layer (Gemma4)."""

from typing import Any

from transformers import PreTrainedConfig

Sizes = tuple[int, int, int, int]


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


def feed_forward_width(config: PreTrainedConfig) -> int:
    """Numbers of a token inside the widest feed-forward layer, those of all experts that it goes through.

    Args:
        config: the text config.
    """
    inner = _most(config, "intermediate_size") or 4 * config.hidden_size
    if getattr(config, "use_double_wide_mlp", False) and getattr(config, "num_kv_shared_layers", 0):
        # Layers that read the keys of others are twice as wide (Gemma4).
        inner *= 2
    return inner * (_most(config, "num_experts_per_tok") or 1)


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
