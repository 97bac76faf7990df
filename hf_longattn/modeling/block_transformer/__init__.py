"""The Block Transformer: configuration, model, cache and the converters of checkpoints."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .cache_block_transformer import BlockTransformerCache
from .configuration_block_transformer import BlockTransformerConfig
from .modeling_block_transformer import BlockTransformerForCausalLM, BlockTransformerModel


def register() -> None:
    """Makes the Auto classes, and what transformers looks up by class name, know the Block Transformer."""
    name = BlockTransformerConfig.model_type
    AutoConfig.register(name, BlockTransformerConfig, exist_ok=True)
    AutoModel.register(BlockTransformerConfig, BlockTransformerModel, exist_ok=True)
    AutoModelForCausalLM.register(BlockTransformerConfig, BlockTransformerForCausalLM, exist_ok=True)
    # Trainer's label smoothing reads these names to know that labels are shifted.
    MODEL_MAPPING_NAMES[name] = BlockTransformerModel.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = BlockTransformerForCausalLM.__name__


__all__ = [
    "BlockTransformerCache",
    "BlockTransformerConfig",
    "BlockTransformerForCausalLM",
    "BlockTransformerModel",
    "register",
]
