"""Liger's own kernels on a CPU, in Triton's interpreter: loss and gradients of the heads of two models."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_longattn.training import liger
from hf_longattn.training.loss import Head, LossOptions, chunked_loss

LABELS = tiny.tokens(2, 21).masked_fill(torch.arange(21) % 5 == 0, -100)


def run(family, smoothing, labels=LABELS, count=None):
    model = tiny.build(family)
    head = Head(model, "model", model.forward, BaseModelOutputWithPast)
    hidden = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = chunked_loss(head, hidden, labels, count, LossOptions(9, smoothing))
    loss.backward()
    with torch.no_grad():
        again = chunked_loss(head, hidden, labels, count, LossOptions(9, smoothing))
    torch.testing.assert_close(again, loss, rtol=2e-6, atol=0)
    return loss.detach(), hidden.grad, model.lm_head.weight.grad


logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
for family, smoothing in (("llama", 0.0), ("llama", 0.2), ("gemma2", 0.0)):
    result = run(family, smoothing)
    liger._INSTALLED = False
    expected = run(family, smoothing)
    liger._INSTALLED = True
    for ours, theirs in zip(result, expected, strict=True):
        assert tiny.relative_error(ours, theirs) <= 2e-6, (family, smoothing)
# A rank's share of a sequence, or a whole batch, may hold no token that counts.
for result in run("llama", 0.0, torch.full_like(LABELS, -100), 7):
    assert not result.any()
