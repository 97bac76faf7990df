"""What a step of a prepared Block Transformer launches, reads and holds."""

import contextlib

import pytest
import torch
from block_answers import GREEDY, both, generate
from tiny_blocks import PAD, make, prompts
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import masking_utils

import hf_longattn
from hf_longattn.fusion import fused
from hf_longattn.generation import blocks
from hf_longattn.modeling.block_transformer import BlockTransformerCache, decoding, held, steps


def test_captured_steps_attend_within_a_block_in_one_launch(recorded, monkeypatch):
    calls, real = [], steps.few_key_attention
    monkeypatch.setattr(
        steps,
        "few_key_attention",
        lambda *args, **options: (calls.append((args[0].shape[2], args[5])), real(*args, **options))[1],
    )
    plain, fast = both(make(), *prompts(9, 6), **GREEDY)
    assert torch.equal(fast, plain) and len(recorded) == 1
    # Rehearsal and capture of four steps, two layers, two groups: P vectors open a block, tokens follow.
    assert len(calls) == 2 * 4 * 2 * 2
    assert set(calls) == {(2, 0), (1, 2), (1, 3), (1, 4)}


def note_writes(monkeypatch):
    """The keys of every rotation and write in one, and of every write alone, as they come."""
    together, alone, real = [], [], steps.rotary_cache_write
    monkeypatch.setattr(
        steps, "rotary_cache_write", lambda *given: (together.append(given[1].shape), real(*given))[1]
    )
    monkeypatch.setattr(held, "cache_write", lambda *given: alone.append(given))
    return together, alone


