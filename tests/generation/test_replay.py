"""`generate` on replayed steps: a stand-in for the graph runs the captured call again, on a CPU too."""

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.generation import graph
from hf_longattn.generation.graph import GraphDecoder, Step, device_lengths

FAMILIES = ["llama", "gemma2", pytest.param("gpt-neox", marks=pytest.mark.slow)]


class _Replayed:
    """Runs the call of a capture on the tensors that were captured, and knows no lengths but the clocks'."""

    def __init__(self, decoder, call, cache, clocks, count):
        self.decoder, self.call, self.cache = decoder, call, cache
        self.clocks, self.count = clocks, count
        self.tensors, self.replays = {}, 0

    def replay(self):
        self.replays += 1
        with device_lengths(self.cache, self.clocks, self.count):
            used = {id(layer.clock): layer.clock for layer in self.cache.layers}.values()
            for clock in used:
                clock.begin(self.count)
            output = self.decoder.original(**self.call)
            for clock in used:
                clock.advance(self.count)
        self.tensors["logits"] = output.logits


@pytest.fixture
def graphs(monkeypatch):
    """Captures on a CPU; what was captured."""
    made = []

    def capture(self, kwargs, cache, graphs, count):
        inputs = graph._make_inputs(kwargs)
        with device_lengths(cache, graphs.clocks, count):
            leaders = list({id(layer.clock): (layer.clock, layer) for layer in cache.layers}.values())
        replayed = _Replayed(self, {**kwargs, **inputs}, cache, graphs.clocks, count)
        made.append(replayed)
        output_type = type(self.model(input_ids=kwargs["input_ids"]))
        return Step(replayed, inputs, output_type, replayed.tensors, leaders, graph._buffers(cache))

    monkeypatch.setattr(graph, "_GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(GraphDecoder, "_capture", capture)
    return made


def generate(model, ids, mask=None, **kwargs):
    call = {"do_sample": False, "max_new_tokens": 14, **kwargs}
    torch.manual_seed(11)
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **call).tolist()


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "penalty": {"repetition_penalty": 1.3},
    "returned": {"num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_transformers(family, mode, graphs):
    rows = 1 if mode == "lookup" else 2
    ids, mask = tiny.tokens(rows, 17), tiny.padding([17, 9][:rows], 17, "left")
    expected = generate(tiny.build(family), ids, mask, **MODES[mode])
    model = hf_longattn.prepare_generation(tiny.build(family), prefill_chunk_size=8)
    assert generate(model, ids, mask, **MODES[mode]) == expected
    assert graphs and sum(graph.replays for graph in graphs) >= (1 if mode == "lookup" else 13)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["positions", "positions-only", "no-mask", "holes"])
def test_what_the_caller_passes_is_honoured(family, form, graphs):
    ids, mask = tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    call = {}
    if form.startswith("positions"):
        # Not those of the mask: every token moved on by five.
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + 5
    if form == "holes":
        mask[0, 5] = mask[1, 12] = 0
    mask = None if form in ("no-mask", "positions-only") else mask
    expected = generate(tiny.build(family), ids, mask, **call)
    model = hf_longattn.prepare_generation(tiny.build(family), prefill_chunk_size=8)
    assert generate(model, ids, mask, **call) == expected
    assert len(graphs) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_conversation_go_on_and_outgrow_their_room(family, graphs):
    plain, model = tiny.build(family), hf_longattn.prepare_generation(tiny.build(family))
    cache, whole = LongContextCache(model.config), tiny.tokens(1, 11)
    for turn in range(3):
        mask = torch.ones_like(whole)
        expected = generate(plain, whole, mask)
        assert generate(model, whole, mask, past_key_values=cache) == expected
        whole = torch.cat([torch.tensor(expected), tiny.tokens(1, 4 + turn)], 1)
    assert len(graphs) >= 3


def test_a_mask_that_outgrows_its_buffer_is_captured_again(graphs, monkeypatch):
    monkeypatch.setattr(graph, "_MASK_ROOM", 7)
    ids, mask = tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    expected = generate(tiny.build("llama"), ids, mask)
    assert generate(hf_longattn.prepare_generation(tiny.build("llama")), ids, mask) == expected
    assert len(graphs) == 2
