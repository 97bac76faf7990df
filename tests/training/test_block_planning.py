"""The plan of a training step of a Block Transformer against the bytes that a step takes."""

import pytest
import torch
from recorded_memory import bytes_a_token

import hf_longattn
from hf_longattn import BlockTransformerConfig, BlockTransformerForCausalLM
from hf_longattn.generation.sizes import on_meta
from hf_longattn.training import attention, planning, setup
from hf_longattn.training.block_planning import plan_block_training
from hf_longattn.training.offload import working_bytes
from hf_longattn.training.planning import TrainingRequest

GIB = 1 << 30
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
SMALL |= {"vocab_size": 64, "max_position_embeddings": 1 << 16}
NARROW = {"token_hidden_size": 32, "token_intermediate_size": 64, "token_num_attention_heads": 8}
# Layers of a model of 1.2 B parameters.
LARGE = {"hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 16}


def plan_of(context, fields=None, **request):
    config = BlockTransformerConfig(**(fields or LARGE))
    request = TrainingRequest(**request)
    return plan_block_training(config, on_meta(config, request.dtype), context, request)


CASES = {
    "prefix": ({}, {}),
    "again": ({}, {"save_attention": False}),
    "summation": ({"decoding_strategy": "summation", "expansion_ratio": None, "block_length": 8}, {}),
    "deep": ({"num_hidden_layers": 3, "token_num_hidden_layers": 5}, {}),
    "kept": ({"num_hidden_layers": 4, "token_num_hidden_layers": 6}, {"keep_every": 3}),
    "sequential": ({"use_parallel_residual": False, "token_intermediate_size": 128}, {}),
    "parallel": ({"token_intermediate_size": 128}, {}),
    "blocks": ({"hidden_size": 512, "intermediate_size": 2048, **NARROW}, {}),
    "loss": ({"vocab_size": 1 << 15}, {}),
    "llama": ({"decoder_type": "llama", "num_key_value_heads": 2}, {}),
}
FAST = ("prefix", "again", "llama")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_token_takes_what_is_planned(monkeypatch, name):
    # Memory that comes as zeros from the system is not in the profile.
    monkeypatch.setattr(torch, "zeros_like", lambda like, **kwargs: torch.empty_like(like, **kwargs).zero_())
    for module in (attention, planning):
        monkeypatch.setattr(module, "MOST_KEYS", 256)
    fields, sizes = CASES[name]
    fields = {**SMALL, **fields}
    sizes = {"block_size": 256, "loss_chunk_size": 128, "offload": False, "keep_every": 1, **sizes}
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**fields)).train()
    hf_longattn.prepare_training(model, **sizes)
    measured = bytes_a_token(model)
    plans = [plan_of(length, fields, dtype=torch.float32, **sizes) for length in (2048, 3072)]
    planned = (plans[1].peak - plans[0].peak) / 1024
    if name == "llama":
        # On a CPU each norm and the gate of a layer keep one result more: positions of blocks are 5 / 4.
        planned += 5 / 4 * (2 * 128 + 512) * 4
    assert planned == pytest.approx(measured, rel=0.05)


def test_inputs_of_both_decoders_wait_where_there_is_room():
    tokens, item = 1 << 19, 2
    inside, blocks = tokens * 5 // 4 * 2048 * item, tokens // 4 * 2048 * item
    kept = {"dtype": torch.bfloat16, "save_attention": False, "keep_every": 1, "host_memory": 1 << 50}
    plan = plan_of(tokens, memory=1 << 50, **kept)
    # The contexts, and the input of the block decoder's last norm, stay in any case.
    assert (plan.inputs, plan.host) == (12 * inside + 14 * blocks, 0)
    plan = plan_of(tokens, offload=True, **kept)
    assert (plan.inputs, plan.host) == (2 * blocks, 12 * (inside + blocks))
    # Where "auto" leaves room for half of the layers of the token decoder.
    static = plan.weights + plan.gradients + plan.optimizer
    # A layer of all rows at once takes 7 D and 3 F beside its input.
    free = 14 * blocks + 6 * inside + working_bytes(inside, 1, 1 + 7 + 3 * 4) + 2 * inside
    plan = plan_of(tokens, memory=static + GIB + free, **kept)
    assert (plan.inputs, plan.host) == (14 * blocks + 6 * inside, 6 * inside)
    # The first layer of a decoder asks whether the inputs of 24 such layers find room.
    for room, every, host in ((24, 1, 12 * inside), (23, 2, 7 * inside), (12, 3, 6 * inside)):
        short = {**kept, "keep_every": "auto", "host_memory": room * inside}
        plan = plan_of(tokens, offload=True, **short)
        assert (plan.every, plan.host) == (every, host + 12 * blocks)
    assert not any("--gpus" in words for words in plan_of(tokens, host_memory=0, offload=True).advice)


def test_a_layer_of_all_rows_at_once_is_left_room_for():
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**SMALL))
    missing = sum(p.nbytes for p in model.parameters())
    assert setup._reserve(model, 1)(100) - missing == working_bytes(100, 1, 20) == working_bytes(0, 1) + 2000


def test_the_longest_fits_and_more_does_not():
    for request in ({}, {"lora": 16}, {"batch_size": 2, "host_memory": 10 * GIB}):
        longest = plan_of(1000, **request).longest
        assert longest > 16384 and plan_of(longest, **request).fits
        assert not plan_of(longest + longest // 50, **request).fits


def test_what_is_not_counted_is_refused():
    with pytest.raises(ValueError, match="`embedder_type` must be 'lookup' for a plan of training"):
        plan_of(1000, {**SMALL, "embedder_type": "roberta", "embedder_hidden_size": 32})
    with pytest.raises(ValueError, match="`--gpus 2`: several GPUs do not share a sequence of a Block"):
        plan_of(1000, ranks=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decoding_strategy": "cross_attention"}, "its token decoder attends to vectors beside its tokens"),
        ({"n_embedding_tokens": 2, "expansion_ratio": 1}, "see each other .`n_embedding_tokens=2`"),
    ],
    ids=["cross", "two"],
)
def test_what_blocks_cannot_be_cut_into_is_refused_before_a_step(fields, words):
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**SMALL, **fields))
    with pytest.raises(ValueError, match=words):
        hf_longattn.prepare_training(model)
    assert "forward" not in vars(model)
