"""Turns checkpoints of the official code, and vanilla language models, into Block Transformers of
transformers.
"""

# Fields of the configuration that default to None are filled in by it, which a type checker cannot see.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hf_longattn.modeling.conversion import Progress, fill_model, save_converted

from .configuration_block_transformer import BlockTransformerConfig
from .modeling_block_transformer import BlockTransformerForCausalLM

# Layers and width of the released decoders -> attention heads, which the shapes of a checkpoint do not tell.
RELEASED_HEADS = {(3, 256): 8, (3, 512): 8, (6, 768): 12, (12, 1024): 16, (8, 2048): 16, (12, 2048): 16}
ROBERTA_HEADS = {256: 8}
# Buffers that older versions of transformers saved, and the block decoder's table, which nothing reads.
IGNORED = (
    ".attention.bias",
    ".masked_bias",
    "inv_freq",
    "position_ids",
    "block_decoder.gpt_neox.embed_in.weight",
)
VANILLA_TYPES = ("gpt_neox", "llama", "qwen2", "qwen3")


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    block_alignment: str = "tokens",
    block_length: int = 4,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> BlockTransformerConfig:
    """Converts a checkpoint of the official code (arXiv 2406.02657) into one that `from_pretrained` reads.

    The configuration comes from `config.json` in `src` if it describes the three parts, else from the shapes
    of the tensors and the arguments.

    Args:
        src: a folder with `*.safetensors` and perhaps `config.json`, or one safetensors file.
        dst: the folder to write, made if needed.
        block_alignment: `"tokens"` for models trained without padding (the released ones of 420M parameters
            and more), `"columns"` to reproduce the official layout (the three smaller ones).
        block_length: tokens in a block, where no `config.json` says it.
        num_attention_heads: heads of both decoders, where neither `config.json` nor the released shapes tell.
        dtype: type of the written weights; None keeps that of the file.
        progress: called with (done, total, name) for every tensor.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError: if `src` holds no safetensors.
        ValueError: if a tensor is missing, left over or misshapen, or the configuration cannot be told.
    """
    src, dst = Path(src), Path(dst)
    state = _load_state(src)
    described = _read_json(src / "config.json") if src.is_dir() else {}
    if "token_decoder" in described:
        try:
            config = _config_from_description(described, block_alignment)
        except KeyError as error:
            raise ValueError(
                f"`src` has a config.json without {error}, which tells how tensors are used; add it, or take "
                "the file away and leave released shapes to tell."
            ) from error
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        config = config_from_shapes(shapes, block_length, num_attention_heads, block_alignment)
    tensors = convert_state_dict(state, progress)
    model = fill_model(BlockTransformerForCausalLM, config, tensors, dtype)
    described = described.get("token_decoder", {})
    save_converted(
        model,
        src,
        dst,
        eos_token_id=described.get("generation_eos_token_id", config.eos_token_id),
        pad_token_id=described.get("generation_pad_token_id", 1),
    )
    return config


