"""What the converters of all models share: filling a model from foreign tensors, and writing it out."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("hf_longattn")

# Called with (done, total, name) for every tensor.
Progress = Callable[[int, int, str], None]
Model = TypeVar("Model", bound=PreTrainedModel)

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json")


def fill_model(
    model_class: type[Model],
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> Model:
    """A model that holds exactly these tensors.

    Args:
        model_class: class of the model.
        config: its configuration.
        tensors: by the model's own names; a tied one may be left out.
        dtype: type of the weights; None keeps that of the tensors.

    Raises:
        ValueError: a tensor is missing, left over or misshapen.
    """
    with torch.device("meta"):
        model = model_class(config)
    tensors = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    tied: Any = (model._tied_weights_keys or {}) if getattr(config, "tie_word_embeddings", False) else {}
    # Safetensors keep one name of a tensor that has two.
    tensors |= {name: tensors[of] for name, of in tied.items() if of in tensors and name not in tensors}
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in needed.keys() | got.keys() if needed.get(name) != got.get(name))
    if wrong:
        lines = (f"{name}: needs {needed.get(name)}, got {got.get(name)}" for name in wrong[:8])
        raise ValueError(
            f"`src` does not fit its configuration in {len(wrong)} tensors, such as {'; '.join(lines)}."
        )
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.config.dtype = next(iter(tensors.values())).dtype
    return model


def save_converted(
    model: PreTrainedModel, src: Path, dst: Path, eos_token_id: Any, pad_token_id: int | None
) -> None:
    """Writes the model, its generation config and the tokenizer files that lie beside the source.

    Args:
        model: the filled model.
        src: folder or file that it came from.
        dst: folder to write, made if needed.
        eos_token_id: where generation stops.
        pad_token_id: what fills finished rows.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id
    )
    dst.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(dst)
    for pattern in _TOKENIZER_FILES if src.is_dir() else ():
        for file in src.glob(pattern):
            shutil.copy(file, dst)
    logger.info("wrote a %s to %s", type(model).__name__, dst)
