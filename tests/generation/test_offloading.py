"""`prepare_generation(offload_layers=...)`: the bits of a cache that stays, and fewest layers that fit."""

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.offloaded import offloaded_layers
from hf_longattn.generation import room
from hf_longattn.generation.clock import Hardware
from hf_longattn.generation.offloading import HOST_RATE, plan_offload
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import (
    Ranks,
    activation_bytes,
    cache_bytes,
    layer_bytes,
    number_of_layers,
)

KINDS = ["sliding_attention", "full_attention"] * 4
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.fixture(autouse=True)
def more_layers(monkeypatch):
    """Models of more layers than buffers: five of full attention, or four between windows."""
    for family, changes in (("llama", {"num_hidden_layers": 5}), ("gemma2", {"num_hidden_layers": 8})):
        kinds = {"layer_types": KINDS} if family == "gemma2" else {}
        make = tiny.CONFIGS[family]
        monkeypatch.setitem(tiny.CONFIGS, family, lambda make=make, c={**changes, **kinds}: make(**c))


def prepare(family="llama", device="cpu", **fields):
    model = tiny.build(family).to(device)
    return hf_longattn.prepare_generation(model, **{"prefill_chunk_size": 5, **fields})


def scores(model, ids, mask=None, **kwargs):
    """Tokens and the logits behind them."""
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    call = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    output = model.generate(input_ids=ids, attention_mask=mask, output_logits=True, **call)
    return output.sequences, torch.stack(output.logits), output.past_key_values


def check_equal(expected, result):
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


slow = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache_dtype", [None, pytest.param("int8", marks=slow)])
def test_bits_are_those_without_offload(family, mode, cache_dtype):
    lengths = [23] if mode == "lookup" else [23, 10]
    ids, mask = tiny.tokens(len(lengths), 23), tiny.padding(lengths, 23, "left")
    expected = scores(prepare(family, cache_dtype=cache_dtype), ids, mask, **MODES[mode])
    result = scores(prepare(family, cache_dtype=cache_dtype, offload_layers=4), ids, mask, **MODES[mode])
    check_equal(expected, result)
    assert result[2].offload_layers == 4 and expected[2].offload_layers == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_turns_on_one_cache(family):
    plain, model = prepare(family), prepare(family, offload_layers=3)
    caches = [LongContextCache(model.config) for _ in range(2)]
    conversation = tiny.tokens(1, 11)
    for turn in range(3):
        outputs = [
            scores(each, conversation, past_key_values=cache)
            for each, cache in zip((plain, model), caches, strict=True)
        ]
        check_equal(*outputs)
        conversation = torch.cat([outputs[0][0], tiny.tokens(1, 7, seed=turn)], 1)
        for cache in caches:
            cache.crop(-2)
    assert caches[1].offload_layers == 3
    forks = [cache.fork(2) for cache in caches]
    more = torch.cat([conversation, tiny.tokens(1, 40, seed=9)], 1).repeat(2, 1)
    check_equal(scores(plain, more, past_key_values=forks[0]), scores(model, more, past_key_values=forks[1]))


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=slow), 7, pytest.param(100, marks=slow)])
def test_the_chunk_size_and_an_assistant_change_nothing(chunk):
    ids = tiny.tokens(1, 23)
    models = [prepare("gemma2", prefill_chunk_size=chunk, offload_layers=count) for count in (0, 3)]
    check_equal(*(scores(model, ids) for model in models))
    helper = hf_longattn.prepare_generation(tiny.build("gemma2", seed=3))
    results = [scores(model, ids, assistant_model=helper)[0] for model in models]
    assert torch.equal(*results)


@pytest.fixture
def memory(monkeypatch):
    """Sets the bytes that are free on the device and on the host."""

    def set_memory(device, host=1 << 40):
        monkeypatch.setattr(room, "free_memory", lambda _: device)
        monkeypatch.setattr(room, "host_memory", lambda _: host)

    return set_memory


def bytes_of(config, tokens, count, dtype=torch.float32, rows=1):
    """What a call takes on the device with `count` layers in host memory, a chunk of 5 tokens among it."""
    staying = cache_bytes(config, tokens, dtype) - max(count - 2, 0) * layer_bytes(config, tokens, dtype)
    return rows * staying + activation_bytes(config, 5 * rows, torch.float32)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=slow)])
