"""Lightning attention with a cache: chunks, strategies, rollback, and steps by the clock of the device."""

import logging

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_models import BOUND, NAME, families, generate, hybrid, logits, positions, uncached

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.generation.graph import GraphDecoder, device_lengths, rehearsal
from hf_longattn.kernels import dispatch
from hf_longattn.parallel.group import SequenceGroup

CACHES = {
    "state": LongContextCache,
    "dynamic": lambda config: tf.DynamicCache(config=config),
    "static": lambda config: tf.StaticCache(config=config, max_cache_len=40),
}


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("cut", [1, 8, 25])
def test_a_prompt_in_chunks_equals_the_whole(family, kind, cut):
    model = tiny.build(family, NAME)
    ids, mask = tiny.tokens(3, 26), tiny.padding([26, 15, 3], 26, "left")
    expected = logits(model, ids, mask, position_ids=positions(mask), use_cache=False)
    cache, parts = CACHES[kind](model.config), []
    for start in range(0, 26, cut):
        part = slice(start, min(start + cut, 26))
        where = {"position_ids": positions(mask)[:, part], "past_key_values": cache}
        parts.append(logits(model, ids[:, part], mask[:, : part.stop], **where))
    real = mask.bool()
    assert tiny.relative_error(torch.cat(parts, 1)[real], expected[real]) <= BOUND


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["state", "dynamic"]),
    hybrid_model=st.booleans(),
)
def test_any_padding_and_any_split_give_the_same_rows(data, kind, hybrid_model):
    """Tokens that do not exist may stand anywhere, and the prompt may be cut anywhere."""
    length = data.draw(st.integers(2, 14))
    mask = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(2)]
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    model = hybrid() if hybrid_model else tiny.build("llama", NAME)
    ids, cache, parts = tiny.tokens(2, length), CACHES[kind](model.config), []
    where = positions(mask.long())
    # Softmax layers take every position 0 for the beginning of a document.
    where = where.masked_fill(~mask, 1) if hybrid_model else where
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        keywords = {"position_ids": where[:, start:stop], "past_key_values": cache}
        parts.append(logits(model, ids[:, start:stop], mask[:, :stop].long(), **keywords))
    for b in range(2):
        if mask[b].any():
            alone = logits(model, ids[b : b + 1, mask[b]], use_cache=False)[0]
            assert tiny.relative_error(torch.cat(parts, 1)[b][mask[b]], alone) <= BOUND


