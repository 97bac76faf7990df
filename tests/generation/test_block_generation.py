"""Prepared Block Transformers: several tokens a program, and all that plain `generate` gives."""

import contextlib
import functools
import gc
import json
import logging
import os
import string
import subprocess
import sys
import traceback
import weakref
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import RecordedGraph
from tiny_blocks import PAD, make, prompts
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin, logits_process

import hf_longattn
from hf_longattn.generation import blocks, spectator
from hf_longattn.generation import prompts as prompt_graphs
from hf_longattn.kernels.dispatch import log_once
from hf_longattn.modeling.block_transformer import (
    BlockTransformerCache,
    BlockTransformerForCausalLM,
    decoding,
    steps,
)

END = 59
EMBEDDERS = {
    "lookup": {},
    "roberta": {
        "embedder_type": "roberta",
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
        "embedder_num_hidden_layers": 1,
    },
}
DECODERS = {
    "prefix": {},
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "cross_attention": {"decoding_strategy": "cross_attention", "expansion_ratio": None},
}
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 11}
DRAW = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
DRAW |= {"min_p": 0.01, "typical_p": 0.98, "pad_token_id": PAD, "max_new_tokens": 11}


def generate(model, ids, mask, **options):
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, **options)


def both(model, ids, mask, **options):
    """(what the plain model gives, what the prepared one gives), the latter by programs of blocks."""
    plain = generate(model, ids, mask, **options)
    hf_longattn.prepare_generation(model)
    fast = generate(model, ids, mask, **options)
    hf_longattn.restore(model)
    return plain, fast


@pytest.fixture(autouse=True)
def warned_anew():
    log_once.cache_clear()


class Graphs(list):
    """Recorded graphs: those of steps, and those that read a prompt."""

    def __init__(self):
        super().__init__()
        self.prompts = []


