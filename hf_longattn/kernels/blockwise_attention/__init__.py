"""Exact softmax attention in blocks: memory linear in the length, cost linear in the visible pairs."""

from .api import blockwise_attention
from .gradients import blockwise_attention_gradients

__all__ = ["blockwise_attention", "blockwise_attention_gradients"]