@pytest.mark.parametrize("cache_dtype", [None, pytest.param("int8", marks=slow)])
def test_auto_takes_the_fewest_layers_that_fit(monkeypatch, memory, family, cache_dtype):
    said = []
    monkeypatch.setattr(room, "warn_slow", lambda name, reason: said.append((name, reason)))
    model, ids = prepare(family, offload_layers="auto", cache_dtype=cache_dtype), tiny.tokens(1, 23)
    expected = scores(prepare(family, cache_dtype=cache_dtype), ids)
    kept = torch.int8 if cache_dtype else torch.float32
    number = number_of_layers(model.config)
    for count in (0, *range(3, number + 1)):
        memory(bytes_of(model.config, 23 + 8, count, kept))
        result = scores(model, ids)
        check_equal(expected, result)
        assert result[2].offload_layers == count and bool(said) == bool(count)
    memory(bytes_of(model.config, 23 + 8, 3, kept) - 1)
    assert scores(model, ids)[2].offload_layers == 4
    words = f"keys and values of 3 of {number} layers wait in host memory, so that 32 tokens fit on cpu"
    assert said[0] == ("offload_layers", words)


def test_what_fits_neither_way_is_refused(memory):
    model, ids = prepare(offload_layers="auto"), tiny.tokens(1, 23)
    least = bytes_of(model.config, 31, 5)
    memory(least, host=5 * layer_bytes(model.config, 31, torch.float32))
    assert scores(model, ids)[2].offload_layers == 5
    memory(least // 2)
    with pytest.raises(ValueError, match="`max_new_tokens`|`input_ids`"):
        scores(model, ids)
    memory(least, host=5 * layer_bytes(model.config, 31, torch.float32) - 1)
    with pytest.raises(ValueError, match="tokens of prompt and answer fit") as error:
        scores(model, ids)
    assert "offload_layers" not in str(error.value)
    memory(least)
    with pytest.raises(ValueError, match="keep 5 layers in host memory with `offload_layers='auto'`"):
        scores(prepare(), ids)
    memory(bytes_of(model.config, 31, 3))
    assert scores(prepare(offload_layers=3), ids)[2].offload_layers == 3


def test_a_cpu_has_no_memory_beside_the_hosts():
    assert room.host_memory(torch.device("cpu")) == 0
    assert room.host_memory(torch.device("cuda")) > 1 << 30


def test_later_turns_count_what_is_on_the_device(memory):
    model = prepare(offload_layers=4)
    cache = LongContextCache(model.config, capacity=80)
    first = scores(model, tiny.tokens(1, 23), past_key_values=cache)[0]
    work = activation_bytes(model.config, 5, torch.float32)
    # The buffers have room for the next turn already.
    memory(work)
    ids = torch.cat([first, tiny.tokens(1, 9, seed=3)], 1)
    scores(model, ids, past_key_values=cache)
    memory(work // 3)
    with pytest.raises(ValueError, match="tokens of prompt and answer fit"):
        scores(model, torch.cat([ids, tiny.tokens(1, 90, seed=5)], 1), past_key_values=cache)


@pytest.mark.parametrize("call_number", [2, 6], ids=["prefill", "decode"])
def test_memory_that_runs_out_leaves_the_cache_as_it_was(call_number):
    model, conversation = prepare("gemma2", offload_layers=4), tiny.tokens(1, 11)
    cache, seen = LongContextCache(model.config), []
    first = scores(model, conversation, past_key_values=cache)[0]
    second = torch.cat([first, tiny.tokens(1, 19, seed=4)], 1)

    def run_out(module, args):
        seen.append(1)
        if len(seen) == call_number:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.model.layers[-1].pre_feedforward_layernorm.register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError, match="as they were before the call"):
        scores(model, second, past_key_values=cache)
    hook.remove()
    plain = prepare("gemma2")
    stays = LongContextCache(plain.config)
    scores(plain, conversation, past_key_values=stays)
    expected = scores(plain, second, past_key_values=stays)
    check_equal(expected, scores(model, second, past_key_values=cache))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"offload_layers": -1}, "a number of layers, or 'auto'"),
        ({"offload_layers": True}, "a number of layers, or 'auto'"),
        ({"offload_layers": "all"}, "a number of layers, or 'auto'"),
        ({"offload_layers": 6}, "`offload_layers` must be from 0 to 5"),
    ],
)
def test_settings_that_cannot_be_honoured(fields, words):
    model = tiny.build("llama", "sdpa")
    before = set(vars(model))
    with pytest.raises(ValueError, match=words):
        hf_longattn.prepare_generation(model, **fields)
    assert set(vars(model)) == before and model.config._attn_implementation == "sdpa"


