"""Lightning attention: causal or bidirectional linear attention with one decay a head."""

from hf_longattn.kernels.lightning_attention.api import lightning_attention, lightning_attention_step
from hf_longattn.kernels.lightning_attention.reference import combine_states

__all__ = ["combine_states", "lightning_attention", "lightning_attention_step"]
