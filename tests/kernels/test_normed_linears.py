"""Both ends of a layer with parallel branches against fp64: one row and two, odd sizes, interpreted too."""

import pytest
import torch
from torch import nn

from hf_longattn.kernels.normed_linears import normed_linears, residual_linears

# Rows, columns of both products in front, width, and those of what is joined: less than a tile, and several.
SHAPES = [
    (1, 70, 96, 64, 4200, 1100),
    (2, 33, 50, 40, 130, 40),
    (2, 6, 40, 24, 7200, 2100),
    (1, 9, 5, 264, 8, 8),
]
IDS = [f"M{m}-N{n1}x{n2}-D{d}-H{h}x{o}" for m, n1, n2, d, h, o in SHAPES]
EPS = 1e-5


def inputs(m, n1, n2, d, h, o, dtype, device="cpu"):
    """Arguments of both operators, no weight, bias or norm like another."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape, size=1.0):
        return (size * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    def section(n):
        return 1 + draw(d, size=0.5), draw(d), draw(n, d, size=d**-0.5), draw(n)

    # Rows lie apart, as slices of a longer tensor do, with a mean that is far from zero.
    states = draw(m, 2 * d)[:, :d] * 2 + 3
    branch = draw(m, h + 8)[:, :h], draw(d, h, size=h**-0.5), draw(d)
    attended = draw(m, 3 * o)[:, o : 2 * o], draw(d, o, size=o**-0.5), draw(d)
    return states, (section(n1), section(n2)), (branch, attended)


def double(sections):
    return [tuple(tensor.double() for tensor in section) for section in sections]


def results(states, front, back, activation, **options):
    """What both operators give, in one tuple."""
    outer = normed_linears(states, *front, eps=EPS, activation=activation, **options)
    return *outer, residual_linears(states, *back, **options)


def check(impl, dtype, shape, activation="gelu", device="cpu", **options):
    states, front, back = inputs(*shape, dtype, device)
    exact = results(states.double(), double(front), double(back), activation, impl="reference")
    standard = results(states, front, back, activation, impl="reference")
    found = results(states, front, back, activation, impl=impl, **options)
    for result, plain, wanted in zip(found, standard, exact, strict=True):
        allowed = (plain.double() - wanted).norm() + torch.finfo(dtype).eps * wanted.norm()
        assert (result.double() - wanted).norm() <= 1.5 * allowed
        assert result.dtype == dtype and result.shape == wanted.shape
    batched = [tuple(tensor[:, None] if i == 0 else tensor for i, tensor in enumerate(s)) for s in back]
    assert torch.equal(residual_linears(states[:, None], *batched, impl=impl)[:, 0], found[2])
    assert torch.equal(normed_linears(states[:, None], *front, eps=EPS, impl=impl)[0][:, 0], found[0])


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_under_the_interpreter(dtype, shape):
    check("triton", dtype, shape, "silu" if shape[0] == 1 else None, settled_weights=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_under_the_interpreter(activation):
    check("triton", torch.float32, SHAPES[1], activation)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, *((m, 6144, 8192, 2048, 8192, 2048) for m in (1, 2)), (1, 300, 512, 4096, 9000, 4096)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settled", [False, True], ids=["plain", "settled"])
def test_kernels_on_a_gpu(dtype, shape, settled):
    check("triton", dtype, shape, device="cuda", settled_weights=settled)


def test_reference_is_what_modules_compute():
    torch.manual_seed(1)
    norms, maps = [nn.LayerNorm(16, eps=EPS).double() for _ in range(2)], []
    for shape in ((16, 24), (16, 40), (40, 16), (16, 16)):
        maps.append(nn.Linear(*shape).double())
    for parameter in (p for norm in norms for p in norm.parameters()):
        nn.init.normal_(parameter)
    states = torch.randn(3, 2, 16, dtype=torch.double)
    pairs = [(n.weight, n.bias, m.weight, m.bias) for n, m in zip(norms, maps[:2], strict=True)]
    qkv, inner = normed_linears(states, *pairs, eps=EPS, activation="gelu")
    torch.testing.assert_close(qkv, maps[0](norms[0](states)))
    torch.testing.assert_close(inner, nn.functional.gelu(maps[1](norms[1](states))))
    attended = qkv[..., 5:21]
    back = (inner, maps[2].weight, maps[2].bias), (attended, maps[3].weight, maps[3].bias)
    torch.testing.assert_close(residual_linears(states, *back), maps[2](inner) + maps[3](attended) + states)


def test_reference_has_a_gradient():
    states, front, back = inputs(2, 6, 10, 8, 12, 8, torch.float64)
    weight = front[1][2].requires_grad_()

    def run(weight):
        section = *front[1][:2], weight, front[1][3]
        return normed_linears(states, front[0], section, eps=EPS, activation="silu")[1]

    assert torch.autograd.gradcheck(run, (weight,))
    bias = back[0][2].requires_grad_()
    assert torch.autograd.gradcheck(lambda b: residual_linears(states, (*back[0][:2], b), back[1]), (bias,))


def test_what_does_not_fit_is_refused():
    states, (one, two), (branch, attended) = inputs(2, 8, 12, 16, 24, 16, torch.float32)
    narrow = one[0], one[1], one[2][:, :4], one[3]
    with pytest.raises(ValueError, match=r"`first` of normed_linears must have a weight \(N, 16\)"):
        normed_linears(states, narrow, two, eps=EPS)
    with pytest.raises(ValueError, match="`second` of normed_linears must begin"):
        normed_linears(states, one, (two[0][:3], *two[1:]), eps=EPS)
    with pytest.raises(ValueError, match="`activation` of normed_linears"):
        normed_linears(states, one, two, eps=EPS, activation="relu")
    with pytest.raises(ValueError, match="`first` of residual_linears must have .* torch.float32"):
        residual_linears(states, (branch[0], branch[1].half(), branch[2]), attended)
    with pytest.raises(ValueError, match="`second` of residual_linears must map"):
        residual_linears(states, branch, (attended[0][:1], *attended[1:]))
    with pytest.raises(ValueError, match="`impl`"):
        normed_linears(states, one, two, eps=EPS, impl="fast")


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("change", "words"),
    [("rows", "1 to 2 rows"), ("width", "up to 4096"), ("dtype", "fp32 alone"), ("norm", "one dtype"),
     ("strides", "contiguous rows"), ("gradient", "no backward")],
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_refused_by_name(change, words):
    shape = {"rows": (3, 4, 4, 8, 8, 8), "width": (1, 4, 4, 4100, 8, 8)}.get(change, (1, 4, 4, 8, 8, 8))
    dtype = torch.float64 if change == "dtype" else torch.float32
    states, (one, two), (branch, attended) = inputs(*shape, dtype)
    if change == "norm":
        one = one[0].double(), *one[1:]
    if change == "strides":
        one = *one[:2], torch.randn(8, 4).T, one[3]
    if change == "gradient":
        one[2].requires_grad_()
    with pytest.raises(ValueError, match=f"`impl='triton'` of normed_linears .*{words}"):
        normed_linears(states, one, two, eps=EPS, impl="triton")
    if change in ("rows", "dtype"):
        with pytest.raises(ValueError, match=f"`impl='triton'` of residual_linears .*{words}"):
            residual_linears(states, branch, attended, impl="triton")
