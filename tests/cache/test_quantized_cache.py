"""A cache in 8 bits: the same bytes and scales whatever happens between, and models that read them."""

import pytest
import tiny
import torch

from hf_longattn import LongContextCache
from hf_longattn.attention import quantized as pieces
from hf_longattn.attention.exact import Options, exact_attention
from hf_longattn.cache.quantized import QuantizedLayer, QuantizedSlidingLayer, scales_of
from hf_longattn.generation.graph import device_lengths
from hf_longattn.kernels.quantized_states import dequantized_states, quantized_states

WINDOW = 6
KINDS = ["full", "sliding"]
DTYPES = ["int8", "fp8"]
TORCH_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FAMILIES = ["llama", "gemma2", "mistral-window", "gpt-oss", "llama4", "gpt2"]


def states(batch, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, count, width, generator=generator) for width in (4, 3)]


def make_layer(kind, dtype="int8"):
    kinds = {"full": QuantizedLayer, "sliding": QuantizedSlidingLayer}
    return kinds[kind](TORCH_DTYPES[dtype], *([WINDOW] if kind == "sliding" else []))


def shown(layer, new):
    """What attention would read, as numbers."""
    keys, values = layer.update(*new)
    scales = scales_of(keys)
    assert keys.dtype == values.dtype == layer.cache_dtype and scales.shape == (*keys.shape[:3], 2)
    numbers = (keys, scales[..., :1]), (values, scales[..., 1:])
    return [dequantized_states(states, factor, torch.float64) for states, factor in numbers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1] * 40, [17, 1, 1, 9, 1, 30, 1], [1, 400, 1, 1]], ids=str)
