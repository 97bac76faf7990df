"""The join of partial attention results: `merge_partials`."""

from hf_longattn.kernels.merge_partials.api import merge_over_first, merge_partials

__all__ = ["merge_over_first", "merge_partials"]
