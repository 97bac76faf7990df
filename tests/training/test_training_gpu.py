"""What only a GPU shows: gradients in 16 bit, through torch's kernels and ours, offload, peak memory."""

import gc

import pytest
import torch
import transformers as tf

import hf_longattn
from hf_longattn.training import liger, offload
from hf_longattn.training.attention import MOST_KEYS
from hf_longattn.training.offload import HostBlocks, Layout, PinnedPool

pytestmark = pytest.mark.gpu
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
}
WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 200,
}
FAMILIES = {
    "llama": (tf.LlamaConfig, {}),
    "gemma2": (tf.Gemma2Config, {"query_pre_attn_scalar": 64, **WINDOWS}),
    "gpt-oss": (tf.GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}),
}


def build(family, dtype):
    torch.manual_seed(0)
    kind, changes = FAMILIES[family]
    model = tf.AutoModelForCausalLM.from_config(
        kind(**{**SHAPE, **changes}), attn_implementation="eager", dtype=torch.float32
    )
    # Grouped matrix products have no float64.
    model.set_experts_implementation("eager")
    # The same values, exactly, in every dtype.
    return model.to(torch.bfloat16).to("cuda", dtype).train()


def batch(length, pad):
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(1, 512, (2, length), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        mask[1, -pad:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def gradients_without_padding(model, inputs):
    """The gradients of the mean over all tokens, from each row by itself."""
    lengths = inputs["attention_mask"].sum(-1).tolist()
    total = 0.0
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        # Each row predicts all of its tokens but the first.
        total = total + gradients(model, alone) * ((length - 1) / (sum(lengths) - len(lengths)))
    return total


def error(result, exact):
    return ((result - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [0, 333])
def test_bf16_gradients_are_as_good_as_eager(family, pad):
    inputs = batch(1500, pad)
    # Padding behind a window sees nothing, and eager attention without sinks is NaN there.
    reference = gradients_without_padding if family == "gemma2" else gradients
    exact = reference(build(family, torch.float64), inputs)
    plain = error(reference(build(family, torch.bfloat16), inputs), exact)
    for fields in ({"offload": False}, {"offload": True}, {"offload": True, "save_attention": False},
                   {"offload": True, "keep_every": 2}, {"offload": False, "keep_every": 3}):  # fmt: skip
        model = hf_longattn.prepare_training(build(family, torch.bfloat16), block_size=400, **fields)
        result = error(gradients(model, inputs), exact)
        assert result <= 1.5 * (plain + torch.finfo(torch.bfloat16).eps), fields


def test_offload_changes_no_bit_over_steps_of_other_lengths():
    settings = ({"offload": False}, {"offload": True}, {"offload": True, "keep_every": 3})
    models = [
        hf_longattn.prepare_training(build("llama", torch.bfloat16), block_size=300, **fields)
        for fields in settings
    ]
    for length in (900, 1300, 700, 1300):
        inputs = batch(length, 100)
        expected, *results = (gradients(model, inputs) for model in models)
        assert all(torch.equal(result, expected) for result in results), length


@pytest.mark.parametrize(("every", "slabs"), [(1, 9), (3, 4), ("auto", 9)])
def test_groups_of_layers_pin_fewer_inputs(monkeypatch, every, slabs):
    pinned, pin = [], offload.pin
    monkeypatch.setattr(offload, "pin", lambda slab, *words: pinned.append(slab.numel()) or pin(slab, *words))
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 8)
    model = build("llama", torch.bfloat16)
    fields = {"block_size": 400, "offload": True, "save_attention": False, "keep_every": every}
    hf_longattn.prepare_training(model, **fields)
    for _ in range(2):
        gradients(model, batch(1500, 0))
    # Of eight layers and of the final norm; or of three layers and one more: the norm's, then a layer's.
    assert pinned == [2 * 1500 * 256 * 2] * slabs


def test_a_second_backward_after_offload_says_what_to_do():
    model = hf_longattn.prepare_training(build("llama", torch.bfloat16), block_size=300, offload=True)
    loss = model(**batch(900, 0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


def test_pinned_blocks_come_back_and_their_memory_is_used_again():
    pool, rows = PinnedPool(), [slice(0, 30), slice(30, 60), slice(60, 70)]
    tensor = torch.randn(2, 70, 5, device="cuda", dtype=torch.bfloat16)
    layout = Layout((2, 70, 5), tensor.dtype, tensor.device, rows)
    stream, slabs = torch.cuda.Stream(), set()
    for _ in range(3):
        blocks = HostBlocks(pool, stream, layout)
        slabs.add(blocks.slab.data_ptr())
        for index, part in enumerate(rows):
            blocks.write(index, tensor[:, part])
        for order in ([0, 1, 2], [2, 1, 0], [1]):
            for index, block in zip(order, blocks.read(order), strict=True):
                assert torch.equal(block, tensor[:, rows[index]])
        blocks.release()
    assert len(slabs) == 1
    assert pool.take(layout.num_bytes).numel() == layout.num_bytes


def peak(model, length):
    ids = torch.ones(1, length, dtype=torch.long, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("save_attention", [False, True])
def test_the_peak_a_token_is_that_of_one_layer(save_attention):
    # Logits of one chunk are bounded, as those of a larger vocabulary are by themselves.
    options = {"block_size": 2048, "offload": True, "loss_chunk_size": 4096, "save_attention": save_attention}
    model = hf_longattn.prepare_training(build("llama", torch.bfloat16), **options)
    peak(model, 1 << 15)
    # One call of the attention kernel gives gradients of MOST_KEYS keys for every query head. A sequence of
    # that length has a block less to the left of its last one: only behind it do no such bytes grow with it.
    assert 1 << 17 >= MOST_KEYS + 2048
    slope = (peak(model, 1 << 18) - peak(model, 1 << 17)) / (1 << 17)
    hidden, kv, results = 2 * 256, 2 * 2 * 128, 8 * (2 * 64 + 4)
    # In the backward a gradient, keys and values, and theirs in fp32; positions, labels, cosines and sines.
    # What attention gave waits on the GPU until the host has it: a layer's, where layers are short as here.
    # The allocator hands out multiples of 512 bytes: one more at a time may stand in the longer peak.
    assert slope <= hidden + 3 * kv + 2 * 2 * 64 + 6 * 8 + save_attention * results + 512 / (1 << 17)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_the_gradient_scaler(dtype):
    inputs = batch(700, 50)
    exact = gradients(build("llama", torch.float64), inputs)
    errors = []
    for prepare in (lambda model: model, lambda m: hf_longattn.prepare_training(m, block_size=300)):
        model = prepare(build("llama", torch.float32))
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        with torch.autocast("cuda", dtype):
            loss = model(**inputs, use_cache=False).loss
        scaler.scale(loss).backward()
        result = torch.cat([p.grad.flatten().double() for p in model.parameters()]) / 2.0**10
        errors.append(error(result, exact))
    assert errors[1] <= 1.5 * (errors[0] + torch.finfo(dtype).eps)


def test_the_host_does_not_wait_for_the_layers_before_the_loss(monkeypatch):
    """Liger asks the device itself for the number of tokens; torch's loss is under test."""
    monkeypatch.setattr(liger, "_INSTALLED", False)
    model, inputs = hf_longattn.prepare_training(build("llama", torch.bfloat16)), batch(300, 40)
    expected = model(**inputs).loss
    hook = model.model.register_forward_hook(lambda *found: torch.cuda.set_sync_debug_mode("error"))
    try:
        loss = model(**inputs).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert torch.equal(loss, expected)
