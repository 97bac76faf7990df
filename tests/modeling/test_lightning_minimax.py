"""MiniMax with its lightning layers replaced: equal to the original without a cache, in every strategy."""

import copy
import functools

import pytest
import tiny
import torch
import transformers as tf
from transformers.models.minimax.modeling_minimax import (
    MiniMaxCache,
    MiniMaxLightningAttention,
    MiniMaxRMSNorm,
)

import hf_longattn
from hf_longattn import fusion
from hf_longattn.kernels.row_norm import gated_row_norm
from hf_longattn.modeling.lightning import minimax
from hf_longattn.modeling.lightning.minimax import MiniMaxLongContextCache, minimax_slopes

# fp32 sums in another order through four layers of experts; measured: at most 2e-6.
BOUND = 2e-5
KINDS = {
    "linear-first": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "softmax-first": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
}
both_orders = pytest.mark.parametrize("order", KINDS)


def build(order="linear-first"):
    torch.manual_seed(0)
    config = tf.MiniMaxConfig(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, layer_types=KINDS[order], num_local_experts=2,
        num_experts_per_tok=2, block_size=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, initializer_range=0.15,
    )  # fmt: skip
    return tf.MiniMaxForCausalLM(config).eval()


def prepared(order="linear-first", **kwargs):
    return hf_longattn.prepare_generation(build(order), **kwargs)


def logits(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"do_sample": False, "max_new_tokens": 9, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs).tolist()


def test_slopes_are_those_of_the_module():
    for module in build().modules():
        if isinstance(module, MiniMaxLightningAttention):
            ours = torch.tensor(minimax_slopes(4, module.layer_idx, 4))
            torch.testing.assert_close(ours, module.get_slope_rate().flatten(), rtol=1e-6, atol=0)


@both_orders
@pytest.mark.parametrize("length", [1, 15, 16, 50])
def test_logits_equal_the_original(order, length):
    ids = tiny.tokens(2, length)
    expected = logits(build(order), ids, use_cache=False)
    assert tiny.relative_error(logits(prepared(order), ids, use_cache=False), expected) <= BOUND
    assert tiny.relative_error(logits(prepared(order), ids, use_cache=True), expected) <= BOUND


def test_a_model_in_fp64_equals_the_original():
    ids, models = tiny.tokens(2, 20), [build().double(), prepared().double()]
    for model in models:
        # The grouped products of torch know no fp64.
        model.set_experts_implementation("eager")
    expected = logits(models[0], ids, use_cache=False)
    assert tiny.relative_error(logits(models[1], ids, use_cache=False), expected) <= BOUND
    assert tiny.relative_error(logits(models[1], ids, use_cache=True), expected) <= BOUND
    assert generate(models[1], ids) == generate(models[0], ids, use_cache=False)


def test_norm_and_gate_are_one_launch_unless_somebody_could_tell(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return gated_row_norm(*args, **kwargs)

    monkeypatch.setattr(minimax, "runs_on", lambda device: True)
    monkeypatch.setattr(minimax, "gated_row_norm", counted)
    ids, model = tiny.tokens(2, 20), prepared()
    expected = logits(build(), ids, use_cache=False)
    assert tiny.relative_error(logits(model, ids, use_cache=False), expected) <= BOUND and len(calls) == 3
    norms = [m for m in model.modules() if isinstance(m, MiniMaxRMSNorm)]
    for norm in norms:
        # What replaces norms for the time of a prompt computes the same.
        norm.forward = functools.partial(fusion._run, norm.forward, norm.forward)
    assert torch.equal(logits(model, ids, use_cache=False), logits(model, ids, use_cache=False))
    assert len(calls) == 9
    for norm in norms:
        norm.forward = torch.zeros_like
    assert not logits(model, ids, use_cache=False).any() and len(calls) == 9
    for norm in norms:
        del norm.forward
    handles = [norm.register_forward_hook(lambda *args: None) for norm in norms]
    assert tiny.relative_error(logits(model, ids, use_cache=False), expected) <= BOUND and len(calls) == 9
    for handle in handles:
        handle.remove()
    assert model(ids, use_cache=False).logits.requires_grad and len(calls) == 9


def test_gradients_equal_the_original():
    ids, gradients = tiny.tokens(2, 40), []
    for model in (build(), prepared()):
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert tiny.relative_error(gradients[1], gradients[0]) <= BOUND


# transformers' own cache counts no tokens where the first layer is linear, and is refused there.
@pytest.mark.parametrize(
    ("order", "kind"),
    [("linear-first", "ours"), ("softmax-first", "ours"), ("softmax-first", "transformers")],
)
@pytest.mark.parametrize("cut", [1, 7, 20, 39])
def test_a_prompt_in_chunks_equals_the_whole(order, kind, cut):
    model, ids = prepared(order), tiny.tokens(2, 40)
    expected = logits(build(order), ids, use_cache=False)
    cache = MiniMaxLongContextCache(model.config) if kind == "ours" else MiniMaxCache()
    parts = []
    for part in ids.split(cut, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits.detach())
    assert tiny.relative_error(torch.cat(parts, 1), expected) <= BOUND


@both_orders
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(order, side):
    model, ids = prepared(order), tiny.tokens(3, 21)
    mask = tiny.padding([21, 13, 4], 21, "left" if side == "holes" else side)
    if side == "holes":
        mask[0, [0, 5, 6]] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0).masked_fill(mask == 0, 1)
    result = logits(model, ids, mask, position_ids=where, use_cache=False)
    for row, exists in enumerate(mask.bool()):
        alone = logits(build(order), ids[row : row + 1, exists], use_cache=False)[0]
        assert tiny.relative_error(result[row][exists], alone) <= BOUND