@pytest.fixture
def recorded(monkeypatch):
    """Programs are captured in recorded graphs, which it lists."""
    graphs = Graphs()

    def capture(kind, rehearse, step, like=None):
        rehearse()
        kind.append(RecordedGraph())
        state = torch.get_rng_state()
        with kind[-1]:
            result = step()
        torch.set_rng_state(state)
        kind[-1].undo()
        return kind[-1], result

    monkeypatch.setattr(blocks, "_GRAPH_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(blocks, "capture", functools.partial(capture, graphs))
    monkeypatch.setattr(prompt_graphs, "capture", functools.partial(capture, graphs.prompts))
    return graphs


@pytest.fixture
def never_token_by_token(monkeypatch):
    """The prepared model may not use transformers' loop; the plain one may."""
    real = GenerationMixin._sample

    def _sample(self, *args, **kwargs):
        assert "_sample" not in vars(self), "fell back to the loop of transformers"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", _sample)


def cases():
    for embedder in EMBEDDERS:
        for decoder in DECODERS:
            for length in (1, 2, 4):
                fast = embedder == "lookup" if length == 4 else (embedder, decoder) == ("lookup", "prefix")
                marks = () if fast else pytest.mark.slow
                yield pytest.param(
                    embedder, decoder, length, marks=marks, id=f"{embedder}-{decoder}-L{length}"
                )


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [{**GREEDY, "repetition_penalty": 1.5}, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("embedder", "decoder", "length"), list(cases()))
def test_tokens_equal_those_of_the_plain_model(embedder, decoder, length, options, recorded):
    fields = {**EMBEDDERS[embedder], **DECODERS[decoder], "block_length": length}
    if decoder == "prefix":
        fields["expansion_ratio"] = 2
    plain, fast = both(make(**fields), *prompts(9, 9), **options)
    assert torch.equal(fast, plain)
    assert recorded and recorded[0].replays >= 2
    assert plain[:, 9:].unique().numel() > 6, "a model that repeats itself would hide an error"


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [GREEDY, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize("length", [pytest.param(3, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("alignment", ["tokens", pytest.param("columns", marks=pytest.mark.slow)])
def test_rows_at_different_slots_decode_together(alignment, length, options, recorded):
    fields = {"projection_method": "projection_layer"} if length == 3 else {}
    model = make(block_alignment=alignment, block_length=length, **fields)
    plain, fast = both(model, *prompts(2, 9, 12, 7, 11), **options)
    assert torch.equal(fast, plain)
    assert len(recorded) == 1 and recorded[0].replays >= 2


class Looks(TorchDispatchMode):
    """Notes which function asked for a number of a tensor, "transformers" for one of theirs."""

    def __init__(self):
        super().__init__()
        self.askers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in RecordedGraph.WAITING:
            *_, asker = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.askers.append("transformers" if "/transformers/" in asker.filename else asker.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("alignment", ["tokens", "columns"])
def test_a_prompt_that_is_replayed_is_looked_at_once(alignment, monkeypatch):
    model, (ids, mask) = make(block_alignment=alignment), prompts(8, 8)
    options = {**GREEDY, "eos_token_id": END, "max_new_tokens": 9}
    expected = generate(model, ids, mask, **options)
    hf_longattn.prepare_generation(model)
    for _ in range(3):
        assert torch.equal(generate(model, ids, mask, **options), expected)
    # Those of transformers are at special tokens, which lie on the host, and at pads behind a prompt; what is
    # watched once the prompt is launched are copies on the host.
    with Looks() as looks:
        read = prompt_graphs.PromptGraphs.read
        monkeypatch.setattr(
            prompt_graphs.PromptGraphs,
            "read",
            lambda *args: (read(*args), looks.askers.append("launched"))[0],
        )
        generate(model, ids, mask, **options)
    before = looks.askers.index("launched")
    assert [name for name in looks.askers[:before] if name != "transformers"] == ["look_for_whole_rows"]
    assert set(looks.askers[before + 1 :]) == {"watch"}


@pytest.mark.usefixtures("recorded")
def test_what_a_cache_knows_of_one_prompt_is_not_said_of_the_next():
    model, (ids, mask) = make(), prompts(9, 9)
    padded = prompts(9, 2)
    expected = generate(model, *padded, **GREEDY)
    hf_longattn.prepare_generation(model)
    for forget in (lambda cache: cache.reset(), lambda cache: cache.crop(-cache.get_seq_length())):
        cache = generate(model, ids, mask, return_dict_in_generate=True, **GREEDY).past_key_values
        assert cache.whole_prompt
        forget(cache)
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, *padded, past_key_values=cache, **GREEDY), expected)


def test_ends_are_looked_for_on_the_host():
    config = tf.GenerationConfig(eos_token_id=[9, 4])
    # To read a tensor of this device raises.
    config._eos_token_tensor = torch.tensor([9, 4]).to("meta")
    own = tf.EosTokenCriteria(torch.tensor([7]))
    criteria = tf.StoppingCriteriaList(
        [tf.MaxLengthCriteria(4), tf.EosTokenCriteria(config._eos_token_tensor)]
    )
    on_host = spectator.criteria_on_host(tf.StoppingCriteriaList([*criteria, own]), config)
    assert on_host[0] is criteria[0] and on_host[2] is own
    for ids, ended in (([[4, 9], [9, 3]], [1, 0]), ([[1, 7], [1, 4]], [1, 1]), ([[1, 2, 3, 3]], [1])):
        assert on_host(torch.tensor(ids), None).tolist() == [bool(each) for each in ended]
    # Criteria of others see what lies on the device.
    others = tf.StoppingCriteriaList([*criteria, tf.MaxTimeCriteria(9.0)])
    assert spectator.criteria_on_host(others, config) is others


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_any_number_of_new_tokens(captured, request):
    graphs = request.getfixturevalue("recorded") if captured else []
    model, (ids, mask) = make(), prompts(6, 9)
    for count in (1, 4, 5, 6, 10):
        plain, fast = both(model, ids, mask, **{**GREEDY, "max_new_tokens": count})
        assert torch.equal(fast, plain) and fast.shape[1] == 9 + count
    # A program that would be replayed once is not worth a capture.
    assert len(graphs) == (2 if captured else 0)


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


@pytest.fixture
def read_rows(monkeypatch):
    """Prompts of more than eight blocks are read some rows at a time; lists the calls and what they say."""
    calls, real = [], BlockTransformerForCausalLM.decode_prompts

    def decode_prompts(self, cache, ids, steps, at_once):
        result = real(self, cache, ids, steps, at_once)
        calls.append((tuple(ids.shape), at_once, result is not None))
        return result

    monkeypatch.setattr(prompt_graphs, "GPU_CHUNK_TOKENS", 8)
    monkeypatch.setattr(BlockTransformerForCausalLM, "decode_prompts", decode_prompts)
    return calls


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize("options", [GREEDY, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", ["lookup", pytest.param("roberta", marks=pytest.mark.slow)])
def test_many_whole_prompts_are_read_some_rows_at_a_time(name, options, read_rows):
    long = {**options, "max_new_tokens": 15}
    calls = [((14,) * 5, long), ((14,) * 5, options), ((16,) * 5, options), ((14,) * 5, long)]
    # One row has more blocks, rows have pads, and rows that are read at once as ever.
    others = [((40, 40), options), ((14, 11, 14, 9), options), ((9, 9), options)]
    _, results = answers(calls + others, **EMBEDDERS[name])
    assert all(torch.equal(*result) for result in results)
    assert read_rows == [((5, 14), 2, True), ((5, 14), 2, True), ((5, 16), 2, True), ((5, 14), 2, True)]


@pytest.mark.usefixtures("never_token_by_token", "recorded")
def test_prompts_whose_cache_lasts_or_that_are_cut_in_chunks_are_read_by_the_forward(read_rows):
    model, (ids, mask) = make(), prompts(*(14,) * 5)
    expected = generate(model, ids, mask, **GREEDY)
    hf_longattn.prepare_generation(model)
    result = generate(model, ids, mask, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, expected)
    assert result.past_key_values.get_seq_length() == expected.shape[1] - 1
    with torch.autocast("cpu", torch.bfloat16):
        # Keys and values are of two dtypes.
        own = generate(hf_longattn.restore(model), ids, mask, **GREEDY)
        hf_longattn.prepare_generation(model, cuda_graph=False)
        assert torch.equal(generate(model, ids, mask, **GREEDY), own)
    hf_longattn.prepare_generation(model, prefill_chunk_size=8)
    assert torch.equal(generate(model, ids, mask, **GREEDY), expected)
    assert not read_rows
    # Blocks of two vectors see each other, for which the forward has its mask.
    model = make(n_embedding_tokens=2)
    expected = generate(model, ids, mask, **GREEDY)
    hf_longattn.prepare_generation(model)
    assert torch.equal(generate(model, ids, mask, **GREEDY), expected)
    assert read_rows == [((5, 14), 2, False)]


@pytest.mark.parametrize("decoder", ["gpt_neox", "llama"])
def test_captured_steps_look_their_positions_up(decoder, recorded):
    model = make(decoder_type=decoder)
    plain, fast = both(model, *prompts(9, 9), **GREEDY)
    assert torch.equal(fast, plain)
    cosines = sum(call[0] is torch.ops.aten.cos.default for call in recorded[0].calls)
    # A llama computes those of its four steps, and of the block that they fill.
    assert cosines == (0 if decoder == "gpt_neox" else 5)
    assert not any("rotary" in str(vars(module).get("forward")) for module in model.modules())


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


def answers(calls, **fields):
    """Each call's (tokens of a plain model, tokens of a model that was prepared once)."""
    plain, fast, results = make(**fields), hf_longattn.prepare_generation(make(**fields)), []
    for seed, (lengths, options) in enumerate(calls):
        ids, mask = prompts(*lengths)
        ids = torch.where(mask.bool(), (ids + 11 * seed) % 58, PAD)
        results.append([generate(model, ids, mask, **options) for model in (plain, fast)])
    return fast, results


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize(
    "options", [GREEDY, pytest.param(DRAW, marks=pytest.mark.slow)], ids=["greedy", "sampling"]
)
def test_later_calls_go_on_with_the_program_of_the_first(options, recorded):
    # Three slots of the open block, shorter and longer answers, and rows at slots of their own.
    even = [((14, 14), 15), ((9, 9), 11), ((12, 12), 13), ((14, 14), 3), ((14, 14), 15)]
    calls = [(lengths, {**options, "max_new_tokens": new}) for lengths, new in even]
    model, results = answers(calls)
    assert all(torch.equal(*result) for result in results)
    assert len(recorded) == 1 and recorded[0].replays >= 8
    buffers = [layer._keys for layer in vars(model)["_kept_program"].program.decoding.cache.layers]
    generate(model, *prompts(9, 9), **options)
    kept = vars(model)["_kept_program"].program.decoding.cache.layers
    assert all(layer._keys is buffer for layer, buffer in zip(kept, buffers, strict=True))


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [GREEDY, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize("decoder", ["prefix", pytest.param("summation", marks=pytest.mark.slow)])
def test_a_prompt_as_long_as_an_earlier_one_is_read_by_a_replay(decoder, options, recorded):
    # One length three times, another with the same open slot, rows with pads, and an end inside the answer.
    even = [((14, 14), 15), ((14, 14), 15), ((22, 22), 6), ((14, 14), 3), ((14, 11), 9), ((14, 14), 15)]
    calls = [(lengths, {**options, "max_new_tokens": new}) for lengths, new in even]
    ends = {**options, "max_new_tokens": 9, "eos_token_id": [3, 17, 29, 44, 50]}
    model, results = answers(calls, **DECODERS[decoder], initializer_range=0.4)
    assert all(torch.equal(*result) for result in results)
    assert len({tuple(result[0][0, -3:].tolist()) for result in results}) > 3, "prompts that say the same"
    # The rows with pads ended the program of the first call, and the graph with it.
    (graph,) = recorded.prompts
    assert graph.replays == 2
    _, results = answers([((22, 22), ends)] * 3, **DECODERS[decoder], initializer_range=0.4)
    assert all(torch.equal(*result) for result in results) and recorded.prompts[-1].replays == 2
    assert any(PAD in result[0] for result in results), "no row has ended before the other"


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("why", ["chunks", "scores", "slot", "progress"])
def test_other_prompts_are_read_as_ever(why, recorded):
    model, fields = make(), {"chunks": {"prefill_chunk_size": 8}, "progress": {"progress": True}}
    ids, mask = prompts(14, 14)
    options = {**GREEDY, "max_new_tokens": 12}
    expected = generate(model, ids, mask, **options)
    hf_longattn.prepare_generation(model, **fields.get(why, {}))
    if why == "slot":
        # The program that is kept begins at another slot of the open block.
        generate(model, ids[:, 1:], mask[:, 1:], **{**options, "max_new_tokens": 16})
    kept = {"return_dict_in_generate": True, "output_scores": True} if why == "scores" else {}
    for _ in range(3):
        result = generate(model, ids, mask, **options, **kept)
        assert torch.equal(result.sequences if kept else result, expected)
    assert not recorded.prompts


@pytest.mark.usefixtures("never_token_by_token")
def test_the_graphs_of_eight_lengths_are_kept(recorded):
    model = hf_longattn.prepare_generation(make())
    graphs, lengths = vars(model)["_kept_program"].prompts, [4 * n for n in range(9, 0, -1)]
    for length in lengths * 2:
        generate(model, *prompts(length), **GREEDY)
    # Every second call came after eight others, when its length was forgotten.
    assert not recorded.prompts
    for length in lengths[-8:]:
        generate(model, *prompts(length), **GREEDY)
    assert len(recorded.prompts) == 8 and not graphs.knows(36)
    generate(model, *prompts(36), **GREEDY)
    assert graphs.knows(36) and not graphs.knows(32)


@pytest.mark.usefixtures("never_token_by_token")
def test_a_prompt_that_cannot_be_captured_is_read_as_ever(recorded, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, (ids, mask) = make(), prompts(14, 14)
    expected = generate(model, ids, mask, **GREEDY)
    hf_longattn.prepare_generation(model)
    generate(model, (ids + 5) % 58, mask, **GREEDY)
    monkeypatch.setattr(prompt_graphs, "capture", fail)
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        assert all(torch.equal(generate(model, ids, mask, **GREEDY), expected) for _ in range(3))
    assert sum("not permitted" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("never_token_by_token")
def test_rows_at_slots_of_their_own_share_a_program_too(recorded):
    calls = [((14, 11), GREEDY), ((10, 7), GREEDY), ((11, 7), GREEDY)]
    _, results = answers(calls)
    assert all(torch.equal(*result) for result in results)
    assert len(recorded) == 2, "only the last call has rows at other slots"


@pytest.mark.slow
@pytest.mark.usefixtures("never_token_by_token")
def test_what_a_graph_holds_is_captured_anew_where_it_changed(recorded):
    calls = [((9, 9), DRAW), ((9, 9), {**DRAW, "temperature": 1.5}), ((9, 9), GREEDY), ((9,), GREEDY)]
    calls += [((9,), {**GREEDY, "eos_token_id": END}), ((9,), {**GREEDY, "max_new_tokens": 40})]
    model, results = answers(calls)
    assert all(torch.equal(*result) for result in results)
    assert len(recorded) == len(calls)
    ids, mask = prompts(9)
    options = {**GREEDY, "max_new_tokens": 40}
    # New weights at new places, of another dtype.
    model.double()
    expected = generate(make().double(), ids, mask, **options)
    assert torch.equal(generate(model, ids, mask, **options), expected)
    assert len(recorded) == len(calls) + 1
    model.model.token_decoder.decoder.layers[0].attention.scaling *= 1.5
    assert not torch.equal(generate(model, ids, mask, **options), expected)
    assert len(recorded) == len(calls) + 2


@pytest.mark.usefixtures("never_token_by_token")
def test_a_cache_that_is_handed_out_is_nobody_elses(recorded):
    model, (ids, mask) = hf_longattn.prepare_generation(make()), prompts(9, 9)
    generate(model, ids, mask, **GREEDY)
    cache = generate(model, ids, mask, return_dict_in_generate=True, **GREEDY).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    generate(model, (ids + 1) % 58, mask, **GREEDY)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, before, strict=True))
    assert len(recorded) == 3


def test_a_call_inside_another_has_buffers_of_its_own(recorded):
    model, (ids, mask) = hf_longattn.prepare_generation(make()), prompts(9, 9)
    expected = generate(model, ids, mask, **GREEDY)
    inner = []

    class Asking(Collect):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 8:
                inner.append(generate(model, (ids + 5) % 58, mask, **GREEDY))

    for _ in range(2):
        assert torch.equal(generate(model, ids, mask, streamer=Asking(), **GREEDY), expected)
    other = generate(model, (ids + 5) % 58, mask, **GREEDY)
    assert len(inner) == 2 and all(torch.equal(answer, other) for answer in inner)


@pytest.mark.usefixtures("recorded")
def test_restore_and_calls_of_another_kind_free_the_kept_program():
    model, (ids, mask) = hf_longattn.prepare_generation(make()), prompts(9, 9)
    for way in (
        lambda: hf_longattn.restore(model),
        lambda: generate(model, ids, mask, num_beams=2, **GREEDY),
    ):
        hf_longattn.prepare_generation(model)
        generate(model, ids, mask, **GREEDY)
        kept = weakref.ref(vars(model)["_kept_program"].program)
        assert kept() is not None
        way()
        gc.collect()
        assert kept() is None


def ends_inside(plain, row, place):
    """A token that row `row` has at new place `place`, and neither it nor the other row before."""
    new = plain[:, 9:]
    token = int(new[row, place])
    assert token not in new[row, :place].tolist() + new[1 - row, : place + 1].tolist()
    return token


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("place", [5, *(pytest.param(place, marks=pytest.mark.slow) for place in (3, 6))])
def test_a_row_that_ends_inside_a_block_is_padded(place, captured, request):
    graphs = request.getfixturevalue("recorded") if captured else []
    options = {**GREEDY, "repetition_penalty": 1.5, "max_new_tokens": 17}
    model, (ids, mask) = make(), prompts(9, 9)
    end = ends_inside(generate(model, ids, mask, **options), 0, place)
    options["eos_token_id"] = [end, 58]
    plain, fast = both(model, ids, mask, **options)
    assert torch.equal(fast, plain)
    assert (fast[0, 9 + place + 1 :] == PAD).all() and bool(graphs) == captured
    plain, fast = both(model, ids[:1], mask[:1], **options)
    assert torch.equal(fast, plain) and fast.shape[1] == 9 + place + 1


class Collect:
    def __init__(self):
        self.parts = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.parts.append(value.tolist())

    def end(self):
        self.parts.append("end")


class EndAt:
    """Ends each row at a length of its own, and notes what it was shown."""

    def __init__(self, *lengths):
        self.lengths, self.seen = torch.tensor(lengths), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.shape[1], None if scores is None else len(scores)))
        return input_ids.shape[1] >= self.lengths


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize("end", [None, END], ids=["no-eos", "eos"])
def test_streamers_and_criteria_see_every_token_in_order(end):
    model, (ids, mask), results = make(), prompts(9, 9), []
    for prepared in (False, True):
        if prepared:
            hf_longattn.prepare_generation(model)
        streamer, criterion = Collect(), EndAt(12, 19)
        # Plain `generate` streams one row only; its check is on beams alone.
        options = {**GREEDY, "max_new_tokens": 15, "eos_token_id": end, "streamer": streamer}
        tokens = generate(model, ids, mask, stopping_criteria=tf.StoppingCriteriaList([criterion]), **options)
        results.append((tokens.tolist(), streamer.parts, criterion.seen))
    assert results[0] == results[1]
    assert len(results[1][0][0]) == 19 and results[1][1][-1] == "end"


@pytest.mark.usefixtures("never_token_by_token", "recorded")
def test_stop_strings_end_inside_a_block():
    from tokenizers import Tokenizer, decoders, models

    letters = (string.ascii_letters + string.digits)[:61]
    words = Tokenizer(models.BPE({letter: token for token, letter in enumerate(letters)}, merges=[]))
    words.decoder = decoders.Fuse()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words)
    options = {**GREEDY, "repetition_penalty": 1.5, "max_new_tokens": 17, "tokenizer": tokenizer}
    model, (ids, mask) = make(), prompts(9, 9)
    stop = ends_inside(generate(model, ids, mask, **options), 0, 5)
    plain, fast = both(model, ids[:1], mask[:1], stop_strings=[letters[stop]], **options)
    assert torch.equal(fast, plain) and fast.shape[1] == 9 + 6


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [GREEDY, DRAW], ids=["greedy", "sampling"])
def test_scores_and_logits_are_those_of_the_plain_model(options, recorded, caplog):
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        plain, fast = both(make(), *prompts(9, 6), **options, **kept)
    assert torch.equal(fast.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(fast[name]) == len(plain[name]) == 11
        for ours, theirs in zip(fast[name], plain[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert not recorded
    assert any("`output_scores` keeps" in record.message for record in caplog.records)


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (GREEDY, torch.bfloat16),
        ({**GREEDY, "repetition_penalty": 1.3}, torch.float32),
        (DRAW, torch.float32),
        ({**GREEDY, "return_dict_in_generate": True, "output_logits": True}, torch.float32),
    ],
    ids=["greedy", "penalty", "sampling", "kept-logits"],
)
def test_the_largest_of_16_bit_logits_is_taken_as_it_is_and_the_first_of_equal_ones(
    options, dtype, monkeypatch
):
    model, seen = make().bfloat16(), set()
    with torch.no_grad():
        # Every even token has the logit of the odd one behind it.
        weight = model.lm_head.weight
        weight[0:60:2] = weight[1:60:2]
    choose = blocks.TokenChoice.__call__
    monkeypatch.setattr(
        blocks.TokenChoice, "__call__", lambda self, ids, x: (seen.add(x.dtype), choose(self, ids, x))[1]
    )
    ids, mask = prompts(9, 6)
    plain, fast = both(model, ids, mask, **options)
    assert seen == {dtype}
    if options is not GREEDY:
        return
    assert torch.equal(fast, plain)
    assert bool((fast[:, 9:] % 2 == 0).all())


@pytest.mark.parametrize(("lengths", "masked"), [((9, 9), False), ((9, 4), True)], ids=["none", "whole"])
def test_a_mask_over_blocks_is_kept_only_where_a_block_is_all_pads(lengths, masked):
    model, (ids, mask) = make(block_alignment="columns"), prompts(*lengths)
    cache = BlockTransformerCache(model.config)
    with torch.no_grad():
        # Pads fill up the first block, so that the last one is whole.
        model(ids, attention_mask=mask, past_key_values=cache, block_offset=torch.tensor([3, 3]))
    assert cache.block_mask is not None
    assert (decoding.HeldBlocks(cache, slice(0, 2)).key_mask is not None) == masked


class Forbid(logits_process.LogitsProcessor):
    """Forbids the token three places back; needs the exact tokens so far."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -3:-2], -torch.inf)


@pytest.mark.usefixtures("never_token_by_token")
def test_processors_of_others_run_one_by_one_with_a_warning(recorded, caplog):
    processors = logits_process.LogitsProcessorList([Forbid()])
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        plain, fast = both(make(), *prompts(9, 6), logits_processor=processors, min_new_tokens=4, **GREEDY)
    assert torch.equal(fast, plain) and not recorded
    assert sum("`Forbid`" in record.message or "MinNew" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize("new", [9, *(pytest.param(new, marks=pytest.mark.slow) for new in (6, 10))])
@pytest.mark.parametrize("alignment", ["tokens", "columns"])
def test_a_second_turn_goes_on_from_the_cache(alignment, new):
    model, (ids, mask) = make(block_alignment=alignment), prompts(12, 9, 2)
    options = {**GREEDY, "max_new_tokens": new, "return_dict_in_generate": True}
    answers = []
    for prepared in (False, True):
        if prepared:
            hf_longattn.prepare_generation(model)
        turn, seen, cache, said = ids, mask, None, []
        for _ in range(3):
            result = generate(model, turn, seen, past_key_values=cache, **options)
            cache = result.past_key_values
            assert cache.get_seq_length() == result.sequences.shape[1] - 1
            said.append((result.sequences, cache.num_blocks.clone(), cache.context_valid.clone()))
            turn = torch.cat([result.sequences, prompts(5, 5, 5)[0]], dim=1)
            seen = torch.nn.functional.pad(seen, (0, turn.shape[1] - seen.shape[1]), value=1)
        answers.append(said)
    for plain, fast in zip(*answers, strict=True):
        assert torch.equal(fast[0], plain[0])


@pytest.mark.usefixtures("never_token_by_token", "recorded")
def test_a_streamer_that_raises_leaves_the_callers_cache_in_order():
    class Break(Collect):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 5:
                raise KeyboardInterrupt

    model, (ids, mask) = make(), prompts(6, 12, 9)
    cache = BlockTransformerCache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    expected = generate(model, ids, mask, **GREEDY)
    hf_longattn.prepare_generation(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, mask, past_key_values=cache, streamer=Break(), **GREEDY)
    assert cache.get_seq_length() == ids.shape[1]
    cache.crop(-1)
    assert torch.equal(generate(model, ids, mask, past_key_values=cache, **GREEDY), expected)


@pytest.mark.usefixtures("recorded")
def test_a_program_under_autocast_is_not_kept():
    # Its graph reads weights that autocast casts, and lets go of at its end.
    model, (ids, mask) = hf_longattn.prepare_generation(make()), prompts(9, 9)
    expected = generate(model, ids, mask, **GREEDY)
    was = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(generate(model, ids, mask, **GREEDY), expected)
    finally:
        torch.set_autocast_enabled("cuda", was)
    assert vars(model)["_kept_program"].program is None


@pytest.mark.usefixtures("recorded")
def test_a_call_that_fails_leaves_no_program_behind():
    class OutOfMemory(Collect):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 8:
                raise torch.OutOfMemoryError("out of memory")

    model, (ids, mask) = hf_longattn.prepare_generation(make()), prompts(9, 9)
    expected = generate(model, ids, mask, **GREEDY)
    assert vars(model)["_kept_program"].program is not None
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, (ids + 5) % 58, mask, streamer=OutOfMemory(), **GREEDY)
    assert vars(model)["_kept_program"].program is None
    assert torch.equal(generate(model, ids, mask, **GREEDY), expected)


@pytest.mark.parametrize("place", ["processor", "first step"])
def test_an_error_before_the_first_block_leaves_the_callers_rows_in_order(place, monkeypatch):
    def fail(*args):
        raise RuntimeError("from outside")

    model, (ids, mask) = make(), prompts(6, 12, 9)
    hf_longattn.prepare_generation(model)
    cache = BlockTransformerCache(model.config)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="from outside"):
        if place == "first step":
            patch.setattr(decoding.BlockGroup, "__init__", fail)
        processors = tf.LogitsProcessorList([fail] if place == "processor" else [])
        generate(model, ids, mask, past_key_values=cache, logits_processor=processors, **GREEDY)
    assert cache.get_seq_length() == ids.shape[1]
    cache.crop(-1)
    result = generate(model, ids, mask, past_key_values=cache, **GREEDY)
    assert torch.equal(result, generate(model, ids, mask, **GREEDY))


@torch.no_grad()
def test_the_cache_left_behind_is_that_of_a_forward(recorded):
    model, (ids, mask) = make(), prompts(12, 9, 6)
    hf_longattn.prepare_generation(model)
    options = {**GREEDY, "max_new_tokens": 11, "return_dict_in_generate": True}
    result = generate(model, ids, mask, **options)
    cache, every = result.past_key_values, torch.nn.functional.pad(mask, (0, 11), value=1)
    seen = model(result.sequences[:, :-1], attention_mask=every[:, :-1]).past_key_values
    assert recorded and torch.equal(cache.num_slots, seen.num_slots)
    for row, (held, whole) in enumerate(zip(cache.num_blocks, seen.num_blocks, strict=True)):
        # Tokens decoded beyond the end open their block again, and the one before it.
        assert whole - 1 <= held <= whole
        for ours, theirs in zip(cache.layers, seen.layers, strict=True):
            for name in ("keys", "values"):
                pair = (getattr(layer, name)[row, :, :held] for layer in (ours, theirs))
                torch.testing.assert_close(*pair, rtol=1e-4, atol=2e-4)
    last = result.sequences[:, -1:]
    logits = model(last, attention_mask=every, past_key_values=cache).logits
    torch.testing.assert_close(
        logits, model(last, attention_mask=every, past_key_values=seen).logits, rtol=1e-4, atol=2e-4
    )


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


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_what_has_no_program_gives_the_tokens_of_the_plain_model(options, recorded):
    rows = (9,) if "prompt_lookup_num_tokens" in options else (9, 6)
    plain, fast = both(make(), *prompts(*rows), **{**GREEDY, **options})
    assert torch.equal(fast, plain) and not recorded


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_changed_models_decode_token_by_token_with_a_warning(change, caplog):
    model, (ids, mask), calls = make(), prompts(9, 6), []
    plain = generate(model, ids, mask, **GREEDY)
    if change == "forward":
        own = model.forward
        model.forward = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    hf_longattn.prepare_generation(model)
    if change == "hook":
        model.model.block_decoder.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        fast = [generate(model, ids, mask, **GREEDY) for _ in range(2)]
    assert all(torch.equal(tokens, plain) for tokens in fast) and len(calls) >= 3
    assert sum("slower path" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("decoder", ["prefix", "cross_attention"])
@pytest.mark.parametrize("operators", [40, 200])
def test_a_capture_that_fails_midway_changes_no_token(operators, decoder, recorded, monkeypatch, caplog):
    real = RecordedGraph.__torch_dispatch__

    def fail(self, *args):
        if len(self.calls) >= operators:
            self.undo()
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(self, *args)

    monkeypatch.setattr(RecordedGraph, "__torch_dispatch__", fail)
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        plain, fast = both(make(**DECODERS[decoder]), *prompts(9, 6), **GREEDY)
    assert torch.equal(fast, plain)
    assert len(recorded) == 1 and not recorded[0].replays
    assert sum("not permitted" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
def test_a_rehearsal_that_fails_midway_changes_no_token(alignment, recorded, monkeypatch):
    def capture(rehearse, step, like=None):
        heads = [model.lm_head.forward] * 2
        with monkeypatch.context() as patch:
            patch.setattr(model.lm_head, "forward", lambda states: heads.pop()(states))
            with pytest.raises(IndexError):
                rehearse()
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(blocks, "capture", capture)
    model = make(block_alignment=alignment)
    plain, fast = both(model, *prompts(9, 6), **GREEDY)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("change", ["hook", "scores"])
def test_a_graph_that_is_required_is_refused_by_name(change, recorded, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda"))
    model, (ids, mask), options = make(), prompts(9, 6), dict(GREEDY)
    hf_longattn.prepare_generation(model, cuda_graph=True)
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "_GRAPH_DEVICES", ("cpu",))
    if change == "hook":
        model.lm_head.register_forward_hook(lambda *args: None)
    else:
        options |= {"return_dict_in_generate": True, "output_scores": True}
    with pytest.raises(ValueError, match="`cuda_graph=True` cannot be honoured"):
        generate(model, ids, mask, **options)


@pytest.mark.usefixtures("never_token_by_token")
def test_prepared_models_are_copied_plain_and_restored():
    import copy

    model, (ids, mask) = make(), prompts(9, 6)
    hf_longattn.prepare_generation(hf_longattn.prepare_generation(model))
    assert "_sample" in vars(model) and "_sample" not in vars(copy.deepcopy(model))
    fast = generate(model, ids, mask, **GREEDY)
    assert torch.equal(fast, generate(hf_longattn.restore(model), ids, mask, **GREEDY))
    assert "_sample" not in vars(model)


@pytest.mark.slow
@pytest.mark.usefixtures("never_token_by_token", "recorded")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 14), min_size=1, max_size=4),
    st.integers(1, 13),
    st.sampled_from(["tokens", "columns"]),
    st.sampled_from([None, [3, 17, 29, 44]]),
    st.booleans(),
)
def test_any_lengths(block_length, lengths, new, alignment, ends, draw):
    fields = {"block_length": block_length, "projection_method": "projection_layer", "num_hidden_layers": 1}
    model = make(block_alignment=alignment, **fields)
    options = {**(DRAW if draw else GREEDY), "max_new_tokens": new, "eos_token_id": ends}
    plain, fast = both(model, *prompts(*lengths), **options)
    assert torch.equal(fast, plain)


@pytest.mark.slow
def test_the_benchmark_compares_tokens_and_writes_its_rows(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "bench_block_transformer.py"
    variables = os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), "--check"], env=variables, check=True, timeout=300)
    rows = json.loads((tmp_path / "block_transformer.json").read_text())
    assert {row["peer"] for row in rows} >= {"block", "vanilla", "vanilla-prepared"}
    assert all(row["tokens_per_s"] > 0 for row in rows)
    queues = [row for row in rows if row["peer"] in ("block-queue", "block-batches")]
    assert len(queues) == 2 and all(row["new_tokens"] > 9 for row in queues)
    steps = [row for row in rows if row.get("section") == "training"]
    assert [row["peer"] for row in steps] == ["block", "block-compiled"]
    others = [row for row in rows if row not in queues + steps]
    assert all(row["floor_s"] > row["floor_prompt_s"] > 0 for row in others)
