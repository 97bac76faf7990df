"""The plan of a training step against the bytes that a step takes, and against the rule of the offloader."""

import gc

import pytest
import torch
import transformers as tf
from recorded_memory import bytes_a_token

import hf_longattn
from hf_longattn.cache.head_sizes import head_sizes
from hf_longattn.generation.sizes import on_meta
from hf_longattn.training import attention, liger, planning, setup
from hf_longattn.training.offload import Layout, Offloader, working_bytes
from hf_longattn.training.planning import TrainingRequest, count_parameters, plan_training

GIB = 1 << 30
SMALL = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 1 << 16,
}  # fmt: skip
# The shapes of Llama-3.2-1B and Llama-3.1-8B.
SHAPES = {
    "1B": tf.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
    ),
    "8B": tf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ),
}  # fmt: skip


def plan_of(config, context, **fields):
    request = TrainingRequest(**fields)
    return plan_training(config, on_meta(config, request.dtype), head_sizes(config), context, request)


@pytest.mark.parametrize(
    ("kind", "save_attention", "block_size"),
    [
        ("blockwise_attention", True, 256),
        ("blockwise_attention", False, 256),
        # Blocks long enough for their states, which the plan leaves out, to be little.
        pytest.param("lightning_attention", False, 1024, marks=pytest.mark.slow),
    ],
    ids=["saved", "again", "lightning"],
)
def test_a_token_takes_what_is_planned(monkeypatch, kind, save_attention, block_size):
    # Memory that comes as zeros from the system is not in the profile.
    monkeypatch.setattr(torch, "zeros_like", lambda like, **kwargs: torch.empty_like(like, **kwargs).zero_())
    # What one call of the kernel takes for its keys is bounded: here below the lengths of the test.
    for module in (attention, planning):
        monkeypatch.setattr(module, "MOST_KEYS", 256)
    config = tf.LlamaConfig(**SMALL, attn_implementation=kind)
    model = tf.AutoModelForCausalLM.from_config(config).train()
    sizes = {"block_size": block_size, "save_attention": save_attention}
    sizes |= {"loss_chunk_size": 128, "offload": False}
    hf_longattn.prepare_training(model, **sizes)
    measured = bytes_a_token(model)
    plans = [plan_of(config, length, dtype=torch.float32, **sizes) for length in (2048, 3072)]
    planned = (plans[1].peak - plans[0].peak) / 1024
    assert planned == pytest.approx(measured, rel=0.05)


EXPERTS = {**SMALL, "hidden_size": 64, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 4}
WITH_EXPERTS = {
    "copies": tf.Qwen2MoeConfig(**EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=256),
    "gates": tf.Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=192),
    "biases": tf.GptOssConfig(
        **{**EXPERTS, "intermediate_size": 96}, num_local_experts=8, layer_types=["full_attention"] * 2
    ),
}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_token_that_goes_through_experts_takes_what_is_planned(monkeypatch, name):
    monkeypatch.setattr(torch, "zeros_like", lambda like, **kwargs: torch.empty_like(like, **kwargs).zero_())
    config, sizes = WITH_EXPERTS[name], {"block_size": 4096, "offload": False, "loss_chunk_size": 64}
    model = hf_longattn.prepare_training(tf.AutoModelForCausalLM.from_config(config).train(), **sizes)
    measured = bytes_a_token(model)
    plans = [plan_of(config, length, dtype=torch.float32, **sizes) for length in (2048, 3072)]
    # Norms outside of a kernel keep some more than is planned, and half of the biases less.
    assert (plans[1].peak - plans[0].peak) / 1024 == pytest.approx(measured, rel=0.06)


