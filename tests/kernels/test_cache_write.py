"""New tokens in the slots of a cache: the same bits, and nothing else touched."""

import pytest
import torch

from hf_longattn.kernels.cache_write import cache_write

SHAPES = [(1, 2, 9, 1, 64, 64), (2, 3, 20, 4, 48, 24), (2, 1, 7, 3, 16, 0), (0, 2, 5, 1, 32, 32)]
IDS = [f"B{b}-G{g}-S{s}-T{t}-K{k}-V{v}" for b, g, s, t, k, v in SHAPES]


def drawn(shape, dtype, device):
    states = torch.randint(-128, 128, shape, device=device)
    return states.to(dtype) if dtype == torch.int8 else (states / 7).to(dtype)


def check(impl, dtype, shape, device="cpu"):
    b, g, s, t, k, v = shape
    # Buffers are views of longer ones, and heads lie behind tokens, as projections leave them.
    buffers = [drawn((b, g, s + 5, width), dtype, device) for width in (k, v)]
    states = [drawn((b, t, g, width), dtype, device).transpose(1, 2) for width in (k, v)]
    index = torch.randperm(s, device=device)[:t]
    expected = [buffer.clone() for buffer in buffers]
    for buffer, new in zip(expected, states, strict=True):
        for token, slot in enumerate(index.tolist()):
            buffer[:, :, slot] = new[:, :, token]
    cache_write(buffers[0][:, :, :s], buffers[1][:, :, :s], index, *states, impl=impl)
    assert all(torch.equal(got, wanted) for got, wanted in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_reference_writes_the_slots(shape, dtype):
    check("reference", dtype, shape)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_kernel_under_the_interpreter(shape):
    for dtype in (torch.float32, torch.float16, torch.int8):
        check("triton", dtype, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 4096, 1, 128, 128), (3, 2, 64, 16, 256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_kernel_on_a_gpu(shape, dtype, impl):
    check(impl, dtype, shape, "cuda")


@pytest.mark.gpu
def test_a_replay_writes_where_the_index_has_moved_to():
    keys, values = (torch.zeros(1, 2, 12, 64, device="cuda") for _ in range(2))
    key, value = (torch.zeros(1, 2, 1, 64, device="cuda") for _ in range(2))
    index = torch.full((1,), 3, device="cuda")
    cache_write(keys, values, index, key, value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache_write(keys, values, index, key, value)
    for slot in (7, 2, 12, -1):
        index.fill_(slot)
        key.fill_(slot + 1)
        value.fill_(-slot)
        graph.replay()
    # Slots outside are not written.
    assert keys[0, 1, :, 5].tolist() == [0, 0, 3, 0, 0, 0, 0, 8, 0, 0, 0, 0]
    assert values[0, 0, :, 63].tolist() == [0, 0, -2, 0, 0, 0, 0, -7, 0, 0, 0, 0]


def test_what_does_not_fit_is_refused():
    keys, key, index = torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 1, 8), torch.tensor([4])
    with pytest.raises(ValueError, match="`key` of cache_write"):
        cache_write(keys, keys, index, key[..., :4], key)
    with pytest.raises(ValueError, match="`value` of cache_write"):
        cache_write(keys, keys[:, :, :5], index, key, key)
    with pytest.raises(TypeError, match="`value` of cache_write must have the dtype"):
        cache_write(keys, keys, index, key, key.half())
    with pytest.raises(ValueError, match="must not require a gradient"):
        cache_write(keys, keys, index, key.clone().requires_grad_(), key)
    with pytest.raises(ValueError, match="`impl`"):
        cache_write(keys, keys, index, key, key, impl="fast")
