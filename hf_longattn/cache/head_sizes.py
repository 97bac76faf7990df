"""How wide the keys and values of a model's layers are, which may differ from layer to layer (Gemma4)."""

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