def test_the_law_of_a_layer_is_that_of_the_specification():
    # At most 9 d bytes a token for the tensors of the whole sequence in one layer of the 1B and 8B shapes.
    for shape, width in (("1B", 2048), ("8B", 4096)):
        plans = [plan_of(SHAPES[shape], tokens, offload=True, lora=16) for tokens in (1 << 19, 1 << 20)]
        slope = (plans[1].backward - plans[0].backward) / (1 << 19)
        assert 5 * width <= slope <= 9 * width
        # One block saves 37 d and 34 d bytes a token, and takes 18 d and 16 d more in its backward, which is
        # more than gradients of 64 K keys and values; a layer's gradients of the adapters, twice.
        assert 65536 * 32 * 2 * (width // 32) * 2 < 16384 * width * (40 if shape == "1B" else 35)
        block = 16384 * width * (55 if shape == "1B" else 50)
        layers = SHAPES[shape].num_hidden_layers
        rest = plans[0].backward - slope * (1 << 19)
        assert rest == block + 2 * plans[0].gradients // layers


def test_lightning_layers_hold_no_keys_and_take_larger_blocks():
    tokens, fields = 1 << 20, {"offload": True, "lora": 16, "keep_every": 1}
    softmax = plan_of(SHAPES["1B"], tokens, **fields)
    config = tf.LlamaConfig(**{**SHAPES["1B"].to_dict(), "attn_implementation": "lightning_attention"})
    config.lightning_layers = list(range(16))
    lightning = plan_of(config, tokens, **fields)
    keys, block = tokens * 2 * 8 * 64, 16384 * (15 * 2048 + 10 * 8192) // 2
    assert softmax.backward - lightning.backward == keys * (2 + 4) - block * 2
    config.lightning_layers = [1]
    assert plan_of(config, tokens, **fields).backward == softmax.backward
    # Keys of a short sequence take less than the larger block.
    short = [plan_of(c, 1 << 15, **fields).backward for c in (SHAPES["1B"], config)]
    assert short[0] < short[1]


def test_weights_gradients_and_optimizer():
    config = SHAPES["1B"]
    model = on_meta(config, torch.bfloat16)
    full, lora = count_parameters(model, torch.bfloat16), count_parameters(model, torch.bfloat16, 8)
    numbers = sum(p.numel() for p in model.parameters())
    assert full.weights == full.trained == 2 * numbers
    width, inner = 2048, 8192
    a_layer = 8 * (2 * (width + width) + 2 * (width + 512) + 3 * (width + inner))
    assert lora.count == 16 * a_layer and lora.trained == 4 * lora.count
    assert lora.weights == 2 * numbers + 4 * lora.count
    plan = plan_of(config, 1024, lora=8)
    assert plan.optimizer == 2 * plan.gradients == 2 * lora.trained


def test_inputs_go_to_the_host_where_the_offloader_sends_them(monkeypatch):
    config, tokens, memory = SHAPES["8B"], 200_000, 79 * GIB
    plan = plan_of(config, tokens, lora=16, memory=memory, host_memory=1 << 50)
    assert plan.inputs and plan.host
    hidden = tokens * 4096 * 2
    free = memory - GIB - plan.weights - plan.gradients - plan.optimizer - 2 * hidden
    offloader = Offloader("auto", lambda size: working_bytes(size, 1))
    kept = host = 0
    half, full = torch.bfloat16, torch.float32
    layer = [((1, tokens, 4096), half), ((1, tokens, 32, 128), half), ((1, tokens, 32), full)]
    for shape, dtype in layer * 32:
        layout = Layout(shape, dtype, torch.device("cuda"), [slice(0, tokens)])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, left=free - kept: (left, memory))
        held = {name: {"all": {"current": 0}} for name in ("reserved_bytes", "allocated_bytes")}
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device, held=held: held)
        if offloader._moves(layout):
            host += layout.num_bytes
        else:
            kept += layout.num_bytes
    assert (plan.inputs, plan.host) == (kept, host)


