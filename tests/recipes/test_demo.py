"""How recipes/demo.py judges answers that differ from those of sdpa."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import demo  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_choices_within_rounding_are_a_tie(tmp_path, dtype):
    model, ids = tiny.build("llama"), tiny.tokens(1, 20)
    with torch.no_grad():
        first = model(ids).logits[0, -1].argmax().item()
        best, worst = (
            model(torch.cat([ids, torch.tensor([[first]])], 1)).logits[0, -1].sort().indices[[-1, 0]]
        )
        twin = (best + 1) % model.config.vocab_size
        model.lm_head.weight[twin] = model.lm_head.weight[best]
    model.save_pretrained(tmp_path)
    answers = [[first, best.item(), 3], [first, twin.item(), 4]]
    tie, figures = demo.parts_at_a_tie(tmp_path, ids, answers, dtype)
    assert tie and figures.startswith("token 1, 0.0e+00 below"), figures
    tie, figures = demo.parts_at_a_tie(tmp_path, ids, [answers[0], [first, worst.item()]], dtype)
    assert not tie, figures