@both_orders
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_equal_separate_ones(order, use_cache):
    lengths = [9, 1, 12]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    words = (
        {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        {"cu_seq_lens_q": torch.tensor([0, 0, 9, 10, 22])},
        {"seq_idx": numbers},
    )
    expected = torch.cat([logits(build(order), ids, use_cache=False) for ids in documents], 1)
    model, packed = prepared(order), torch.cat(documents, 1)
    for packing in words:
        cache = MiniMaxLongContextCache(model.config) if use_cache else None
        result = logits(model, packed, past_key_values=cache, use_cache=use_cache, **packing)
        assert tiny.relative_error(result, expected) <= BOUND, packing
    with pytest.raises(ValueError, match="`seq_idx` must be"):
        logits(model, packed, seq_idx=numbers[:, :5], use_cache=False)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@both_orders
@pytest.mark.parametrize("mode", MODES)
def test_generated_tokens_equal_those_without_a_cache(order, mode):
    ids = tiny.tokens(2, 23)
    expected = generate(build(order), ids, use_cache=False, **MODES[mode])
    for chunk in (None, 5):
        assert generate(prepared(order, prefill_chunk_size=chunk), ids, **MODES[mode]) == expected


# A kind of cache that MiniMax does not have is left out by transformers, which warns.
@both_orders
@pytest.mark.parametrize(("chunk", "kind", "count"), [(1, None, 1), (6, None, 9), (None, "static", 2)])
def test_left_padded_rows_generate_what_they_generate_alone(order, chunk, kind, count):
    ids, mask = tiny.tokens(2, 23), tiny.padding([23, 9], 23, "left")
    model = prepared(order, prefill_chunk_size=chunk)
    result = generate(model, ids, mask, cache_implementation=kind, max_new_tokens=count)
    alone = generate(build(order), ids[1:, 14:], use_cache=False, max_new_tokens=count)
    assert result[1][23:] == alone[0][9:]


@both_orders
def test_tokens_that_come_one_by_one_may_be_padding(order):
    model, ids, mask = prepared(order), tiny.tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 6], mask[1, [8, 11]] = 0, 0
    where, cache, parts = mask.cumsum(-1) - 1, None, []
    for start, stop in ((0, 6), *((t, t + 1) for t in range(6, 12))):
        call = {"position_ids": where[:, start:stop], "past_key_values": cache, "use_cache": True}
        output = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **call)
        cache = output.past_key_values
        parts.append(output.logits.detach())
    assert isinstance(cache, MiniMaxLongContextCache) and cache.get_seq_length() == 12
    for row, exists in enumerate(mask.bool()):
        alone = logits(build(order), ids[row : row + 1, exists], use_cache=False)[0]
        assert tiny.relative_error(torch.cat(parts, 1)[row][exists], alone) <= BOUND


def test_a_cache_that_counts_no_tokens_is_refused_once_it_holds_some():
    model, ids, cache = prepared(), tiny.tokens(1, 5), MiniMaxCache()
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="counts no tokens where the first layer is linear"):
        logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="must be a `MiniMaxLongContextCache"):
        logits(model, ids, past_key_values=hf_longattn.LongContextCache(model.config))


def test_a_restored_model_is_refused_the_states_of_a_prepared_one():
    model, ids = prepared("softmax-first"), tiny.tokens(1, 9)
    cache = MiniMaxLongContextCache(model.config)
    logits(model, ids, past_key_values=cache)
    hf_longattn.restore(model)
    with pytest.raises(ValueError, match="`past_key_values` is a MiniMaxLongContextCache.*has prepared"):
        logits(model, ids[:, :1], past_key_values=cache)


def test_prompt_lookup_rolls_the_state_back():
    ids = tiny.tokens(1, 6).repeat(1, 4)
    expected = generate(build(), ids, use_cache=False, max_new_tokens=20)
    assert generate(prepared(), ids, prompt_lookup_num_tokens=3, max_new_tokens=20) == expected


def test_the_cache_counts_forks_resets_and_is_saved(tmp_path):
    model, ids = prepared(), tiny.tokens(2, 12)
    cache, more = MiniMaxLongContextCache(model.config), tiny.tokens(2, 3, seed=5)
    logits(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == 12 and len(cache) == 4
    cache.save(tmp_path / "cache.safetensors")
    loaded = MiniMaxLongContextCache.load(tmp_path / "cache.safetensors", model.config)
    expected = logits(model, more, past_key_values=cache.fork())
    assert torch.equal(logits(model, more, past_key_values=loaded), expected)
    whole = logits(build(), torch.cat([ids, more], 1), use_cache=False)[:, 12:]
    assert tiny.relative_error(expected, whole) <= BOUND
    cache.reset()
    assert torch.equal(logits(model, ids, past_key_values=cache), logits(model, ids, use_cache=False))


def test_restore_gives_back_what_was_there():
    model, ids = build(), tiny.tokens(1, 20)
    names, weights = [set(vars(m)) for m in model.modules()], copy.deepcopy(model.state_dict())
    expected = logits(model, ids, use_cache=False)
    hf_longattn.prepare_generation(model)
    hf_longattn.restore(model)
    assert [set(vars(m)) for m in model.modules()] == names
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, ids, use_cache=False), expected)
