"""Tiny models with lightning attention, and what they are asked."""

import pytest
import tiny
import torch
import transformers as tf

FAMILIES = ("llama", "qwen2", "qwen3", "gpt-neox", "cohere", "phi3", "olmo2", "gpt2")
families = pytest.mark.parametrize("family", FAMILIES)
NAME = "lightning_attention"
# Two orders of summation in fp32 through three layers with a norm each; measured: at most 9e-7.
BOUND = 1e-5


def logits(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"do_sample": False, "max_new_tokens": 9, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs).tolist()


def uncached(model, ids, count=9):
    """Greedy decoding of one row with no cache at all."""
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids.tolist()


def hybrid(**kwargs):
    model = tiny.build("qwen3", NAME, **kwargs)
    model.config.lightning_layers = [0, 2]
    return model


class Module(torch.nn.Module):
    """What an attention module shows to an attention function."""

    is_causal = True

    def __init__(self, heads=4, **config):
        super().__init__()
        self.config = tf.LlamaConfig(num_attention_heads=heads, num_hidden_layers=3, **config)
        self.config._attn_implementation = NAME
        self.layer_idx = 1
