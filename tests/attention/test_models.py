"""Every family against transformers' eager attention: logits, gradients, tokens, any layout."""

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn  # noqa: F401  registers the implementations
from hf_longattn.attention.tree import tree_attention_forward
from hf_longattn.masking import lazy_mask

IMPLEMENTATIONS = ("tree_attention", "blockwise_attention")
BOUND = 2e-5
families = pytest.mark.parametrize("family", tiny.CAUSAL)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def logits(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generate(model, ids, mask, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": 9, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs).tolist()


@families
@implementations
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_equal_eager(family, implementation, side):
    lengths = [21, 21, 21] if side == "none" else [21, 13, 4]
    ids, mask = tiny.tokens(3, 21), tiny.padding(lengths, 21, side)
    expected = logits(tiny.build(family), ids, mask, position_ids=positions(mask))
    result = logits(tiny.build(family, implementation), ids, mask, position_ids=positions(mask))
    real = mask.bool()
    assert tiny.relative_error(result[real], expected[real]) <= BOUND


@families
@implementations
def test_gradients_equal_eager(family, implementation):
    ids, mask = tiny.tokens(2, 19), tiny.padding([19, 11], 19, "right")
    labels = torch.where(mask.bool(), ids, -100)
    gradients = []
    for name in ("eager", implementation):
        model = tiny.build(family, name)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, result = gradients
    assert expected.keys() == result.keys() and expected
    whole = [torch.cat([g[n].flatten() for n in sorted(g)]) for g in (result, expected)]
    assert tiny.relative_error(*whole) <= BOUND


@families
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_equal_eager(family, beams):
    ids, mask = tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    expected = generate(tiny.build(family), ids, mask, num_beams=beams)
    assert generate(tiny.build(family, "tree_attention"), ids, mask, num_beams=beams) == expected


@families
def test_packed_documents_equal_separate_ones(family):
    if family == "gpt2":
        pytest.skip("GPT-2 does not hand position ids to its attention; packing needs `cu_seq_lens_q` there")
    if family == "llama4":
        pytest.skip(
            "its chunks count from the start of the row, so documents that straddle one differ in eager too"
        )
    model = tiny.build(family, "tree_attention")
    lengths = [9, 1, 12]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    packed, position_ids = torch.cat(documents, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    layouts = [
        {"use_cache": False},
        {"use_cache": True},
        {"mask": torch.ones_like(packed)},
    ]
    for layout in layouts:
        result = logits(model, packed, position_ids=position_ids, **layout)
        assert tiny.relative_error(result, expected) <= BOUND, layout


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt-oss", "gpt-neox"])
def test_cumulative_lengths_keep_documents_apart(family):
    model = tiny.build(family, "blockwise_attention")
    lengths = [5, 8, 8]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    bounds = torch.tensor([0, 5, 13, 21], dtype=torch.int32)
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    result = logits(model, torch.cat(documents, 1), position_ids=position_ids, use_cache=True, **packing)
    assert tiny.relative_error(result, expected) <= BOUND


@implementations
def test_cumulative_lengths_count_through_all_rows(implementation):
    model, lengths = tiny.build("qwen3", implementation), [[5, 4], [3, 6], [9]]
    rows = [[tiny.tokens(1, n, seed=7 * row + n) for n in parts] for row, parts in enumerate(lengths)]
    packed = torch.cat([torch.cat(parts, 1) for parts in rows])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in parts]) for parts in lengths])
    bounds = torch.tensor([0, 5, 9, 12, 18, 27], dtype=torch.int32)
    expected = torch.cat([torch.cat([logits(model, ids) for ids in parts], 1) for parts in rows])
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    result = logits(model, packed, position_ids=position_ids, **packing)
    assert tiny.relative_error(result, expected) <= BOUND


@families
@pytest.mark.parametrize("cut", [1, 8, 20])
def test_a_prompt_in_chunks_equals_the_whole(family, cut):
    model = tiny.build(family, "tree_attention")
    ids, mask = tiny.tokens(2, 26), tiny.padding([26, 15], 26, "left")
    expected = logits(model, ids, mask, position_ids=positions(mask))
    cache = tf.DynamicCache(config=model.config)
    parts = []
    for start in range(0, 26, cut):
        part = slice(start, min(start + cut, 26))
        where = {"position_ids": positions(mask)[:, part], "past_key_values": cache}
        parts.append(logits(model, ids[:, part], mask[:, : part.stop], **where))
    real = mask.bool()
    assert tiny.relative_error(torch.cat(parts, 1)[real], expected[real]) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window"])
