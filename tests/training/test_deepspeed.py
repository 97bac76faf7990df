"""Prepared models under DeepSpeed: ZeRO stages 2 and 3 train as one process does without it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import hf_longattn

missing = importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("peft") is None
GROUPS = {
    "whole": ["2", "llama", "qwen2", "qwen3", "gemma2", "tied", "gathers", "one-sequence", "loaded"],
    "adapters": ["lora", "lora-head", "lora-tied-head"],
    "refused": ["late", "frozen"],
}


@pytest.mark.slow
@pytest.mark.skipif(missing, reason="deepspeed or peft is not installed")
@pytest.mark.parametrize("cases", GROUPS.values(), ids=GROUPS)
def test_two_processes(cases):
    script = Path(__file__).with_name("deepspeed_case.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(script), *cases]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    for case in cases:
        assert result.stdout.count(f"done {case}\n") == 2


def test_layers_are_whole_for_zero_3_until_restored():
    model = hf_longattn.prepare_training(tiny.build("llama"))
    # What DeepSpeed reads in `initialize`.
    marked = [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]
    assert marked == [f"model.layers.{index}" for index in range(3)]
    hf_longattn.restore(model)
    assert not any(hasattr(module, "_z3_leaf") for module in model.modules())


def cut(model):
    """Puts on the parameters of one layer what ZeRO stage 3 does, and returns the layer."""
    for parameter in model.model.layers[1].parameters():
        parameter.ds_id = 7
    return model.model.layers[1]


def test_parameters_that_are_cut_inside_a_layer_are_refused():
    model = hf_longattn.prepare_training(tiny.build("llama").train(), block_size=16)
    layer = cut(model)
    ids = tiny.tokens(1, 20)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="before `deepspeed.initialize`"):
            model(input_ids=ids, labels=ids)
    for parameter in layer.parameters():
        parameter.ds_z3_leaf_module = layer
    model(input_ids=ids, labels=ids)


def test_input_without_gradient_is_refused():
    model = hf_longattn.prepare_training(tiny.build("llama").train(), block_size=16)
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            parameter.ds_id, parameter.ds_z3_leaf_module = 7, layer
    ids = tiny.tokens(1, 20)
    with pytest.raises(ValueError, match="enable_input_require_grads"):
        model(input_ids=ids, labels=ids)
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
