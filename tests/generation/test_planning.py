"""The plan against what was measured, and against what the caches and the tensor parallel plan hold."""

import runpy
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf

from hf_longattn.cache.sharded import ShardedLayer
from hf_longattn.generation.planning import (
    Ranks,
    cache_bytes,
    count_weights,
    plan_generation,
    workspace_bytes,
)
from hf_longattn.modeling.block_transformer import BlockTransformerConfig
from hf_longattn.parallel.cost import Links, message_bytes, received_bytes, reduction_seconds

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_tables.py"
TABLES = runpy.run_path(str(SCRIPT), run_name="plan_tables")
SHAPE, MEASURED = TABLES["SHAPE"], list(TABLES["measured"]())


@pytest.mark.parametrize("row", MEASURED, ids=lambda r: f"{r['prompt']}-B{r['batch']}-pad{r.get('pad', 0)}")
def test_memory_and_times_are_those_measured(row):
    plan = TABLES["plan_of"](row)
    assert plan.peak == pytest.approx(row["peak_gib"] * 2**30, rel=0.05)
    assert plan.expected_first_token == pytest.approx(row["first_token_s"], rel=0.10)
    assert 1e3 * plan.expected_a_token == pytest.approx(row["token_ms"], rel=0.10)
    assert plan.fits and plan.longest >= plan.context


def test_there_are_measurements_to_hold_the_plan_against():
    assert len(MEASURED) >= 6


def test_the_tables_of_the_page_are_up_to_date():
    text = TABLES["PAGE"].read_text()
    assert TABLES["filled"](text) == text, "run `python benchmarks/plan_tables.py`"


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
    held = slots * config.num_hidden_layers * 2 * config.num_key_value_heads * 16 * 2
    assert cache_bytes(config, tokens, torch.bfloat16, Ranks(sequence=3)) == held


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


def test_block_transformers_are_refused():
    with pytest.raises(ValueError, match="keys and values of blocks"):
        plan_generation(BlockTransformerConfig(vocab_size=61, hidden_size=32, num_attention_heads=2), 400)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="`--tp`"):
        plan_generation(SHAPE, 100, ranks=Ranks(1, 3))
    with pytest.raises(ValueError, match="no tensor parallel plan"):
        plan_generation(tiny.CONFIGS["gpt2"](), 100, ranks=Ranks(1, 2))
