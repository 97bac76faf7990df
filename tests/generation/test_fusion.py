"""Single kernels in place of norms and rotary embeddings: where proven, while capturing."""

import sys

import pytest
import tiny
import torch

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
