"""The residual sum of a layer with parallel branches, and the two norms of the next layer, in one launch."""

from hf_longattn.kernels.residual_norms.api import residual_norms

__all__ = ["residual_norms"]