def test_static_cache_equals_dynamic(family):
    model = tiny.build(family, "tree_attention")
    ids, mask = tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    expected = generate(tiny.build(family), ids, mask)
    assert generate(model, ids, mask, cache_implementation="static") == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window"])
def test_static_cache_without_a_mask_sees_no_empty_slots(family):
    model, ids = tiny.build(family, "tree_attention"), tiny.tokens(2, 14)
    expected = logits(model, ids)
    cache = tf.StaticCache(config=model.config, max_cache_len=40)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split([9, 1, 4], dim=1)]
    assert tiny.relative_error(torch.cat(parts, 1), expected) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_prompt_lookup_on_transformers_own_cache(family):
    ids = tiny.tokens(1, 23)
    expected, result = (
        generate(tiny.build(family, name), ids, torch.ones_like(ids), prompt_lookup_num_tokens=3)
        for name in ("eager", "tree_attention")
    )
    assert result == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_change_of_one_token_changes_nothing_before_it(implementation):
    model = tiny.build("gemma2", implementation)
    ids = tiny.tokens(1, 24)
    changed = ids.clone()
    changed[0, 15] = (ids[0, 15] + 1) % 97
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@implementations
def test_holes_in_the_padding(implementation):
    ids, mask = tiny.tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 3:6], mask[1, [0, 9, 19]] = 0, 0
    expected = logits(tiny.build("llama"), ids, mask)
    result = logits(tiny.build("llama", implementation), ids, mask)
    assert tiny.relative_error(result[mask.bool()], expected[mask.bool()]) <= BOUND


@implementations
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_dense_mask_of_the_callers(implementation, kind):
    ids = tiny.tokens(2, 12)
    visible = (torch.rand(2, 1, 12, 12) > 0.4) | torch.eye(12, dtype=torch.bool)
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    expected = logits(tiny.build("llama"), ids, additive)
    result = logits(tiny.build("llama", implementation), ids, visible if kind == "bool" else additive)
    assert tiny.relative_error(result, expected) <= BOUND


@implementations
def test_under_autocast_as_exact_as_sdpa(implementation):
    ids, exact = tiny.tokens(2, 19), tiny.build("llama").double()(input_ids=tiny.tokens(2, 19)).logits
    errors = []
    for name in ("sdpa", implementation):
        model = tiny.build("llama", name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        errors.append(tiny.relative_error(output.logits, exact))
    assert errors[1] <= 1.5 * errors[0]


@implementations
def test_autocast_leaves_fp64_as_it_is(implementation):
    ids = tiny.tokens(2, 19)
    expected, result = (tiny.build("llama", name).double() for name in ("eager", implementation))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, result = expected(input_ids=ids).logits, result(input_ids=ids).logits
    assert result.dtype == torch.float64
    assert tiny.relative_error(result, expected) <= BOUND


@implementations
def test_holes_in_the_padding_of_a_prompt(implementation):
    ids, mask = tiny.tokens(1, 24), torch.ones(1, 24, dtype=torch.long)
    mask[:, 10:13] = 0
    assert generate(tiny.build("llama", implementation), ids, mask) == generate(
        tiny.build("llama"), ids, mask
    )


@implementations
def test_positions_that_do_not_count_up_are_no_packing(implementation):
    ids, grouped = tiny.tokens(1, 40), (torch.arange(40) // 4)[None]
    expected = logits(tiny.build("llama"), ids, torch.ones_like(ids), position_ids=grouped)
    result = logits(tiny.build("llama", implementation), ids, torch.ones_like(ids), position_ids=grouped)
    assert tiny.relative_error(result, expected) <= BOUND


@pytest.mark.parametrize("known", [True, False])
def test_cumulative_lengths_hold_under_any_mask_function(known):
    query, bounds = torch.randn(1, 2, 40, 16), torch.tensor([0, 13, 20, 40], dtype=torch.int32)

    def causal(batch, head, q, k):
        return k <= q

    function = {} if known else {"mask_function": causal}
    layer = torch.nn.Module()
    packed = tree_attention_forward(
        layer, query, query, query, lazy_mask(1, 40, 40, **function), cu_seq_lens_q=bounds
    )
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part, length = query[:, :, start:stop], stop - start
        alone = tree_attention_forward(layer, part, part, part, lazy_mask(1, length, length))
        assert tiny.relative_error(packed[0][:, start:stop], alone[0]) <= 2e-6
