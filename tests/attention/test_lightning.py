"""Lightning attention as a flag: against its definition, in every layout of tokens, with every cache."""

import logging
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longattn
from hf_longattn.attention.lightning import lightning_attention_forward, tnl_slopes
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.generation.graph import GraphDecoder, device_lengths, rehearsal
from hf_longattn.instance import Setup
from hf_longattn.kernels import dispatch
from hf_longattn.masking import lazy_mask

FAMILIES = ("llama", "qwen2", "qwen3", "gpt-neox", "cohere", "phi3", "olmo2", "gpt2")
families = pytest.mark.parametrize("family", FAMILIES)
NAME = "lightning_attention"
# Two orders of summation in fp32 through three layers with a norm each; measured: at most 9e-7.
BOUND = 1e-5


def slopes_by_hand(heads, layer, layers):
    """ALiBi's published rule, recursively, times the layer's factor."""

    def alibi(n):
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start ** (i + 1) for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return alibi(closest) + alibi(2 * closest)[0::2][: n - closest]

    factor = 1.0 + 1e-5 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
    return torch.tensor(alibi(heads), dtype=torch.float64) * factor


def definition(query, key, value, slopes, scale, visible, rank):
    """fp64, quadratic: visible (B, 1, T, S) bool, rank (B, S) the number of existing tokens so far."""
    heads = query.shape[1]
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    distance = (rank[:, None, :, None] - rank[:, None, None, :]).double()
    decay = torch.where(visible, torch.exp(-slopes[:, None, None] * distance), 0)
    output = scale * (q @ k.transpose(-1, -2) * decay) @ v
    flat = output.transpose(1, 2).flatten(2)
    return (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)).view_as(output.transpose(1, 2))


def by_hand_forward(module, query, key, value, mask, dropout=0.0, scaling=None, **unused):
    """The definition in the signature of an attention function; no cache."""
    batch, heads, length, _ = query.shape
    visible = mask.tile(slice(0, length))
    exists = torch.ones(batch, length) if mask.padding is None else mask.padding
    slopes = slopes_by_hand(heads, module.layer_idx, module.config.num_hidden_layers)
    result = definition(query, key, value, slopes, scaling, visible, exists.cumsum(-1))
    return result.to(query.dtype), None


tf.AttentionInterface.register("lightning_by_hand", by_hand_forward)
tf.AttentionMaskInterface.register("lightning_by_hand", lazy_mask)


def logits(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"do_sample": False, "max_new_tokens": 9, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs).tolist()


def uncached(model, ids, count=9):
    """Greedy decoding of one row with no cache at all."""
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids.tolist()


def hybrid(**kwargs):
    model = tiny.build("qwen3", NAME, **kwargs)
    model.config.lightning_layers = [0, 2]
    return model


# The slopes


@pytest.mark.parametrize("heads", [1, 2, 8, 9, 12, 32, 48])
@pytest.mark.parametrize("layer", [0, 1, 5])
def test_slopes_are_those_of_transnormerllm(heads, layer):
    result = torch.tensor(tnl_slopes(heads, layer, 6), dtype=torch.float64)
    torch.testing.assert_close(result, slopes_by_hand(heads, layer, 6), rtol=1e-12, atol=0)


def test_slopes_of_a_single_layer():
    assert tnl_slopes(8, 0, 1)[0] == pytest.approx(0.5 * (1 + 1e-5))
    # The last layer's slowest head barely forgets: what fp32 decays could not hold.
    assert tnl_slopes(32, 23, 24)[-1] == pytest.approx(2**-8 * 1e-5)


# Whole models against the definition


@families
@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
def test_logits_equal_the_definition(family, side):
    lengths = [21, 21, 21] if side in ("none", "holes") else [21, 13, 4]
    ids, mask = tiny.tokens(3, 21), tiny.padding(lengths, 21, "left" if side == "holes" else side)
    if side == "holes":
        mask[0, 3:6], mask[1, [0, 9, 20]], mask[2, :] = 0, 0, 0
        mask[2, 4] = 1
    expected = logits(tiny.build(family, "lightning_by_hand"), ids, mask, position_ids=positions(mask))
    result = logits(tiny.build(family, NAME), ids, mask, position_ids=positions(mask))
    real = mask.bool()
    assert tiny.relative_error(result[real], expected[real]) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_equal_the_definition(family, side):
    ids, mask = tiny.tokens(2, 19), tiny.padding([19, 11], 19, side)
    labels, gradients = torch.where(mask.bool(), ids, -100), []
    for name in ("lightning_by_hand", NAME):
        model = tiny.build(family, name)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert tiny.relative_error(gradients[1], gradients[0]) <= BOUND


def test_checkpointing_changes_nothing():
    ids, mask, gradients = tiny.tokens(2, 19), tiny.padding([19, 11], 19, "left"), []
    for checkpointing in (False, True):
        model = tiny.build("llama", NAME).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])


