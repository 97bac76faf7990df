"""Assisted and prompt-lookup decoding under `prepare_generation`: prompts in chunks, and filled caches."""

import logging

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn import LongContextCache

# The second half repeats the first, so that guesses come true.
IDS = tiny.tokens(1, 20).repeat(1, 2)
CHUNK, NEW = 7, 9
KINDS = {"lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {}}


def build(family):
    return tiny.build_lightning("hybrid") if family == "lightning" else tiny.build(family)


def generate(model, ids=IDS, cache=None, **options):
    call = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **call)


@pytest.fixture
def widths():
    """Tokens of every forward, by a hook on the embedding."""
    seen = []

    def watch(model):
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, _: seen.append(inputs[0].shape[-1])
        )
        return model

    watch.seen = seen
    return watch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "lightning"])
def test_a_long_prompt_comes_in_chunks_and_a_cache_goes_on(family, kind, widths):
    expected = generate(build(family))
    model = widths(hf_longattn.prepare_generation(build(family), prefill_chunk_size=CHUNK))
    options = KINDS[kind] or {"assistant_model": build(family)}
    for held in (0, 30, 39):
        cache = LongContextCache(model.config)
        if held:
            generate(model, IDS[:, :held], cache, max_new_tokens=1)
        after = generate(model, cache=cache, **options)
        assert after.equal(expected), held
        assert generate(model, after, cache, max_new_tokens=1)[:, :-1].equal(expected)
    assert max(widths.seen) == CHUNK


def test_a_cache_of_transformers_goes_on_too():
    model = hf_longattn.prepare_generation(build("gemma3"), prefill_chunk_size=CHUNK)
    cache = tf.DynamicCache(config=model.config)
    generate(model, IDS[:, :30], cache, max_new_tokens=1)
    assert generate(model, cache=cache, prompt_lookup_num_tokens=3).equal(generate(build("gemma3")))


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_windows_stay_windows(cache_dtype):
    model = hf_longattn.prepare_generation(build("gemma3"), prefill_chunk_size=64, cache_dtype=cache_dtype)
    cache = LongContextCache(model.config, cache_dtype=cache_dtype)
    ids = generate(model, tiny.tokens(1, 300), cache, prompt_lookup_num_tokens=3)
    generate(model, torch.cat([ids, tiny.tokens(1, 300)], 1), cache, max_new_tokens=1)
    window = cache.layers[0]
    # Two windows, what may be undone, and a chunk; each turn alone is 300 tokens.
    assert window.capacity <= 2 * (7 + 64) + 64 < 300
    assert not window.record_past
    if cache_dtype is not None:
        assert (window.scales.start, window.scales.end) == (window.start, window.end)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_that_a_call_returns_records_no_more(kind):
    model = hf_longattn.prepare_generation(build("gemma3"), prefill_chunk_size=64)
    options = KINDS[kind] or {"assistant_model": hf_longattn.prepare_generation(build("gemma3"))}
    output = generate(model, return_dict_in_generate=True, **options)
    cache, ids = output.past_key_values, torch.cat([output.sequences, tiny.tokens(1, 300)], 1)
    assert generate(model, ids, cache).equal(generate(build("gemma3"), ids))
    assert cache.layers[0].capacity <= 2 * (7 + 64) + 64


def test_a_batch_is_refused_before_the_cache_is_filled():
    model = hf_longattn.prepare_generation(build("llama"))
    cache = LongContextCache(model.config)
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(model, IDS.repeat(2, 1), cache, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() == 0


def test_what_the_caller_records_stays_recorded():
    model = hf_longattn.prepare_generation(build("gemma3"))
    cache = LongContextCache(model.config)
    cache.activate_past_recording()
    generate(model, cache=cache, prompt_lookup_num_tokens=3)
    assert cache.layers[0].record_past


@pytest.mark.parametrize("options", [{"return_dict_in_generate": True, "output_hidden_states": True}, None])
def test_what_cannot_go_on_is_refused(options):
    model = hf_longattn.prepare_generation(build("llama"))
    cache = LongContextCache(model.config)
    generate(model, IDS[:, :30], cache, max_new_tokens=1)
    ids, way = (IDS, "leave `assistant_model`") if options else (IDS[:, 30:], "pass the ids of the whole")
    with pytest.raises(ValueError, match=f"`past_key_values` holds 30 tokens, .*{way}"):
        model.generate(
            ids,
            attention_mask=torch.ones_like(IDS),
            past_key_values=cache,
            prompt_lookup_num_tokens=3,
            **options or {},
        )
    assert cache.get_seq_length() == 30


def test_restore_says_nothing_where_prompt_tuning_has_put_the_method_back(caplog):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = hf_longattn.prepare_generation(peft.get_peft_model(build("llama"), config).eval())
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1)
    with caplog.at_level(logging.WARNING, "hf_longattn"):
        hf_longattn.restore(model)
    assert not caplog.messages
