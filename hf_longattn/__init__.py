"""Long context for Hugging Face Transformers, with one import.

>>> import hf_longattn
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tree_attention")
"""

from hf_longattn import requirements as requirements  # first: what follows needs what it looks for
from hf_longattn.cache import LongContextCache
from hf_longattn.generation import GenerationSetup, prepare_generation
from hf_longattn.instance import restore
from hf_longattn.kernels.attention_energy import attention_energy
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.lightning_attention import lightning_attention, lightning_attention_step
from hf_longattn.kernels.merge_partials import merge_partials
from hf_longattn.modeling.block_transformer import (
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
    BlockTransformerModel,
)
from hf_longattn.modeling.lightning import LightningConfig, LightningForCausalLM, LightningModel
from hf_longattn.registration import register
from hf_longattn.training import TrainingSetup, prepare_training

__version__ = "0.1.0"

__all__ = [
    "BlockTransformerConfig",
    "BlockTransformerForCausalLM",
    "BlockTransformerModel",
    "GenerationSetup",
    "LightningConfig",
    "LightningForCausalLM",
    "LightningModel",
    "LongContextCache",
    "TrainingSetup",
    "attention_energy",
    "blockwise_attention",
    "decode_attention",
    "lightning_attention",
    "lightning_attention_step",
    "merge_partials",
    "prepare_generation",
    "prepare_training",
    "restore",
]

register()
