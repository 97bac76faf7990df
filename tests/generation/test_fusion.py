"""Single kernels in place of norms and rotary embeddings: where proven, while capturing."""

import sys

import pytest
import tiny
import torch

from hf_longattn.generation import fusion, linear
from hf_longattn.generation.fusion import fused


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gpt-oss", "gpt-neox", "cohere", "phi3", "olmo2"]
)
def test_logits_stay_and_everything_is_put_back(family):
    model, ids = tiny.build(family, "tree_attention"), tiny.tokens(2, 9)
    source = sys.modules[type(model).__module__]
    before = vars(source).get("apply_rotary_pos_emb")
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused(model):
            result = model(input_ids=ids).logits
    assert tiny.relative_error(result, expected) <= 2e-6
    assert vars(source).get("apply_rotary_pos_emb") is before
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == own


def test_llama_is_fused_and_gemma_norms_are_not():
    llama, gemma = tiny.build("llama"), tiny.build("gemma2")
    for module in gemma.modules():
        if type(module).__name__ == "Gemma2RMSNorm":
            torch.nn.init.normal_(module.weight)
    with fused(llama), fused(gemma):
        assert all("forward" in vars(m) for m in llama.modules() if type(m).__name__ == "LlamaRMSNorm")
        assert not any("forward" in vars(m) for m in gemma.modules() if type(m).__name__ == "Gemma2RMSNorm")
        assert "_rotate" in repr(sys.modules[type(llama).__module__].apply_rotary_pos_emb)


@pytest.mark.parametrize("family", ["gpt-neox", "llama"])
def test_heads_that_turn_in_part_are_fused_where_the_model_can(family, monkeypatch):
    model, calls = tiny.build(family), []
    real = fusion.rotary_embedding
    monkeypatch.setattr(fusion, "rotary_embedding", lambda *args: (calls.append(1), real(*args))[1])
    source = sys.modules[type(model).__module__]
    query, key, angle = (
        torch.randn(2, 4, 3, 24),
        torch.randn(2, 2, 3, 24),
        torch.randn(2, 3, 4).repeat(1, 1, 2),
    )
    own = source.apply_rotary_pos_emb
    with fused(model):
        calls.clear()
        if family == "llama":
            # Its function takes whole heads only, and says so.
            with pytest.raises(RuntimeError):
                source.apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
            assert not calls
            return
        turned = source.apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
        across = source.apply_rotary_pos_emb(
            query.transpose(1, 2), key.transpose(1, 2), angle.cos(), angle.sin(), unsqueeze_dim=2
        )
    assert len(calls) == 2
    for result, sideways, expected in zip(
        turned, across, own(query, key, angle.cos(), angle.sin()), strict=True
    ):
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(sideways.transpose(1, 2), expected)


def chooses(ours):
    """Products whose clock says that ours are always, or never, the faster ones."""

    def clock(calls):
        for call in calls:
            call()
        return -float(len(clocked)) if ours else float(len(clocked))

    clocked = []

    def counted(calls):
        clocked.append(len(calls))
        return clock(calls)

    return linear.Products(counted), clocked


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt-oss", "gpt-neox"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_products_are_replaced_where_they_are_faster_and_put_back(family, ours):
    model, ids = tiny.build(family, "tree_attention", dtype=torch.bfloat16), tiny.tokens(2, 4)
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    products, clocked = chooses(ours)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused(model, 8, products):
            plain = [m for m in model.modules() if type(m) is torch.nn.Linear]
            assert all(("forward" in vars(m)) == ours for m in plain) and plain
            result = model(input_ids=ids).logits
            replaced = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
        timed = len(clocked)
        with fused(model, 8, products):
            pass
    assert len(clocked) == timed, "a shape was timed twice"
    assert ("LlamaMLP" in replaced) == (ours and family == "llama")
    assert tiny.relative_error(result.float(), expected.float()) <= 2**-7
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == own


def test_more_rows_than_the_kernel_takes_and_layers_that_are_not_plain_are_left_alone():
    products, clocked = chooses(True)
    model = tiny.build("llama", dtype=torch.bfloat16)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.model.layers[0].mlp.gate_proj.forward = model.model.layers[0].mlp.gate_proj.forward
    with fused(model, 17, products):
        assert not any("forward" in vars(m) for m in model.model.layers[1].mlp.modules())
    assert not clocked
    fp32 = tiny.build("llama")
    with fused(fp32, 1, products):
        assert not any("forward" in vars(m) for m in fp32.modules() if type(m) is torch.nn.Linear)


def test_a_product_that_disagrees_is_not_used(monkeypatch):
    monkeypatch.setattr(
        linear, "few_row_linear", lambda x, w, b=None: 1.1 * torch.nn.functional.linear(x, w, b)
    )
    products, clocked = chooses(True)
    model = tiny.build("gpt-neox", dtype=torch.bfloat16)
    with fused(model, 1, products):
        assert not any("forward" in vars(m) for m in model.modules() if type(m) is torch.nn.Linear)
    assert not clocked


def test_gated_layers_with_parameters_of_their_own_are_tried_as_others_are():
    model = tiny.build("llama", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.gain = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        # The order of the parts says nothing either.
        layer.mlp._modules = dict(reversed(layer.mlp._modules.items()))
    products, clocked = chooses(True)
    with fused(model, 1, products):
        assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
    assert clocked
