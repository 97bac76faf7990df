"""Tiny random models of every family the attention tests cover: a few layers, real code paths."""

import functools

import torch
import transformers as tf
from transformers.generation.streamers import BaseStreamer

from hf_longattn import LightningConfig, LightningForCausalLM

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}

# Tied to the scaled embedding, a random head would repeat its input whatever attention does.
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}


def _config(cls, **changes):
    return functools.partial(cls, **{**_COMMON, **changes})


CONFIGS = {
    "llama": _config(tf.LlamaConfig),
    "qwen2": _config(tf.Qwen2Config),
    "qwen2-window": _config(
        tf.Qwen2Config, use_sliding_window=True, max_window_layers=1, sliding_window=7, layer_types=None
    ),
    "qwen3": _config(tf.Qwen3Config, head_dim=24),
    "mistral-window": _config(tf.MistralConfig, sliding_window=7),
    "gemma2": _config(tf.Gemma2Config, attn_logit_softcapping=5.0, **_GEMMA, **_WINDOWS),
    "gemma3": _config(tf.Gemma3TextConfig, **_GEMMA, **_WINDOWS),
    "gpt-oss": _config(tf.GptOssConfig, head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_WINDOWS),
    "gpt-neox": _config(tf.GPTNeoXConfig),
    "cohere": _config(tf.CohereConfig),
    "phi3": _config(tf.Phi3Config),
    "olmo2": _config(tf.Olmo2Config),
    "gpt2": functools.partial(
        tf.GPT2Config, vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    ),
    "llama4": _config(
        tf.Llama4TextConfig, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=8,
        head_dim=16, layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        no_rope_layers=[1, 0, 1], moe_layers=[], attn_temperature_tuning=False,
    ),
}  # fmt: skip
CAUSAL = tuple(CONFIGS)
# Heads of full layers differ from those of windows, in width and number.
CONFIGS["gemma4"] = _config(
    tf.Gemma4TextConfig, head_dim=16, global_head_dim=32, attention_k_eq_v=True, num_global_key_value_heads=1,
    hidden_size_per_layer_input=16, vocab_size_per_layer_input=97, tie_word_embeddings=False,
    sliding_window=7, layer_types=["sliding_attention", "full_attention", "full_attention"],
)  # fmt: skip
# The last layers read keys and values of the last one of their kind before them: here of layers 0 and 1.
_SHARED = {
    "num_hidden_layers": 5, "num_kv_shared_layers": 3, "head_dim": 16, "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"],
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS["gemma4-shared"] = _config(
    tf.Gemma4TextConfig, global_head_dim=32, use_double_wide_mlp=True, **_SHARED
)
CONFIGS["gemma3n"] = _config(
    tf.Gemma3nTextConfig, laurel_rank=8, activation_sparsity_pattern=[0.0] * 5, **_SHARED
)
SHARED_KEYS = ("gemma4-shared", "gemma3n")
LIGHTNING_KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]


def build(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0):
    """A causal LM of the family `name`, the same random weights for the same seed."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Larger than the usual initialisation, so that attention is far from uniform.
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "sinks" in parameter_name or "bias" in parameter_name:
                parameter.normal_(0, 0.5)
    return model.eval()


def capturable(model):
    """The model, with experts that a CUDA graph can hold in fp32: grouped ones look from the host there."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model


def build_to_train(name: str):
    """`build` in training mode without dropout, for dropout draws other numbers by blocks."""
    return without_dropout(build(name).train())


def without_dropout(model):
    """The model, whose dropout layers let everything pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def scattered(model):
    """The model with matrices so large that its attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def end_in(layer, call_number, error):
    """Raises an error in a layer at one of its calls, behind its attention, whose keys are written by then.

    Returns the hook, to be removed.
    """
    seen = []

    def hook(module, args):
        seen.append(1)
        if len(seen) == call_number:
            raise error

    return layer.post_attention_layernorm.register_forward_pre_hook(hook)


class Collect(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def build_lightning(name: str):
    """A tiny model with lightning layers: model, hybrid, flag, flag-hybrid, neox-flag or minimax."""
    if "flag" in name:
        family = "gpt-neox" if name == "neox-flag" else "llama"
        config = CONFIGS[family](lightning_layers=[0, 2] if name == "flag-hybrid" else None)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="lightning_attention")
    elif name == "minimax":
        config = tf.MiniMaxConfig(
            vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, layer_types=LIGHTNING_KINDS, num_local_experts=2,
            num_experts_per_tok=2, block_size=16, max_position_embeddings=512, pad_token_id=0,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        model = tf.MiniMaxForCausalLM(config)
    else:
        config = LightningConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            lightning_layers=[1, 2] if name == "hybrid" else None, eos_token_id=None,
        )  # fmt: skip
        model = LightningForCausalLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.shape[1] > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1):
    """Random token ids in 2..96, (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (batch, length), generator=generator)


def padding(lengths: list[int], total: int, side: str):
    """A (B, total) mask of ones for `lengths` tokens on the side away from the padding."""
    mask = torch.zeros(len(lengths), total, dtype=torch.long)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, total - length :] = 1
        else:
            mask[row, :length] = 1
    return mask


def relative_error(result, reference):
    """‖result - reference‖ / ‖reference‖, in fp64."""
    result, reference = result.double(), reference.double()
    return ((result - reference).norm() / reference.norm()).item()
