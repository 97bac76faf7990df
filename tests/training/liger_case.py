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


def run(family, smoothing):
    model = tiny.build(family)
    head = Head(model, "model", model.forward, BaseModelOutputWithPast)
    hidden = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = chunked_loss(head, hidden, LABELS, None, LossOptions(9, smoothing))
    loss.backward()
    with torch.no_grad():
        again = chunked_loss(head, hidden, LABELS, None, LossOptions(9, smoothing))
    assert tiny.relative_error(again, loss) <= 2e-6
    return loss.detach(), hidden.grad, model.lm_head.weight.grad


logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
for family, smoothing in (("llama", 0.0), ("llama", 0.2), ("gemma2", 0.0)):
    result = run(family, smoothing)
    liger._INSTALLED = False
    expected = run(family, smoothing)
    liger._INSTALLED = True
    for ours, theirs in zip(result, expected, strict=True):
        assert tiny.relative_error(ours, theirs) <= 2e-6, (family, smoothing)
