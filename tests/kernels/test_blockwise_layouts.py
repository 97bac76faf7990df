"""Layouts in which torch's attention kernels are handed the results of a forward, for the backward."""

from types import SimpleNamespace

import pytest
import torch

from hf_longattn.kernels.blockwise_attention import (
    blockwise_attention,
    blockwise_attention_gradients,
    sdpa,
)
from hf_longattn.kernels.key_range import KeyRange

B, H, G, T, S, K = 2, 4, 2, 150, 400, 64


def in_blocks(tensor):
    """(B, H, T, K) as rows 100 to 250 of a (B, 300, H, K) buffer."""
    buffer = tensor.new_full((B, 300, H, tensor.shape[3]), torch.nan)
    buffer[:, 100:250] = tensor.transpose(1, 2)
    return buffer[:, 100:250].transpose(1, 2)


LAYOUTS = {
    "packed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows of a buffer": in_blocks,
    "heads first": torch.Tensor.contiguous,
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("query_layout", ["packed", "rows of a buffer", "heads first"])
def test_one_plan_of_cudnn_meets_one_layout(monkeypatch, query_layout):
    torch.manual_seed(0)
    query = LAYOUTS[query_layout](torch.randn(B, H, T, K))
    key, value = torch.randn(2, B, G, S, K)
    output, grad, lse = torch.randn(B, H, T, K), torch.randn(B, H, T, K), torch.randn(B, T, H).mT
    calls = []

    def backward(grad, query, key, value, output, lse, *rest, **options):
        calls.append((grad, output, lse))
        return query, key, value

    monkeypatch.setattr(sdpa, "_uses_cudnn", lambda query, key: True)
    monkeypatch.setattr(sdpa, "_ATEN", SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=backward))
    for lay_out in LAYOUTS.values():
        given = lay_out(grad), lay_out(output)
        sdpa._gradients_cuda(given[0], (query, key, value), (given[1], lse), False, 1.0)
        assert torch.equal(calls[-1][0], given[0]) and torch.equal(calls[-1][1], given[1])
        # What a forward in torch would have made of this query, as torch's own calls share the plan.
        assert calls[-1][0].stride() == calls[-1][1].stride() == torch.empty_like(query).stride()
        assert calls[-1][2].is_contiguous()
    packed = LAYOUTS["packed" if query_layout == "rows of a buffer" else query_layout](output)
    sdpa._gradients_cuda(packed, (query, key, value), (packed, lse), False, 1.0)
    assert calls[-1][0] is calls[-1][1] is packed


@pytest.mark.gpu
@pytest.mark.parametrize("order", [("rows of a buffer", "packed"), ("packed", "rows of a buffer")])
@pytest.mark.parametrize("keys", [S, T])
def test_the_layout_of_the_results_does_not_matter(order, keys):
    torch.manual_seed(0)
    query, grad = (torch.randn(B, T, H, K, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    key, value = torch.randn(2, B, G, keys, K, device="cuda").bfloat16()
    mask = KeyRange(causal=True)
    output, lse = blockwise_attention(query, key, value, mask=mask)
    found = []
    for name in order:
        results = LAYOUTS[name](output), lse
        found.append(blockwise_attention_gradients(grad, (query, key, value), results, mask=mask))
    for first, second in zip(*(gradients[:3] for gradients in found), strict=True):
        # Sums in another order, rounded once: at most one unit in the last place of each number.
        assert (first.float() - second.float()).norm() <= torch.finfo(
            torch.bfloat16
        ).eps * first.float().norm()