@families
def test_the_state_is_constant_and_generates_the_same_tokens(family):
    model, ids = tiny.build(family, NAME), tiny.tokens(1, 17)
    expected = uncached(model, ids)
    assert generate(model, ids) == expected
    hf_longattn.prepare_generation(model, prefill_chunk_size=5)
    assert model.config._attn_implementation == NAME
    output = model.generate(ids, do_sample=False, max_new_tokens=9, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected
    layers = output.past_key_values.layers
    assert all(isinstance(layer, RecurrentLayer) for layer in layers)
    width = layers[0].recurrent_state.shape[-1]
    assert all(layer.recurrent_state.shape == (1, 4, width, width) for layer in layers)
    assert all(layer.recurrent_state.dtype == torch.float32 for layer in layers)


MODES = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("make", [lambda: tiny.build("llama", NAME), hybrid], ids=["all", "hybrid"])
@pytest.mark.parametrize("mode", MODES)
def test_strategies_on_the_state_equal_those_on_all_keys(make, mode):
    lengths = [23] if mode == "lookup" else [23, 10]
    ids, mask = tiny.tokens(len(lengths), 23), tiny.padding(lengths, 23, "left")
    expected = generate(make(), ids, mask, **MODES[mode])
    model = hf_longattn.prepare_generation(make(), prefill_chunk_size=5)
    assert generate(model, ids, mask, **MODES[mode]) == expected


def test_static_cache_equals_dynamic():
    model, ids, mask = tiny.build("llama", NAME), tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    assert generate(model, ids, mask, cache_implementation="static") == generate(model, ids, mask)


def test_assisted_decoding_equals_greedy():
    ids = tiny.tokens(1, 23)
    expected = generate(hybrid(), ids, max_new_tokens=20)
    model, assistant = (hf_longattn.prepare_generation(hybrid(seed=seed)) for seed in (0, 3))
    assert generate(model, ids, assistant_model=assistant, max_new_tokens=20) == expected


@pytest.mark.parametrize("drop", [1, 3, 6, 7])
def test_a_rollback_leaves_no_trace(drop):
    model = hybrid()
    ids, mask = tiny.tokens(2, 20), tiny.padding([20, 13], 20, "left")
    mask[0, 15] = 0
    where, cache, clean = positions(mask), LongContextCache(model.config), LongContextCache(model.config)

    def feed(cache, start, stop):
        keywords = {"position_ids": where[:, start:stop], "past_key_values": cache}
        return logits(model, ids[:, start:stop], mask[:, :stop], **keywords)

    feed(cache, 0, 10)
    cache.activate_past_recording()
    for start, stop in ((10, 14), (14, 15), (15, 17)):
        feed(cache, start, stop)
    cache.crop(-drop)
    assert cache.get_seq_length() == 17 - drop
    feed(clean, 0, 17 - drop)
    result, expected = feed(cache, 17 - drop, 20), feed(clean, 17 - drop, 20)
    real = mask[:, 17 - drop :].bool()
    assert tiny.relative_error(result[real], expected[real]) <= BOUND


def test_a_rollback_that_nobody_recorded_is_refused():
    model, ids = tiny.build("llama", NAME), tiny.tokens(1, 9)
    cache = LongContextCache(model.config)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    cache.crop(-9)
    assert torch.equal(logits(model, ids, past_key_values=cache), logits(model, ids))


def test_rows_are_repeated_selected_and_forked():
    model, ids = hybrid(), tiny.tokens(2, 12)
    more = tiny.tokens(4, 3, seed=5)
    cache = LongContextCache(model.config)
    logits(model, ids, past_key_values=cache)
    twin = cache.fork(2)
    result = logits(model, more, past_key_values=twin)
    expected = logits(model, torch.cat([ids.repeat_interleave(2, 0), more], 1))[:, 12:]
    assert tiny.relative_error(result, expected) <= BOUND
    twin.batch_select_indices(torch.tensor([3, 0]))
    result = logits(model, more[:2], past_key_values=twin)
    rows = torch.cat([ids[[1, 0]], more[[3, 0]], more[:2]], 1)
    assert tiny.relative_error(result, logits(model, rows)[:, 15:]) <= BOUND
    cache.reset()
    assert torch.equal(logits(model, ids, past_key_values=cache), logits(model, ids))


def test_a_cache_is_saved_and_loaded(tmp_path):
    model, ids = hybrid(), tiny.tokens(2, 12)
    cache = LongContextCache(model.config)
    logits(model, ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = LongContextCache.load(tmp_path / "cache.safetensors", model.config)
    more = tiny.tokens(2, 3, seed=5)
    expected, result = (logits(model, more, past_key_values=c) for c in (cache, loaded))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("other", ["softmax", "hybrid", "slopes"])
def test_a_cache_of_other_layers_or_slopes_is_refused(other, tmp_path):
    model, ids = tiny.build("llama", NAME), tiny.tokens(1, 9)
    model.config.lightning_slopes = (0.5, 0.1, 0.02, 0.0)
    cache = LongContextCache(model.config)
    logits(model, ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    LongContextCache.load(tmp_path / "cache.safetensors", model.config)
    another = tiny.build("llama", "tree_attention" if other == "softmax" else NAME)
    another.config.lightning_slopes = model.config.lightning_slopes if other == "hybrid" else None
    another.config.lightning_layers = [0, 2] if other == "hybrid" else None
    field = "lightning_slopes" if other == "slopes" else "lightning_layers"
    with pytest.raises(ValueError, match=f"`config` has {field}="):
        LongContextCache.load(tmp_path / "cache.safetensors", another.config)
    with pytest.raises(ValueError, match=f"made for a model with {field}="):
        generate(hf_longattn.prepare_generation(another), tiny.tokens(1, 12), past_key_values=cache)


def test_latent_attention_keeps_its_latents_and_says_so(caplog):
    config = tf.DeepseekV3Config(
        **{**tiny._COMMON, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=2, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=3,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    ids, mask = tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    expected = uncached(model, ids[1:, 8:])[0][9:]
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_longattn"):
        hf_longattn.prepare_generation(model, prefill_chunk_size=5)
        assert generate(model, ids, mask)[1][17:] == expected
    assert "'deepseek_v3' keep compressed keys" in caplog.text
    with pytest.raises(ValueError, match="its lightning layers expand compressed keys"):
        hf_longattn.prepare_training(hf_longattn.restore(model))


@pytest.mark.parametrize("family", tiny.SHARED_KEYS)
@pytest.mark.parametrize("lightning", [None, [0, 2, 3], [3, 4]], ids=str)
def test_layers_that_read_keys_of_others_find_keys_and_no_state(family, lightning, caplog):
    def make():
        kinds = {"layer_types": ["full_attention"] * 5, "lightning_layers": lightning}
        config = tiny.CONFIGS[family](**kinds)
        torch.manual_seed(0)
        return tiny.scattered(tf.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)).eval()

    model, ids, mask = make(), tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    expected = uncached(model, ids[1:, 8:])[0][9:]
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_longattn"):
        prepared = hf_longattn.prepare_generation(make(), prefill_chunk_size=5)
        assert generate(prepared, ids, mask)[1][17:] == expected
    assert "have layers that read keys of others" in caplog.text
    cache = LongContextCache(model.config)
    parts = [logits(model, ids[:, part], past_key_values=cache) for part in (slice(0, 9), slice(9, 17))]
    whole = logits(model, ids, use_cache=False)
    assert tiny.relative_error(torch.cat(parts, 1), whole) <= BOUND
    with pytest.raises(ValueError, match="`cache_dtype`: layers .* reads the keys of all tokens"):
        LongContextCache(model.config, cache_dtype="int8")
    with pytest.raises(ValueError, match="`model`: layers .* got a cache for several processes"):
        ShardedCache(model.config, SequenceGroup(None))
    with pytest.raises(ValueError, match="`attn_implementation` must be"):
        one = LongContextCache(model.config)
        logits(model, ids[:1], past_key_values=one)
        logits(model, ids, past_key_values=one.fork(rows=2))


def test_a_batch_of_another_size_is_refused():
    model = tiny.build("llama", NAME)
    cache = LongContextCache(model.config)
    logits(model, tiny.tokens(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        logits(model, tiny.tokens(3, 5), past_key_values=cache)


# Decoding steps whose lengths are on the device


@pytest.mark.parametrize("make", [lambda: tiny.build("llama", NAME), hybrid], ids=["all", "hybrid"])
@pytest.mark.parametrize("holes", [False, True])
def test_steps_by_the_clock_equal_ordinary_ones(make, holes):
    model, ids, mask = make(), tiny.tokens(2, 30), tiny.padding([30, 22], 30, "left")
    if holes:
        mask[0, [10, 16]] = 0
    where, clocks, start = positions(mask).masked_fill(mask == 0, 1), {}, 9
    caches = [LongContextCache(model.config, capacity=18) for _ in range(2)]
    for cache in caches:
        logits(model, ids[:, :9], mask[:, :9], position_ids=where[:, :9], past_key_values=cache)
    memory = caches[1].layers[0].recurrent_state.data_ptr()
    for count in (1, 1, 3, 1, 4, 1, 1, 8, 1):
        part = slice(start, start + count)
        keywords = {"position_ids": where[:, part]}
        expected = logits(model, ids[:, part], mask[:, : part.stop], past_key_values=caches[0], **keywords)
        future = F.pad(mask[:, : part.stop], (0, 64), value=1)
        with device_lengths(caches[1], clocks, count):
            used = {id(layer.clock): layer.clock for layer in caches[1].layers}.values()
            for clock in used:
                clock.begin(count)
            # The rehearsal for a capture leaves no trace.
            with rehearsal(caches[1]):
                logits(model, ids[:, part], future, past_key_values=caches[1], **keywords)
            result = logits(model, ids[:, part], future, past_key_values=caches[1], **keywords)
            for clock in used:
                clock.advance(count)
        for clock in used:
            clock.advanced(count)
        for layer in caches[1].layers:
            layer.advanced(count)
        real = mask[:, part].bool()
        assert tiny.relative_error(result[real], expected[real]) <= BOUND
        start += count
    assert caches[1].layers[0].recurrent_state.data_ptr() == memory


@pytest.mark.gpu
@pytest.mark.parametrize("make", [lambda: tiny.build("llama", NAME), hybrid], ids=["all", "hybrid"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_graph_gives_the_tokens_of_eager(make, mode):
    rows = 1 if "prompt_lookup_num_tokens" in mode else 2
    ids, mask = tiny.tokens(rows, 23).cuda(), tiny.padding([23, 9][:rows], 23, "left").cuda()
    expected = generate(make().cuda(), ids, mask, max_new_tokens=40, **mode)
    required = True if rows == 2 else "auto"
    model = hf_longattn.prepare_generation(make().cuda(), prefill_chunk_size=8, cuda_graph=required)
    assert generate(model, ids, mask, max_new_tokens=40, **mode) == expected


@pytest.mark.gpu
def test_one_capture_serves_a_whole_answer(monkeypatch):
    captures, real = [], GraphDecoder._capture
    monkeypatch.setattr(GraphDecoder, "_capture", lambda self, *a: (captures.append(1), real(self, *a))[1])
    model = hf_longattn.prepare_generation(hybrid().cuda(), cuda_graph=True)
    generate(model, tiny.tokens(1, 23).cuda(), max_new_tokens=100)
    assert len(captures) == 1
