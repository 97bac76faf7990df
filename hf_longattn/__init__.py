"""Long context for Hugging Face Transformers, with one import.

>>> import hf_longattn
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tree_attention")
"""

from hf_longattn.cache import LongContextCache
from hf_longattn.generation import GenerationSetup, prepare_generation
from hf_longattn.instance import restore
from hf_longattn.registration import register
from hf_longattn.training import TrainingSetup, prepare_training

__version__ = "0.1.0"

__all__ = [
    "GenerationSetup",
    "LongContextCache",
    "TrainingSetup",
    "prepare_generation",
    "prepare_training",
    "restore",
]

register()
