"""Launches that overlap: off where they cannot, and on a GPU the bits of launches one after the other."""

import contextlib
import importlib

import pytest
import torch

from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.dispatch import has_triton
from hf_longattn.kernels.few_key_attention import few_key_attention
from hf_longattn.kernels.few_row_linear import few_row_gated_linear, few_row_linear
from hf_longattn.kernels.gated_activation import gated_activation
from hf_longattn.kernels.normed_linears import normed_linears, residual_linears
from hf_longattn.kernels.residual_norms import residual_norms
from hf_longattn.kernels.rotary_cache_write import rotary_cache_write
from hf_longattn.kernels.rotary_embedding import rotary_embedding
from hf_longattn.kernels.row_norm import row_norm

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")
WIDTH, HEADS, LAYERS = 1024, 8, 6
OPERATORS = (
    "cache_write", "few_key_attention", "few_row_linear", "gated_activation", "normed_linears",
    "residual_norms", "rotary_cache_write", "rotary_embedding", "row_norm",
)  # fmt: skip


@contextlib.contextmanager
def one_after_the_other(monkeypatch):
    """Inside, no launch begins before the one in front of it has ended."""
    with monkeypatch.context() as patch:
        for name in OPERATORS:
            module = importlib.import_module(f"hf_longattn.kernels.{name}.triton")
            patch.setattr(module, "overlap", lambda device: {"OVERLAP": False})
        yield


def test_no_overlap_on_a_cpu():
    from hf_longattn.kernels.common import overlap

    assert overlap(torch.device("cpu")) == {"OVERLAP": False}


def draw_layers():
    def weight(rows, columns):
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5

    torch.manual_seed(0)
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "gate": (4 * WIDTH, WIDTH)}
    shapes |= {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    return [{name: weight(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]


def step(layers, states, norm, angles, held, slots, settled=False):
    """A decoding step of a few layers; the allocator gives the same memory again to one after the other."""
    rows, weight = states.shape[0], {"settled_weight": settled}
    for layer, (keys, values) in zip(layers, held, strict=True):
        normed = row_norm(states, norm[0], eps=1e-5, kind="rms")
        qkv = few_row_linear(normed, layer["qkv"], **weight).view(rows, 1, 3 * HEADS, -1).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=1)
        query, key = rotary_embedding(query, key, *angles)
        further = keys[:, :, 1:], values[:, :, 1:], slots[None]
        query = rotary_cache_write(query, key, value, *angles, *further)
        attended = few_key_attention(query, key, value, keys[:, :, :8], values[:, :, :8], 3, scale=0.1)
        cache_write(keys, values, slots, key, value)
        out = few_row_linear(attended.flatten(2)[:, 0], layer["out"], **weight)
        inner = few_row_gated_linear(normed, layer["gate"], layer["up"], **weight)
        inner = gated_activation(inner, inner, activation="gelu")
        down = few_row_linear(inner, layer["down"], **weight)
        states, _, _ = residual_norms(states, (out, down), norm, eps=1e-5)
        # One kernel of torch between ours.
        states = states * 0.5
    return states


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [0, 1, 2], ids="A{}".format)
@pytest.mark.parametrize("rows", [1, 3], ids="B{}".format)
def test_a_captured_step_gives_the_bits_of_one_launch_after_the_other(monkeypatch, rows, tiles):
    ahead = importlib.import_module("hf_longattn.kernels.few_row_linear.triton")
    monkeypatch.setattr(ahead, "_LARGE", 0 if tiles == 2 else 1 << 30)
    layers, slots = draw_layers(), torch.tensor([9], device="cuda")
    states = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    norm = torch.rand(2, WIDTH, device="cuda", dtype=torch.bfloat16).unbind()
    angles = torch.randn(2, rows, 1, WIDTH // HEADS, device="cuda", dtype=torch.bfloat16).unbind()
    shape = (LAYERS, 2, rows, HEADS, 16, WIDTH // HEADS)
    held = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    arguments = layers, states, norm, angles, held, slots
    compare_replays(
        monkeypatch, layers, states, held, lambda on=False: step(*arguments, settled=on and tiles > 0)
    )


def branched(layers, states, norm, held, settled=False):
    """Layers with parallel branches, three launches each."""
    rows, weight = states.shape[0], {"settled_weights": settled}
    scale, shift = norm
    for layer, (keys, values) in zip(layers, held, strict=True):
        first = scale, shift, layer["qkv"], shift.repeat(3)
        second = shift, scale, layer["gate"], scale.repeat(4)
        qkv, inner = normed_linears(states, first, second, eps=1e-5, activation="gelu", **weight)
        query, key, value = qkv.view(rows, 1, 3 * HEADS, -1).transpose(1, 2).chunk(3, dim=1)
        attended = few_key_attention(query, key, value, keys[:, :, :8], values[:, :, :8], 3, scale=0.1)
        attended = attended.flatten(2)[:, 0], layer["out"], scale
        states = residual_linears(states, (inner, layer["down"], shift), attended, **weight)
    return states


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2], ids="B{}".format)
def test_layers_with_parallel_branches_give_the_bits_of_one_launch_after_the_other(monkeypatch, rows):
    layers, norm = draw_layers(), torch.rand(2, WIDTH, device="cuda", dtype=torch.bfloat16).unbind()
    states = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    shape = (LAYERS, 2, rows, HEADS, 16, WIDTH // HEADS)
    held = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    compare_replays(
        monkeypatch, layers, states, held, lambda on=False: branched(layers, states, norm, held, on)
    )


def compare_replays(monkeypatch, layers, states, held, run):
    """Replays of `run(True)`, which writes to `held`, give the bits that `run()` gives without overlap."""
    start, drawn, expected = held.clone(), [torch.randn_like(states) for _ in range(50)], []
    with one_after_the_other(monkeypatch):
        for each in drawn:
            states.copy_(each)
            expected.append((run(), held.clone()))
    held.copy_(start)
    run(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(True)
    held.copy_(start)
    for each, (wanted, wanted_held) in zip(drawn, expected, strict=True):
        # Weights that were written right before the replay count as well.
        for layer in layers:
            layer["out"].neg_().neg_()
        states.copy_(each)
        graph.replay()
        assert torch.equal(result, wanted) and torch.equal(held, wanted_held)
