"""`prepare_generation(cache_dtype=...)`: the tokens do not depend on how they are computed."""

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.quantized import QuantizedLayer, QuantizedSlidingLayer
from hf_longattn.generation import setup as preparing

MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
gpu = pytest.mark.gpu


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    call = {"max_new_tokens": 9, "do_sample": False, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **call).tolist()


def prepare(family, dtype="int8", chunk=5, **fields):
    model = tiny.build(family, dtype=torch.float64 if family != "gpt-oss" else torch.float32)
    return hf_longattn.prepare_generation(model, cache_dtype=dtype, prefill_chunk_size=chunk, **fields)


def transformers_alone(family, ids, mask, cache_dtype, **kwargs):
    """transformers' own loop and model, handed a cache in 8 bits and nothing else of ours."""
    model = tiny.build(family, "tree_attention", torch.float64 if family != "gpt-oss" else torch.float32)
    cache = LongContextCache(model.config, cache_dtype=cache_dtype)
    return generate(model, ids, mask, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "mistral-window"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "lookup"])
def test_tokens_equal_those_of_an_unprepared_model_on_such_a_cache(family, mode):
    lengths = [23] if mode == "lookup" else [23, 10]
    ids, mask = tiny.tokens(len(lengths), 23), tiny.padding(lengths, 23, "left")
    call = MODES["greedy" if mode == "lookup" else mode]
    expected = transformers_alone(family, ids, mask, "int8", **call)
    assert generate(prepare(family), ids, mask, **MODES[mode]) == expected


@pytest.mark.parametrize("dtype", ["fp8", torch.int8, torch.float8_e4m3fn])
def test_dtypes_by_name_and_by_themselves(dtype):
    ids, mask = tiny.tokens(2, 23), tiny.padding([23, 10], 23, "left")
    call = MODES["sampling"]
    assert generate(prepare("llama", dtype, 4), ids, mask, **call) == generate(
        prepare("llama", dtype, 100), ids, mask, **call
    )


def test_layers_are_in_8_bits_and_batch_mates_change_nothing(monkeypatch):
    made = []
    real = preparing.LongContextCache
    monkeypatch.setattr(preparing, "LongContextCache", Kept := type("Kept", (real,), {}))
    monkeypatch.setattr(Kept, "__init__", lambda self, *a: (real.__init__(self, *a), made.append(self))[0])
    model, ids = prepare("gemma2"), tiny.tokens(1, 8)
    alone = generate(model, ids)[0][8:]
    kinds = [type(layer) for layer in made[0].layers]
    assert kinds == [QuantizedSlidingLayer, QuantizedLayer, QuantizedSlidingLayer]
    assert {layer._keys.dtype for layer in made[0].layers} == {torch.int8}
    batch = torch.cat([torch.zeros(1, 15, dtype=torch.long), ids], 1), tiny.tokens(1, 23, seed=4)
    together = generate(model, torch.cat(batch), tiny.padding([8, 23], 23, "left"))
    assert together[0][23:] == alone


def test_several_turns_and_a_saved_cache(tmp_path):
    model = prepare("gemma2")
    first, path = tiny.tokens(1, 11), tmp_path / "cache.safetensors"
    cache = LongContextCache(model.config, cache_dtype="int8")
    answer = torch.tensor(generate(model, first, past_key_values=cache))
    cache.save(path)
    second = torch.cat([answer, tiny.tokens(1, 7, seed=3)], 1)
    loaded = LongContextCache.load(path, model.config, cache_dtype="int8")
    expected = generate(prepare("gemma2", chunk=100), second)
    assert generate(model, second, past_key_values=cache) == expected
    assert generate(model, second, past_key_values=loaded) == expected


def test_assisted_decoding_equals_greedy():
    ids = tiny.tokens(1, 23)
    assistant = hf_longattn.prepare_generation(tiny.build("gemma2", dtype=torch.float64, seed=3))
    assert generate(prepare("gemma2"), ids, assistant_model=assistant) == generate(prepare("gemma2"), ids)


def test_a_cache_in_another_dtype_is_refused():
    model, ids = prepare("llama"), tiny.tokens(1, 9)
    for dtype in (None, "fp8"):
        with pytest.raises(ValueError, match=f"`cache_dtype` of the cache is {dtype!r}.*'int8'"):
            generate(model, ids, past_key_values=LongContextCache(model.config, cache_dtype=dtype))
    with pytest.raises(ValueError, match="`cache_dtype`='int8' cannot be honoured.*StaticCache"):
        generate(model, ids, cache_implementation="static")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    config = tf.MiniMaxConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **sizes
    )
    minimax = hf_longattn.prepare_generation(tf.MiniMaxForCausalLM(config).eval(), cache_dtype="int8")
    with pytest.raises(ValueError, match="MiniMax.*leave `cache_dtype` out"):
        generate(minimax, ids)
    # Without a wish of its own, the model takes what it is given.
    plain = hf_longattn.prepare_generation(tiny.build("llama", dtype=torch.float64), prefill_chunk_size=5)
    cache = LongContextCache(plain.config, cache_dtype="int8")
    assert generate(plain, ids, past_key_values=cache) == generate(model, ids)


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch):
    import hf_longattn.cache.quantized as quantized

    monkeypatch.setattr(quantized, "lacks_fp8", lambda device: True)
    with pytest.raises(ValueError, match="`cache_dtype='fp8'` needs a GPU .* use `cache_dtype='int8'`"):
        prepare("llama", "fp8")
    prepare("llama", "int8")


@gpu
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "mistral-window", "gpt-neox"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "lookup"])
def test_graph_gives_the_tokens_of_eager(family, dtype, mode):
    rows = 1 if mode == "lookup" else 2
    ids, mask = tiny.tokens(rows, 23).cuda(), tiny.padding([23, 9][:rows], 23, "left").cuda()
    results = []
    for graph in (False, True):
        model = tiny.capturable(tiny.build(family)).cuda()
        hf_longattn.prepare_generation(model, cache_dtype=dtype, cuda_graph=graph)
        results.append(generate(model, ids, mask, max_new_tokens=40, **MODES[mode]))
    assert results[0] == results[1]
