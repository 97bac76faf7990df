"""A cache that is filled in inference mode goes on outside of it, and the other way round."""

import itertools

import pytest
import tiny
import torch
from tiny_blocks import make

import hf_longattn
from hf_longattn.cache import LongContextCache

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
PAIRS = [pair for pair in itertools.permutations(MODES, 2)]
FAMILIES = {
    "llama": ({}, lambda: tiny.build("llama")),
    "window": ({}, lambda: tiny.build("mistral-window")),
    "8 bits": ({"cache_dtype": "int8"}, lambda: tiny.build("llama")),
    "host": ({"offload_layers": 2}, lambda: tiny.build("llama")),
    "state": ({}, lambda: tiny.build_lightning("hybrid")),
    "blocks": ({}, lambda: make(block_length=4)),
}


def turns(model, cache, *modes):
    """Logits of a turn in each mode, the later ones on the cache of the first."""
    ids, logits = tiny.tokens(2, 11).clamp(max=57), []
    for mode in modes:
        with MODES[mode]():
            call = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
            # All tokens of an answer are real ones, whatever the model takes for a pad.
            turn = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **call)
        cache = turn.past_key_values
        logits.append(torch.stack(turn.logits).clone())
        ids = torch.cat([turn.sequences, tiny.tokens(2, 3).clamp(max=57)], 1).clone()
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first, second", PAIRS)
def test_a_cache_serves_in_and_outside_of_inference_mode(family, first, second):
    settings, build = FAMILIES[family]
    model = hf_longattn.prepare_generation(build(), **settings)

    def cache():
        # With room to spare, so that the buffers of the first turn serve the second.
        return None if family == "blocks" else LongContextCache(model.config, 64, **settings)

    expected = turns(model, cache(), "no_grad", "no_grad", "no_grad")
    assert torch.equal(turns(model, cache(), first, second, first), expected)


def test_a_forward_with_gradients_reads_keys_of_inference_mode():
    model, ids = tiny.build("llama"), tiny.tokens(1, 9)
    gradients = []
    for mode in MODES.values():
        cache = LongContextCache(model.config, 16)
        with mode():
            model(ids, past_key_values=cache)
        model.zero_grad()
        model(tiny.tokens(1, 3), past_key_values=cache).logits.sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    assert torch.equal(*gradients)
