"""Widths that the layers of a model may not have in common."""

import types

import transformers as tf

from hf_longattn.cache.head_sizes import feed_forward_width


def test_the_width_of_a_layer_is_that_of_the_widest():
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


def test_the_width_of_experts_is_that_of_a_dense_layer_that_takes_as_much():
    config = tf.MixtralConfig(hidden_size=16, intermediate_size=96, num_experts_per_tok=3)
    assert feed_forward_width(config) == (3 * 16 + 6 * 3 * 96) // 5
    config = tf.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, num_experts_per_tok=3, moe_intermediate_size=20
    )
    assert feed_forward_width(config) == (5 * 3 * 64 + 4 * 3 * 20) // 5
    # One layer in front of the experts is dense.
    config.intermediate_size = 1000
    assert feed_forward_width(config) == 1000
    shared = tf.Qwen2MoeConfig(
        hidden_size=64, num_experts_per_tok=3, moe_intermediate_size=20, intermediate_size=96,
        shared_expert_intermediate_size=55,
    )  # fmt: skip
    assert feed_forward_width(shared) == (5 * 3 * 64 + 4 * 3 * 20 + 4 * 55) // 5
    config = tf.DeepseekV3Config(
        hidden_size=64, num_experts_per_tok=3, moe_intermediate_size=20, intermediate_size=96,
        n_shared_experts=2,
    )  # fmt: skip
    assert feed_forward_width(config) == (5 * 3 * 64 + 4 * 3 * 20 + 4 * 40) // 5
