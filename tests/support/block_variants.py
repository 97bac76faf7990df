"""Tiny Block Transformers of every kind, and rows of tokens for them."""

import pytest
import torch
from tiny_blocks import SMALL

from hf_longattn.modeling.block_transformer import BlockTransformerConfig, BlockTransformerForCausalLM

VARIANTS = {
    "prefix": {},
    "L8-P3": {"block_length": 8, "expansion_ratio": 3},
    "L1": {"block_length": 1, "expansion_ratio": 1},
    "L3-odd": {"block_length": 3, "projection_method": "projection_layer", "embedder_hidden_size": 10},
    "projection": {
        "projection_method": "projection_layer",
        "token_hidden_size": 16,
        "token_num_hidden_layers": 1,
    },
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "repeat": {"expansion_method": None},
    "two-vectors": {"n_embedding_tokens": 2, "expansion_ratio": 1},
    "roberta": {
        "embedder_type": "roberta",
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
    },
    "roberta-cls": {
        "embedder_type": "roberta_cls",
        "n_cls_tokens": 3,
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
        "embedder_hidden_size": 16,
    },
    "cross-attention": {
        "decoding_strategy": "cross_attention",
        "expansion_ratio": None,
        "tie_word_embeddings": True,
    },
    "llama-gqa": {"decoder_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"decoder_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"decoder_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2},
}
# fp32 sums in another order: a few units in the last place of logits of size 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant="prefix", seed=0, **fields):
    torch.manual_seed(seed)
    config = BlockTransformerConfig(**(SMALL | VARIANTS[variant] | fields))
    return BlockTransformerForCausalLM(config).eval()


def tokens(batch, length, seed=1):
    return torch.randint(0, 59, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows, width, side, pad=60):
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, where], mask[place, where] = row, 1
    return ids, mask
