"""`paged|tree_attention` under transformers' continuous batching."""

import pytest
import tiny
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import continuous_api

import hf_longattn  # noqa: F401  registers the implementation


@pytest.fixture
def flash(request, monkeypatch):
    """Has transformers think that FlashAttention 2 is installed, or that it is not."""
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: False)
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: request.param)


@pytest.mark.parametrize(
    ("family", "name", "flash"),
    [
        ("llama", "tree_attention", False),
        ("gemma2", "tree_attention", False),
        ("gpt-oss", "tree_attention", False),
        ("llama", "paged|tree_attention", False),
        ("llama", "paged|tree_attention", True),
    ],
    indirect=["flash"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_of_different_lengths_get_the_tokens_they_get_alone(family, name, flash, device):
    prompts = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (5, 23, 40)]
    plain = tiny.build(family).to(device)
    alone = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt), device=device)
        call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        result = plain.generate(torch.tensor([prompt], device=device), **call)
        alone.append(result[0, len(prompt) :].tolist())
    model = tiny.build(family, "tree_attention").to(device)
    model.set_attn_implementation(name)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    results = model.generate_batch(inputs=prompts, generation_config=config)
    assert [result.generated_tokens for result in results.values()] == alone
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("flash", [True], indirect=True)
def test_a_plain_name_gives_way_to_flash_attention_where_that_is_installed(flash, monkeypatch):
    """As the guide says: the name with `paged|` does not."""
    model, chosen = tiny.build("llama", "tree_attention"), []

    def choose(self, name):
        chosen.append(name)
        raise ImportError(name)

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", choose)
    with pytest.raises(ImportError):
        model.generate_batch(inputs=[[5, 6]], generation_config=GenerationConfig(max_new_tokens=2))
    assert chosen == ["paged|flash_attention_2"]


def test_outside_continuous_batching_it_is_refused():
    model = tiny.build("llama", "tree_attention")
    model.set_attn_implementation("paged|tree_attention")
    with pytest.raises(ValueError, match="generate_batch"):
        model(input_ids=tiny.tokens(1, 5))
