"""A tiny Llama with weights of 8 or 4 bits, by the packages that transformers knows."""

import importlib.util

import pytest
import tiny
import torch
import transformers as tf


def torchao_int8():
    """Weights of 8 bits by torchao."""

    from torchao.quantization import Int8WeightOnlyConfig

    return tf.TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_int8():
    """Weights and activations of 8 bits by bitsandbytes."""
    # Without outliers, which are looked for in all tokens of a call together.
    return tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def bitsandbytes_nf4():
    """Weights of 4 bits by bitsandbytes."""
    fields = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return tf.BitsAndBytesConfig(load_in_4bit=True, **fields)


def _kind(package, make):
    missing = importlib.util.find_spec(package) is None
    return pytest.param(make, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


kinds = pytest.mark.parametrize(
    "make",
    [
        _kind("torchao", torchao_int8),
        _kind("bitsandbytes", bitsandbytes_int8),
        _kind("bitsandbytes", bitsandbytes_nf4),
    ],
    ids=["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"],
)


def save(folder):
    """Writes the model in fp32; widths are multiples of 64, as blocks of 4 bits need."""
    config = tf.LlamaConfig(**{**tiny._COMMON, "intermediate_size": 128})
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def load(folder, make, device="cpu"):
    """The model with quantised weights, and a proof that they are."""
    options = {"attn_implementation": "eager", "dtype": torch.float32, "device_map": device}
    model = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), **options)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter, "the weights are not quantised"
    return model
