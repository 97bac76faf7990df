"""Makes the names known to transformers: no patch, no device, no environment."""

from transformers import AttentionInterface, AttentionMaskInterface

from hf_longattn.attention.blockwise import blockwise_attention_forward
from hf_longattn.attention.lightning import lightning_attention_forward
from hf_longattn.attention.paged import paged_attention_forward
from hf_longattn.attention.tree import tree_attention_forward
from hf_longattn.masking import lazy_mask
from hf_longattn.modeling import block_transformer, lightning

ATTENTION_FUNCTIONS = {
    "tree_attention": tree_attention_forward,
    "blockwise_attention": blockwise_attention_forward,
}


def register() -> None:
    """Registers every implementation with its mask function: without one the mask would be dropped."""
    # Not in the table above, which lists what is softmax attention.
    functions = {**ATTENTION_FUNCTIONS, "lightning_attention": lightning_attention_forward}
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lazy_mask)
    AttentionInterface.register("paged|tree_attention", paged_attention_forward)
    block_transformer.register()
    lightning.register()
