"""The plan of a Block Transformer against what its model, its caches and its steps hold."""

from types import SimpleNamespace

import pytest
import tiny_blocks
import torch

import hf_longattn
from hf_longattn import BlockTransformerConfig
from hf_longattn.generation import blocks, demand
from hf_longattn.generation.block_planning import count_block_weights, shape_of_blocks
from hf_longattn.generation.clock import Hardware
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import Ranks
from hf_longattn.modeling.block_transformer.cache_block_transformer import BlockWrite
from hf_longattn.modeling.block_transformer.shared import SharedBlockCache

MODELS = {
    "prefix": {"token_hidden_size": 16, "token_num_hidden_layers": 3},
    "llama-two": {
        "decoder_type": "llama",
        "num_key_value_heads": 1,
        "n_embedding_tokens": 2,
        "expansion_ratio": 3,
    },
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "cross": {"decoding_strategy": "cross_attention", "expansion_ratio": 3},
    "roberta": {"embedder_type": "roberta", "embedder_hidden_size": 8, "embedder_num_attention_heads": 2},
    "tied": {"tie_word_embeddings": True},
}


def shape(model, rows=1, ranks=None):
    return shape_of_blocks(model.config, rows, torch.float32, None, ranks or Ranks())


def size(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model_and_each_is_read_as_often_as_it_is_run(name):
    model = tiny_blocks.make(**MODELS[name])
    weights, inner = count_block_weights(model.config, torch.float32), model.model
    assert weights.total == size(*model.parameters())
    steps = [*inner.token_decoder.decoder.parameters(), model.lm_head.weight]
    assert weights.tokens == size(*{id(each): each for each in steps}.values())
    expansion = inner.token_decoder.expansion
    assert weights.blocks == size(*inner.block_decoder.parameters(), *expansion.parameters())
    encoder = getattr(inner.embedder, "encoder", None)
    assert weights.encoder == (0 if encoder is None else size(*encoder.encoder.parameters()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("prompt", "new"), [(23, 6), (24, 41)])
def test_caches_hold_what_is_planned(name, prompt, new, monkeypatch):
    """Bytes of the blocks' cache that `generate` makes, and of the buffers of the open blocks of two rows."""
    model, made, real = tiny_blocks.make(**MODELS[name]), [], blocks.BlockProgram.__init__

    def note(self, decoding, *args):
        made.append(decoding)
        real(self, decoding, *args)

    monkeypatch.setattr(blocks.BlockProgram, "__init__", note)
    hf_longattn.prepare_generation(model.set_attn_implementation("tree_attention") or model)
    ids, mask = tiny_blocks.prompts(prompt, prompt)
    model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    planned, (decoding,) = shape(model, rows=2), made
    held = [buffer for layer in decoding.cache.layers for buffer in (layer._keys, layer._values)]
    assert size(*held) == planned.cache(prompt + new)
    (group,) = decoding.groups
    buffers = [each for layer in group._layers() for each in (layer._keys, layer._values)]
    assert size(*buffers, group.context, group.prefix) == planned.open_block()


@pytest.mark.parametrize("chunk", [1, 17, 512])
def test_a_rank_makes_no_more_room_than_is_planned(chunk):
    model = tiny_blocks.make()
    width = model.config.num_key_value_heads, model.config.head_dim
    for rank in range(3):
        cache = SharedBlockCache(model.config, SimpleNamespace(rank=rank, world_size=3))
        layer = cache.layers[0]
        for start in range(0, 2048, chunk):
            count = min(chunk, 2048 - start)
            states = torch.zeros(1, width[0], count, width[1])
            layer.update(states, states, write=BlockWrite(torch.tensor([start]), count), batch_size=1)
        held = model.config.num_hidden_layers * size(layer._keys, layer._values)
        planned = shape(model, ranks=Ranks(3)).cache(2048 * model.config.block_length)
        assert held <= planned <= 1.5 * held


def test_ranks_share_blocks_and_no_weights():
    config, context = BlockTransformerConfig(), 1 << 20
    one, two, eight = (plan_generation(config, context, ranks=Ranks(ranks)) for ranks in (1, 2, 8))
    assert one.weights == two.weights == eight.weights
    assert 0.5 < two.cache / one.cache < 0.6 and two.longest > 1.7 * one.longest
    for field in ("expected_first_token", "expected_a_token", "floor_a_token"):
        values = [getattr(plan, field) for plan in (one, two, eight)]
        assert values == sorted(values, reverse=True), field
    # A block joins what the ranks found, a token does not: its part of it is 1 / L.
    short = [plan_generation(config, 4, ranks=Ranks(ranks)).expected_a_token for ranks in (1, 2)]
    assert 0 < short[1] - short[0] < config.num_hidden_layers * 16e-6 / config.block_length


def test_the_longest_fits_and_one_block_more_does_not():
    config, hardware = BlockTransformerConfig(), Hardware(memory=3 << 30)
    plan = plan_generation(config, 4096, hardware=hardware)
    at_limit = plan_generation(config, plan.longest, hardware=hardware)
    assert plan.fits and at_limit.fits and at_limit.longest == plan.longest
    # What is counted in full eats into the reserve by half of the shortest chunk, and by ids and masks.
    over = at_limit.peak - (hardware.memory - demand.RESERVE)
    assert over <= at_limit.workspace.activations / 2 + at_limit.workspace.tokens
    assert at_limit.shortened and at_limit.chunk == 512 * config.block_length
    beyond = plan_generation(config, plan.longest + config.block_length, hardware=hardware)
    assert not beyond.fits and beyond.peak + demand.RESERVE > hardware.memory


def test_what_blocks_do_not_have_is_refused():
    with pytest.raises(ValueError, match="`cache_dtype` must be None for a Block Transformer"):
        plan_generation(BlockTransformerConfig(), 400, cache_dtype=torch.int8)
    with pytest.raises(ValueError, match="`--tp 2`: there is no tensor parallel plan"):
        plan_generation(BlockTransformerConfig(), 400, ranks=Ranks(1, 2))
