"""Exact softmax attention in blocks: memory linear in the length, cost linear in the visible pairs."""

from .api import blockwise_attention

__all__ = ["blockwise_attention"]