def test_layers_share_an_input_where_inputs_find_no_room():
    tokens, fields = 1 << 18, {"offload": True, "lora": 16, "save_attention": False}
    hidden = tokens * 4096 * 2
    for host, every in ((64, 1), (63, 2), (34, 2), (33, 3), (24, 3), (23, 4), (21, 5), (19, 5)):
        plan = plan_of(SHAPES["8B"], tokens, **fields, host_memory=host * GIB)
        inputs = {1: 32, 2: 17, 3: 12, 4: 11, 5: 10}[every]
        assert (plan.every, plan.host, plan.fits) == (every, inputs * hidden, host >= 20)
    # One GPU and no host: the plan of what stays, and what a second forward has on top.
    small = {**fields, "offload": False, "host_memory": 0}
    plans = [plan_of(SHAPES["8B"], tokens, **small, keep_every=every) for every in (1, 2, 4, 6)]
    assert [plan.inputs // hidden for plan in plans] == [32, 17, 11, 10]
    assert any("keep_every='auto'" in words for words in plans[0].advice)
    assert plan_of(SHAPES["8B"], tokens, **small).every > 1


def test_the_longest_fits_and_more_does_not():
    for fields in ({"lora": 16}, {"lora": 16, "ranks": 4}, {"lora": 16, "host_memory": 10 * GIB}):
        longest = plan_of(SHAPES["8B"], 1000, **fields).longest
        assert longest > 16384
        assert plan_of(SHAPES["8B"], longest, **fields).fits
        assert not plan_of(SHAPES["8B"], longest + longest // 50, **fields).fits


def test_advice_says_what_is_full():
    full = plan_of(SHAPES["8B"], 8192, memory=48 * GIB)
    assert not full.fits and any("--lora" in words for words in full.advice)
    host = plan_of(SHAPES["8B"], 1 << 20, lora=16, host_memory=10 * GIB)
    assert any("save_attention=False" in words for words in host.advice)
    assert any("--gpus 2" in words for words in host.advice)
    assert plan_of(SHAPES["1B"], 8192, lora=16).advice == ()
    # Weights are whole on every GPU, whatever their number, and beside every batch.
    for rank, words in ((0, "`--lora 16`"), (16, "4 bits")):
        heavy = plan_of(SHAPES["8B"], 8192, lora=rank, batch_size=2, memory=12 * GIB)
        assert heavy.longest == 0 and len(heavy.advice) == 1 and words in heavy.advice[0]


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "liger"])
def test_a_step_on_a_gpu_takes_what_is_planned(fused, monkeypatch):
    monkeypatch.setattr(liger, "_INSTALLED", fused and liger._INSTALLED)
    gc.collect()
    # What other tests of this process have left, and libraries hold.
    before = torch.cuda.memory_allocated()
    config, tokens = tf.LlamaConfig(**{**SHAPES["1B"].to_dict(), "num_hidden_layers": 4}), 1 << 16
    with torch.device("cuda"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    hf_longattn.prepare_training(model)
    ids = torch.ones(1, tokens, dtype=torch.long, device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=ids).loss.backward()
    measured, plan = torch.cuda.max_memory_allocated() - before, plan_of(config, tokens)
    # The plan counts the way of the two that takes more: Liger's, by little for this shape.
    assert measured <= 1.05 * (plan.peak - plan.optimizer)
    assert fused or measured >= 0.95 * (plan.peak - plan.optimizer)


def test_gradients_that_are_to_come_are_left_room_for():
    config = tf.LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = tf.AutoModelForCausalLM.from_config(config)
    reserve = setup._reserve(model, 2)

    def missing():
        return reserve(100) - working_bytes(100, 2)

    assert missing() == sum(p.nbytes for p in model.parameters())
    # Sharding puts others in the place of parameters.
    layer = model.model.layers[0]
    for name, part in list(layer.self_attn.named_children()):
        part.weight = torch.nn.Parameter(part.weight.half(), requires_grad=name != "q_proj")
    layer.mlp.up_proj.weight.grad = torch.zeros_like(layer.mlp.up_proj.weight)
    expected = sum(p.nbytes for p in model.parameters() if p.requires_grad and p.grad is None)
    assert missing() == expected < sum(p.nbytes for p in model.parameters())
