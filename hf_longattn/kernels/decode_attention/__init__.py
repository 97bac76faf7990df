"""Attention of a few queries over a long cache: `decode_attention`."""

from hf_longattn.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