def test_caches_that_cannot_be_placed():
    model, ids = prepare(offload_layers=3), tiny.tokens(1, 9)
    with pytest.raises(ValueError, match="`offload_layers`=3.*StaticCache"):
        scores(model, ids, cache_implementation="static")
    cache = LongContextCache(model.config, offload_layers=2)
    with pytest.raises(ValueError, match="of `past_key_values` is 2.*`prepare_generation` is 3"):
        scores(model, ids, past_key_values=cache)
    # A cache of the caller may be offloaded where the set-up says nothing.
    result = scores(prepare(), ids, past_key_values=cache)
    check_equal(scores(prepare(), ids), result)
    assert cache.offload_layers == 2


def test_a_set_up_over_several_processes_is_refused():
    from hf_longattn.generation.offloading import check_setup

    config = tiny.CONFIGS["llama"]()
    for wanted in (3, "auto"):
        with pytest.raises(ValueError, match="`offload_layers` must be 0 where several processes"):
            check_setup(hf_longattn.GenerationSetup(offload_layers=wanted), config, 2)
    with pytest.raises(ValueError, match="`cuda_graph=True`.*`offload_layers=3`"):
        check_setup(hf_longattn.GenerationSetup(offload_layers=3, cuda_graph=True), config, 1)


def test_the_plan_says_how_many_layers_must_wait():
    config = tf.LlamaConfig(num_hidden_layers=12, hidden_size=256, intermediate_size=512, vocab_size=1024)
    hardware = Hardware(memory=6 << 30)
    plan = plan_generation(config, 1 << 20, hardware=hardware)
    offload = plan_offload(config, plan, Ranks(), 1, torch.bfloat16)
    assert not plan.fits and offload.number == 12
    a_layer = layer_bytes(config, 1 << 20, torch.bfloat16)
    assert plan.cache == 12 * a_layer and offload.fetched == offload.host == offload.layers * a_layer
    needed = plan.peak - (offload.layers - 2) * a_layer + (1 << 30)
    assert needed <= hardware.memory < needed + a_layer
    assert offload.expected_a_token == pytest.approx(offload.layers * a_layer / HOST_RATE)
    assert offload.expected_recomputing == plan.expected_first_token
    # Neither where it fits, nor where several GPUs share it.
    roomy = plan_generation(config, 1 << 20, hardware=Hardware(memory=1 << 40))
    assert plan_offload(config, roomy, Ranks(), 1, torch.bfloat16) is None
    assert plan_offload(config, plan, Ranks(2), 1, torch.bfloat16) is None
    nothing = plan_generation(config, 1 << 20, hardware=Hardware(memory=1 << 30))
    assert plan_offload(config, nothing, Ranks(), 1, torch.bfloat16).layers is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", MODES)
def test_bits_are_those_without_offload_on_a_gpu(family, mode):
    ids = tiny.tokens(1 if mode == "lookup" else 2, 23).cuda()
    plain, model = (prepare(family, "cuda", cuda_graph=False, offload_layers=count) for count in (0, 4))
    expected, result = scores(plain, ids, **MODES[mode]), scores(model, ids, **MODES[mode])
    check_equal(expected, result)
    layers = offloaded_layers(result[2].layers)
    assert len(layers) == 4 and all(layer._keys.device.type == "cpu" for layer in layers)


@pytest.mark.gpu
def test_auto_captures_no_step_and_says_why(memory, monkeypatch):
    said = []
    monkeypatch.setattr("hf_longattn.generation.graph.warn_slow", lambda name, reason: said.append(reason))
    model, ids = prepare(device="cuda", offload_layers="auto"), tiny.tokens(1, 23).cuda()
    expected = scores(prepare(device="cuda", cuda_graph=False), ids)
    memory(bytes_of(model.config, 23 + 8, 4))
    result = scores(model, ids)
    assert result[2].offload_layers == 4 and any("layers in host memory" in reason for reason in said)
    assert torch.equal(result[0], expected[0])
    with pytest.raises(ValueError, match="`cuda_graph=True` cannot be honoured: layers in host memory"):
        scores(prepare(device="cuda", offload_layers="auto", cuda_graph=True), ids)


@pytest.mark.gpu
def test_the_device_holds_what_the_plan_says():
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 1024}
    config = tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, eos_token_id=None)
    with torch.device("cuda"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens, peaks = 1 << 17, []
    for count in (0, 10):
        hf_longattn.prepare_generation(model, offload_layers=count, cuda_graph=False)
        scores(model, tiny.tokens(1, 64).cuda())
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.generate(tiny.tokens(1, tokens).cuda(), max_new_tokens=2, do_sample=False, pad_token_id=0)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    saved = 8 * layer_bytes(config, tokens + 1, torch.bfloat16)
    assert peaks[0] - peaks[1] == pytest.approx(saved, rel=0.1)
