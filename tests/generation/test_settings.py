"""What a prepared model makes of the settings of a call is what transformers makes of them."""

import pytest
import torch
import transformers as tf
from tiny import build
from tiny_blocks import make

import hf_longattn

MAKE = {"llama": lambda: build("llama"), "blocks": make}
CALLS = {
    "keywords": {"max_new_tokens": 3, "do_sample": True, "top_p": 0.5, "eos_token_id": [5, 7]},
    "config": {"generation_config": tf.GenerationConfig(max_length=30, pad_token_id=4, eos_token_id=4)},
    "none": {"max_new_tokens": None, "min_new_tokens": None, "output_hidden_states": True},
    "hybrid": {"cache_implementation": "hybrid", "attention_mask": None},
}


def prepared_settings(model, **call):
    """(all settings, what is left for the forward), special tokens as lists."""
    call = dict(call)
    config, left = model._prepare_generation_config(call.pop("generation_config", None), **call)
    model._prepare_special_tokens(config, True, device=model.device, batch_size=2)
    said = {name: value.tolist() if torch.is_tensor(value) else value for name, value in vars(config).items()}
    return said, left


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("call", CALLS)
def test_settings_are_those_of_transformers(name, call):
    model = MAKE[name]()
    model.generation_config.eos_token_id = 3
    expected = prepared_settings(model, **CALLS[call])
    hf_longattn.prepare_generation(model)
    for _ in range(3):
        assert prepared_settings(model, **CALLS[call]) == expected
    hf_longattn.restore(model)
    assert not {"_prepare_generation_config", "_prepare_special_tokens"} & set(vars(model))


def test_the_config_is_made_anew_once_and_looked_at_again_where_it_has_new_fields(monkeypatch):
    model, calls = hf_longattn.prepare_generation(build("llama")), []
    real = tf.LlamaConfig._get_generation_parameters
    monkeypatch.setattr(
        tf.LlamaConfig, "_get_generation_parameters", lambda self: (calls.append(1), real(self))[1]
    )
    ids = torch.arange(5)[None]
    for _ in range(3):
        model.generate(ids, max_new_tokens=1)
        assert len(calls) == 1
    model.config.hidden_dropout = 0.5
    model.generate(ids, max_new_tokens=1)
    assert len(calls) == 2
    model.config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, max_new_tokens=1)
    del model.config.num_beams
    model.generate(ids, max_new_tokens=1)
    model.config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, max_new_tokens=1)


def test_special_tokens_are_checked_on_the_host():
    model = hf_longattn.prepare_generation(build("llama"))
    config = tf.GenerationConfig(eos_token_id=[9, 4], pad_token_id=2, bos_token_id=1)
    # A look at a tensor of this device raises.
    model._prepare_special_tokens(config, True, device="meta", batch_size=2)
    tokens = config._eos_token_tensor, config._pad_token_tensor, config._bos_token_tensor
    assert all(token.device.type == "meta" for token in tokens)
    assert [tuple(token.shape) for token in tokens] == [(2,), (), ()]
    assert config._decoder_start_token_tensor is None


def test_a_token_that_cannot_be_one_is_warned_of_as_ever(caplog, monkeypatch):
    monkeypatch.setattr(tf.utils.logging.get_logger("transformers"), "propagate", True)
    model = hf_longattn.prepare_generation(build("llama"))
    model.generate(torch.arange(5)[None], max_new_tokens=1, eos_token_id=-1, pad_token_id=0)
    assert "should consist of positive integers" in caplog.text
