"""LoRA on a base of 8 or 4 bits: loss and gradients of the same model unprepared."""

import pytest
import quantized
import tiny
import torch

import hf_longattn

peft = pytest.importorskip("peft", reason="peft is not installed")
IDS = tiny.tokens(2, 43)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return quantized.save(tmp_path_factory.mktemp("model"))


def step(folder, make, order):
    model = peft.prepare_model_for_kbit_training(
        quantized.load(folder, make), use_gradient_checkpointing=order == "never"
    )
    if order == "before":
        hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    if order == "after":
        hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@quantized.kinds
def test_lora_trains_as_on_the_unprepared_model(make, folder):
    expected_loss, expected = step(folder, make, "never")
    assert expected and all("lora" in name for name in expected)
    for order in ("before", "after"):
        loss, gradients = step(folder, make, order)
        assert tiny.relative_error(loss, expected_loss) <= 2e-6
        assert gradients.keys() == expected.keys()
        result, reference = (torch.cat([g[n].flatten() for n in expected]) for g in (gradients, expected))
        assert tiny.relative_error(result, reference) <= 5e-6, order
