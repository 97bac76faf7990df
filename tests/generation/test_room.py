"""Calls that cannot fit are refused before any work; where memory runs out after all, nothing is lost."""

import re
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch
from accepted import is_accepted
from living import Living
from transformers import AutoModelForCausalLM, DynamicCache

import hf_longattn
from hf_longattn import devices
from hf_longattn.cache import LongContextCache, preallocated
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.cache.snapshot import Snapshot
from hf_longattn.generation import demand, prefill, room
from hf_longattn.generation.clock import Hardware
from hf_longattn.generation.graph import device_lengths
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import activation_bytes, cache_bytes

FAMILIES = ["llama", "gemma2", "mistral-window", "gpt-oss", "llama4"]


def prepare(family="llama", **fields):
    return hf_longattn.prepare_generation(tiny.build(family), **{"prefill_chunk_size": 5, **fields})


def generate(model, ids, **kwargs):
    mask = torch.ones_like(ids)
    call = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, **kwargs}
    return model.generate(input_ids=ids, **call).tolist()


def count_forwards(model):
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def bytes_of(model, tokens, rows=1, chunk=5):
    """What `tokens` of prompt and answer take, a chunk of the prompt among them."""
    work = activation_bytes(model.config, chunk * rows, torch.float32)
    return rows * cache_bytes(model.config, tokens, torch.float32) + int(demand.CERTAIN * work)


def test_what_cannot_fit_is_refused_before_any_work(free):
    model, ids = prepare(), tiny.tokens(1, 23)
    calls = count_forwards(model)
    # The last token is never put in the cache.
    free(bytes_of(model, 23 + 40 - 1))
    generate(model, ids, max_new_tokens=40)
    calls.clear()
    with pytest.raises(ValueError, match="`max_new_tokens`: a prompt of 23 tokens and 41 new") as error:
        generate(model, ids, max_new_tokens=41)
    assert not calls
    assert " 63 tokens of prompt and answer fit" in str(error.value)
    assert "`cache_dtype='int8'`" in str(error.value) and "`accelerator=`" in str(error.value)
    free(bytes_of(model, 20))
    with pytest.raises(ValueError, match="`input_ids`: a prompt of 23 tokens"):
        generate(model, ids)
    assert not calls
    free(None)
    generate(model, ids)


def test_a_call_of_another_thread_is_not_taken_for_this_one(monkeypatch):
    model, ids = prepare(), tiny.tokens(1, 23)
    size, others = bytes_of(model, 23 + 5), []

    def free(device):
        # A call that fits begins and ends while this one asks.
        if not others:
            others.append(threading.Thread(target=generate, args=(model, ids)))
            others[0].start()
            others[0].join()
        return size

    monkeypatch.setattr(room, "free_memory", free)
    with pytest.raises(ValueError, match="`max_new_tokens`: a prompt of 23 tokens and 41 new"):
        generate(model, ids, max_new_tokens=41)


@pytest.mark.parametrize(("fits", "widest"), [(300, 300), (128, 128), (100, 64), (64, 64), (33, 64)])
def test_chunks_are_as_long_as_there_is_room(free, monkeypatch, fits, widest):
    monkeypatch.setattr(demand, "_SMALLEST_CHUNK", 4)
    monkeypatch.setattr(demand, "RESERVE", 0)
    model, ids, widths = prepare(prefill_chunk_size=None), tiny.tokens(1, 300), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))

    def read(work, cache, **call):
        widths.clear()
        free(cache_bytes(model.config, 301, torch.float32) + work)
        tokens = generate(model, ids, past_key_values=cache, max_new_tokens=2, **call)
        return tokens, max(widths)

    work = activation_bytes(model.config, fits, torch.float32)
    plenty = read(1 << 30, None)
    assert plenty[1] == 300
    cache = LongContextCache(model.config)
    assert read(work, cache) == (plenty[0], widest)
    cache.reset()
    assert read(1 << 30, cache) == plenty, "another call had less room"
    # What somebody asks for is not shortened: what is certain of it fits.
    half = activation_bytes(model.config, 150, torch.float32)
    assert read(half, None, prefill_chunk_size=300)[1] == 300


def begins(model, length, cache=None):
    """Whether a call of so many prompt tokens and one of answer begins; else the words that refuse it."""
    ids = torch.ones(1, length, dtype=torch.long)
    call = {"max_new_tokens": 1, "past_key_values": cache}
    return is_accepted(model.model.layers[0], lambda: generate(model, ids, **call))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("mebibytes", [1400, 1499, 1700, 3333])
