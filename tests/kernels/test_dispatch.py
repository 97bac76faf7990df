"""The choice of an implementation, where it does not depend on the operator."""

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.kernels import dispatch
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
