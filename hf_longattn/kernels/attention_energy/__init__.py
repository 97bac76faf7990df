"""The energy whose gradient is attention."""

from .api import attention_energy

__all__ = ["attention_energy"]
