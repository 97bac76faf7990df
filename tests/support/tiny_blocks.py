"""Tiny Block Transformers, and prompts for them."""

import torch
import transformers as tf

from hf_longattn import BlockTransformerConfig, BlockTransformerForCausalLM

PAD = 60
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": PAD, "eos_token_id": None}


def make(**fields):
    """A model that generates, the same random weights for the same fields of its config."""
    torch.manual_seed(0)
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**(SMALL | fields))).eval()
    # `generate` reads its own file of defaults; a test says what it wants.
    model.generation_config = tf.GenerationConfig(bos_token_id=0)
    return model


def prompts(*lengths):
    """Left-padded rows (B, T) and their mask."""
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * row + length)
        ids[row, -length:] = torch.randint(0, 58, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask
