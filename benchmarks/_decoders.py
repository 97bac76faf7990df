"""The decoders that the training benchmark steps: shapes, adapters, peers, and what a step must cost."""

import types

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_longattn
from hf_longattn.instance import unwrap

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 997,
    },
}
OURS = {
    "ours": {},
    "ours-gpu": {"offload": False},
    "ours-offload": {"offload": True},
    "ours-lean": {"offload": True, "save_attention": False},
    "ours-liger": {},
    "ours-liger-offload": {"offload": True},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(arguments, layers=None, implementation="sdpa"):
    """A model with random weights, the same in every process."""
    torch.manual_seed(0)
    fields = {"vocab_size": 128256, "max_position_embeddings": 1 << 23, **SHAPES[arguments.shape]}
    if layers := layers or arguments.layers:
        fields["num_hidden_layers"] = layers
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**fields), attn_implementation=implementation, dtype=torch.bfloat16
        )
    return (add_adapters(model, arguments.lora) if arguments.lora else model).train()


def add_adapters(model, rank):
    """LoRA on every linear layer, neither half of it at zero, in the dtype of the weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def use_liger(model, peer):
    """Liger's norm, rope and MLP; its loss where the peer is not ours, its tiled MLP where asked for."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.tiled_mlp import LigerTiledSwiGLUMLP

    inner = unwrap(model)
    _apply_liger_kernel_to_instance(inner, fused_linear_cross_entropy=not peer.startswith("ours"))
    for layer in inner.model.layers if "tiled" in peer else ():
        layer.mlp.num_shards = None
        for name in ("_mlp_forward", "forward"):
            setattr(layer.mlp, name, types.MethodType(getattr(LigerTiledSwiGLUMLP, name), layer.mlp))


def prepare(model, peer, arguments, mesh=None):
    """Sets a model up as one of the peers."""
    if "liger" in peer:
        use_liger(model, peer)
    if peer in OURS:
        fields = {"block_size": arguments.block_size, **OURS[peer]}
        if arguments.keep_every:
            fields["keep_every"] = arguments.keep_every
        return hf_longattn.prepare_training(model, device_mesh=mesh, **fields)
    if peer != "eager":
        model.gradient_checkpointing_enable(offload=peer.endswith("offload"))
    return model


def trained(model):
    """The parameters that want a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def held_bytes(module):
    """Bytes of weights and gradients."""
    return sum((2 if p.requires_grad else 1) * p.numel() * p.element_size() for p in module.parameters())


def decoder_layers(model):
    """The layers, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# ---- what a step must cost


def operations(model, length, peer):
    """(operations without recomputation, with that of the peer) of a step."""
    inner = unwrap(model)
    config, table = inner.config, inner.get_input_embeddings().weight
    # A table is looked up, unless it is the head too.
    skipped = None if config.tie_word_embeddings else table
    weights = [p for p in inner.parameters() if p.ndim == 2 and p is not skipped]
    products = sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
    inside = sum(2 * p.numel() for layer in decoder_layers(inner) for p in layer.parameters() if p.ndim == 2)
    scores = 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    needed = products + 3.5 * scores
    saves = OURS.get(peer, {"save_attention": False}).get("save_attention", True)
    again = 0 if peer == "eager" else inside + (0 if saves else scores)
    return needed * length, (needed + again) * length


def floor_bytes(model):
    """Bytes a token of a gradient, keys, values and their fp32 gradients, which a layer's backward holds."""
    config, item = unwrap(model).config, 2
    states = 2 * config.num_key_value_heads * config.head_dim
    return config.hidden_size * item + states * (item + 4)