def test_two_epochs_of_one_batch_are_learnt():
    model, ids = tiny.build("llama", NAME).train(), tiny.tokens(2, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_error_in_half_precision_is_that_of_the_plain_formula(dtype):
    batch, heads, length, width = 2, 4, 70, 32
    q, k, v = (torch.randn(batch, heads, length, width).to(dtype) for _ in range(3))
    module, mask = Module(heads), lazy_mask(batch, length, length)
    visible, rank = mask.tile(slice(0, length)), torch.arange(length).expand(batch, length)
    slopes = slopes_by_hand(heads, 1, 3)
    expected = definition(q, k, v, slopes, 0.2, visible, rank)
    plain = 0.2 * (q @ k.mT * torch.where(visible, torch.exp(-slopes[:, None, None] * (
        rank[:, None, :, None] - rank[:, None, None]).double()), 0).to(dtype)) @ v  # fmt: skip
    plain = F.rms_norm(plain.transpose(1, 2).flatten(2), (heads * width,), eps=1e-6)
    result, _ = lightning_attention_forward(module, q, k, v, mask, scaling=0.2)
    bound = 1.5 * (tiny.relative_error(plain, expected.flatten(2)) + torch.finfo(dtype).eps)
    assert tiny.relative_error(result, expected) <= bound


class Module(torch.nn.Module):
    """What an attention module shows to an attention function."""

    is_causal = True

    def __init__(self, heads=4, **config):
        super().__init__()
        self.config = tf.LlamaConfig(num_attention_heads=heads, num_hidden_layers=3, **config)
        self.config._attn_implementation = NAME
        self.layer_idx = 1


# Batches, packing


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mates_and_padding_side_change_nothing(family, side):
    model, short = tiny.build(family, NAME), tiny.tokens(1, 8)
    alone = logits(model, short)[0]
    pad = torch.full((1, 15), 5)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask = tiny.padding([8, 23], 23, side)
    together = logits(model, torch.cat([row, tiny.tokens(1, 23, seed=4)]), mask, position_ids=positions(mask))
    assert tiny.relative_error(together[0][mask[0].bool()], alone) <= BOUND


@families
def test_packed_documents_equal_separate_ones(family):
    if family == "gpt2":
        pytest.skip("GPT-2 does not hand position ids to its attention; packing needs `cu_seq_lens_q` there")
    model, lengths = tiny.build(family, NAME), [9, 1, 12]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    packed, position_ids = torch.cat(documents, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    layouts = {
        "training": {"use_cache": False},
        "dynamic": {"use_cache": True},
        "mask": {"mask": torch.ones_like(packed)},
        "state": {"past_key_values": LongContextCache(model.config)},
    }
    for name, layout in layouts.items():
        result = logits(model, packed, position_ids=position_ids, **layout)
        assert tiny.relative_error(result, expected) <= BOUND, name
    # The state that is left behind is that of the last document alone.
    cache = LongContextCache(model.config)
    logits(model, documents[-1], past_key_values=cache)
    for packed_layer, layer in zip(layouts["state"]["past_key_values"].layers, cache.layers, strict=True):
        error = tiny.relative_error(packed_layer.recurrent_state, layer.recurrent_state)
        assert error <= BOUND


def test_packed_rows_of_a_padded_batch():
    model, lengths = tiny.build("llama", NAME), [[9, 1, 12], [4, 7]]
    documents = [[tiny.tokens(1, n, seed=n) for n in row] for row in lengths]
    rows = [F.pad(torch.cat(row, 1), (0, 22 - sum(n))) for row, n in zip(documents, lengths, strict=True)]
    position_ids = torch.zeros(2, 22, dtype=torch.long)
    for b, row in enumerate(lengths):
        position_ids[b, : sum(row)] = torch.cat([torch.arange(n) for n in row])
    mask = tiny.padding([22, 11], 22, "right")
    result = logits(model, torch.cat(rows), mask, position_ids=position_ids)
    for b, row in enumerate(documents):
        expected = torch.cat([logits(model, ids) for ids in row], 1)[0]
        assert tiny.relative_error(result[b][mask[b].bool()], expected) <= BOUND


def test_cumulative_lengths_keep_documents_apart():
    model, lengths = tiny.build("gpt2", NAME), [5, 8, 8]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    bounds = torch.tensor([0, 5, 13, 21], dtype=torch.int32)
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    result = logits(model, torch.cat(documents, 1), position_ids=position_ids, use_cache=False, **packing)
    assert tiny.relative_error(result, expected) <= BOUND


# Caches


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


def test_a_batch_of_another_size_is_refused():
    model = tiny.build("llama", NAME)
    cache = LongContextCache(model.config)
    logits(model, tiny.tokens(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        logits(model, tiny.tokens(3, 5), past_key_values=cache)


# The config


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
        ("lightning_layers", [0, 3]),
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "left", "holes", "packed"])
def test_forward_compiles_in_one_graph(layout):
    torch._dynamo.reset()
    ids, mask = tiny.tokens(2, 14), tiny.padding([14, 9], 14, "left")
    if layout == "holes":
        mask[0, 4:7] = 0
    where = torch.arange(14)[None] if layout in ("plain", "packed") else positions(mask)
    if layout == "packed":
        where = torch.cat([torch.arange(5), torch.arange(9)]).expand(2, -1)
    mask = None if layout in ("plain", "packed") else mask
    model = tiny.build("llama", NAME)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = logits(model, ids, mask, position_ids=where, use_cache=False)
    with torch.no_grad():
        keywords = {"position_ids": where, "use_cache": False}
        result = compiled(input_ids=ids, attention_mask=mask, **keywords).logits
    real = slice(None) if mask is None else mask.bool()
    assert tiny.relative_error(result[real], expected[real]) <= BOUND


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
