"""Ranks that share a prompt of a model with adapters of PEFT or quantised weights.

Run as `python ecosystem_cases.py adapters` or `python ecosystem_cases.py quantized KIND`.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import peft
import quantized
import ranks
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn

IDS = tiny.tokens(2, 40)
CAUSAL = {"task_type": "CAUSAL_LM"}


def lora(**changes):
    fields = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **CAUSAL}
    return peft.LoraConfig(**{**fields, **changes})


ADAPTERS = {
    "lora": (lora(), 2),
    "prompt-tuning": (peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL), 2),
    "prefix-tuning": (peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL), 2),
    "activated-lora": (
        lora(target_modules=["q_proj", "v_proj"], alora_invocation_tokens=IDS[0, -4:-2].tolist()),
        1,
    ),
}


def adapted(config):
    torch.manual_seed(3)
    return peft.get_peft_model(tiny.build("llama"), config).eval()


def generate(model, rows):
    mask = tiny.padding([40, 17][:rows], 40, "left")
    call = {"input_ids": IDS[:rows], "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    return model.generate(**call).tolist()


def adapters(rank, size, name):
    """The tokens of one process, or a refusal by name where an adapter counts tokens."""
    config, rows = ADAPTERS[name]
    expected, model = generate(adapted(config), rows), adapted(config)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    hf_longattn.prepare_generation(model, device_mesh=mesh, prefill_chunk_size=16, timeout=60.0)
    if name != "activated-lora":
        assert generate(model, rows) == expected, name
        return
    try:
        generate(model, rows)
    except ValueError as error:
        assert "activated LoRA" in str(error), error
    else:
        raise AssertionError("an adapter that counts tokens was not refused")


def weights(rank, size, folder, make):
    """The tokens of one process."""
    # First of all: the packages that quantise take long to import, on one rank longer than on the other.
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    plain, model = (quantized.load(folder, make) for _ in range(2))
    expected = generate(plain, 2)
    hf_longattn.prepare_generation(model, device_mesh=mesh, prefill_chunk_size=16, timeout=60.0)
    assert generate(model, 2) == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "adapters":
        for name in ADAPTERS:
            ranks.run(adapters, 2, name)
    else:
        with tempfile.TemporaryDirectory() as folder:
            quantized.save(folder)
            ranks.run(weights, 2, folder, getattr(quantized, sys.argv[2]))
