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


def bounds(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


RIGHT = bounds(0, 5, 12)
PACKINGS = {
    "keys alone": ({"cu_seq_lens_k": RIGHT}, "`cu_seq_lens_k` came without `cu_seq_lens_q`"),
    "a list": ({"cu_seq_lens_q": [0, 5, 12]}, "`cu_seq_lens_q` must be a tensor of int32 or int64, got list"),
    "floats": ({"cu_seq_lens_q": bounds(0, 5, 12, dtype=torch.float32)}, "got torch.float32"),
    "rows": ({"cu_seq_lens_q": RIGHT[None]}, r"`cu_seq_lens_q` must be \(documents \+ 1,\)"),
    "counts": ({"cu_seq_lens_q": RIGHT, "cu_seq_lens_k": RIGHT[1:]}, "as many for queries as for keys"),
    "no zero": ({"cu_seq_lens_q": RIGHT[1:]}, "must rise from 0 .* got 5 to 12"),
    "too many": ({"cu_seq_lens_q": bounds(0, 5, 13)}, "must rise from 0 .* 12 here, got 0 to 13"),
    "falling": ({"cu_seq_lens_q": bounds(0, 7, 5, 12)}, "got falling numbers"),
    "two": ({"cu_seq_lens_q": RIGHT, "cu_seq_lens_k": bounds(0, 6, 12)}, "`cu_seq_lens_q` and .* differ"),
    "documents": ({"seq_idx": torch.zeros(1, 11, dtype=torch.long)}, r"`seq_idx` must be \(1, 12\)"),
}


@pytest.mark.parametrize("how", ["tree_attention", "blockwise_attention", "lightning_attention", "trained"])
@pytest.mark.parametrize("kind", PACKINGS)
def test_packing_of_other_tokens(kind, how):
    packing, message = PACKINGS[kind]
    model = tiny.build("llama", "blockwise_attention" if how == "trained" else how)
    if how == "trained":
        hf_longattn.prepare_training(model, block_size=5)
    ids = tiny.tokens(1, 12)
    with pytest.raises((ValueError, TypeError), match=message):
        model(input_ids=ids, labels=ids, use_cache=False, **packing)


@pytest.mark.parametrize("targets", [(0, 4, 12), (0, 4, 9)], ids=["as-many", "fewer"])
def test_packing_of_encoder_decoders_by_two_lengths(targets):
    config = tf.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=97,
    )  # fmt: skip
    config._attn_implementation = "tree_attention"
    model = tf.BartForConditionalGeneration(config)
    packing = {"cu_seq_lens_q": bounds(*targets), "cu_seq_lens_k": RIGHT}
    with pytest.raises(ValueError, match="an encoder-decoder hands one pair"):
        model(tiny.tokens(1, 12), decoder_input_ids=tiny.tokens(1, targets[-1]), use_cache=False, **packing)