def test_the_longest_that_is_planned_is_the_longest_that_is_accepted(free, family, mebibytes):
    model, hardware = prepare(family, prefill_chunk_size=None), Hardware(memory=mebibytes << 20)
    plan = plan_generation(model.config, 4096, dtype=torch.float32, hardware=hardware)
    free(plan.room)
    assert 0 < plan.longest < 10**7
    assert begins(model, plan.longest - 1) is True
    refused = begins(model, plan.longest)
    assert f"; {plan.longest:,} tokens of prompt and answer fit" in str(refused)
    at_limit, beyond = (
        plan_generation(model.config, plan.longest + more, dtype=torch.float32, hardware=hardware)
        for more in (0, 1)
    )
    assert (at_limit.fits, beyond.fits) == (True, False) and at_limit.longest == plan.longest
    # What is counted in full eats into the reserve by half of the shortest chunk, and by ids and masks.
    over = at_limit.peak - (hardware.memory - demand.RESERVE)
    assert over <= at_limit.workspace.activations / 2 + at_limit.workspace.tokens


def test_what_does_not_grow_is_accepted_at_any_length(free):
    model = prepare("mistral-window", prefill_chunk_size=None)
    plan = plan_generation(model.config, 4096, dtype=torch.float32, hardware=Hardware(memory=1400 << 20))
    free(plan.room)
    assert plan.fits and not plan.grows and begins(model, 1 << 20) is True
    nothing = plan_generation(model.config, 4096, hardware=Hardware(memory=1 << 30))
    assert nothing.longest == 0 and not nothing.fits


def test_chunks_are_planned_as_short_as_they_are(free, monkeypatch):
    # On a CPU chunks are shorter to begin with.
    monkeypatch.setattr(prefill, "_CPU_CHUNK_TOKENS", prefill.GPU_CHUNK_TOKENS)
    model, context, found = prepare(prefill_chunk_size=None), 1 << 20, []
    need = plan_generation(model.config, context, dtype=torch.float32)
    for missing in (0.0, 0.3, 0.6, 0.8, 0.9, 0.97):
        # So much of a chunk's activations finds no room beside the reserve.
        memory = need.peak - need.workspace.tokens + (2 << 30) - int(missing * need.workspace.activations)
        plan = plan_generation(model.config, context, dtype=torch.float32, hardware=Hardware(memory=memory))
        cache = LongContextCache(model.config)
        free(plan.room)
        assert begins(model, context - 1, cache) is True
        assert (cache.fitting_chunk or prefill.GPU_CHUNK_TOKENS) == plan.chunk
        assert plan.shortened == (cache.fitting_chunk is not None)
        found.append(plan.chunk)
    assert found == sorted(found, reverse=True) and len(set(found)) > 2


def test_states_of_minimax_are_counted(free):
    model = hf_longattn.prepare_generation(tiny.build_lightning("minimax"), prefill_chunk_size=5)
    ids = tiny.tokens(1, 23)
    size = cache_bytes(model.config, 28, torch.float32)
    work = int(demand.CERTAIN * activation_bytes(model.config, 5, torch.float32))
    free(size + work)
    generate(model, ids)
    free(size + work - 1)
    with pytest.raises(ValueError, match="a prompt of 23 tokens and 6 new"):
        generate(model, ids)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_returned_sequences_are_rows(free, kwargs):
    model, ids = prepare(), tiny.tokens(2, 23)
    free(bytes_of(model, 28, rows=6))
    generate(model, ids, **kwargs)
    free(bytes_of(model, 28, rows=6) - 1)
    with pytest.raises(ValueError, match="in each of 6 rows.*pass fewer rows"):
        generate(model, ids, **kwargs)


