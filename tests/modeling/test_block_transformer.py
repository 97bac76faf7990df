"""The Block Transformer against itself: padding, packing, splits of the cache, strategies, loss, saving."""

import pytest
import torch
from block_variants import CLOSE, every_variant, make, padded, tokens
from tiny_blocks import SMALL
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_longattn.modeling.block_transformer import (
    BlockTransformerCache,
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
    register,
)

register()


def by_hand(model, ids):
    """Logits of one row without pads from the definition: block by block, token by token, nothing shared."""
    config, base = model.config, model.model
    length, blocks = config.block_length, ids.shape[0] // config.block_length
    logits = torch.zeros(ids.shape[0], config.vocab_size)
    embeds = base.embedder(ids[: blocks * length].view(1, blocks, length), None)
    for row in range(length - 1, ids.shape[0]):
        target, slot = divmod(row + 1, length)
        context = embeds[:, :target].flatten(1, 2)
        each = config.n_embedding_tokens
        mask = torch.zeros(1, 1, target * each, target * each, dtype=torch.bool)
        for query in range(target * each):
            mask[..., query, : (query // each + 1) * each] = True
        base.block_decoder.config._attn_implementation_internal = "sdpa"
        states = base.block_decoder(inputs_embeds=context, attention_mask=mask).last_hidden_state
        prefix = base.token_decoder.expand(states[:, -each:])
        own = ids[target * length : target * length + slot][None]
        if config.decoding_strategy == "prefix":
            inputs = torch.cat([prefix, base.token_decoder.embed_tokens(own)], dim=1)
        else:
            inputs = base.token_decoder.embed_tokens(F.pad(own, (1, 0), value=config.start_token_id))
        if config.decoding_strategy == "summation":
            inputs = inputs + prefix[:, : slot + 1]
        extra = {"encoder_hidden_states": prefix} if config.decoding_strategy == "cross_attention" else {}
        state = base.token_decoder.decoder(inputs_embeds=inputs, **extra).last_hidden_state[0, -1]
        scale = config.token_hidden_size**-0.5 if extra else 1
        logits[row] = model.lm_head(state * scale)
    return logits


@every_variant
@torch.no_grad()
def test_logits_follow_the_definition(variant):
    model, ids = make(variant), tokens(2, 13)
    logits = model(ids).logits
    for row in range(2):
        torch.testing.assert_close(logits[row], by_hand(model, ids[row]), **CLOSE)
    length = model.config.block_length
    assert not logits[:, : length - 1].any() and logits[:, length - 1 :].any(dim=-1).all()


@every_variant
@torch.no_grad()
def test_cached_equals_uncached_at_every_split(variant):
    model, ids = make(variant), tokens(2, 19)
    whole = model(ids, use_cache=False).logits
    for split in range(1, 19):
        cache = BlockTransformerCache(model.config)
        first = model(ids[:, :split], past_key_values=cache).logits
        second = model(ids[:, split:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, msg=f"{split=}", **CLOSE)
        assert cache.get_seq_length() == 19
    cache, rows = BlockTransformerCache(model.config), []
    for column in range(19):
        rows.append(model(ids[:, column : column + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "roberta", "llama-gqa"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(variant, side):
    model = make(variant)
    rows = [tokens(1, length, length)[0] for length in (3, 9, 17, 12)]
    ids, mask = padded(rows, 20, side)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    other = model(torch.where(mask.bool(), ids, 7), attention_mask=mask, use_cache=False).logits
    for place, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[place][mask[place].bool()], alone, **CLOSE)
        torch.testing.assert_close(other[place][mask[place].bool()], alone, **CLOSE)


@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "roberta", "llama-gqa"])
@torch.no_grad()
def test_ragged_rows_in_the_cache(variant):
    """Rows whose blocks fill up at different steps: chunks with pads inside, then single tokens."""
    model, rows = make(variant), [tokens(1, length, length)[0] for length in (5, 22, 13)]
    held = [0, 0, 0]
    cache, seen = BlockTransformerCache(model.config), torch.zeros(3, 0, dtype=torch.long)
    whole = [model(row[None], use_cache=False).logits[0] for row in rows]
    for takes in ((1, 6, 9), (2, 5, 0), (0, 9, 3), (1, 1, 1), (1, 1, 0)):
        chunk = [row[at : at + take] for row, at, take in zip(rows, held, takes, strict=True)]
        ids, mask = padded(chunk, max(takes), "left" if sum(takes) % 2 else "right")
        seen = torch.cat([seen, mask], dim=1)
        logits = model(ids, attention_mask=seen, past_key_values=cache).logits
        for place, (at, take) in enumerate(zip(held, takes, strict=True)):
            torch.testing.assert_close(
                logits[place][mask[place].bool()], whole[place][at : at + take], **CLOSE
            )
        held = [at + take for at, take in zip(held, takes, strict=True)]


@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "llama-gqa"])
@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q", "seq_idx", "all-ones-mask"])
@torch.no_grad()
def test_packed_documents_do_not_meet(variant, by):
    model, lengths = make(variant), (9, 1, 14, 4, 6)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    inputs = {"cu_seq_lens_q": ends} if by == "cu_seq_lens_q" else {"position_ids": positions}
    if by == "seq_idx":
        inputs = {"seq_idx": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]}
    if by == "all-ones-mask":
        inputs["attention_mask"] = torch.ones_like(ids)
    out = model(ids, labels=ids, **inputs)
    scored, total = 0, 0.0
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        alone = model(ids[:, start:end], labels=ids[:, start:end], use_cache=False)
        torch.testing.assert_close(out.logits[:, start:end], alone.logits, **CLOSE)
        count = max(int(end - start) - model.config.block_length, 0)
        scored, total = scored + count, total + alone.loss * count
    torch.testing.assert_close(out.loss, total / scored, **CLOSE)


