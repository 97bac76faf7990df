"""Programs of Block Transformers that later calls go on with, and captures that fail."""

import gc
import logging
import weakref

import pytest
import torch
from block_answers import DECODERS, DRAW, END, GREEDY, Collect, answers, both, generate
from recorded import RecordedGraph
from tiny_blocks import make, prompts
from transformers import PreTrainedModel

import hf_longattn
from hf_longattn.generation import blocks


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