def test_a_filled_cache_needs_no_more_than_is_new(free):
    model, ids = prepare(), tiny.tokens(1, 23)
    work = bytes_of(model, 0)
    cache = LongContextCache(model.config, capacity=28)
    generate(model, ids[:, :15], past_key_values=cache, max_new_tokens=1)
    free(work)
    generate(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == 28
    # The fewer new tokens, the smaller the chunk, and the more room for keys.
    with pytest.raises(ValueError, match="; (29|30|31|32) tokens of prompt and answer fit"):
        generate(model, torch.cat([ids, ids], 1), past_key_values=cache)


def test_windows_do_not_grow_with_the_prompt(free):
    model = prepare("mistral-window")
    free(bytes_of(model, 10_000) + 1000)
    generate(model, tiny.tokens(1, 400))


def test_a_cpu_counts_all_of_its_memory_and_other_devices_none():
    assert room.free_memory(torch.device("cpu")) > 1 << 30
    assert room.free_memory(torch.device("meta")) is None


def test_a_cpu_counts_what_its_container_may_take(monkeypatch, tmp_path):
    files = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(devices, "_LIMITS", files)
    whole = room.free_memory(torch.device("cpu"))
    for words, expected in (("max", whole), (str(1 << 62), whole), (str(5 << 20), 5 << 20)):
        files[0].write_text(f"{words}\n")
        assert room.free_memory(torch.device("cpu")) == expected
    assert room.host_memory(torch.device("cuda")) == 4 << 20
    files[0].unlink()
    files[1].write_text("4096\n")
    assert room.free_memory(torch.device("cpu")) == 4096


def run_out(model, call_number):
    """Memory runs out in the last layer at one of its calls; returns the hook."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")
    return tiny.end_in(model.model.layers[-1], call_number, error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call_number", [2, 6], ids=["prefill", "decode"])
def test_memory_that_runs_out_leaves_model_and_cache_as_they_were(family, call_number):
    model, conversation = prepare(family), tiny.tokens(1, 11)
    cache = LongContextCache(model.config)
    first = torch.tensor(generate(model, conversation, past_key_values=cache))
    held = cache.get_seq_length()
    # Longer than the windows, which have moved on by the time of the error.
    second = torch.cat([first, tiny.tokens(1, 19, seed=4)], 1)
    hook = run_out(model, call_number)
    with pytest.raises(torch.OutOfMemoryError, match="as they were before the call") as error:
        generate(model, second, past_key_values=cache)
    hook.remove()
    found = re.search(r"about ([\d,]+) fit", str(error.value))
    assert found and held <= int(found[1].replace(",", "")) < second.shape[1] + 6
    assert cache.get_seq_length() == held
    assert generate(model, second, past_key_values=cache) == generate(prepare(family), second)


def test_an_empty_cache_gives_its_memory_back():
    model, ids = prepare(), tiny.tokens(1, 23)
    cache = LongContextCache(model.config, capacity=64)
    hook = run_out(model, 2)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, ids, past_key_values=cache)
    hook.remove()
    assert all(layer._keys is None for layer in cache.layers) and cache.get_seq_length() == 0
    assert generate(model, ids, past_key_values=cache) == generate(prepare(), ids)


def test_a_cache_that_is_not_taken_back_is_named():
    model, ids = prepare(), tiny.tokens(1, 23)
    cache = DynamicCache(config=model.config)
    run_out(model, 3)
    with pytest.raises(torch.OutOfMemoryError, match="a DynamicCache, may hold a part of the call"):
        generate(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("buffer", [1, 2, 3, 4])
def test_buffers_that_could_not_grow_hold_what_they_held(monkeypatch, buffer):
    model = prepare(prefill_chunk_size=50)
    cache = LongContextCache(model.config, capacity=16)
    first = torch.tensor(generate(model, tiny.tokens(1, 11), past_key_values=cache))
    ids = torch.cat([first, tiny.tokens(1, 200, seed=4)], 1)
    real, made = preallocated._moved, []

    def moved(filled, capacity):
        made.append(1)
        if len(made) == buffer:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(filled, capacity)

    monkeypatch.setattr(preallocated, "_moved", moved)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == 16
    assert generate(model, ids, past_key_values=cache) == generate(prepare(), ids)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("buffer", [2, 4, 5])
def test_captured_steps_go_on_where_some_layers_had_grown(monkeypatch, family, cache_dtype, buffer):
    model = tiny.build(family, "tree_attention")
    cache = LongContextCache(model.config, cache_dtype=cache_dtype)
    real, made = preallocated._moved, []

    def moved(filled, capacity):
        made.append(1)
        if len(made) == buffer:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(filled, capacity)

    last = {"input_ids": tiny.tokens(1, 1, seed=4), "position_ids": torch.tensor([[30]])}
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 30), past_key_values=cache)
        snapshot = Snapshot(cache)
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(preallocated, "_moved", moved)
            model(input_ids=tiny.tokens(1, 400, seed=3), past_key_values=cache)
        snapshot.restore()
        expected = model(**last, past_key_values=cache.fork()).logits
        with device_lengths(cache, clocks := {}, 1):
            for clock in clocks.values():
                clock.begin(1)
            result = model(**last, past_key_values=cache).logits
    assert tiny.relative_error(result, expected) < 1e-5


def test_states_are_copied_and_put_back():
    config = tiny.CONFIGS["llama"]()
    model = tiny.build("llama")
    model.config._attn_implementation = config._attn_implementation = "lightning_attention"
    cache, ids = LongContextCache(config), tiny.tokens(1, 23)
    with torch.no_grad():
        model(input_ids=ids[:, :9], past_key_values=cache)
        snapshot = Snapshot(cache)
        expected = model(input_ids=ids[:, 9:], past_key_values=cache).logits
        snapshot.restore()
        assert cache.get_seq_length() == 9
        assert torch.equal(model(input_ids=ids[:, 9:], past_key_values=cache).logits, expected)


def test_layers_that_ranks_share_keep_one_placement():
    config = tiny.CONFIGS["llama"]()
    config._attn_implementation, config.lightning_layers = "lightning_attention", [0, 2]
    cache = ShardedCache(config, SimpleNamespace(rank=0, world_size=2))
    states = torch.ones(1, 2, 9, 16)

    def add():
        for index, layer in enumerate(cache.layers):
            cache.update(states, states, index)
            if isinstance(layer, RecurrentLayer):
                layer.recurrent_state = torch.zeros(1, 4, 16, 16)

    add()
    snapshot = Snapshot(cache)
    add()
    snapshot.restore()
    assert all(layer.placement is cache.placement for layer in cache.layers)
    add()
    assert cache.placement.length == cache.get_seq_length() == 18


def test_other_errors_leave_the_cache_to_the_caller():
    model, ids = prepare(), tiny.tokens(1, 23)
    cache = LongContextCache(model.config)
    stop = []

    def hook(module, args):
        stop.append(1)
        if len(stop) == 3:
            raise RuntimeError("something else")

    model.model.layers[-1].mlp.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="^something else$"):
        generate(model, ids, past_key_values=cache)
    assert cache.layers[0].get_seq_length() == 15


def test_restore_gives_generate_back():
    model = prepare()
    assert "generate" in vars(model)
    hf_longattn.restore(model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize(("family", "feed_forward"), [("llama", 3), ("gpt-neox", 2), ("phi3", 4)], ids=str)
def test_activations_of_a_chunk_lie_between_what_is_certain_and_what_is_planned(family, feed_forward):
    width, hidden = 1024, 64
    config = tiny.CONFIGS[family](intermediate_size=width)
    model = hf_longattn.prepare_generation(AutoModelForCausalLM.from_config(config).eval())
    cache = LongContextCache(config, capacity=300)
    with torch.no_grad(), Living() as living:
        model(input_ids=tiny.tokens(1, 8), past_key_values=cache)
        before, living.peak = living.now, 0
        model(input_ids=tiny.tokens(1, 256), past_key_values=cache, logits_to_keep=1)
    taken = (living.peak - before) / 256 / 4
    # Cosines, sines and positions are some elements a token more.
    assert 0 <= taken - (feed_forward * width + 3 * hidden) <= 2 * hidden
    planned = activation_bytes(model.config, 256, torch.float32) / 256 / 4
    assert demand.CERTAIN * planned <= taken <= planned + 2 * hidden


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_memory_of_a_gpu_that_runs_out(cuda_graph, monkeypatch):
    import transformers as tf

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 97}
    config = tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, eos_token_id=None)
    model = tiny.scattered(tf.AutoModelForCausalLM.from_config(config).eval()).cuda()
    hf_longattn.prepare_generation(model, cuda_graph=cuda_graph)
    cache = LongContextCache(config)
    first = torch.tensor(generate(model, tiny.tokens(1, 4000).cuda(), past_key_values=cache)).cuda()
    second, held = torch.cat([first, tiny.tokens(1, 50, seed=4).cuda()], 1), cache.get_seq_length()
    expected = generate(model, second)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(room, "free_memory", lambda device: None)
    # 32 KiB a token: a prompt of 2 GiB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 29)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="as they were before the call"):
            generate(model, torch.cat([first, tiny.tokens(1, 1 << 16).cuda()], 1), past_key_values=cache)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert cache.get_seq_length() == held
    assert generate(model, second, past_key_values=cache) == expected


@pytest.mark.gpu
def test_what_is_counted_is_not_more_than_what_is_taken():
    import transformers as tf

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 1024}
    config = tf.LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, eos_token_id=None)
    with torch.device("cuda"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = hf_longattn.prepare_generation(model)
    generate(model, tiny.tokens(1, 64).cuda())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generate(model, tiny.tokens(1, 1 << 17).cuda(), max_new_tokens=2)
    taken = torch.cuda.max_memory_allocated() - before
    cache = cache_bytes(config, (1 << 17) + 1, torch.bfloat16)
    activations = activation_bytes(config, 8192, torch.bfloat16)
    assert cache + demand.CERTAIN * activations <= taken <= cache + 1.1 * activations
