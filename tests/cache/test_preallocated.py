"""How much room a cache takes: enough, little more, and the same for calls of about the same length."""

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.preallocated import rounded_capacity


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257, 8192, 8193, 131072 + 48, 440_001])
def test_room_is_enough_and_little_more(tokens):
    room = rounded_capacity(tokens)
    assert tokens <= room <= tokens + tokens / 128
    assert rounded_capacity(room) == room


def test_strides_of_the_keys_do_not_tell_how_many_tokens_were_asked_for():
    model = tiny.build("llama")
    hf_longattn.prepare_generation(model)
    ids = torch.randint(1, 60, (1, 400))
    strides = set()
    for new_tokens in (2, 3):
        call = model.generate(
            ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        assert isinstance(call.past_key_values, LongContextCache)
        strides |= {layer.keys.stride() for layer in call.past_key_values.layers}
    assert len(strides) == 1
