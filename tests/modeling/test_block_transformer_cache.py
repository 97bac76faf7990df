"""The cache of a Block Transformer, and generation with it."""

import pytest
import torch
from block_variants import CLOSE, make, padded, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_blocks import SMALL
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longattn.modeling.block_transformer import BlockTransformerCache
from hf_longattn.modeling.block_transformer.cache_block_transformer import BlockLayer


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "roberta"])
@torch.no_grad()
def test_generation_with_cache_equals_without(variant, alignment):
    model = make(variant, block_alignment=alignment)
    ids, mask = padded([tokens(1, length, length)[0] for length in (2, 9, 15)], 15, "left")
    options = {"attention_mask": mask, "max_new_tokens": 11, "do_sample": False, "pad_token_id": 60}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
    assert not torch.equal(beams, cached)


@torch.no_grad()
def test_unequal_prompts_generate_as_alone():
    model = make()
    rows = [tokens(1, length, length)[0] for length in (1, 3, 4, 9, 18)]
    ids, mask = padded(rows, 18, "left")
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 60}
    together = model.generate(ids, attention_mask=mask, **options)[:, 18:]
    for place, row in enumerate(rows):
        alone = model.generate(row[None], **options)[0, len(row) :]
        assert torch.equal(together[place], alone), f"{place=}"


@torch.no_grad()
def test_short_prompt_fills_its_block_with_pads():
    model, ids = make(), tokens(1, 3)
    after = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 3:]
    filled = torch.cat([torch.tensor([[60]]), ids], dim=1)
    assert torch.equal(after, model.generate(filled, max_new_tokens=6, do_sample=False)[:, 4:])


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@torch.no_grad()
def test_generation_goes_on_from_a_cache(alignment):
    model = make(block_alignment=alignment)
    ids, mask = padded([tokens(1, length, length)[0] for length in (12, 9)], 12, "left")
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 60}
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    assert first.past_key_values.get_seq_length() == 18
    longer = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    seen = F.pad(mask, (0, 10), value=1)
    # By column, 22 columns would be filled to 24 anew; the cache was begun with 12, which need no filling.
    wanted = model.generate(longer, attention_mask=seen, block_offset=torch.zeros(2).long(), **options)
    again = model.generate(longer, attention_mask=seen, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, wanted)


@torch.no_grad()
def test_streamed_tokens_are_the_generated_ones():
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    model, streamer, ids = make(), Streamer(), tokens(1, 6)
    out = model.generate(ids, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), None]


@torch.no_grad()
def test_sampling_is_the_same_with_and_without_cache():
    model, ids, drawn = make(), tokens(2, 7), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, do_sample=True, top_k=5, max_new_tokens=12, use_cache=use_cache))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("length", [2, 10])
@torch.no_grad()
def test_assisted_decoding_changes_nothing(length):
    model, small, ids = make(), make(seed=5, num_hidden_layers=1), tokens(1, length)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    # Neither a model without blocks nor one with others is told of the pads of a short prompt.
    vanilla = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    for assistant in (small, vanilla, make("L8-P3")):
        options = {"max_new_tokens": 20, "do_sample": False, "assistant_model": assistant}
        assert torch.equal(plain, model.generate(ids, **options))
    looked_up = model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@torch.no_grad()
def test_crop_takes_tokens_back(alignment):
    model = make(block_alignment=alignment)
    ids, mask = padded([tokens(1, length, length)[0] for length in (6, 21)], 21, "left")
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for kept in range(1, 21):
        cache = BlockTransformerCache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(kept - 21)
        assert cache.get_seq_length() == kept
        logits = model(ids[:, kept:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, whole[:, kept:], msg=f"{kept=}", **CLOSE)


@torch.no_grad()
def test_batch_operations_of_the_cache():
    model, ids = make(), tokens(3, 10)
    cache = BlockTransformerCache(model.config)
    model(ids[:, :6], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(torch.arange(3))
    logits = model(ids[order][:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids[order], use_cache=False).logits[:, 6:], **CLOSE)


@torch.no_grad()
def test_cache_holds_one_block_for_every_length_tokens():
    model = make(token_num_hidden_layers=2, num_hidden_layers=2)
    cache = BlockTransformerCache(model.config)
    model(tokens(2, 64), past_key_values=cache)
    held = sum(part.numel() for layer in cache.layers for part in (layer._keys, layer._values))
    layers = model.config.num_hidden_layers + model.config.token_num_hidden_layers
    vanilla = layers * 2 * 2 * 64 * model.config.hidden_size
    assert held == vanilla // 2 // model.config.block_length


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 21), min_size=1, max_size=3),
    st.integers(0, 5),
    st.booleans(),
    st.data(),
)
@torch.no_grad()
def test_any_lengths(block_length, lengths, extra, left, data):
    model = make(block_length=block_length, projection_method="projection_layer", num_hidden_layers=1)
    rows = [tokens(1, length, length)[0] for length in lengths]
    ids, mask = padded(rows, max(lengths) + extra, "left" if left else "right")
    split = data.draw(st.integers(1, ids.shape[1]))
    cache = BlockTransformerCache(model.config)
    logits = model(ids[:, :split], attention_mask=mask[:, :split], past_key_values=cache).logits
    if split < ids.shape[1]:
        rest = model(ids[:, split:], attention_mask=mask, past_key_values=cache).logits
        logits = torch.cat([logits, rest], dim=1)
    for place, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[place][mask[place].bool()], alone, **CLOSE)


@torch.no_grad()
def test_a_forward_that_is_asked_for_no_row_fills_the_cache_alone():
    model, ids = make(), tokens(2, 11)
    cache = BlockTransformerCache(model.config)
    outputs = model(ids, past_key_values=cache, logits_to_keep=ids.new_empty(0))
    assert outputs.logits.shape[:2] == (2, 0)
    whole = model(torch.cat([ids, ids], dim=1)).logits[:, 11:]
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, **CLOSE)


@pytest.mark.parametrize("borrowed", [False, True], ids=["new", "borrowed"])
def test_only_what_nobody_is_about_to_write_is_cleared(borrowed):
    layer = BlockLayer(8)
    layer.lazy_initialization(torch.zeros(3, 2, 0, 4), torch.zeros(3, 2, 0, 5))
    if borrowed:
        layer.borrowed = torch.full((3, 2, 8, 4), torch.nan), torch.full((3, 2, 8, 5), torch.nan)
    # What `torch.empty` gives is NaN in tests.
    layer.reserve(3, 7, written=5)
    for buffer in (layer._keys, layer._values):
        assert buffer.shape[:3] == (3, 2, 8)
        assert buffer[:, :, :5].isnan().all() and (buffer[:, :, 5:] == 0).all()
        buffer[:, :, :5] = 1.0
    layer.reserve(3, 9)
    for buffer in (layer._keys, layer._values):
        assert (buffer[:, :, :5] == 1).all() and (buffer[:, :, 5:] == 0).all()
