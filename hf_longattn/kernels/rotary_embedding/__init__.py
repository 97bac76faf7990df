"""Rotary position embedding of queries and keys in one launch."""

from hf_longattn.kernels.rotary_embedding.api import rotary_embedding

__all__ = ["rotary_embedding"]
