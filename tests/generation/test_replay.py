"""`generate` on replayed steps: a stand-in for the graph runs the captured call again, on a CPU too."""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.generation import graph
from hf_longattn.generation.graph import GraphDecoder, Step, device_lengths

FAMILIES = ["llama", "gemma2", pytest.param("gpt-neox", marks=pytest.mark.slow)]


_CAPTURE = GraphDecoder._capture


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


def test_a_step_of_inference_mode_is_replayed_outside_of_it(graphs):
    model, plain = hf_longattn.prepare_generation(tiny.build("llama")), tiny.build("llama")
    cache, ids = LongContextCache(model.config, 64), tiny.tokens(2, 9)
    with torch.inference_mode():
        model(input_ids=ids[:, :7], past_key_values=cache)
        model(input_ids=ids[:, 7:8], past_key_values=cache)
    with torch.no_grad():
        last = model(input_ids=ids[:, 8:], past_key_values=cache).logits[:, -1]
        assert tiny.relative_error(last, plain(ids).logits[:, -1]) < 1e-5
    assert [graph.replays for graph in graphs] == [2]


def test_a_step_of_autocast_is_not_replayed_outside_of_it(graphs):
    model = hf_longattn.prepare_generation(tiny.build("llama", dtype=torch.bfloat16))
    cache, ids = LongContextCache(model.config, 64), tiny.tokens(2, 9)
    with torch.no_grad():
        model(input_ids=ids[:, :7], past_key_values=cache)
        for enabled, captured in ((True, 1), (False, 2), (True, 2)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(input_ids=ids[:, :1], past_key_values=cache)
            assert len(graphs) == captured


def compile_parts(model, part, **options):
    """The model, of which a user has compiled itself in place, its forward, or its layers."""
    if part == "forward":
        model.forward = torch.compile(model.forward, fullgraph=True, **options)
    for module in {"model": [model], "layers": model.model.layers}.get(part, []):
        module.compile(**options)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "order"), [("model", "before"), ("model", "after"), ("forward", "before"), ("layers", "after")]
)
def test_steps_of_a_compiled_model(part, order, graphs, monkeypatch):
    """What a compiler traces are the model and its layers: not the capture, and nothing new inside of it."""
    traced, stand_in = [], GraphDecoder._capture

    def capture(rehearse, step):
        rehearse()
        before = counters["frames"]["total"], counters["stats"]["unique_graphs"]
        output = step()
        assert before == (counters["frames"]["total"], counters["stats"]["unique_graphs"])
        traced.append(output)
        return None, output

    def both(self, kwargs, cache, graphs, count):
        assert not torch.compiler.is_compiling()
        _CAPTURE(self, kwargs, cache, graphs, count)
        # The capture has moved them on.
        graphs.clocks.clear()
        return stand_in(self, kwargs, cache, graphs, count)

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(GraphDecoder, "_capture", both)
    ids, mask = tiny.tokens(2, 17), tiny.padding([17, 9], 17, "left")
    expected, model = generate(tiny.build("llama"), ids, mask), tiny.build("llama")
    torch._dynamo.reset()
    try:
        model = compile_parts(model, part, backend="eager") if order == "before" else model
        hf_longattn.prepare_generation(model)
        model = compile_parts(model, part, backend="eager") if order == "after" else model
        counters.clear()
        assert generate(model, ids, mask) == expected
    finally:
        torch._dynamo.reset()
    assert len(traced) == 1 and [graph.replays for graph in graphs] == [13]
    assert counters["stats"]["unique_graphs"] >= 1
    # The call of a step ends a graph where the whole model is compiled in place; nothing else does.
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])


@pytest.mark.gpu
def test_steps_of_an_autocast_each_are_those_without_a_graph():
    ids, answers = tiny.tokens(1, 24).cuda(), []
    for cuda_graph in (False, True):
        model = hf_longattn.prepare_generation(tiny.build("llama").cuda(), cuda_graph=cuda_graph)
        cache, logits = LongContextCache(model.config, 64), []
        for start, stop in ((0, 8), *((i, i + 1) for i in range(8, 24))):
            # Each ends before the next begins, and the memory of its casts goes to others.
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                step = model(input_ids=ids[:, start:stop], past_key_values=cache).logits[:, -1]
            logits.append(step.float())
            torch.randn(1 << 16, device="cuda")
        answers.append(torch.stack(logits))
    assert tiny.relative_error(*answers) < 2e-2
