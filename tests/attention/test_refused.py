"""What cannot be honoured is refused by name, before any work, and the model stays as it was."""

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.attention.tree import tree_attention_forward

BYPASSING = {
    "bloom": lambda: tf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "gptj": lambda: tf.GPTJConfig(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64
    ),
    "mpt": lambda: tf.MptConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, max_seq_len=64),
}


class Layer(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize("kind", ["falcon", "gptj"])
def test_transformers_itself_refuses_some_at_load(kind):
    with pytest.raises(KeyError, match="tree_attention"):
        tf.AutoModelForCausalLM.from_config(BYPASSING[kind](), attn_implementation="tree_attention")


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_models_that_bypass_the_interface(kind):
    model = tf.AutoModelForCausalLM.from_config(BYPASSING[kind](), attn_implementation="tree_attention")
    with pytest.raises(ValueError, match=kind):
        model(input_ids=tiny.tokens(1, 8))


@pytest.mark.parametrize("kind", BYPASSING)
def test_prepare_refuses_them_and_changes_nothing(kind):
    model = tf.AutoModelForCausalLM.from_config(BYPASSING[kind]())
    before = model.config._attn_implementation, set(vars(model))
    with pytest.raises(ValueError, match=kind):
        hf_longattn.prepare_generation(model)
    hf_longattn.restore(model)
    assert (model.config._attn_implementation, set(vars(model))) == before


def test_prepare_refuses_a_model_that_only_takes_the_name_at_load():
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=97)
    model = tf.T5ForConditionalGeneration(config)
    before = model.config, set(vars(model)), model.encoder.config._attn_implementation
    with pytest.raises(ValueError, match="from_pretrained"):
        hf_longattn.prepare_generation(model)
    assert (model.config, set(vars(model)), model.encoder.config._attn_implementation) == before


def test_unknown_keyword():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(TypeError, match="block_indices"):
        tree_attention_forward(Layer(), q, q, q, None, block_indices=torch.zeros(1))


def test_output_attentions():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="output_attentions"):
        tree_attention_forward(Layer(), q, q, q, None, output_attentions=True)


def test_mask_of_another_length():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="5 queries and 5 keys"):
        tree_attention_forward(Layer(), q, q, q, torch.ones(1, 1, 5, 5, dtype=torch.bool))


def test_mask_of_the_wrong_rank():
    with pytest.raises(ValueError, match="attention_mask"):
        tiny.build("llama", "tree_attention")(input_ids=tiny.tokens(2, 8), attention_mask=torch.ones(2, 8, 8))


@pytest.mark.parametrize("held", [0, 5])
def test_mask_that_ends_before_the_tokens(held):
    model, ids, cache = tiny.build("gemma2", "tree_attention"), tiny.tokens(1, 9), tf.DynamicCache()
    with torch.no_grad():
        if held:
            model(input_ids=ids[:, :held], past_key_values=cache)
        with pytest.raises(ValueError, match="`attention_mask` covers 8 tokens of 9"):
            model(input_ids=ids[:, held:], attention_mask=torch.ones(1, 8), past_key_values=cache)


def test_window_on_a_layer_without_a_side():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="sliding_window"):
        tree_attention_forward(Layer(), q, q, q, None, sliding_window=2, is_causal=False)
