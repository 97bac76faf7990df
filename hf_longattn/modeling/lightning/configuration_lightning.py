"""Configuration of the lightning-attention model, TransNormerLLM (arXiv 2307.14995, 2401.04658)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class LightningConfig(PreTrainedConfig):
    r"""Describes a `LightningModel`. The defaults are the published model of 1B parameters.

    Args:
        vocab_size: number of token ids.
        hidden_size: width D of the model.
        intermediate_size: width of the gated linear unit.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads H; D must be a multiple of it.
        hidden_act: activation of the queries and keys of lightning layers.
        lightning_layers: indices of the lightning layers; the others are softmax attention with rotary
            embedding. `None`: all layers are lightning.
        lightning_slopes: decay slopes, H numbers, or one such list a layer. `None`: 2^(-8 (h + 1) / H)
            (1 - l / (L - 1) + 1e-5).
        lrpe_layers: indices of the lightning layers with a learned relative position encoding, which doubles
            the width of queries and keys.
        scale_embedding: whether embeddings are multiplied by sqrt(D).
        max_position_embeddings: longest context that the rotary embedding of softmax layers is made for.
        rope_parameters: rotary embedding of softmax layers.
        initializer_range: standard deviation of the initial weights.
        use_cache: whether forward passes return a cache.
        pad_token_id: id that fills up rows.
        bos_token_id: id that begins a text.
        eos_token_id: id, or ids, that end one.
        tie_word_embeddings: whether the head is the embedding table.

    Raises:
        ValueError: names the field that does not fit the others, what was got and what is needed.

    Example:
        ```python
        >>> config = LightningConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> config.head_dim
        32
        ```
    """

    model_type = "lightning_attention"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 64000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    hidden_act: str = "silu"
    lightning_layers: list[int] | None = None
    lightning_slopes: list[float] | list[list[float]] | None = None
    lrpe_layers: list[int] | None = None
    scale_embedding: bool = True
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.lrpe_layers is None:
            # The first layer, where it is lightning.
            self.lrpe_layers = [0] if self.lightning_layers is None or 0 in self.lightning_layers else []
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of a head, before the position encoding."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers are softmax attention."""
        return not all(map(self.is_lightning, range(self.num_hidden_layers)))

    def is_lightning(self, layer_idx: int) -> bool:
        """Whether a layer is lightning attention."""
        return self.lightning_layers is None or layer_idx in self.lightning_layers

    def validate_architecture(self) -> None:
        """Checks what one field says about another; part of the validation of strict configurations."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.is_hybrid and self.head_dim % 2:
            raise ValueError(
                f"`hidden_size` / `num_attention_heads` must be even for the rotary embedding of softmax "
                f"layers, got {self.head_dim}."
            )
        layers = range(self.num_hidden_layers)
        for name in ("lightning_layers", "lrpe_layers"):
            if wrong := [index for index in getattr(self, name) or [] if index not in layers]:
                raise ValueError(
                    f"`{name}` must list layers from 0 to {self.num_hidden_layers - 1}, got {wrong}."
                )
        if softmax := [index for index in self.lrpe_layers or [] if not self.is_lightning(index)]:
            raise ValueError(
                f"`lrpe_layers` must be lightning layers, got {softmax}, which `lightning_layers` leaves out."
            )


__all__ = ["LightningConfig"]