@torch.no_grad()
def test_cumulative_lengths_count_through_all_rows():
    model, ids = make("llama-gqa"), tokens(2, 14)
    # What comes behind the last end, here of the second row, is no part of the document before it.
    ends = torch.tensor([0, 9, 14, 19])
    logits = model(ids, cu_seq_lens_q=ends, position_ids=torch.arange(14)[None]).logits
    for row, start, end in ((0, 0, 9), (0, 9, 14), (1, 0, 5), (1, 5, 14)):
        alone = model(ids[row : row + 1, start:end], use_cache=False).logits
        torch.testing.assert_close(logits[row : row + 1, start:end], alone, **CLOSE)


@pytest.mark.parametrize("keep", [1, 3, 6, torch.tensor([2, 9, 13])], ids=["1", "3", "6", "indices"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_logits_to_keep(keep, side):
    model = make()
    ids, mask = padded([tokens(1, length, length)[0] for length in (4, 9, 14)], 14, side)
    mask = None if side == "none" else mask
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    whole = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    for use_cache in (False, True):
        kept = model(ids, attention_mask=mask, logits_to_keep=keep, use_cache=use_cache).logits
        torch.testing.assert_close(kept, whole, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "tree_attention"])
def test_loading_with_an_implementation(implementation, tmp_path):
    import hf_longattn  # noqa: F401  registers the names

    make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    local = "eager" if implementation == "eager" else "sdpa"
    assert model.model.block_decoder.config._attn_implementation == implementation
    assert model.model.token_decoder.decoder.config._attn_implementation == local


IMPLEMENTATIONS = ("eager", "sdpa", "tree_attention", "blockwise_attention")
PAIRS = [(name, variant) for name in IMPLEMENTATIONS for variant in ("prefix", "two-vectors", "llama-gqa")]
PAIRS += [pytest.param("flex_attention", "prefix", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("implementation", "variant"), PAIRS)
@torch.no_grad()
def test_attention_implementations_agree(implementation, variant):
    import hf_longattn  # noqa: F401  registers the names

    model, ids = make(variant), tokens(2, 21)
    wanted = model(ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    assert model.model.block_decoder.config._attn_implementation == implementation
    assert model.model.token_decoder.decoder.config._attn_implementation == (
        "eager" if implementation == "eager" else "sdpa"
    )
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, **CLOSE)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, :9], wanted[:, :9], **CLOSE)
    torch.testing.assert_close(packed[:, 9:], model(ids[:, 9:], use_cache=False).logits, **CLOSE)
    if implementation == "flex_attention":
        return
    rows, mask = padded([tokens(1, length, length)[0] for length in (5, 9, 17)], 17, "left")
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 60}
    generated = model.generate(rows, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(rows, **options))


@every_variant
@torch.no_grad()
def test_save_and_load(variant, tmp_path):
    model, ids = make(variant), tokens(1, 11)
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is BlockTransformerForCausalLM
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)


def test_resizing_reaches_both_tables():
    model = make()
    model.resize_token_embeddings(70)
    assert model.model.embedder.embeddings.weight.shape[0] == model.lm_head.weight.shape[0] == 70
    model(torch.full((1, 9), 69), labels=torch.full((1, 9), 69)).loss.backward()


