"""Ring- and Ling-linear's layer is the same operator: its formulas with it and with the recurrence."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from hf_longattn.attention.lightning import tnl_slopes
from hf_longattn.kernels.lightning_attention import lightning_attention

HEADS, WIDTH, LAYERS, GROUPS = 4, 16, 8, 2


def rotated(x, part):
    """Rotary embedding of the first `part` channels."""
    turn, rest = x[..., :part], x[..., part:]
    time = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
    angle = time * 10000.0 ** (-torch.arange(0, part, 2, dtype=x.dtype) / part)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    half = torch.cat([-turn[..., part // 2 :], turn[..., : part // 2]], -1)
    return torch.cat([turn * cos + half * sin, rest], -1)


def layer(x, weights, layer_idx, mix):
    """Fused projection, norms of q and k, partial rotary embedding, group norm, sigmoid gate."""
    qkv = (x @ weights["qkv"]).unflatten(-1, (3 * HEADS, WIDTH)).transpose(1, 2)
    q, k, v = qkv.chunk(3, 1)
    q, k = (rotated(F.rms_norm(s, (WIDTH,), weights["qk_norm"], eps=1e-6), WIDTH // 2) for s in (q, k))
    # The factor counts layers from one before the first: 1 - (l - 1) / (L - 1) + 1e-5.
    base = torch.tensor(tnl_slopes(HEADS, 0, LAYERS), dtype=torch.float64) / (1 + 1e-5)
    slopes = base * (1 - (layer_idx - 1) / (LAYERS - 1) + 1e-5)
    mixed = mix(q, k, v, slopes).transpose(1, 2).flatten(2)
    groups = F.rms_norm(mixed.unflatten(-1, (GROUPS, -1)), (HEADS * WIDTH // GROUPS,), eps=1e-6).flatten(-2)
    return (groups * weights["norm"] * torch.sigmoid(x @ weights["gate"])) @ weights["out"]


def recurrence(q, k, v, slopes):
    state, outputs = q.new_zeros(*q.shape[:2], WIDTH, WIDTH), []
    for t in range(q.shape[2]):
        state = state * torch.exp(-slopes)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        outputs.append(WIDTH**-0.5 * (q[:, :, t, None] @ state))
    return torch.cat(outputs, 2)


def ours(q, k, v, slopes):
    return lightning_attention(q, k, v, slopes.to(q.dtype), scale=WIDTH**-0.5)


@pytest.mark.parametrize("layer_idx", [0, 3, LAYERS - 1])
def test_a_layer_equals_its_recurrence(layer_idx):
    width = HEADS * WIDTH
    shapes = {"qkv": (width, 3 * width), "gate": (width, width), "out": (width, width), "norm": (width,)}
    weights = {name: 0.2 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    weights["qk_norm"] = 1 + 0.1 * torch.randn(WIDTH, dtype=torch.float64)
    x = torch.randn(2, 130, width, dtype=torch.float64)
    expected = layer(x, weights, layer_idx, recurrence)
    single = {name: weight.float() for name, weight in weights.items()}
    result = layer(x.float(), single, layer_idx, ours)
    standard = layer(
        x.float(), single, layer_idx, lambda q, k, v, slopes: recurrence(q, k, v, slopes.float())
    )
    eps = torch.finfo(torch.float32).eps
    assert tiny.relative_error(result, expected) <= 1.5 * (tiny.relative_error(standard, expected) + eps)
