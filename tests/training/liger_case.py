"""Liger's own kernels on a CPU, in Triton's interpreter: the heads of two models, and the layers of one."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm, swiglu
from liger_kernel.transformers import apply_liger_kernel_to_llama
from transformers.modeling_outputs import BaseModelOutputWithPast

import hf_longattn
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


class Number(float):
    """A float as kernels get it from a compiler; the interpreter hands them Python's."""

    def to(self, dtype):
        return self


def step(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def run_layers(ids):
    """A step through Liger's norms, rotary embedding and gates, by blocks."""
    model = tiny.build_to_train("llama")
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
    # The first is of a device's library, which the interpreter does not have.
    rms_norm.rsqrt, swiglu.float = lambda x: tl.rsqrt(x), Number
    for norm in (part for part in model.modules() if hasattr(part, "variance_epsilon")):
        norm.variance_epsilon, norm.offset = Number(norm.variance_epsilon), Number(norm.offset)
    return step(hf_longattn.prepare_training(model, block_size=8), ids)


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

IDS = tiny.tokens(1, 17)
# Liger changes the module of transformers for good.
EXPECTED = step(tiny.build_to_train("llama"), IDS)
for ours, theirs in zip(run_layers(IDS), EXPECTED, strict=True):
    assert tiny.relative_error(ours, theirs) <= 2e-6
print("layers by Liger")
