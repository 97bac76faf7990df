"""Calls that an error ends within a step: the layers of the caller's cache agree, and it can go on."""

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.cache import LongContextCache

SLOW = ["mistral-window", "gpt-oss", "llama4"]


def prepare(model, chunk=5):
    return hf_longattn.prepare_generation(model, prefill_chunk_size=chunk)


def generate(model, ids, **kwargs):
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, **kwargs}
    return model.generate(input_ids=ids, **call).tolist()


@pytest.mark.parametrize(
    "family",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), "gemma2", "flag-hybrid"],
)
@pytest.mark.parametrize(
    ("call_number", "chunk"), [(2, 5), (2, 80), (28, 5)], ids=["prefill", "long-chunk", "decode"]
)
def test_a_cache_goes_on_after_an_interruption_within_a_step(family, call_number, chunk):
    """As by a key that is pressed: the first layer has read what the others have not."""
    build = tiny.build_lightning if family == "flag-hybrid" else tiny.build
    model, conversation = prepare(build(family), None), tiny.tokens(1, 11)
    cache, plain = LongContextCache(model.config), prepare(build(family), None)
    first = torch.tensor(generate(model, conversation, past_key_values=cache))
    # Longer than what a window can give back.
    second = torch.cat([first, tiny.tokens(1, 119, seed=4)], 1)
    expected = torch.tensor(generate(plain, second, max_new_tokens=40))
    hook = tiny.end_in(model.model.layers[0], call_number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        generate(model, second, past_key_values=cache, prefill_chunk_size=chunk, max_new_tokens=40)
    hook.remove()
    held = cache.get_seq_length()
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {held}
    whole = expected[:, : max(second.shape[1], held + 1)]
    left = expected.shape[1] - whole.shape[1]
    assert generate(model, whole, past_key_values=cache, max_new_tokens=left) == expected.tolist()


def test_guesses_are_taken_back_after_an_interruption():
    """All layers hold them, and nobody knows whether they are right."""
    model, conversation = prepare(tiny.build("llama")), tiny.tokens(1, 11)
    cache = LongContextCache(model.config)
    first = torch.tensor(generate(model, conversation, past_key_values=cache))
    second, held = torch.cat([first, tiny.tokens(1, 19, seed=4)], 1), cache.get_seq_length()
    hook = tiny.end_in(model.model.layers[-1], 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        generate(model, second, past_key_values=cache, prompt_lookup_num_tokens=3)
    hook.remove()
    assert cache.get_seq_length() == held and not cache.holds_guesses
    assert generate(model, second, past_key_values=cache) == generate(prepare(tiny.build("llama")), second)
