"""Lightning attention by the fields of a config, and what it refuses by name."""

import logging

import pytest
import tiny
import torch
import transformers as tf
from lightning_models import BOUND, NAME, Module, logits

from hf_longattn.attention.lightning import lightning_attention_forward
from hf_longattn.instance import Setup
from hf_longattn.kernels import dispatch
from hf_longattn.masking import lazy_mask


def test_layers_outside_the_list_are_softmax():
    ids = tiny.tokens(2, 16)
    model = tiny.build("llama", NAME)
    model.config.lightning_layers = []
    assert tiny.relative_error(logits(model, ids), logits(tiny.build("llama"), ids)) <= BOUND
    model.config.lightning_layers = [1]
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    mixed = logits(model, ids)
    assert tiny.relative_error(mixed, logits(tiny.build("llama"), ids)) > 0.1
    plain = tiny.build("llama")
    plain.model.layers[0].self_attn.register_forward_hook(lambda m, args, output: seen.append(output[0]))
    logits(plain, ids)
    assert tiny.relative_error(seen[0], seen[-1]) <= BOUND


def test_slopes_and_layers_are_saved_and_honoured(tmp_path):
    ids, model = tiny.tokens(1, 16), tiny.build("llama", NAME)
    default = logits(model, ids)
    model.config.lightning_slopes = [[0.5, 0.1, 0.02, 0.0]] * 3
    model.config.lightning_layers = [0, 1]
    expected = logits(model, ids)
    assert tiny.relative_error(expected, default) > 0.01
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    assert loaded.config.lightning_layers == [0, 1]
    assert torch.equal(logits(loaded, ids), expected)
    loaded.config.lightning_slopes = [0.5, 0.1, 0.02, 0.0]
    assert torch.equal(logits(loaded, ids), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lightning_slopes", [0.1, 0.2]),
        ("lightning_slopes", [0.1, 0.2, 0.3, -0.1]),
        ("lightning_slopes", [[0.1, 0.2, 0.3, 0.4]] * 2),
        ("lightning_slopes", 0.1),
        ("lightning_layers", [0, 3]),
        ("lightning_layers", 2),
        ("lightning_layers", "all"),
    ],
)
def test_fields_that_do_not_fit(field, value):
    model = tiny.build("llama", NAME)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=f"config.{field}"):
        logits(model, tiny.tokens(1, 5))


def test_a_softmax_checkpoint_is_warned_about_once(tmp_path, caplog):
    tiny.build("llama").save_pretrained(tmp_path)
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_longattn"):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
        for _ in range(2):
            logits(model, tiny.tokens(1, 5))
        assert sum("until it is trained" in record.message for record in caplog.records) == 1
        caplog.clear()
        dispatch.log_once.cache_clear()
        model.config.lightning_layers = [0, 1, 2]
        logits(model, tiny.tokens(1, 5))
        logits(tiny.build("llama", NAME), tiny.tokens(1, 5))
    assert not [record for record in caplog.records if "until it is trained" in record.message]


# What is refused, by name


REFUSED_MODELS = {
    "mistral-window": "sliding_window",
    "gemma2": "sliding_window|softcap",
    "gpt-oss": "sliding_window|s_aux",
    "llama4": "sliding_window",
}


@pytest.mark.parametrize("family", REFUSED_MODELS)
def test_models_with_windows_caps_and_sinks(family):
    with pytest.raises(ValueError, match=REFUSED_MODELS[family]):
        logits(tiny.build(family, NAME), tiny.tokens(1, 12))


def test_windows_stay_softmax_in_a_hybrid():
    ids = tiny.tokens(1, 20)
    model = tiny.build("gemma3", NAME)
    model.config.lightning_layers = [1]
    assert not torch.allclose(logits(model, ids), logits(tiny.build("gemma3"), ids), atol=1e-2)
    model.config.lightning_layers = []
    assert tiny.relative_error(logits(model, ids), logits(tiny.build("gemma3"), ids)) <= 2e-5


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("is_causal", {"is_causal": False}),
        ("sliding_window", {"sliding_window": 4}),
        ("softcap", {"softcap": 30.0}),
        ("s_aux", {"s_aux": torch.zeros(4)}),
        ("position_bias", {"position_bias": torch.zeros(1, 4, 6, 6)}),
        ("dropout", {"dropout": 0.1}),
        ("output_attentions", {"output_attentions": True}),
    ],
)
def test_keywords(name, keywords):
    q = torch.randn(1, 4, 6, 16)
    with pytest.raises(ValueError, match=f"`{name}"):
        lightning_attention_forward(Module(), q, q, q, None, **keywords)
    with pytest.raises(TypeError, match="block_indices"):
        lightning_attention_forward(Module(), q, q, q, None, block_indices=1)


def test_masks():
    q = torch.randn(1, 4, 6, 16)
    with pytest.raises(ValueError, match="`attention_mask`"):
        lightning_attention_forward(Module(), q, q, q, torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="`mask_function`"):
        strange = lazy_mask(1, 6, 6, mask_function=lambda b, h, i, j: (i - j) % 2 == 0)
        lightning_attention_forward(Module(), q, q, q, strange)
    with pytest.raises(ValueError, match="5 queries and 5 keys"):
        lightning_attention_forward(Module(), q, q, q, lazy_mask(1, 5, 5))
    with pytest.raises(ValueError, match="layer_idx"):
        lightning_attention_forward(torch.nn.Identity(), q, q, q, None)


def test_a_set_up_leaves_softmax_attention_to_softmax_models():
    model = tiny.build("llama", NAME)
    before = set(vars(model))
    with pytest.raises(ValueError, match="'lightning_attention' would be another model"):
        Setup(model).use_attention("tree_attention")
    assert model.config._attn_implementation == NAME and set(vars(model)) == before


def test_encoders_and_cross_attention():
    bert = tf.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    bert._attn_implementation = NAME
    with pytest.raises(ValueError, match="`is_causal`|layer_idx"):
        tf.BertModel(bert).eval()(input_ids=tiny.tokens(1, 8))
    gpt2 = tiny.CONFIGS["gpt2"]()
    gpt2.add_cross_attention, gpt2._attn_implementation = True, NAME
    with pytest.raises(ValueError, match="`is_causal`"):
        states = torch.randn(1, 5, 64)
        tf.GPT2Model(gpt2).eval()(input_ids=tiny.tokens(1, 8), encoder_hidden_states=states)
