"""Turns checkpoints of TransNormerLLM's official code into lightning models of transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_longattn.modeling.conversion import Progress, fill_model, save_converted

from .configuration_lightning import LightningConfig
from .modeling_lightning import LightningForCausalLM

# What older versions of transformers saved beside the weights.
IGNORED = ("decoder.version", "slopes", "_linear_attn_mask", "lrpe.index")
# Official fields with one value that this model computes.
FIXED = {"norm_type": ("simplermsnorm",), "bias": (False,), "linear_act_fun": ("silu", "swish")}


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> LightningConfig:
    """Converts a checkpoint of the official TransNormerLLM code into one that `from_pretrained` reads.

    Args:
        src: a folder with `config.json` and `*.safetensors`.
        dst: the folder to write, made if needed.
        dtype: type of the written weights; None keeps that of the files.
        progress: called with (done, total, name) for every tensor.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError: if `src` holds no configuration or no weights.
        ValueError: if the weights are pickled, the configuration asks for what this model does not compute,
            or a tensor is missing, left over or misshapen.
    """
    src, dst = Path(src), Path(dst)
    if not (src / "config.json").is_file():
        raise FileNotFoundError(f"`src` must hold a config.json, got {str(src)!r}.")
    state = convert_state_dict(_load_state(src), progress)
    config = config_from_official(json.loads((src / "config.json").read_text()), state)
    model = fill_model(LightningForCausalLM, config, state, dtype)
    save_converted(model, src, dst, config.eos_token_id, config.pad_token_id)
    return config


def config_from_official(
    described: dict[str, Any], state: dict[str, torch.Tensor] | None = None
) -> LightningConfig:
    """The configuration of a model that an official `config.json` describes.

    Args:
        described: the content of `config.json`.
        state: the tensors, which tell the layers with a position encoding where `linear_use_lrpe_list` is
            missing.

    Raises:
        ValueError: names the field with a value that this model does not compute.
    """
    for name, allowed in FIXED.items():
        if (value := described.get(name, allowed[0])) not in allowed:
            raise ValueError(f"`{name}` of the checkpoint must be one of {allowed}, got {value!r}.")
    width, layers = _whole(described, "decoder_embed_dim"), _whole(described, "decoder_layers")
    if described.get("hidden_dim", width) != width:
        raise ValueError(
            f"`hidden_dim` of the checkpoint must be its `decoder_embed_dim` {width}, got "
            f"{described['hidden_dim']}."
        )
    encoded = described.get("linear_use_lrpe_list")
    if encoded:
        if len(encoded) != layers:
            raise ValueError(
                f"`linear_use_lrpe_list` of the checkpoint must have an entry for each of its {layers} "
                f"layers, got {encoded}."
            )
        lrpe_layers = [index for index in range(layers) if encoded[index]]
    else:
        names = (f"model.layers.{index}.token_mixer.lrpe.theta" for index in range(layers))
        lrpe_layers = [index for index, name in enumerate(names) if name in (state or {})]
    glu = described.get("glu_dim", -1)
    return LightningConfig(
        vocab_size=_whole(described, "vocab_size"),
        hidden_size=width,
        intermediate_size=width if glu == -1 else glu,
        num_hidden_layers=layers,
        num_attention_heads=_whole(described, "decoder_attention_heads"),
        lrpe_layers=lrpe_layers,
        scale_embedding=not described.get("no_scale_embedding", False),
        initializer_range=described.get("init_std", 0.02),
        pad_token_id=described.get("pad_token_id", 0),
        bos_token_id=described.get("bos_token_id", 1),
        eos_token_id=described.get("eos_token_id", 2),
        tie_word_embeddings=described.get("tie_word_embeddings", False),
    )


def _whole(described: dict[str, Any], name: str) -> int:
    value = described.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` of the checkpoint's config.json must be a whole number, got {value!r}.")
    return value


def convert_state_dict(
    state: dict[str, torch.Tensor], progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Keeps the weights, whose names are ours too, and leaves out buffers.

    Args:
        state: official names and tensors.
        progress: called with (done, total, name) for every tensor.

    Returns:
        Our names and tensors.
    """
    converted = {}
    for done, (name, tensor) in enumerate(state.items(), start=1):
        # Training code of the authors wraps the model once more.
        new_name = name.removeprefix("module.")
        if not new_name.endswith(IGNORED):
            converted[new_name] = tensor
        if progress is not None:
            progress(done, len(state), name)
    return converted


def _load_state(src: Path) -> dict[str, torch.Tensor]:
    if files := sorted(src.glob("*.safetensors")):
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    if sorted(src.glob("*.bin")):
        raise ValueError(
            f"`src`={str(src)!r} holds pickled weights (*.bin), which are not read here; write them as "
            "safetensors first, in the environment that you trust them in."
        )
    raise FileNotFoundError(f"`src` must hold *.safetensors, got {str(src)!r} with none.")


__all__ = ["config_from_official", "convert_checkpoint", "convert_state_dict"]
