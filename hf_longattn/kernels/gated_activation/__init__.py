"""The gate of a feed-forward layer in one launch."""

from hf_longattn.kernels.gated_activation.api import gated_activation

__all__ = ["gated_activation"]
