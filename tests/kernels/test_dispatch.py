"""The choice of an implementation, where it does not depend on the operator."""

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.kernels import dispatch
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.lightning_attention import lightning_attention
from hf_longattn.kernels.merge_partials import merge_partials


@pytest.mark.parametrize(
    ("version", "too_old"),
    [("2.3.1", True), ("3.3.9", True), ("3.4.0", False), ("3.10.0+git", False), ("10.0", False), ("", False)],
)
def test_versions_of_triton(version, too_old):
    assert dispatch._is_too_old(version) is too_old


def test_a_triton_that_is_too_old_is_named_before_any_work(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_TRITON_VERSION", "3.3.1")
    monkeypatch.setattr(dispatch, "_TRITON_IS_TOO_OLD", True)
    with pytest.raises(ValueError, match=r"`triton` 3.3.1 is too old .* 3.4 or later"):
        merge_partials(torch.zeros(2, 1, 1, 1, 16), torch.zeros(2, 1, 1, 1))
    model = tiny.build("llama", "sdpa")
    before = set(vars(model))
    with pytest.raises(ValueError, match="too old"):
        hf_longattn.prepare_generation(model)
    assert set(vars(model)) == before and model.config._attn_implementation == "sdpa"
    # Without kernels, plain torch needs none.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    merge_partials(torch.zeros(2, 1, 1, 1, 16), torch.zeros(2, 1, 1, 1))


def test_a_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    for device in ("cpu", "cuda"):
        with pytest.raises(
            ValueError, match=f"cannot run on '{device}' tensors without the package `triton`"
        ):
            dispatch.check_impl("an operator", "triton", torch.device(device))


OPERATORS = {
    "decode": lambda q, k, v: decode_attention(q.detach(), k.detach(), v.detach()),
    "blockwise": lambda q, k, v: blockwise_attention(q, k, v, softcap=3.0),
    "lightning": lambda q, k, v: lightning_attention(
        q, k, v, torch.tensor([0.1, 0.2, 0.3, 0.4]), output_final_state=True
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_rounds_nothing_inside_an_operator(name):
    states = [torch.randn(1, heads, 9, 16, requires_grad=True) for heads in (4, 2, 2)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts = OPERATORS[name](*states)
            loss = sum((part * part).sum() for part in parts)
            grads = torch.autograd.grad(loss, states) if loss.requires_grad else ()
        results.append([*parts, *grads])
    assert all(map(torch.equal, *results))