def test_hidden_states_and_attentions():
    model, ids = make(), tokens(1, 12)
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(1, 12, 32)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, 2, 3, 3)] * 2
    # No block stands before any row of a text shorter than one.
    short = model(ids[:, :2], output_hidden_states=True).hidden_states
    assert [(tuple(states.shape), bool(states.any())) for states in short] == [((1, 2, 32), False)] * 3
    for chosen in ([0], [1]):
        kinds = [
            [None if states is None else states.shape[2] for states in part.hidden_states]
            for part in (model(row, output_hidden_states=chosen) for row in (ids, ids[:, :2]))
        ]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"block_length": 0}, "block_length"),
        ({"n_embedding_tokens": 3}, "n_embedding_tokens"),
        ({"embedder_hidden_size": 5}, "embedder_hidden_size"),
        ({"decoding_strategy": "summation"}, "expansion_ratio"),
        ({"expansion_method": None, "token_hidden_size": 16}, "token_hidden_size"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"block_alignment": "rows"}, "block_alignment"),
        ({"n_embedding_tokens": 0}, "`n_embedding_tokens` must be at least 1"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1"),
        ({"pad_token_id": -1}, "`pad_token_id` must be an id"),
        ({"pad_token_id": 61}, "`pad_token_id` must be an id"),
        (
            {"expansion_ratio": 4, "decoding_strategy": "summation", "bos_token_id": 61},
            "`bos_token_id` must be",
        ),
        ({"embedder_type": "roberta_cls", "embedder_bos_token_id": 61, "n_cls_tokens": 4}, "`embedder_bos_"),
        ({"embedder_type": "roberta", "embedder_max_position_embeddings": 5}, "must be at least 6"),
    ],
)
def test_configuration_refuses(fields, name):
    with pytest.raises(Exception, match=f"{name}"):
        BlockTransformerConfig(**(SMALL | fields))


def test_forward_refuses():
    model, ids = make(), tokens(1, 8)
    with pytest.raises(ValueError, match="`input_ids`"):
        model(None)
    with pytest.raises(ValueError, match="`input_ids`"):
        model(ids[0])
    for shape in ((1, 1, 8, 8), (1, 7), (2, 8)):
        with pytest.raises(ValueError, match="`attention_mask`"):
            model(ids, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="`past_key_values`"):
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        model(ids, position_ids=packed, past_key_values=BlockTransformerCache(model.config))
    with pytest.raises(ValueError, match="got `inputs_embeds` too"):
        model(ids, inputs_embeds=torch.zeros(1, 8, 32))
    with pytest.raises(TypeError, match="`attention_mask` must be a tensor"):
        model(ids, attention_mask=[[1] * 8])
    for shape in ((1, 5), (3, 1, 8)):
        with pytest.raises(ValueError, match="`position_ids`"):
            model(ids, position_ids=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="`seq_idx`"):
        model(ids, seq_idx=torch.zeros(1, 5))
    for ends in ([0, 5, 60], [1, 5, 8], [0, 6, 5, 8]):
        with pytest.raises(ValueError, match="`cu_seq_lens_q` must rise from 0"):
            model(ids, cu_seq_lens_q=torch.tensor(ends))
    with pytest.raises(ValueError, match="`cu_seq_lens_k`"):
        model(ids, cu_seq_lens_k=torch.tensor([0, 5, 8]))
    with pytest.raises(TypeError, match="`cu_seq_lens_q`"):
        model(ids, cu_seq_lens_q=[0, 5, 8])
    for offset in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="`block_offset`"):
            model(ids, block_offset=torch.tensor(offset))
    with pytest.raises(ValueError, match="`block_alignment='tokens'`"):
        make(block_alignment="columns")(ids, position_ids=packed)
    with pytest.raises(ValueError, match="`cache_implementation`"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="`assistant_early_exit`"):
        model.generate(ids, assistant_early_exit=1, max_new_tokens=2)


@torch.no_grad()
def test_caches_of_others_are_refused():
    """Each with what differs, and before anything is written."""
    model, ids = make(), tokens(2, 8)
    with pytest.raises(TypeError, match="got tuple"):
        model(ids, past_key_values=((ids, ids),))
    cache = BlockTransformerCache(model.config)
    wanted = model(ids, past_key_values=cache, use_cache=True).logits
    with pytest.raises(ValueError, match="holds 2 rows"):
        model(ids[:1], past_key_values=cache)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="cannot hold packed documents"):
        model(ids, position_ids=packed, past_key_values=cache)
    others = {"L8-P3": "`block_length` 4 and not 8", "two-vectors": "`n_embedding_tokens` 1 and not 2"}
    others["llama-gqa"] = "`head_dim` 16 and not 8"
    for variant, difference in others.items():
        with pytest.raises(ValueError, match=difference):
            make(variant)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`num_hidden_layers` 2 and not 3"):
        make(num_hidden_layers=3)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`block_alignment` tokens and not columns"):
        make(block_alignment="columns")(ids, past_key_values=cache)
    assert cache.get_seq_length() == 8
    cache = BlockTransformerCache(model.config)
    assert torch.equal(model(ids, past_key_values=cache).logits, wanted)


def test_every_field_is_listed():
    """A new field needs a reason: the list makes adding one show."""
    import dataclasses

    from transformers import PreTrainedConfig

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(BlockTransformerConfig)} - inherited
    assert len(own) == 52, sorted(own)
