"""Widths that the layers of a model may not have in common."""

import types

import transformers as tf

from hf_longattn.cache.head_sizes import feed_forward_width


def test_the_width_of_a_layer_is_that_of_all_experts_and_of_the_widest_layer():
    config = tf.MixtralConfig(hidden_size=64, intermediate_size=96, num_experts_per_tok=3)
    assert feed_forward_width(config) == 3 * 96
    config = tf.LlamaConfig(hidden_size=64, intermediate_size=96)
    assert feed_forward_width(config) == 96
    config = types.SimpleNamespace(hidden_size=64, intermediate_size=[32, 128], num_experts_per_tok=None)
    assert feed_forward_width(config) == 128
    assert feed_forward_width(tf.GPT2Config(n_embd=64)) == 256
    # Layers that read keys of others may be twice as wide.
    shared = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "use_double_wide_mlp": True}
    for number, width in ((0, 96), (2, 192)):
        assert feed_forward_width(tf.Gemma4TextConfig(num_kv_shared_layers=number, **shared)) == width
    # One width for every layer, as the config of Gemma3n spells it out.
    config = tf.Gemma3nTextConfig(intermediate_size=96, num_hidden_layers=15)
    assert config.intermediate_size == [96] * 15 and feed_forward_width(config) == 96
