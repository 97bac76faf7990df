"""Training at any length: blockwise-parallel layers, chunked loss, offload."""

from hf_longattn.training.setup import TrainingSetup, prepare_training

__all__ = ["TrainingSetup", "prepare_training"]
