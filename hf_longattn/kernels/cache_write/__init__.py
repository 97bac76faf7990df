"""Keys and values of new tokens written into the slots of a cache."""

from hf_longattn.kernels.cache_write.api import cache_write

__all__ = ["cache_write"]
