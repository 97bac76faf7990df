"""Attention over the handful of keys of one block, with rotary embedding and the write of new keys inside."""

from hf_longattn.kernels.few_key_attention.api import few_key_attention

__all__ = ["few_key_attention"]
