"""Adapters of PEFT under `prepare_generation`: the tokens of plain PEFT, whatever the chunks.

Where PEFT is missing, `test_graph.py` still captures steps through adapted layers of its own.
"""

import pytest
import tiny
import torch

import hf_longattn

peft = pytest.importorskip("peft", reason="peft is not installed")
IDS = tiny.tokens(2, 23)
CAUSAL = {"task_type": "CAUSAL_LM"}


def lora(**changes):
    fields = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **CAUSAL}
    return peft.LoraConfig(**{**fields, **changes})


KINDS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    # Counts its tokens from the end of the prompt.
    "activated-lora": lora(
        target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=IDS[0, -4:-2].tolist()
    ),
    # Mixes its experts by an average over the tokens of a call.
    "lily": peft.LilyConfig(target_modules=["q_proj", "down_proj"], init_weights=False, **CAUSAL),
    # Put tokens of their own before the prompt, the second in a cache that they make.
    "prompt-tuning": peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "prefix-tuning": peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
}


def build(config, order, device="cpu", **fields):
    model, fields = tiny.build("llama").to(device), {"prefill_chunk_size": 5, **fields}
    if order == "before":
        hf_longattn.prepare_generation(model, **fields)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config).eval()
    return hf_longattn.prepare_generation(model, **fields) if order == "after" else model


def generate(model, rows, **options):
    mask = tiny.padding([23, 10][:rows], 23, "left").to(model.device)
    ids = IDS[:rows].to(model.device)
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    return model.generate(**call, **options).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_plain_peft(kind):
    rows = 1 if kind == "activated-lora" else 2
    expected = generate(build(KINDS[kind], "never"), rows)
    assert expected != generate(tiny.build("llama"), rows), "the adapter does nothing"
    for order in ("before", "after"):
        assert generate(build(KINDS[kind], order), rows) == expected, order


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_steps_with_adapters_are_captured(kind):
    expected = generate(build(KINDS[kind], "never", "cuda"), 2)
    assert expected != generate(tiny.build("llama").cuda(), 2), "the adapter does nothing"
    for order in ("before", "after"):
        # True refuses a call whose steps cannot be captured.
        assert generate(build(KINDS[kind], order, "cuda", cuda_graph=True), 2) == expected, order


def test_an_adapter_for_each_row():
    results = []
    for order in ("never", "before", "after"):
        model = build(lora(), order)
        torch.manual_seed(4)
        model.add_adapter("other", lora())
        results.append(generate(model, 2, adapter_names=["default", "other"]))
    assert results[1] == results[2] == results[0]
    assert results[0] != generate(model, 2)


def test_switched_and_disabled_adapters_between_two_calls():
    plain, model = build(lora(), "never"), build(lora(), "after")
    for one in (plain, model):
        torch.manual_seed(4)
        one.add_adapter("other", lora())
    base = generate(tiny.build("llama"), 2)
    for name in ("default", "other"):
        plain.set_adapter(name)
        model.set_adapter(name)
        assert generate(model, 2) == generate(plain, 2) != base
    with model.disable_adapter():
        assert generate(model, 2) == base
