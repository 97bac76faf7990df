"""The Block Transformer on a GPU: as exact as eager attention, the same tokens with and without a cache."""

import pytest
import torch

import hf_longattn  # noqa: F401  registers the attention implementations
from hf_longattn.modeling.block_transformer import (
    BlockTransformerCache,
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
)

pytestmark = pytest.mark.gpu
IMPLEMENTATIONS = ["eager", "sdpa", "tree_attention", "blockwise_attention"]


def make(implementation, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BlockTransformerConfig(**(sizes | {"initializer_range": 0.1, "eos_token_id": None} | fields))
    model = BlockTransformerForCausalLM(config).eval().to(dtype)
    model.set_attn_implementation(implementation)
    return model


def ragged():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 500, (4, 203), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 1, 66, 201)):
        mask[row, :pads] = 0
    return ids, mask


@pytest.mark.parametrize("decoder_type", ["gpt_neox", "llama"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_logits_are_as_exact_as_eager(implementation, decoder_type):
    model, (ids, mask) = make("eager", decoder_type=decoder_type), ragged()
    exact = model.double()(ids, attention_mask=mask).logits
    model, attended = model.float().cuda(), mask.bool()
    errors = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        logits = model(ids.cuda(), attention_mask=mask.cuda(), use_cache=False).logits.cpu().double()
        errors.append((logits - exact)[attended].abs().mean())
    assert errors[1] <= 1.5 * (errors[0] + torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_bf16_steps_as_one_pass(implementation):
    model, (ids, mask) = make(implementation, torch.bfloat16).cuda(), ragged()
    ids, mask = ids.cuda(), mask.cuda()
    exact = make("sdpa").double().cuda()(ids, attention_mask=mask).logits
    whole = model(ids, attention_mask=mask, use_cache=False).logits.double()
    cache, parts = BlockTransformerCache(model.config), []
    for start, end in ((0, 150), (150, 190), *((at, at + 1) for at in range(190, 203))):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(out.logits)
    steps = torch.cat(parts, dim=1).double()
    attended = mask.bool()
    error = (whole - exact)[attended].abs().mean()
    assert (steps - exact)[attended].abs().mean() <= 1.5 * error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_generation_with_cache_equals_without(implementation):
    model, (ids, mask) = make(implementation).cuda(), ragged()
    options = {"attention_mask": mask.cuda(), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(ids.cuda(), **options)
    assert torch.equal(cached, model.generate(ids.cuda(), use_cache=False, **options))


def test_training_step_compiles():
    model, (ids, _) = make("sdpa", torch.bfloat16).cuda().train(), ragged()
    ids = ids.cuda()
    plain = model(ids, labels=ids).loss
    torch._dynamo.reset()
    loss = torch.compile(lambda ids: model(ids, labels=ids).loss)(ids)
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