def convert_state_dict(
    state: dict[str, torch.Tensor], progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Renames official tensors to ours and reshapes the convolutions, which are linear maps, to matrices.

    Args:
        state: official names and tensors.
        progress: called with (done, total, name) for every tensor.

    Returns:
        Our names and tensors.
    """
    converted: dict[str, torch.Tensor] = {}
    for done, (name, tensor) in enumerate(state.items(), start=1):
        new_name = _new_name(name, "embedder.embeddings.weight" in state)
        if new_name is not None:
            converted[new_name] = _reshaped(name, tensor)
        if progress is not None:
            progress(done, len(state), name)
    return converted


def _new_name(name: str, lookup: bool) -> str | None:
    """Our name of an official tensor; None if it is not needed."""
    if (
        any(name.endswith(end) or end in name for end in IGNORED)
        or name == "token_decoder.decoder.embed_tokens.weight"
    ):
        return None
    embedder = "model.embedder." if lookup else "model.embedder.encoder."
    renamings = (
        ("embedder.projection_layer.", "model.embedder.projection."),
        ("embedder.", embedder),
        ("block_decoder.gpt_neox.", "model.block_decoder."),
        ("token_decoder.gpt_neox.embed_in.", "model.token_decoder.embed_tokens."),
        ("token_decoder.shared.", "model.token_decoder.embed_tokens."),
        ("token_decoder.gpt_neox.", "model.token_decoder.decoder."),
        ("token_decoder.decoder.", "model.token_decoder.decoder."),
        ("token_decoder.expansion_layer.", "model.token_decoder.expansion."),
        ("token_decoder.embed_out.", "lm_head."),
        ("token_decoder.lm_head.", "lm_head."),
    )
    for old, new in renamings:
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(
        f"`src` has a tensor that no Block Transformer has: {name!r}; is it an official checkpoint?"
    )


def _reshaped(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith(("projection_layer.weight", "expansion_layer.weight")) and tensor.ndim == 3:
        # (out, in, taps): our input is the vectors of the taps one after the other.
        return tensor.transpose(1, 2).flatten(1).contiguous()
    return tensor


def _config_from_description(described: dict, block_alignment: str) -> BlockTransformerConfig:
    """The configuration of a folder whose config.json holds those of the three parts."""
    embedder, token = described["embedder"], described["token_decoder"]
    block, inner = described["block_decoder"]["config"], described["token_decoder"]["config"]
    fields: dict[str, Any] = {
        "block_length": described["block_length"],
        "n_embedding_tokens": described["n_embedding_tokens"],
        "block_alignment": block_alignment,
        "vocab_size": inner["vocab_size"],
        "decoding_strategy": token["decoding_strategy"],
        "expansion_method": token["expansion_method"],
        "expansion_ratio": token["expansion_ratio"],
        "decoder_start_token_id": token["bos_token_id"],
        "bos_token_id": token["bos_token_id"],
        "eos_token_id": token["eos_token_id"],
        # What the official code fills the first block of a prompt with.
        "pad_token_id": _first_of(embedder["config"].get("pad_token_id"), token["pad_token_id"]),
        "tie_word_embeddings": bool(inner["tie_word_embeddings"]),
    }
    fields |= _block_fields(block) | _token_fields(inner, block) | _embedder_fields(embedder)
    loss = described.get("official_cfg", {}).get("block_decoding_loss", {})
    if loss.get("enable"):
        fields |= {"block_decoding_loss": loss.get("type", "contrastive")}
        fields |= {"block_decoding_loss_weight": loss.get("weight", 1.0)}
    return BlockTransformerConfig(**fields)


def _first_of(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _check_type(part: str, config: dict, known: tuple[str, ...]) -> None:
    if config["model_type"] not in known or config.get("rope_scaling"):
        raise ValueError(
            f"`src` must have a {part} of type {' or '.join(known)} without `rope_scaling`, got "
            f"{config['model_type']!r} and {config.get('rope_scaling')}; official models have no others."
        )


def _block_fields(block: dict) -> dict[str, Any]:
    _check_type("block decoder", block, ("gpt_neox",))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    names += (
        "max_position_embeddings",
        "layer_norm_eps",
        "use_parallel_residual",
        "attention_bias",
        "initializer_range",
    )
    rope = {
        "rope_theta": block["rotary_emb_base"],
        "partial_rotary_factor": block["rotary_pct"],
        "rope_type": "default",
    }
    return {name: block[name] for name in names} | {"rope_parameters": rope}


def _token_fields(inner: dict, block: dict) -> dict[str, Any]:
    _check_type("token decoder", inner, ("gpt_neox", "t5"))
    if inner["model_type"] == "t5":
        return {
            "token_hidden_size": inner["d_model"],
            "token_intermediate_size": inner["d_ff"],
            "token_num_hidden_layers": inner["num_decoder_layers"] or inner["num_layers"],
            "token_num_attention_heads": inner["num_heads"],
            "token_head_dim": inner["d_kv"],
            "token_hidden_act": inner["feed_forward_proj"],
            "rms_norm_eps": inner["layer_norm_epsilon"],
            "relative_attention_num_buckets": inner["relative_attention_num_buckets"],
            "relative_attention_max_distance": inner["relative_attention_max_distance"],
        }
    shared = ("rotary_pct", "rotary_emb_base", "use_parallel_residual", "hidden_act", "layer_norm_eps")
    for name in shared:
        if inner[name] != block[name]:
            raise ValueError(
                f"`src` must have one `{name}` for both decoders, got {block[name]} and {inner[name]}; such "
                "a model needs fields that BlockTransformerConfig does not have."
            )
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {f"token_{name}": inner[name] for name in names}


def _embedder_fields(embedder: dict) -> dict[str, Any]:
    inner, known = embedder["config"], ("lookup", "roberta", "roberta_cls")
    if embedder["cls"] not in known:
        raise ValueError(f"`src` must have an embedder of {', '.join(known)}, got {embedder['cls']!r}.")
    fields = {
        "embedder_type": embedder["cls"],
        "projection_method": embedder["projection_method"] or "projection_layer",
        "embedder_hidden_size": inner["hidden_size"],
    }
    if embedder["cls"] != "lookup":
        names = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        fields |= {f"embedder_{name}": inner[name] for name in names}
        fields |= {
            "embedder_bos_token_id": inner["bos_token_id"],
            "embedder_pad_token_id": inner["pad_token_id"],
        }
        fields |= {"n_cls_tokens": embedder["n_cls_tokens"] or 1}
    return fields


def config_from_shapes(
    shapes: dict[str, tuple[int, ...]],
    block_length: int = 4,
    num_attention_heads: int | None = None,
    block_alignment: str = "tokens",
) -> BlockTransformerConfig:
    """Reads the configuration of a released model off the names and shapes of its tensors.

    Args:
        shapes: official tensor names and shapes.
        block_length: tokens in a block.
        num_attention_heads: heads of both decoders; None: those of the released model of this size.
        block_alignment: as in the configuration.

    Raises:
        ValueError: if the heads cannot be told, or the token decoder is not a GPT-NeoX with a prefix.
    """
    if "token_decoder.gpt_neox.embed_in.weight" not in shapes:
        raise ValueError(
            "`src` needs a config.json with its three parts: only GPT-NeoX decoders can be told by shape."
        )
    vocab_size, token_width = shapes["token_decoder.gpt_neox.embed_in.weight"]
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "block_length": block_length,
        "block_alignment": block_alignment,
    }
    for prefix, part in (("", "block_decoder"), ("token_", "token_decoder")):
        layer = f"{part}.gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
        layers = 1 + max(
            int(name.split(".")[3]) for name in shapes if name.startswith(f"{part}.gpt_neox.layers.")
        )
        intermediate, width = shapes[layer]
        heads = num_attention_heads or RELEASED_HEADS.get((layers, width))
        if heads is None:
            raise ValueError(
                f"`num_attention_heads` is needed for {layers} layers of width {width}, which no released "
                "model has."
            )
        fields |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": intermediate}
        fields |= {f"{prefix}num_hidden_layers": layers, f"{prefix}num_attention_heads": heads}
    expanded = shapes.get("token_decoder.expansion_layer.weight")
    fields["expansion_method"] = None if expanded is None else "expansion_layer"
    fields["expansion_ratio"] = 2 if expanded is None else expanded[0] // token_width
    return BlockTransformerConfig(**fields, **_embedder_from_shapes(shapes, block_length))


def _embedder_from_shapes(shapes: dict[str, tuple[int, ...]], block_length: int) -> dict[str, Any]:
    projection = shapes.get("embedder.projection_layer.weight")
    fields: dict[str, Any] = {"projection_method": "concat" if projection is None else "projection_layer"}
    if "embedder.embeddings.weight" in shapes:
        return fields | {"embedder_hidden_size": shapes["embedder.embeddings.weight"][1]}
    width = shapes["embedder.embeddings.word_embeddings.weight"][1]
    layers = {name.split(".")[3] for name in shapes if name.startswith("embedder.encoder.layer.")}
    taps = block_length if projection is None else projection[2]
    return fields | {
        # The outputs that are kept: of all tokens, or of the leading ids.
        "embedder_type": "roberta" if taps == block_length else "roberta_cls",
        "n_cls_tokens": taps,
        "embedder_hidden_size": width,
        "embedder_num_hidden_layers": len(layers),
        "embedder_num_attention_heads": ROBERTA_HEADS.get(width, width // 32),
        "embedder_intermediate_size": shapes["embedder.encoder.layer.0.intermediate.dense.weight"][0],
        "embedder_max_position_embeddings": shapes["embedder.embeddings.position_embeddings.weight"][0],
    }


def convert_from_vanilla(
    src: str | Path,
    dst: str | Path,
    *,
    block_length: int = 4,
    num_prefix_tokens: int = 2,
    block_layers: int | None = None,
    block_alignment: str = "tokens",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> BlockTransformerConfig:
    """Starts a Block Transformer from a vanilla language model (what the paper calls uptraining).

    The first layers become the block decoder, the others the token decoder; the embedder averages the vanilla
    embeddings of a block; every prefix vector starts as the context itself; table, final norm and head are
    copied.

    Args:
        src: folder or name of a GPT-NeoX, Llama, Qwen2 or Qwen3 causal language model.
        dst: the folder to write.
        block_length: tokens in a block.
        num_prefix_tokens: context vectors that the token decoder gets.
        block_layers: layers of the block decoder; None: half of them, rounded down.
        block_alignment: as in the configuration.
        dtype: type of the written weights; None keeps that of the model.
        progress: called with (done, total, name) for every tensor.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: if the model is of another type, or has windows, or too few layers.
    """
    config = AutoConfig.from_pretrained(src)
    ours = config_from_vanilla(config, block_length, num_prefix_tokens, block_layers, block_alignment)
    vanilla = AutoModelForCausalLM.from_pretrained(src, dtype="auto" if dtype is None else dtype)
    tensors = state_from_vanilla(vanilla, ours)
    for done, name in enumerate(tensors, start=1):
        if progress is not None:
            progress(done, len(tensors), name)
    save_converted(
        fill_model(BlockTransformerForCausalLM, ours, tensors, dtype),
        Path(src),
        Path(dst),
        ours.eos_token_id,
        ours.pad_token_id,
    )
    return ours


def config_from_vanilla(
    config: PreTrainedConfig,
    block_length: int = 4,
    num_prefix_tokens: int = 2,
    block_layers: int | None = None,
    block_alignment: str = "tokens",
) -> BlockTransformerConfig:
    """The configuration of the Block Transformer that a vanilla model of `config` starts.

    Args:
        config: of a GPT-NeoX, Llama, Qwen2 or Qwen3 model.
        block_length: tokens in a block.
        num_prefix_tokens: context vectors that the token decoder gets.
        block_layers: layers of the block decoder; None: half of them, rounded down.
        block_alignment: as in the configuration.

    Raises:
        ValueError: if the model is of another type, or has windows, or too few layers.
    """
    if config.model_type not in VANILLA_TYPES:
        raise ValueError(f"`src` must be one of {', '.join(VANILLA_TYPES)}, got {config.model_type!r}.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "`src` has sliding-window layers, which blocks cannot have; use a model without windows."
        )
    layers = config.num_hidden_layers
    block_layers = layers // 2 if block_layers is None else block_layers
    if not 0 < block_layers < layers:
        raise ValueError(f"`block_layers` must leave both decoders a layer, got {block_layers} of {layers}.")
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "hidden_act",
        "attention_bias",
    )
    names += (
        "max_position_embeddings",
        "rms_norm_eps",
        "layer_norm_eps",
        "use_parallel_residual",
        "mlp_bias",
    )
    names += ("initializer_range", "num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id")
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    pad = config.pad_token_id
    # Some old configurations of Llama say -1 where there is none.
    pad = eos if pad is None or not 0 <= pad < config.vocab_size else pad
    return BlockTransformerConfig(
        **{name: getattr(config, name) for name in names if getattr(config, name, None) is not None},
        decoder_type=config.model_type,
        num_hidden_layers=block_layers,
        token_num_hidden_layers=layers - block_layers,
        block_length=block_length,
        block_alignment=block_alignment,
        projection_method="projection_layer",
        expansion_ratio=num_prefix_tokens,
        rope_parameters=dict(config.rope_parameters),
        pad_token_id=pad,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def state_from_vanilla(vanilla: torch.nn.Module, config: BlockTransformerConfig) -> dict[str, torch.Tensor]:
    """The weights with which a Block Transformer of `config` starts from the causal language model `vanilla`.

    Args:
        vanilla: the model that `config` was made from.
        config: what `config_from_vanilla` returned.
    """
    base = vanilla.base_model
    table, length = base.get_input_embeddings().weight, config.block_length
    eye = torch.eye(config.hidden_size, dtype=table.dtype)
    tensors = {
        "model.embedder.embeddings.weight": table,
        "model.embedder.projection.weight": (eye / length).repeat(1, length),
        "model.embedder.projection.bias": eye.new_zeros(config.hidden_size),
        "model.token_decoder.expansion.weight": eye.repeat(config.expansion_ratio, 1),
        "model.token_decoder.expansion.bias": eye.new_zeros(config.hidden_size * config.expansion_ratio),
        "model.token_decoder.embed_tokens.weight": table,
        "lm_head.weight": vanilla.get_output_embeddings().weight,
    }
    for name, tensor in base.state_dict().items():
        if name.startswith("layers."):
            index, rest = name.split(".", 2)[1:]
            place = int(index) - config.num_hidden_layers
            part = f"block_decoder.layers.{index}" if place < 0 else f"token_decoder.decoder.layers.{place}"
            tensors[f"model.{part}.{rest}"] = tensor
        elif name.startswith(("final_layer_norm.", "norm.")):
            tensors[f"model.block_decoder.{name}"] = tensors[f"model.token_decoder.decoder.{name}"] = tensor
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _load_state(src: Path) -> dict[str, torch.Tensor]:
    files = [src] if src.is_file() else sorted(src.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"`src` must hold model*.safetensors, got {str(src)!r}; only safetensors are read."
        )
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


__all__ = [
    "config_from_shapes",
    "config_from_vanilla",
    "convert_checkpoint",
    "convert_from_vanilla",
    "convert_state_dict",
    "state_from_vanilla",
]
