"""A decoding step with its lengths on the device, and the CUDA graph that replays it."""

import logging
import re

import pytest
import tiny
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.generation.graph import GraphDecoder, device_lengths, reason_of, without_full_mask
from hf_longattn.kernels.dispatch import log_once

FAMILIES = ["llama", "mistral-window", "gemma2", "gpt-oss", "gpt-neox", "llama4"]
gpu = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left"])
def test_steps_by_the_clock_equal_ordinary_ones(family, side):
    model = tiny.build(family, "tree_attention")
    lengths = [30, 30] if side == "none" else [30, 12]
    ids, mask = tiny.tokens(2, 30), tiny.padding(lengths, 30, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [LongContextCache(model.config, capacity=18) for _ in range(2)]
    clocks = {}
    with torch.no_grad():
        for cache in caches:
            model(
                input_ids=ids[:, :9],
                attention_mask=mask[:, :9],
                position_ids=positions[:, :9],
                past_key_values=cache,
            )
        start = 9
        for count in (1, 1, 3, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1):
            stop = start + count
            step = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            expected = model(**step, attention_mask=mask[:, :stop], past_key_values=caches[0]).logits
            future = torch.nn.functional.pad(mask[:, :stop], (0, 64), value=1)
            with device_lengths(caches[1], clocks, count):
                used = {id(layer.clock): layer.clock for layer in caches[1].layers}.values()
                for clock in used:
                    clock.begin(count)
                result = model(**step, attention_mask=future, past_key_values=caches[1]).logits
                for clock in used:
                    clock.advance(count)
            for clock in used:
                clock.advanced(count)
            for layer in caches[1].layers:
                layer.advanced(count)
            assert tiny.relative_error(result, expected) <= 2e-5
            start = stop


@pytest.mark.parametrize("chunk", [8, None])
@pytest.mark.parametrize("pads", [0, 3])
def test_a_mask_without_pads_is_known_to_the_end_of_the_answer(pads, chunk, monkeypatch):
    ids, mask = tiny.tokens(1, 20), tiny.padding([20 - pads], 20, "left")
    model = tiny.build("llama")
    call = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    expected, masks = model.generate(ids, **call), []
    hf_longattn.prepare_generation(model, prefill_chunk_size=chunk)
    forward = model.forward

    def looked_at(**kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            masks.append(without_full_mask(kwargs)["attention_mask"])
        return forward(**without_full_mask(kwargs))

    monkeypatch.setattr(model, "forward", looked_at)
    assert model.generate(ids, **call).tolist() == expected.tolist()
    assert len(masks) == 5 and all((seen is None) == (pads == 0) for seen in masks)
    masks.clear()
    # What was known of a tensor that the caller has written to since is known no more.
    mask[:, :5] = 0
    model.generate(ids, **call)
    model.generate(ids[:, -16:], **{**call, "attention_mask": mask[:, -16:]})
    assert not any(seen is None for seen in masks)
    hf_longattn.restore(model)
    assert "_update_model_kwargs_for_generation" not in vars(model)


@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_without_a_mask_on_a_gpu(family):
    ids, model = tiny.tokens(2, 20).cuda(), tiny.build(family).cuda()
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 40}
    expected = model.generate(ids, **call)
    hf_longattn.prepare_generation(model, prefill_chunk_size=8)
    assert model.generate(ids, **call).tolist() == expected.tolist()


class WithoutLooking(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for: a captured step may do none of it."""

    OPERATIONS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert not chosen and not any(name.startswith(word) for word in self.OPERATIONS), f"{name} waits"
        return func(*args, **(kwargs or {}))


def model_and_cache(name):
    """A model that our attention runs, and an empty cache of ours for it."""
    cache_dtype = "int8" if name == "int8" else None
    name = "gemma2" if name == "int8" else name
    if name in LAYERS:
        model = build_with(name)
    else:
        model = tiny.build(name, "tree_attention") if name in FAMILIES else tiny.build_lightning(name)
    hf_longattn.prepare_generation(tiny.capturable(model))
    if name == "minimax":
        from hf_longattn.modeling.lightning.minimax import MiniMaxLongContextCache

        return model, MiniMaxLongContextCache(model.config, capacity=40)
    return model, LongContextCache(model.config, 40, cache_dtype)


class Adapted(torch.nn.Module):
    """A linear layer with a product of low rank beside it, as LoRA has."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.down = torch.nn.Linear(linear.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, linear.out_features, bias=False)

    def forward(self, states):
        return self.base_layer(states) + self.up(self.down(states))


class EightBits(torch.nn.Module):
    """A linear layer whose weight is kept in 8 bits, with a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        self.scale = torch.nn.Parameter(linear.weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), False)

    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight.to(states.dtype) * self.scale)


LAYERS = {"adapter": Adapted, "8-bit-weights": EightBits}


def build_with(kind):
    """A Llama whose linear layers are of another kind, but for the head."""
    model = tiny.build("llama")
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(part, name, LAYERS[kind](child))
    return model


LIGHTNING = ["model", "hybrid", "flag", "flag-hybrid", "neox-flag", "minimax"]


@pytest.mark.parametrize("name", [*FAMILIES, "int8", *LIGHTNING, *LAYERS])
@pytest.mark.parametrize("positions", [False, True], ids=["", "positions"])
def test_a_captured_step_never_asks_the_device(name, positions, monkeypatch):
    (model, cache), clocks = model_and_cache(name), {}
    ids, mask = (
        tiny.tokens(2, 14),
        torch.nn.functional.pad(tiny.padding([14, 6], 14, "left"), (0, 64), value=1),
    )
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        first = {"position_ids": where[:, :9]} if positions else {}
        model(input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache, **first)
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        for part in (slice(9, 10), slice(10, 14)):
            count = part.stop - part.start
            step = {"position_ids": where[:, part]} if positions else {}
            with device_lengths(cache, clocks, count), WithoutLooking():
                for clock in clocks.values():
                    clock.begin(count)
                model(input_ids=ids[:, part], attention_mask=mask.bool(), past_key_values=cache, **step)


def broken_capture():
    """The error that a capture ends with, raised while the one that broke it is on its way."""
    try:
        try:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors\nand more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("required", [False, True])
def test_a_failed_capture_names_what_broke_it_and_the_way_out(required, caplog):
    reasons = {
        ("llama", torch.float32): "^Cannot copy between CPU and CUDA tensors$",
        ("gpt-oss", torch.bfloat16): "^Cannot copy between CPU and CUDA tensors$",
        ("gpt-oss", torch.float32): "^the grouped products .* torch.float32; a model in torch.bfloat16 can",
    }
    log_once.cache_clear()
    for (family, dtype), expected in reasons.items():
        model = tiny.build(family, dtype=dtype)
        reason = reason_of(model, broken_capture())
        assert re.search(expected, reason), reason
        decoder = GraphDecoder(model, model.forward, required)
        if required:
            with pytest.raises(ValueError, match=re.escape(reason)):
                decoder.give_up(reason)
            continue
        for _ in range(2):
            decoder.give_up(reason)
    said = [record.message for record in caplog.records if "could not be captured" in record.message]
    # Each reason once.
    assert len(said) == (0 if required else 2)


@gpu
def test_experts_are_captured_in_bf16_and_in_fp32_where_torch_lets_them(caplog):
    log_once.cache_clear()
    ids = tiny.tokens(3, 9).cuda()
    for dtype, graph in ((torch.bfloat16, True), (torch.float32, "auto")):
        expected = generate(tiny.build("gpt-oss", dtype=dtype).cuda(), ids, None, max_new_tokens=5)
        model = hf_longattn.prepare_generation(tiny.build("gpt-oss", dtype=dtype).cuda(), cuda_graph=graph)
        with caplog.at_level(logging.WARNING, logger="hf_longattn"):
            answers = [generate(model, ids, None, max_new_tokens=5) for _ in range(2)]
        assert dtype == torch.bfloat16 or answers == [expected, expected]
    # Some versions of torch copy the bounds of fp32's groups to the host, whatever `cuda_graph="auto"` asks.
    said = [record.message for record in caplog.records if "could not be captured" in record.message]
    assert len(said) <= 1 and all("a model in torch.bfloat16 can be captured" in line for line in said)


def generate(model, ids, mask, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": 40, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs).tolist()


@gpu
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gemma3", "phi3", "olmo2", "cohere", "gpt2"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_graph_gives_the_tokens_of_eager(family, mode):
    rows = 1 if "prompt_lookup_num_tokens" in mode else 2
    ids, mask = tiny.tokens(rows, 23).cuda(), tiny.padding([23, 9][:rows], 23, "left").cuda()
    expected = generate(tiny.build(family).cuda(), ids, mask, **mode)
    model = hf_longattn.prepare_generation(tiny.build(family).cuda(), prefill_chunk_size=8)
    assert generate(model, ids, mask, **mode) == expected


@gpu
@pytest.mark.parametrize("part", ["model", "forward", "layers"])
def test_steps_of_a_compiled_model_are_captured(part):
    """`tests/generation/test_replay.py` holds the same on a CPU, with a stand-in for the graph."""
    ids, mask = tiny.tokens(2, 23).cuda(), tiny.padding([23, 9], 23, "left").cuda()
    expected, model = generate(tiny.build("llama").cuda(), ids, mask), tiny.build("llama").cuda()
    torch._dynamo.reset()
    if part == "forward":
        model.forward = torch.compile(model.forward, fullgraph=True)
    for module in {"model": [model], "layers": model.model.layers}.get(part, []):
        module.compile()
    # True raises where a step cannot be captured.
    hf_longattn.prepare_generation(model, prefill_chunk_size=8, cuda_graph=True)
    assert [generate(model, ids, mask) for _ in range(2)] == [expected] * 2
    torch._dynamo.reset()


@gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_another_kind_are_captured(kind):
    """What PEFT and packages of quantised weights put in the place of linear layers, without the packages."""
    ids, mask = tiny.tokens(2, 23).cuda(), tiny.padding([23, 9], 23, "left").cuda()
    expected = generate(build_with(kind).cuda(), ids, mask)
    assert expected != generate(tiny.build("llama").cuda(), ids, mask)
    model = hf_longattn.prepare_generation(build_with(kind).cuda(), prefill_chunk_size=8, cuda_graph=True)
    assert generate(model, ids, mask) == expected


@gpu
def test_one_capture_serves_a_whole_answer(monkeypatch):
    captures = []
    real = GraphDecoder._capture
    monkeypatch.setattr(GraphDecoder, "_capture", lambda self, *a: (captures.append(1), real(self, *a))[1])
    model = hf_longattn.prepare_generation(tiny.build("gemma2").cuda(), cuda_graph=True)
    generate(model, tiny.tokens(1, 23).cuda(), None, max_new_tokens=100)
    assert len(captures) == 1


@gpu
def test_hooks_are_honoured_with_one_warning(caplog):
    model = hf_longattn.prepare_generation(tiny.build("llama").cuda())
    calls = []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        generate(model, tiny.tokens(1, 9).cuda(), None, max_new_tokens=5)
    assert len(calls) == 5
    assert sum("forward hooks" in record.message for record in caplog.records) == 1


@gpu
def test_a_users_cache_grows_past_its_capacity():
    ids = tiny.tokens(1, 20).cuda()
    expected = generate(tiny.build("llama").cuda(), ids, None, max_new_tokens=300)
    model = hf_longattn.prepare_generation(tiny.build("llama").cuda())
    cache = LongContextCache(model.config)
    with torch.no_grad():
        # What a call finds empty gets room for all of it.
        model(input_ids=ids[:, :5], past_key_values=cache)
    assert generate(model, ids, None, max_new_tokens=300, past_key_values=cache) == expected


@gpu
def test_sampling_is_reproducible_and_equal():
    ids = tiny.tokens(2, 20).cuda()
    results = []
    for model in (tiny.build("llama").cuda(), hf_longattn.prepare_generation(tiny.build("llama").cuda())):
        tf.set_seed(5)
        results.append(generate(model, ids, None, do_sample=True, top_p=0.9))
    assert results[0] == results[1]