def test_what_is_shown_is_each_token_quantised_alone(kind, dtype, counts):
    layer, tokens = make_layer(kind, dtype), []
    for step, count in enumerate(counts):
        new = states(2, count, step)
        *rows, scales = quantized_states(*new, layer.cache_dtype)
        factors = scales[..., :1], scales[..., 1:]
        tokens.append([dequantized_states(r, f, torch.float64) for r, f in zip(rows, factors, strict=True)])
        first = layer.get_mask_sizes(count)[1]
        expected = (torch.cat(part, 2)[:, :, first:] for part in zip(*tokens, strict=True))
        assert all(map(torch.equal, shown(layer, new), expected))
        assert layer.get_seq_length() == sum(counts[: step + 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", "reorder repeat select crop reset offload grow clock".split())
def test_scales_go_where_their_keys_go(kind, change):
    """After each change the layer shows the same tokens as one that was filled with what the change left."""
    layer, plain = make_layer(kind), make_layer(kind)
    rows, count = torch.arange(2), 11
    first = states(2, 11, 0)
    if change == "crop" and kind == "sliding":
        layer.activate_past_recording()
    layer.update(*first)
    if change == "reorder":
        rows = torch.tensor([1, 1])
        layer.reorder_cache(rows)
    elif change == "repeat":
        rows = torch.tensor([0, 0, 1, 1])
        layer.batch_repeat_interleave(2)
    elif change == "select":
        rows = torch.tensor([1])
        layer.batch_select_indices(rows)
    elif change == "crop":
        layer.crop(-3)
        count = 8
    elif change == "reset":
        layer.reset()
        count = 0
    elif change == "offload":
        layer.offload()
        layer.prefetch()
    elif change == "grow":
        layer.make_room(1000)
        assert layer.capacity == layer.scales.capacity >= 1000
    elif change == "clock":
        advance_by_clock(layer, states(2, 1, 5))
        first = [torch.cat(pair, 2) for pair in zip(first, states(2, 1, 5), strict=True)]
        count = 12
    if count:
        plain.update(*(part[rows, :, :count] for part in first))
    new = states(len(rows), 2, 9)
    assert all(map(torch.equal, shown(layer, new), shown(plain, new)))


def advance_by_clock(layer, new):
    """One step as a CUDA graph makes it: written by an index on the device."""
    from types import SimpleNamespace

    with device_lengths(SimpleNamespace(layers=[layer]), clocks := {}, 1):
        (clock,) = clocks.values()
        clock.begin(1)
        keys, _ = layer.update(*new)
        assert scales_of(keys).shape[2] == keys.shape[2] == layer.capacity
        clock.advance(1)
    layer.advanced(1)


def test_a_step_moves_nothing_while_there_is_room():
    layer = QuantizedLayer(torch.int8, capacity=64)
    layer.update(*states(1, 20, 0))
    buffers = layer._keys, layer._values, layer.scales._keys
    before = [buffer.data_ptr() for buffer in buffers]
    for step in range(30):
        layer.update(*states(1, 1, step))
    assert [b.data_ptr() for b in (layer._keys, layer._values, layer.scales._keys)] == before
    held = sum(b.numel() * b.element_size() for b in buffers)
    assert held == 64 * 2 * (4 + 3 + 8)


def run(model, ids, mask, cache, chunk):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    parts = []
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            part = slice(start, start + chunk)
            call = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            parts.append(model(input_ids=ids[:, part], past_key_values=cache, **call).logits)
    return torch.cat(parts, 1)[mask.bool()]


def build(family):
    # In fp64 no rounding is large enough to move a number of 8 bits to the next one.
    model = tiny.build(family, "tree_attention", torch.float64)
    model.set_experts_implementation("eager") if family == "gpt-oss" else None
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_do_not_depend_on_the_chunks_or_on_the_size_of_a_piece(family, side, monkeypatch):
    model = build(family)
    ids, mask = tiny.tokens(2, 40), tiny.padding([40, 23], 40, side)
    expected = run(model, ids, mask, LongContextCache(model.config, cache_dtype="int8"), 1)
    plain = [run(model, ids, mask, LongContextCache(model.config), chunk) for chunk in (1, 40)]
    # Llama 4 rounds to fp32 in places, whatever the cache.
    bound = 1e-13 + 1.5 * tiny.relative_error(*plain)
    for chunk, piece in ((40, 10**6), (18, 16), (17, 20), (5, 8)):
        monkeypatch.setattr(pieces, "PIECE_TOKENS", piece)
        cache = LongContextCache(model.config, cache_dtype="int8")
        assert tiny.relative_error(run(model, ids, mask, cache, chunk), expected) <= bound
    # It is another cache than the plain one, and not far from it.
    assert 1e-4 < tiny.relative_error(expected, plain[1]) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_and_padding_change_nothing(dtype):
    model = build("gemma2")
    ids, mask = tiny.tokens(2, 40), tiny.padding([40, 23], 40, "left")
    together = run(model, ids, mask, LongContextCache(model.config, cache_dtype=dtype), 9)
    alone = run(model, ids[1:, 17:], mask[1:, 17:], LongContextCache(model.config, cache_dtype=dtype), 9)
    assert tiny.relative_error(together[40:], alone) <= 1e-13


def test_a_4d_mask_and_blockwise_attention_read_the_scales(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 7)
    ids, results = tiny.tokens(1, 30), []
    dense = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
    for kind, mask in (("tree", None), ("tree", dense), ("blockwise", None)):
        model = tiny.build("llama", f"{kind}_attention", torch.float64)
        cache = LongContextCache(model.config, cache_dtype="fp8")
        with torch.no_grad():
            first = None if mask is None else mask[..., :25, :25]
            model(input_ids=ids[:, :25], attention_mask=first, past_key_values=cache)
            rest = None if mask is None else mask[..., 25:, :]
            results.append(model(input_ids=ids[:, 25:], attention_mask=rest, past_key_values=cache).logits)
    assert tiny.relative_error(results[1], results[0]) <= 1e-13
    assert tiny.relative_error(results[2], results[0]) <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_save_load_and_fork_continue_where_it_stopped(family, dtype, tmp_path):
    model, ids = tiny.build(family, "tree_attention"), tiny.tokens(1, 30)
    cache, path = LongContextCache(model.config, cache_dtype=dtype), tmp_path / "cache.safetensors"
    with torch.no_grad():
        model(input_ids=ids[:, :20], past_key_values=cache)
        cache.save(path)
        fork = cache.fork(batch_size=2)
        expected = model(input_ids=ids[:, 20:], past_key_values=cache).logits
        loaded = LongContextCache.load(path, model.config, capacity=64, cache_dtype=dtype)
        assert torch.equal(model(input_ids=ids[:, 20:], past_key_values=loaded).logits, expected)
        both = model(input_ids=ids[:, 20:].expand(2, -1), past_key_values=fork).logits
    assert tiny.relative_error(both, expected.expand_as(both)) <= 2e-5
    for other in (None, {"int8": "fp8", "fp8": "int8"}[dtype]):
        with pytest.raises(ValueError, match=f"`cache_dtype` of the cache is {other!r}.*{dtype!r}"):
            LongContextCache.load(path, model.config, cache_dtype=other)


def test_a_plain_file_is_not_read_as_8_bits(tmp_path):
    model, path = tiny.build("llama", "tree_attention"), tmp_path / "cache.safetensors"
    cache = LongContextCache(model.config)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 5), past_key_values=cache)
    cache.save(path)
    with pytest.raises(ValueError, match="`cache_dtype` of the cache is 'int8', but that of `path`"):
        LongContextCache.load(path, model.config, cache_dtype=torch.int8)


def test_keys_that_lost_their_scales_are_refused():
    keys, values = make_layer("full").update(*states(1, 4, 0))
    changed, query = keys.clone(), torch.randn(1, 2, 1, 4)
    with pytest.raises(TypeError, match="`cache_dtype`: keys in 8 bits came to attention without"):
        # Autocast would make numbers of the bytes.
        with torch.autocast("cpu", torch.bfloat16):
            exact_attention(query, changed, values, None, Options(causal=True), split_kv=True)


def test_what_is_refused():
    model, ids = tiny.build("llama", "tree_attention"), tiny.tokens(1, 5)
    with pytest.raises(ValueError, match="`cache_dtype` must be 'int8', 'fp8' or None"):
        LongContextCache(model.config, cache_dtype=torch.bfloat16)
    cache = LongContextCache(model.config, cache_dtype="int8")
    with pytest.raises(ValueError, match="have no gradient; run under `torch.no_grad"):
        model(input_ids=ids, past_key_values=cache)
    with torch.no_grad():
        other = tiny.build("llama", "sdpa")
        with pytest.raises((TypeError, RuntimeError)):
            other(input_ids=ids, past_key_values=LongContextCache(model.config, cache_dtype="int8"))
        cache = LongContextCache(model.config, cache_dtype="int8")
        model(input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`rows`: layer 0 is a QuantizedLayer"):
        cache.fork(rows=2)
