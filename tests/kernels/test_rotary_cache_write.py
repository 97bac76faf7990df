"""Rotation and cache write in one: the bits of the two operators, and nothing else touched."""

import pytest
import torch

from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.rotary_cache_write import rotary_cache_write
from hf_longattn.kernels.rotary_embedding import rotary_embedding

# (B, H, G, S, T, K, V, R): the first R of a head turn.
SHAPES = [
    (2, 4, 2, 9, 1, 64, 64, 64),
    (1, 3, 1, 20, 5, 48, 24, 48),
    (3, 9, 9, 7, 2, 80, 80, 20),
    (2, 10, 1, 5, 1, 33, 0, 16),
    (0, 2, 2, 5, 1, 32, 32, 32),
]
IDS = ["B{}-H{}-G{}-S{}-T{}-K{}-V{}-R{}".format(*shape) for shape in SHAPES]


def drawn(shape, dtype, device, angle_dtype=None):
    """Buffers that are views of longer ones, states that are slices of one projection, angles, slots."""
    b, h, g, s, t, k, v, r = shape
    buffers = [torch.randn(b, g, s + 5, width, device=device).to(dtype) for width in (k, v)]
    projected = torch.randn(b, t, h * k + g * (k + v), device=device).to(dtype)
    query, key, value = projected.split([h * k, g * k, g * v], dim=-1)
    states = [part.unflatten(-1, (n, -1 if part.numel() else w)).transpose(1, 2)
              for part, n, w in ((query, h, k), (key, g, k), (value, g, v))]  # fmt: skip
    angle = torch.randn(b, t, r // 2, device=device).repeat(1, 1, 2)
    angles = [part.to(angle_dtype or dtype) for part in (angle.cos(), angle.sin())]
    index = torch.stack([torch.randperm(s, device=device)[:t] for _ in range(max(b, 1))])[:b]
    return buffers, states, angles, index


def one_after_the_other(buffers, states, angles, index, impl):
    """What the two operators give: the turned query; `buffers` are written, row by row."""
    query, key = rotary_embedding(*states[:2], *angles, impl=impl)
    for row in range(query.shape[0]):
        one = slice(row, row + 1)
        held = [buffer[one] for buffer in buffers]
        cache_write(*held, index[min(row, len(index) - 1)], key[one], states[2][one], impl=impl)
    return query


def check(impl, dtype, shape, device="cpu", angle_dtype=None, shared=False):
    buffers, states, angles, index = drawn(shape, dtype, device, angle_dtype)
    if shared:
        index, angles = index[:1], [part[:1] for part in angles]
    expected = [buffer.clone() for buffer in buffers]
    own = "triton" if impl == "auto" else impl
    wanted = one_after_the_other([part[:, :, : shape[3]] for part in expected], states, angles, index, own)
    before = [part.clone() for part in states]
    held = [buffer[:, :, : shape[3]] for buffer in buffers]
    assert torch.equal(rotary_cache_write(*states, *angles, *held, index, impl=impl), wanted)
    assert all(torch.equal(*pair) for pair in zip(buffers + states, expected + before, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_reference_has_the_bits_of_the_two_operators(shape, dtype):
    check("reference", dtype, shape)
    check("reference", dtype, shape, shared=shape[0] > 0)


def check_outside(device):
    """Tokens whose slot is outside of the buffers leave no trace."""
    (keys, values), states, angles, _ = drawn((1, 2, 2, 6, 3, 16, 16, 8), torch.float32, device)
    expected = [keys.clone(), values.clone()]
    index, last = torch.tensor([[6, 2, -1]], device=device), slice(1, 2)
    arguments = [*(part[:, :, last] for part in states), *(part[:, last] for part in angles)]
    rotary_cache_write(*arguments, *expected, index[:, last], impl="triton")
    rotary_cache_write(*states, *angles, keys[:, :, :6], values[:, :, :6], index, impl="triton")
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_kernel_has_the_bits_of_the_two_kernels_under_the_interpreter(shape):
    for dtype in (torch.float32, torch.float16):
        check("triton", dtype, shape, shared=shape[0] > 1)
    check("triton", torch.float16, shape, angle_dtype=torch.float32)


@pytest.mark.interpreted
def test_slots_outside_are_not_written_under_the_interpreter():
    check_outside("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (1, 32, 8, 4096, 1, 128, 128, 128), (3, 8, 8, 64, 16, 256, 256, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_has_the_bits_of_the_two_kernels_on_a_gpu(shape, dtype, impl):
    check(impl, dtype, shape, "cuda")
    check(impl, dtype, shape, "cuda", shared=shape[0] > 0)
    check(impl, dtype, shape, "cuda", angle_dtype=torch.float32)


@pytest.mark.gpu
def test_slots_outside_are_not_written_on_a_gpu():
    check_outside("cuda")


@pytest.mark.gpu
def test_a_replay_writes_where_the_index_has_moved_to():
    (keys, values), states, angles, index = drawn((2, 4, 2, 12, 1, 64, 64, 32), torch.bfloat16, "cuda")
    rotary_cache_write(*states, *angles, keys, values, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = rotary_cache_write(*states, *angles, keys, values, index)
    for slots in ((7, 2), (0, 11), (5, 5)):
        expected = [keys.clone(), values.clone()]
        index.copy_(torch.tensor(slots, device="cuda")[:, None])
        states[1].neg_()
        graph.replay()
        assert torch.equal(query, one_after_the_other(expected, states, angles, index, "triton"))
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_what_does_not_fit_is_refused():
    (keys, values), (query, key, value), (cos, sin), index = drawn(
        (2, 4, 2, 9, 3, 16, 8, 16), torch.float32, "cpu"
    )

    def call(**changed):
        given = {"query": query, "key": key, "value": value, "cos": cos, "sin": sin, "keys": keys}
        rotary_cache_write(**given | {"values": values, "index": index} | changed)

    wrong = [
        ({"key": key[..., :8]}, "`key` of rotary_cache_write"),
        ({"sin": sin[..., :8]}, "`cos` and `sin` of rotary_cache_write"),
        ({"cos": cos[..., :9], "sin": sin[..., :9]}, "an even R"),
        ({"index": index[0]}, "`index` of rotary_cache_write"),
        ({"values": values[:, :, :5]}, "`values` of rotary_cache_write"),
        ({"value": value[:, :, :2]}, "`values` of rotary_cache_write"),
        ({"key": key.clone().requires_grad_()}, "must not require a gradient"),
        ({"impl": "fast"}, "`impl`"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(**changed)
    with pytest.raises(TypeError, match="`value` of rotary_cache_write must have the dtype"):
        call(value=value.half())
    call()
