"""`paged|tree_attention` under transformers' continuous batching."""

import pytest
import tiny
import torch
from transformers import GenerationConfig

import hf_longattn  # noqa: F401  registers the implementation


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "tree_attention"),
        ("gemma2", "tree_attention"),
        ("gpt-oss", "tree_attention"),
        ("llama", "paged|tree_attention"),
    ],
)
def test_requests_of_different_lengths_get_the_tokens_they_get_alone(family, name):
    prompts = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (5, 23, 40)]
    plain = tiny.build(family)
    alone = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt))
        call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        result = plain.generate(torch.tensor([prompt]), **call)
        alone.append(result[0, len(prompt) :].tolist())
    model = tiny.build(family, "tree_attention")
    model.set_attn_implementation(name)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    results = model.generate_batch(inputs=prompts, generation_config=config)
    assert [result.generated_tokens for result in results.values()] == alone


def test_outside_continuous_batching_it_is_refused():
    model = tiny.build("llama", "tree_attention")
    model.set_attn_implementation("paged|tree_attention")
    with pytest.raises(ValueError, match="generate_batch"):
        model(input_ids=tiny.tokens(1, 5))
