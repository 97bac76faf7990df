"""Lightning attention as a flag: against its definition, in every layout of tokens, with every cache."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from lightning_models import BOUND, NAME, Module, families, logits, positions

from hf_longattn.attention.lightning import lightning_attention_forward, tnl_slopes
from hf_longattn.cache import LongContextCache
from hf_longattn.masking import lazy_mask


def slopes_by_hand(heads, layer, layers):
    """ALiBi's published rule, recursively, times the layer's factor."""

    def alibi(n):
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start ** (i + 1) for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return alibi(closest) + alibi(2 * closest)[0::2][: n - closest]

    factor = 1.0 + 1e-5 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
    return torch.tensor(alibi(heads), dtype=torch.float64) * factor


def definition(query, key, value, slopes, scale, visible, rank):
    """fp64, quadratic: visible (B, 1, T, S) bool, rank (B, S) the number of existing tokens so far."""
    heads = query.shape[1]
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    distance = (rank[:, None, :, None] - rank[:, None, None, :]).double()
    decay = torch.where(visible, torch.exp(-slopes[:, None, None] * distance), 0)
    output = scale * (q @ k.transpose(-1, -2) * decay) @ v
    flat = output.transpose(1, 2).flatten(2)
    return (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)).view_as(output.transpose(1, 2))


def by_hand_forward(module, query, key, value, mask, dropout=0.0, scaling=None, **unused):
    """The definition in the signature of an attention function; no cache."""
    batch, heads, length, _ = query.shape
    visible = mask.tile(slice(0, length))
    exists = torch.ones(batch, length) if mask.padding is None else mask.padding
    slopes = slopes_by_hand(heads, module.layer_idx, module.config.num_hidden_layers)
    result = definition(query, key, value, slopes, scaling, visible, exists.cumsum(-1))
    return result.to(query.dtype), None


tf.AttentionInterface.register("lightning_by_hand", by_hand_forward)
tf.AttentionMaskInterface.register("lightning_by_hand", lazy_mask)


# The slopes


@pytest.mark.parametrize("heads", [1, 2, 8, 9, 12, 32, 48])
@pytest.mark.parametrize("layer", [0, 1, 5])
def test_slopes_are_those_of_transnormerllm(heads, layer):
    result = torch.tensor(tnl_slopes(heads, layer, 6), dtype=torch.float64)
    torch.testing.assert_close(result, slopes_by_hand(heads, layer, 6), rtol=1e-12, atol=0)


def test_slopes_of_a_single_layer():
    assert tnl_slopes(8, 0, 1)[0] == pytest.approx(0.5 * (1 + 1e-5))
    # The last layer's slowest head barely forgets: what fp32 decays could not hold.
    assert tnl_slopes(32, 23, 24)[-1] == pytest.approx(2**-8 * 1e-5)


# Whole models against the definition


@families
@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
def test_logits_equal_the_definition(family, side):
    lengths = [21, 21, 21] if side in ("none", "holes") else [21, 13, 4]
    ids, mask = tiny.tokens(3, 21), tiny.padding(lengths, 21, "left" if side == "holes" else side)
    if side == "holes":
        mask[0, 3:6], mask[1, [0, 9, 20]], mask[2, :] = 0, 0, 0
        mask[2, 4] = 1
    expected = logits(tiny.build(family, "lightning_by_hand"), ids, mask, position_ids=positions(mask))
    result = logits(tiny.build(family, NAME), ids, mask, position_ids=positions(mask))
    real = mask.bool()
    assert tiny.relative_error(result[real], expected[real]) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_equal_the_definition(family, side):
    ids, mask = tiny.tokens(2, 19), tiny.padding([19, 11], 19, side)
    labels, gradients = torch.where(mask.bool(), ids, -100), []
    for name in ("lightning_by_hand", NAME):
        model = tiny.build(family, name)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert tiny.relative_error(gradients[1], gradients[0]) <= BOUND


def test_checkpointing_changes_nothing():
    ids, mask, gradients = tiny.tokens(2, 19), tiny.padding([19, 11], 19, "left"), []
    for checkpointing in (False, True):
        model = tiny.build("llama", NAME).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])


def test_two_epochs_of_one_batch_are_learnt():
    model, ids = tiny.build("llama", NAME).train(), tiny.tokens(2, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_error_in_half_precision_is_that_of_the_plain_formula(dtype):
    batch, heads, length, width = 2, 4, 70, 32
    q, k, v = (torch.randn(batch, heads, length, width).to(dtype) for _ in range(3))
    module, mask = Module(heads), lazy_mask(batch, length, length)
    visible, rank = mask.tile(slice(0, length)), torch.arange(length).expand(batch, length)
    slopes = slopes_by_hand(heads, 1, 3)
    expected = definition(q, k, v, slopes, 0.2, visible, rank)
    plain = 0.2 * (q @ k.mT * torch.where(visible, torch.exp(-slopes[:, None, None] * (
        rank[:, None, :, None] - rank[:, None, None]).double()), 0).to(dtype)) @ v  # fmt: skip
    plain = F.rms_norm(plain.transpose(1, 2).flatten(2), (heads * width,), eps=1e-6)
    result, _ = lightning_attention_forward(module, q, k, v, mask, scaling=0.2)
    bound = 1.5 * (tiny.relative_error(plain, expected.flatten(2)) + torch.finfo(dtype).eps)
    assert tiny.relative_error(result, expected) <= bound


# Batches, packing


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mates_and_padding_side_change_nothing(family, side):
    model, short = tiny.build(family, NAME), tiny.tokens(1, 8)
    alone = logits(model, short)[0]
    pad = torch.full((1, 15), 5)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask = tiny.padding([8, 23], 23, side)
    together = logits(model, torch.cat([row, tiny.tokens(1, 23, seed=4)]), mask, position_ids=positions(mask))
    assert tiny.relative_error(together[0][mask[0].bool()], alone) <= BOUND


@families
def test_packed_documents_equal_separate_ones(family):
    if family == "gpt2":
        pytest.skip("GPT-2 does not hand position ids to its attention; packing needs `cu_seq_lens_q` there")
    model, lengths = tiny.build(family, NAME), [9, 1, 12]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    packed, position_ids = torch.cat(documents, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    layouts = {
        "training": {"use_cache": False},
        "dynamic": {"use_cache": True},
        "mask": {"mask": torch.ones_like(packed)},
        "state": {"past_key_values": LongContextCache(model.config)},
    }
    for name, layout in layouts.items():
        result = logits(model, packed, position_ids=position_ids, **layout)
        assert tiny.relative_error(result, expected) <= BOUND, name
    # The state that is left behind is that of the last document alone.
    cache = LongContextCache(model.config)
    logits(model, documents[-1], past_key_values=cache)
    for packed_layer, layer in zip(layouts["state"]["past_key_values"].layers, cache.layers, strict=True):
        error = tiny.relative_error(packed_layer.recurrent_state, layer.recurrent_state)
        assert error <= BOUND


def test_packed_rows_of_a_padded_batch():
    model, lengths = tiny.build("llama", NAME), [[9, 1, 12], [4, 7]]
    documents = [[tiny.tokens(1, n, seed=n) for n in row] for row in lengths]
    rows = [F.pad(torch.cat(row, 1), (0, 22 - sum(n))) for row, n in zip(documents, lengths, strict=True)]
    position_ids = torch.zeros(2, 22, dtype=torch.long)
    for b, row in enumerate(lengths):
        position_ids[b, : sum(row)] = torch.cat([torch.arange(n) for n in row])
    mask = tiny.padding([22, 11], 22, "right")
    result = logits(model, torch.cat(rows), mask, position_ids=position_ids)
    for b, row in enumerate(documents):
        expected = torch.cat([logits(model, ids) for ids in row], 1)[0]
        assert tiny.relative_error(result[b][mask[b].bool()], expected) <= BOUND


def test_cumulative_lengths_keep_documents_apart():
    model, lengths = tiny.build("gpt2", NAME), [5, 8, 8]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    bounds = torch.tensor([0, 5, 13, 21], dtype=torch.int32)
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    result = logits(model, torch.cat(documents, 1), position_ids=position_ids, use_cache=False, **packing)
    assert tiny.relative_error(result, expected) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "left", "holes", "packed", "packed-right", "numbered"])
def test_forward_compiles_in_one_graph(layout):
    torch._dynamo.reset()
    ids, mask = tiny.tokens(2, 14), tiny.padding([14, 9], 14, "left")
    if layout == "holes":
        mask[0, 4:7] = 0
    packed, numbered = "packed" in layout, layout == "numbered"
    where = torch.arange(14)[None] if numbered or layout == "plain" else positions(mask)
    if packed:
        where = torch.cat([torch.arange(5), torch.arange(9)]).expand(2, -1)
    mask = None if numbered or layout in ("plain", "packed") else mask
    mask = mask.flip(1) if layout == "packed-right" else mask
    model = tiny.build("llama", NAME)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    keywords = {"position_ids": where, "use_cache": False}
    keywords |= {"seq_idx": (torch.arange(14) > 4).int()[None]} if numbered else {}
    expected = logits(model, ids, mask, **keywords)
    with torch.no_grad():
        result = compiled(input_ids=ids, attention_mask=mask, **keywords).logits
    real = slice(None) if mask is None else mask.bool()
    assert tiny.relative_error(result[real], expected[real]) <= BOUND
