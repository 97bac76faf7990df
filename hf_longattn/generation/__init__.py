"""Long prompts in `generate()`."""

from hf_longattn.generation.setup import GenerationSetup, prepare_generation

__all__ = ["GenerationSetup", "prepare_generation"]
