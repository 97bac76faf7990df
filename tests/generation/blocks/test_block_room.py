"""Calls of a Block Transformer that cannot fit are refused before any work, by the count of the plan."""

import pytest
import tiny_blocks
import torch
from accepted import is_accepted
from living import Living
from transformers import DynamicCache

import hf_longattn
from hf_longattn.generation import demand, prefill
from hf_longattn.generation.block_planning import shape_of_blocks
from hf_longattn.generation.clock import Hardware
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import Ranks
from hf_longattn.modeling.block_transformer import BlockTransformerCache

MODELS = {
    "prefix": {},
    "llama-two": {"decoder_type": "llama", "n_embedding_tokens": 2, "expansion_ratio": 3},
    "roberta": {"embedder_type": "roberta", "embedder_hidden_size": 8, "embedder_num_attention_heads": 2},
}


def prepare(name="prefix", **fields):
    model = tiny_blocks.make(**MODELS[name])
    model.set_attn_implementation("tree_attention")
    return hf_longattn.prepare_generation(model, **fields)


def generate(model, *lengths, **kwargs):
    ids, mask = tiny_blocks.prompts(*lengths)
    call = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, **kwargs}
    return model.generate(ids, **call)


def shape(model, rows=1):
    return shape_of_blocks(model.config, rows, torch.float32, None, Ranks())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_cannot_fit_is_refused_before_any_work(free, name, rows):
    model, calls = prepare(name), []
    model.model.embedder.register_forward_pre_hook(lambda module, args: calls.append(1))
    sums = shape(model, rows)
    need = sums.cache(23 + 41) + int(demand.CERTAIN * sums.reading(rows * 23))
    free(need)
    assert generate(model, *[23] * rows, max_new_tokens=41).shape == (rows, 64)
    calls.clear()
    free(need - 1)
    with pytest.raises(ValueError, match="`max_new_tokens`: a prompt of 23 tokens and 41 new") as error:
        generate(model, *[23] * rows, max_new_tokens=41)
    words = str(error.value)
    assert not calls and ("in each of 3 rows" in words) == (rows == 3)
    assert "cache_dtype" not in words and "offload_layers" not in words and "accelerator=" in words
    # 63 cached tokens of 64 need a block more than 60 of 61.
    assert "; 61 tokens of prompt and answer fit" in words
    generate(model, *[23] * rows, max_new_tokens=38)


def begins(model, length):
    """Whether a call of so many prompt tokens and one of answer begins; else the words that refuse it."""
    ids = torch.ones(1, length, dtype=torch.long)
    return is_accepted(model.model.embedder, lambda: model.generate(ids, max_new_tokens=1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mebibytes", [1499, 1700])
def test_the_longest_that_is_planned_is_the_longest_that_is_accepted(free, name, mebibytes):
    model, hardware = prepare(name), Hardware(memory=mebibytes << 20)
    plan = plan_generation(model.config, 4096, dtype=torch.float32, hardware=hardware)
    free(plan.room)
    assert 0 < plan.longest < 10**7
    assert begins(model, plan.longest - 1) is True
    assert f"; {plan.longest:,} tokens of prompt and answer fit" in str(begins(model, plan.longest))


@pytest.mark.parametrize(("fits", "widest"), [(512, 75), (64, 64), (40, 32), (16, 16), (9, 16)])
def test_chunks_are_as_long_as_there_is_room(free, monkeypatch, fits, widest):
    monkeypatch.setattr(prefill, "_CPU_CHUNK_TOKENS", 128)
    monkeypatch.setattr(demand, "RESERVE", 0)
    monkeypatch.setattr(demand.Demand, "smallest_chunk", property(lambda call: 16))
    model, widths = prepare(), []
    model.model.embedder.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    expected, sums = generate(model, 300, max_new_tokens=2), shape(model)
    assert max(widths) == 75
    widths.clear()
    free(sums.cache(302) + sums.reading(4 * fits))
    assert torch.equal(generate(model, 300, max_new_tokens=2), expected) and max(widths) == widest
    # What somebody asks for is not shortened: what is certain of it fits.
    widths.clear()
    free(sums.cache(302) + sums.reading(300) // 2)
    assert torch.equal(generate(model, 300, max_new_tokens=2, prefill_chunk_size=300), expected)
    assert max(widths) == 75


def test_a_cache_that_is_filled_or_kept_needs_what_is_new(free, recorded):
    model = prepare()
    cache, sums = BlockTransformerCache(model.config, capacity=72), shape(model)
    generate(model, 23, max_new_tokens=1, past_key_values=cache)
    work = int(demand.CERTAIN * sums.reading(17))
    free(work)
    ids, mask = tiny_blocks.prompts(40)
    model.generate(ids, attention_mask=mask, max_new_tokens=22, past_key_values=cache)
    free(work - 1)
    with pytest.raises(ValueError, match="tokens of prompt and answer fit"):
        generate(model, 200, past_key_values=cache)
    # The buffers of the last program are filled by the next call, or make way for it.
    free(1 << 30)
    generate(model, 40, max_new_tokens=22)
    assert recorded and model._kept_program.program is not None
    free(int(demand.CERTAIN * sums.reading(40)))
    generate(model, 40, max_new_tokens=22)


@pytest.mark.parametrize("name", MODELS)
def test_activations_of_a_chunk_lie_between_what_is_certain_and_what_is_planned(name):
    wide = {"hidden_size": 64, "intermediate_size": 1024, "embedder_intermediate_size": 1024}
    fields = {**MODELS[name], **wide}
    fields["embedder_hidden_size"] = 16 * fields.get("n_embedding_tokens", 1)
    model = hf_longattn.prepare_generation(tiny_blocks.make(**fields))
    cache, ids = BlockTransformerCache(model.config, capacity=2048), tiny_blocks.prompts(1032)[0]
    none = ids.new_empty(0)
    with torch.no_grad(), Living() as living:
        model(ids[:, :8], past_key_values=cache, logits_to_keep=none)
        before, living.peak = living.now, 0
        model(ids[:, 8:], past_key_values=cache, logits_to_keep=none)
    taken, planned = living.peak - before, shape(model).reading(1024)
    # Embeddings, contexts and rotations are some numbers a position more.
    positions = 256 * model.config.n_embedding_tokens
    assert demand.CERTAIN * planned <= taken <= planned + 8 * 64 * positions * 4


def test_a_cache_of_another_kind_is_left_to_the_forward(free):
    model, cache, states = prepare(), DynamicCache(), torch.zeros(1, 2, 3, 16)
    cache.update(states, states, 0)
    free(1 << 30)
    ids, mask = tiny_blocks.prompts(23)
    with pytest.raises(TypeError, match="must be a BlockTransformerCache, got DynamicCache"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)


def test_restored_models_are_not_watched(free):
    model = prepare()
    hf_longattn.restore(model)
    free(0)
    assert generate(model, 23).shape == (1, 29)
