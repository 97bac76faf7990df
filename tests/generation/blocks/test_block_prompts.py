"""Prompts of prepared Block Transformers: replayed, read some rows at a time, or by the forward."""

import functools
import logging
import traceback

import pytest
import torch
from block_answers import DECODERS, DRAW, EMBEDDERS, END, GREEDY, answers, generate
from recorded import RecordedGraph
from tiny_blocks import PAD, make, prompts
from torch.utils._python_dispatch import TorchDispatchMode

import hf_longattn
from hf_longattn.generation import blocks
from hf_longattn.generation import prompts as prompt_graphs
from hf_longattn.modeling.block_transformer import BlockTransformerForCausalLM, steps
from hf_longattn.modeling.block_transformer.blocks import TokenDecoder


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


@pytest.mark.usefixtures("recorded", "read_rows")
def test_prompts_that_are_read_some_rows_at_a_time_begin_their_first_block_once(monkeypatch):
    shapes, real = [], TokenDecoder._run
    monkeypatch.setattr(
        TokenDecoder, "_run", lambda self, x, *a: (shapes.append(tuple(x.shape[:2])), real(self, x, *a))[1]
    )
    model, (ids, mask) = hf_longattn.prepare_generation(make()), prompts(*(14,) * 5)
    generate(model, ids, mask, **{**GREEDY, "max_new_tokens": 1})
    # Two vectors of a prefix, and the two tokens behind whole blocks.
    assert shapes == [(5, 4)]


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.usefixtures("never_token_by_token")
def test_prompts_and_steps_by_kernels_give_the_tokens_of_the_plain_model(read_rows, monkeypatch):
    model, (ids, mask) = make(use_parallel_residual=True), prompts(*(14,) * 3)
    options, calls = {**GREEDY, "max_new_tokens": 6}, []
    expected = generate(model, ids, mask, **options)
    for name in ("rotary_cache_write", "few_key_attention", "residual_norms"):
        # On a CPU they are asked for by name.
        kernel = functools.partial(getattr(steps, name), impl="triton")
        monkeypatch.setattr(
            steps, name, lambda *a, _n=name, _k=kernel, **o: (calls.append((_n, a[1])), _k(*a, **o))[1]
        )
    monkeypatch.setattr(blocks, "_GRAPH_DEVICES", ("cuda", "cpu"))
    hf_longattn.prepare_generation(model, cuda_graph=False)
    with model.few_launches():
        assert torch.equal(generate(model, ids, mask, **options), expected)
    assert read_rows == [((3, 14), 2, True)]
    # Three blocks of two rows, then of the last one, in two layers, before any step of a block.
    kept = [tuple(key.shape[:3:2]) for name, key in calls if name == "rotary_cache_write"]
    assert kept[:4] == [(2, 3)] * 2 + [(1, 3)] * 2 and set(kept[4:]) == {(3, 1)}
    assert {name for name, _ in calls} == {"rotary_cache_write", "few_key_attention", "residual_norms"}


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