@pytest.mark.parametrize("lengths", [(9, 9), (9, 6)], ids=["even", "own places"])
def test_captured_steps_turn_and_keep_the_keys_of_a_block_in_one_launch(lengths, recorded, monkeypatch):
    together, alone = note_writes(monkeypatch)
    plain, fast = both(make(n_embedding_tokens=2), *prompts(*lengths), **GREEDY)
    assert torch.equal(fast, plain) and len(recorded) == 1 and not alone
    # Rehearsal and capture, two layers; rows at slots of their own are two groups.
    groups = len(set(lengths))
    assert [tuple(shape) for shape in together] == [(2 // groups, 2, 2, 16)] * 2 * 2 * groups


@torch.no_grad()
def check_one_block(monkeypatch, lengths, device, dtype):
    """A step of the block decoder has the same bits whether rotation and write are one launch or two."""
    # The norms of layers without parallel branches are their own.
    model, results = make(use_parallel_residual=False, rotary_pct=0.5).to(device, dtype), []
    model.set_attn_implementation("tree_attention")
    # What is compared is the rotation, not the angles.
    monkeypatch.setattr(steps, "_look_rotations_up", lambda changes, decoder: None)
    ids, mask = (tensor.to(device) for tensor in prompts(*lengths))
    embeds = torch.randn(2, 1, 32, device=device, dtype=dtype)
    for fast in (False, True):
        cache = BlockTransformerCache(model.config, 32)
        model(ids, attention_mask=mask, past_key_values=cache)
        kept = held.HeldBlocks(cache, slice(0, 2))
        assert kept.even == (lengths[0] == lengths[1])
        given = {"inputs_embeds": embeds, "attention_mask": kept.mask(), "position_ids": kept.places}
        together = note_writes(monkeypatch)[0] if fast else []
        with fused(model), steps.few_launches(model) if fast else contextlib.nullcontext():
            outputs = model.model.block_decoder(**given, past_key_values=kept, use_cache=False)
        assert len(together) == 2 * fast
        end = int(cache.num_blocks.max()) + 1
        results.append([outputs[0], *[part[:, :, :end] for pair in kept.buffers for part in pair]])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


@pytest.mark.parametrize("lengths", [(9, 9), (13, 6)], ids=["even", "own places"])
def test_a_block_turned_and_kept_in_one_launch_has_the_bits_of_two(lengths, monkeypatch):
    check_one_block(monkeypatch, lengths, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(9, 9), (13, 6)], ids=["even", "own places"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_turned_and_kept_in_one_launch_has_the_bits_of_two_on_a_gpu(lengths, dtype, monkeypatch):
    check_one_block(monkeypatch, lengths, "cuda", dtype)


def room_for(model, rows, blocks):
    """Empty buffers for some blocks of every row."""
    cache = BlockTransformerCache(model.config)
    cache.start(torch.zeros(rows, 0, dtype=torch.long, device=model.device), None)
    decoding.make_room(model, cache, blocks * model.config.block_length)
    return held.HeldBlocks(cache, slice(0, rows))


@torch.no_grad()
def check_prompts(monkeypatch, device, dtype, rows):
    """Blocks of prompts, read in two pieces, have the same bits whether rotation and write are one launch."""
    # Sums of the branches are the layers' own.
    model, results = make(use_parallel_residual=False, rotary_pct=0.5).to(device, dtype), []
    model.set_attn_implementation("tree_attention")
    embeds = torch.randn(2, 7, 32, device=device, dtype=dtype)
    index = torch.arange(*rows.indices(4), device=device)
    for where, fast in ((rows, False), (rows, True), (index, True)):
        kept, together, outputs = room_for(model, 4, 9), note_writes(monkeypatch)[0], []
        for start, count in ((0, 4), (4, 3)):
            first = held.FirstBlocks(kept, where, count, start)
            mask = held.FirstMask(2, count, embeds.device, start)
            given = {"attention_mask": mask, "position_ids": first.places, "past_key_values": first}
            given["inputs_embeds"] = embeds[:, start : start + count]
            with fused(model), steps.few_launches(model) if fast else contextlib.nullcontext():
                outputs.append(model.model.block_decoder(**given, use_cache=False)[0])
        # Two layers, two pieces; rows that lie apart are gathered.
        assert len(together) == 4 * (fast and where is rows)
        results.append([*outputs, *(part for pair in kept.buffers for part in pair)])
        written = torch.zeros(4, 1, 9, 1, dtype=torch.bool, device=device)
        written[index, :, :7] = True
        assert all(torch.equal(part != 0, written.expand_as(part)) for part in results[-1][2:])
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 2)], ids=["inside", "front"])
def test_prompts_turned_and_kept_in_one_launch_have_the_bits_of_two(rows, monkeypatch):
    check_prompts(monkeypatch, "cpu", torch.float32, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_turned_and_kept_in_one_launch_have_the_bits_of_two_on_a_gpu(dtype, monkeypatch):
    # What is compared is the rotation, not the angles.
    monkeypatch.setattr(steps, "_look_rotations_up", lambda changes, decoder: None)
    check_prompts(monkeypatch, "cuda", dtype, slice(1, 3))


@pytest.mark.parametrize("decoder", ["gpt_neox", "llama"])
def test_captured_steps_look_their_positions_up(decoder, recorded):
    model = make(decoder_type=decoder)
    plain, fast = both(model, *prompts(9, 9), **GREEDY)
    assert torch.equal(fast, plain)
    cosines = sum(call[0] is torch.ops.aten.cos.default for call in recorded[0].calls)
    # A llama computes those of its four steps, and of the block that they fill.
    assert cosines == (0 if decoder == "gpt_neox" else 5)
    assert not any("rotary" in str(vars(module).get("forward")) for module in model.modules())


def note_first_layers(monkeypatch, recorded):
    """How many operators a graph holds where the first layer of a decoder begins, as it is recorded."""
    places, real = [], steps._run_layer

    def enter(layer, *given, **options):
        if layer.attention.layer_idx == 0 and _get_current_dispatch_mode() is not None:
            places.append(len(recorded[-1].calls))
        return real(layer, *given, **options)

    monkeypatch.setattr(steps, "_run_layer", enter)
    return places


def between(calls, place):
    """The operators that run behind the last embedding in front of `place`; views do not run."""
    functions = [call[0] for call in calls[:place]]
    begin = place - functions[::-1].index(torch.ops.aten.embedding.default)
    return [function.overloadpacket.__name__ for function in functions[begin:] if not function.is_view]


@pytest.mark.parametrize(("n_tokens", "offset"), [(1, 3), (2, 3), (1, 0)], ids=["one", "two", "pads"])
def test_captured_steps_make_nothing_that_no_layer_reads(n_tokens, offset, recorded, monkeypatch):
    # While a stream is captured, transformers spells every mask out.
    monkeypatch.setattr(
        masking_utils, "is_tracing", lambda tensor=None: _get_current_dispatch_mode() is not None
    )
    firsts = note_first_layers(monkeypatch, recorded)
    model = make(block_alignment="columns", n_embedding_tokens=n_tokens)
    given = {**GREEDY, "block_offset": torch.full((2,), offset)}
    plain, fast = both(model, *prompts(9 if offset else 10, 1), **given)
    assert torch.equal(fast, plain) and len(recorded) == 1
    block, *tokens = sorted((between(recorded[0].calls, first) for first in firsts), key=len, reverse=True)
    # Places of blocks lie on the device: where they end, and their rotations.
    assert block == ["add", "index"]
    # Where a block holds pads, those of it that are not yet known are left out behind the prefix.
    assert tokens == [["constant_pad_nd"] * (offset == 0)] * 4


def test_captured_steps_count_their_tokens_once_a_block(recorded):
    both(make(), *prompts(9), **GREEDY)
    counted = [call for call in recorded[0].calls if call[0] is torch.ops.aten.add_.Tensor]
    # Columns of the tokens, and places of the block.
    assert [call[2] or call[1][1] for call in counted] == [1, 4]


@torch.no_grad()
@pytest.mark.parametrize("parallel", [True, False])
def test_layers_with_parallel_branches_are_joined_by_one_launch(parallel, monkeypatch):
    model = make(use_parallel_residual=parallel, num_hidden_layers=3).double()
    calls, real = [], steps.residual_norms
    monkeypatch.setattr(
        steps, "residual_norms", lambda *args, **o: (calls.append(len(args)), real(*args, **o))[1]
    )
    for decoder in (model.model.block_decoder, model.model.token_decoder.decoder):
        for norm in (module for module in decoder.modules() if isinstance(module, torch.nn.LayerNorm)):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        calls.clear()
        states = torch.randn(2, 3, 32, dtype=torch.double)
        plain = decoder(inputs_embeds=states, use_cache=False).last_hidden_state
        with steps.few_launches(model):
            fast = [decoder(inputs_embeds=states * i, use_cache=False).last_hidden_state for i in (1, -1, 1)]
        torch.testing.assert_close(fast[0], plain)
        assert torch.equal(fast[0], fast[2]) and not torch.allclose(fast[1], plain)
        # Two norms between layers, and the last one alone, three passes.
        assert calls == [4, 4, 3] * 3 * parallel


@torch.no_grad()
def test_pads_of_an_open_block_are_left_out_in_one_launch_too():
    model = make().double()
    decoder, results = model.model.token_decoder, []
    prefix, ids = torch.randn(3, 2, 32, dtype=torch.double), torch.tensor([[5, 6], [PAD, 7], [PAD, PAD]])
    for fast in (False, True):
        cache = decoder.make_cache()
        decoder.step(prefix, ids[:, :0], cache)
        cache.reset()
        with steps.few_launches(model) if fast else contextlib.nullcontext():
            states = [decoder.step(prefix, ids[:, :0], cache, (ids != PAD)[:, :0])]
            states += [
                decoder.step(prefix, ids[:, t : t + 1], cache, (ids != PAD)[:, : t + 1]) for t in (0, 1)
            ]
        results.append(torch.stack(states))
    torch.testing.assert_close(*results)
    assert "forward" not in vars(decoder.decoder.layers[0].attention)


@pytest.mark.parametrize(("lengths", "masked"), [((9, 9), False), ((9, 4), True)], ids=["none", "whole"])
def test_a_mask_over_blocks_is_kept_only_where_a_block_is_all_pads(lengths, masked):
    model, (ids, mask) = make(block_alignment="columns"), prompts(*lengths)
    cache = BlockTransformerCache(model.config)
    with torch.no_grad():
        # Pads fill up the first block, so that the last one is whole.
        model(ids, attention_mask=mask, past_key_values=cache, block_offset=torch.tensor([3, 3]))
    assert cache.block_mask is not None
    assert (decoding.HeldBlocks(cache, slice(0, 2)).key_mask is not None) == masked


def test_bytes_of_the_caches(monkeypatch):
    held = {}
    real = blocks.BlockProgram.__init__

    def spy(self, decoding, *args):
        real(self, decoding, *args)
        own = [buffer for group in decoding.groups for buffer in group.state() if buffer.ndim == 4]
        held["token"] = sum(buffer.numel() for buffer in own)
        layers = decoding.cache.layers
        held["block"] = sum(layer._keys.numel() + layer._values.numel() for layer in layers)

    monkeypatch.setattr(blocks.BlockProgram, "__init__", spy)
    model = hf_longattn.prepare_generation(make(token_num_hidden_layers=3))
    generate(model, *prompts(40, 40, 40), **{**GREEDY, "max_new_tokens": 24})
    # Two blocks more than the text has: programs run to the end of their last block.
    assert held["block"] == 2 * 3 * 2 * (64 // 4 + 2) * 32
    assert held["token"] == 3 * 3 * 2 * (2 + 4 - 1) * 32


def test_a_token_costs_one_row_of_the_token_decoder(monkeypatch):
    from hf_longattn.modeling.block_transformer.blocks import TokenDecoder

    rows, real = [], TokenDecoder._run
    monkeypatch.setattr(
        TokenDecoder, "_run", lambda self, x, *a: (rows.append(x.shape[1]), real(self, x, *a))[1]
    )
    model = hf_longattn.prepare_generation(make())
    generate(model, *prompts(8, 8), **{**GREEDY, "max_new_tokens": 10})
    # The prefix of the open block, then nine steps: two vectors where a block begins.
    assert rows == [2, 1, 1, 1, 2, 1, 1, 1, 2, 1]
