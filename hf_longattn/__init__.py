"""Long context for Hugging Face Transformers, with one import."""

__version__ = "0.1.0"
