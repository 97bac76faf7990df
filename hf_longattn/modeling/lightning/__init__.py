"""Lightning attention as a model, TransNormerLLM: configuration, model and the converter of checkpoints."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .configuration_lightning import LightningConfig
from .modeling_lightning import LightningForCausalLM, LightningModel


def register() -> None:
    """Makes the Auto classes, and what transformers looks up by class name, know the model."""
    name = LightningConfig.model_type
    AutoConfig.register(name, LightningConfig, exist_ok=True)
    AutoModel.register(LightningConfig, LightningModel, exist_ok=True)
    AutoModelForCausalLM.register(LightningConfig, LightningForCausalLM, exist_ok=True)
    # Trainer's label smoothing reads these names to know that labels are shifted.
    MODEL_MAPPING_NAMES[name] = LightningModel.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = LightningForCausalLM.__name__


__all__ = ["LightningConfig", "LightningForCausalLM", "LightningModel", "register"]
