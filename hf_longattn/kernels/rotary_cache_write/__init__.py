"""Rotary embedding and the write of keys and values into a cache, in one launch."""

from hf_longattn.kernels.rotary_cache_write.api import rotary_cache_write

__all__ = ["rotary_cache_write"]
