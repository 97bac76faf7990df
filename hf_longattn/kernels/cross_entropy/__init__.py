"""The cross-entropy of logits and its gradient, taken together."""

from hf_longattn.kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
