"""Caches: preallocated, growing, saved and forked."""

from hf_longattn.cache.long_context import LongContextCache

__all__ = ["LongContextCache"]
