"""The plan against what was measured, and against what the caches and the tensor parallel plan hold."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn import LongContextCache
from hf_longattn.cache.preallocated import sliding_capacity
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.cache.shares import ShardedLayer, share_capacity
from hf_longattn.generation import clock
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import (
    Ranks,
    cache_bytes,
    count_weights,
    layer_bytes,
    read_bytes,
    workspace_bytes,
)
from hf_longattn.modeling.lightning.minimax import MiniMaxLongContextCache
from hf_longattn.parallel.cost import Links, message_bytes, received_bytes, reduction_seconds

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_tables.py"
sys.path.insert(0, str(SCRIPT.parent))
TABLES = runpy.run_path(str(SCRIPT), run_name="plan_tables")
sys.path.remove(str(SCRIPT.parent))
SHAPE, MEASURED = TABLES["SHAPE"], list(TABLES["measured"]())
BLOCKS, LIGHTNING = list(TABLES["measured_blocks"]()), list(TABLES["measured_lightning"]())
LATEST = max(row["date"] for row in MEASURED)[:10]


def measured_id(row):
    kind = TABLES["PREPARED"][row["peer"]] or "bf16"
    return f"P{row.get('ranks', 1)}-{row['prompt']}-B{row['batch']}-pad{row.get('pad', 0)}-{kind}"


def other_id(row):
    return f"{row['prompt']}-{row['new']}-B{row['batch']}"


@pytest.mark.parametrize("row", MEASURED, ids=measured_id)
def test_memory_and_times_are_those_measured(row):
    plan = TABLES["plan_of"](row)
    assert plan.peak == pytest.approx(row["peak_gib"] * 2**30, rel=0.05)
    assert plan.fits and plan.longest >= plan.context
    if row["date"].startswith(LATEST):
        # Prompts and steps have become faster than those of earlier days; memory is as it was.
        assert plan.expected_first_token == pytest.approx(row["first_token_s"], rel=0.10, abs=0.05)
        assert 1e3 * plan.expected_a_token == pytest.approx(row["token_ms"], rel=0.10)


def test_there_are_measurements_to_hold_the_plan_against():
    assert {row.get("ranks", 1) for row in MEASURED} == {1, 2} and len(MEASURED) >= 11
    assert {row["peer"] for row in MEASURED} >= {"prepared", "prepared-fp8"}
    assert len(BLOCKS) >= 4 and len(LIGHTNING) >= 3


@pytest.mark.parametrize("row", BLOCKS, ids=other_id)
def test_block_transformers_take_what_was_measured(row):
    plan = TABLES["plan_of_other"](TABLES["BLOCK_SHAPE"], row)
    assert plan.peak == pytest.approx(row["peak_gib"] * 2**30, rel=0.05)
    # The launches of a prompt are left out.
    assert plan.expected_first_token <= row["prompt_s"]
    # Many rows hide the launches of a step, which are planned.
    assert 0.89 <= 1e3 * plan.expected_a_token / row["step_ms"] <= (1.01 if row["batch"] < 1024 else 1.05)
    assert 1e3 * plan.floor_a_token <= row["step_ms"]
    assert plan.fits and plan.block_length == 4


@pytest.mark.parametrize("row", LIGHTNING, ids=other_id)
def test_lightning_models_take_what_was_measured(row):
    plan = TABLES["plan_of_other"](TABLES["LIGHTNING_SHAPE"], row)
    assert plan.peak == pytest.approx(row["peak_gib"] * 2**30, rel=0.05)
    assert plan.expected_first_token == pytest.approx(row["first_token_s"], rel=0.10, abs=0.05)
    # The launches of these layers are more than those of the models that the overhead was measured on.
    assert 0.80 <= 1e3 * plan.expected_a_token / row["token_ms"] <= 1.0
    assert 1e3 * plan.floor_a_token == pytest.approx(row["floor_token_ms"], rel=0.01)
    assert not plan.grows and plan.states == plan.cache


def test_the_tables_of_the_page_are_up_to_date():
    text = TABLES["PAGE"].read_text()
    assert TABLES["filled"](text) == text, "run `python benchmarks/plan_tables.py`"


def test_the_page_gives_the_constants_of_the_plan():
    text = " ".join(TABLES["PAGE"].read_text().split())
    products, attention = 100 * clock.PRODUCT_SHARE, 100 * clock.ATTENTION_SHARE
    assert f"add {1e6 * clock.OVERHEAD_A_LAYER:.0f} µs a layer" in text
    assert f"or {1e6 * clock.FEW_ROW_OVERHEAD_A_LAYER:.0f} µs where layers of GPT-NeoX" in text
    assert f"({products:.3g} % and {attention:.3g} % of 989 TFLOP/s)" in text
    assert f"`start`, {1e6 * Links().start:.3g} µs," in text


def test_the_reduction_is_that_measured_with_two_gpus():
    links = Links()
    message = message_bytes(1, 32, 128)
    found = list(TABLES["reductions"]())
    assert len(found) >= 3
    for keys, own, step, _ in found:
        assert 1e6 * reduction_seconds(message, 2, links) == pytest.approx(step - own, rel=0.10), keys
    assert reduction_seconds(message, 1, links) == 0.0


def test_nodes_are_joined_after_the_gpus_inside_them():
    message, links = message_bytes(1, 32, 128), Links()
    assert message == 32 * (256 + 4)
    assert received_bytes(message, 128, links) == (7 + 15) * message
    assert received_bytes(message, 2, links) == message
    times = [reduction_seconds(message, ranks, links) for ranks in (2, 4, 8, 16, 128)]
    assert times == sorted(times)


class Group:
    world_size, rank = 3, 1


@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_a_rank_holds_what_its_cache_makes_room_for(tokens):
    config = tiny.CONFIGS["llama"]()
    slots = ShardedLayer(Group(), None, tokens).capacity
    rows = slots * config.num_hidden_layers * config.num_key_value_heads
    # Two numbers of a byte, and two scales, in the place of two numbers of two bytes.
    for dtype, row in ((torch.bfloat16, 2 * 16 * 2), (torch.int8, 2 * 16 + 2 * 4)):
        assert cache_bytes(config, tokens, dtype, Ranks(sequence=3)) == rows * row


def test_windows_are_whole_on_every_rank():
    config = tiny.CONFIGS["mistral-window"]()
    alone = cache_bytes(config, 5000, torch.bfloat16)
    assert cache_bytes(config, 5000, torch.bfloat16, Ranks(sequence=4)) == alone


def test_tensor_parallel_ranks_divide_what_the_plan_of_transformers_divides():
    config = tf.LlamaConfig(**{**tiny.CONFIGS["llama"]().to_dict(), "tie_word_embeddings": False})
    model = tiny.build("llama")
    whole = {n: p.numel() * 4 for n, p in model.named_parameters()}
    cut = sum(size for name, size in whole.items() if "proj" in name or "lm_head" in name)
    weights = count_weights(config, torch.float32, 2)
    assert weights.total == sum(whole.values()) - cut // 2
    assert weights.read == weights.total - whole["model.embed_tokens.weight"]
    half = cache_bytes(config, 64, torch.float32, Ranks(tensor=2))
    assert 2 * half == cache_bytes(config, 64, torch.float32)


def test_a_token_reads_the_experts_it_goes_through():
    config = tiny.CONFIGS["gpt-oss"]()
    weights = count_weights(config, torch.float32)
    model = tiny.build("gpt-oss")
    experts = sum(p.numel() * 4 for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.get_input_embeddings().weight.numel() * 4
    assert weights.read == weights.total - experts // 2 - embedding


def test_lightning_layers_keep_a_state_of_constant_size():
    config = tiny.CONFIGS["llama"]()
    config._attn_implementation = "lightning_attention"
    assert cache_bytes(config, 10, torch.float32) == cache_bytes(config, 10**6, torch.float32)
    assert cache_bytes(config, 10, torch.float32) == 3 * 4 * 16 * 16 * 4


@pytest.mark.parametrize("name", ["model", "hybrid", "flag", "flag-hybrid", "neox-flag", "minimax"])
def test_lightning_models_hold_what_their_cache_holds(name):
    """Bytes of the tensors in a cache that a prepared model has filled, and their share on ranks."""
    model = tiny.build_lightning(name)
    kind = MiniMaxLongContextCache if name == "minimax" else LongContextCache
    cache = kind(model.config, capacity=300)
    hf_longattn.prepare_generation(model)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 300), past_key_values=cache, use_cache=True)
    held, states = 0, 0
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            states += layer.recurrent_state.numel() * layer.recurrent_state.element_size()
        else:
            held += 2 * layer.keys.numel() * layer.keys.element_size()
    assert states and bool(held) == (name in ("hybrid", "flag-hybrid", "minimax"))
    assert cache_bytes(model.config, 300, torch.float32) == states + held
    assert cache_bytes(model.config, 300, torch.bfloat16) == states + held // 2
    if held:
        # A state is whole on every rank, and its heads are divided as those of the keys are.
        shared = cache_bytes(model.config, 300, torch.float32, Ranks(sequence=2))
        assert shared == states + held // 300 * share_capacity(300, 2)
    assert 2 * cache_bytes(model.config, 300, torch.float32, Ranks(tensor=2)) == states + held


def test_a_saved_config_that_lists_lightning_layers_is_planned_as_it_is_loaded(tmp_path):
    """`attn_implementation` is not saved: without the list, a plan is that of softmax."""
    loaded = tiny.CONFIGS["llama"](lightning_layers=[0, 2])
    loaded.save_pretrained(tmp_path)
    plain = tiny.CONFIGS["llama"]()
    listed = tf.AutoConfig.from_pretrained(tmp_path)
    assert listed._attn_implementation is None
    loaded._attn_implementation = "lightning_attention"
    plans = [plan_generation(config, 4096) for config in (listed, loaded, plain)]
    assert plans[0] == plans[1] and listed._attn_implementation is None
    a_layer = plans[2].cache // 3
    assert plans[0].cache == a_layer + 2 * 4 * 16 * 16 * 4
    assert plans[0].longest > 2 * plans[2].longest
    # A model that is loaded with softmax keeps keys and values.
    listed._attn_implementation = "sdpa"
    assert plan_generation(listed, 4096).cache == plans[2].cache


def test_lightning_layers_take_time_linear_in_the_length_and_join_nothing():
    config = copy.deepcopy(SHAPE)
    config._attn_implementation, config.lightning_layers = "lightning_attention", list(range(32))
    lengths = (1 << 18, 1 << 19, 1 << 20)
    times = [plan_generation(config, n, ranks=Ranks(2)).expected_first_token for n in lengths]
    assert times[2] - times[1] == pytest.approx(2 * (times[1] - times[0]), rel=1e-3)
    softmax = [plan_generation(SHAPE, n, ranks=Ranks(2)).expected_first_token for n in (1 << 18, 1 << 20)]
    assert softmax[1] > 8 * softmax[0] and softmax[0] > times[0]
    alone, two = (plan_generation(config, 4096, ranks=Ranks(ranks)) for ranks in (1, 2))
    assert two.expected_a_token == alone.expected_a_token and two.cache == alone.cache
    one, both = (plan_generation(SHAPE, 1, ranks=Ranks(ranks)) for ranks in (1, 2))
    join = 32 * reduction_seconds(message_bytes(1, 32, 128), 2, Links())
    rest = (one.expected_a_token - one.floor_a_token) + join
    assert both.expected_a_token - both.floor_a_token == pytest.approx(rest)


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(2), Ranks(8), Ranks(4, 2), Ranks(128)], ids=str)
def test_the_longest_just_fits_on_any_ranks(ranks):
    longest = plan_generation(SHAPE, 1, ranks=ranks).longest
    assert plan_generation(SHAPE, longest, ranks=ranks).fits
    assert not plan_generation(SHAPE, longest + 256, ranks=ranks).fits


def test_more_gpus_hold_more_and_answer_faster():
    plans = [plan_generation(SHAPE, 1 << 20, ranks=Ranks(ranks)) for ranks in (1, 2, 8)]
    assert [plan.longest for plan in plans] == sorted(plan.longest for plan in plans)
    for field in ("expected_a_token", "expected_first_token", "cache"):
        values = [getattr(plan, field) for plan in plans]
        assert values == sorted(values, reverse=True)


def test_the_workspace_names_its_terms():
    workspace = workspace_bytes(SHAPE, 131072, 1, 8192, torch.bfloat16, Ranks())
    assert workspace.activations == 8192 * (4 * 14336 + 3 * 4096) * 2
    assert workspace.logits == 128256 * 10
    assert workspace.total == sum(vars(workspace).values())


def test_layers_that_differ_in_their_heads_hold_what_their_cache_holds():
    config = tiny.CONFIGS["gemma4"]()
    cache = LongContextCache(config, capacity=23)
    with torch.no_grad():
        tiny.build("gemma4")(input_ids=tiny.tokens(1, 23), past_key_values=cache)
    full = [layer for layer, kind in zip(cache.layers, config.layer_types, strict=True) if "full" in kind]
    a_token = sum(2 * layer.keys[0, :, 0].nbytes for layer in full)
    windows = sliding_capacity(7, 23) * 2 * 2 * 16 * 4
    assert cache_bytes(config, 23, torch.float32) == 23 * a_token + windows
    assert layer_bytes(config, 1, torch.float32) == 2 * full[0].keys[0, :, 0].nbytes


@pytest.mark.parametrize("name", tiny.SHARED_KEYS)
def test_layers_that_share_keys_take_the_time_of_others_and_hold_none(name):
    """A step reads the keys of an earlier layer again; a prompt attends in every layer."""
    config, apart = tiny.CONFIGS[name](), tiny.CONFIGS[name](num_kv_shared_layers=0)
    cache = LongContextCache(config, capacity=23)
    with torch.no_grad():
        tiny.build(name)(input_ids=tiny.tokens(1, 23), past_key_values=cache)
    sizes = {"full_attention": 23 * 2 * cache.layers[1].keys[0, :, 0].nbytes}
    sizes["sliding_attention"] = sliding_capacity(7, 23) * 2 * cache.layers[0].keys[0, :, 0].nbytes
    assert cache_bytes(config, 23, torch.float32) == sum(sizes.values())
    read = sum(sizes[kind] for kind in config.layer_types)
    assert read_bytes(config, 23, torch.float32) == read == cache_bytes(apart, 23, torch.float32)
    plan = plan_generation(config, 23, dtype=torch.float32)
    weights = count_weights(config, torch.float32)
    assert plan.floor_a_token * clock.Hardware().bandwidth == pytest.approx(weights.read + read)
    assert plan.cache == cache_bytes(config, 22, torch.float32)
    ranks, dtype = Ranks(2), torch.float32
    shared, own = (clock.Clock(c, weights, ranks, clock.Hardware(), dtype) for c in (config, apart))
    assert shared.prefill(1 << 20) == own.prefill(1 << 20)
    assert shared.overhead(1) == own.overhead(1)
    assert config.num_kv_shared_layers == 3


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="`--tp`"):
        plan_generation(SHAPE, 100, ranks=Ranks(1, 3))
    with pytest.raises(ValueError, match="no tensor parallel plan"):
        plan_generation(tiny.CONFIGS["gpt2"](), 100, ranks=Ranks(1, 2))
