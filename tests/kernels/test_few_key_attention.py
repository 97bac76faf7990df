"""Attention over a few keys against fp64: new keys written and read, parts of heads turned, groups, pads."""

import pytest
import torch

from hf_longattn.kernels.few_key_attention import few_key_attention

# B, H, G, T, slots, start, K, numbers of a head that turn, whether some keys are pads.
SHAPES = [
    (3, 4, 4, 1, 5, 3, 32, 8, False),
    (2, 2, 2, 2, 5, 0, 16, 16, False),
    (2, 4, 2, 3, 9, 4, 24, 6, True),
    (1, 6, 2, 1, 1, 0, 40, 0, True),
    (0, 2, 2, 1, 5, 2, 16, 4, False),
    (2, 2, 1, 4, 32, 28, 16, 4, True),
    (2, 3, 3, 1, 7, 6, 48, 12, False),
]
IDS = [f"B{b}-H{h}-G{g}-T{t}-S{s}-at{a}-K{k}-R{r}" + "-pads" * p for b, h, g, t, s, a, k, r, p in SHAPES]


def inputs(b, h, g, t, slots, start, k, turned, pads, dtype, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    # Slices of one projection, as GPT-NeoX lays them out where every head has keys of its own.
    parts = draw(b, t, h + 2 * g, k).to(dtype).transpose(1, 2)
    if h == g:
        parts = draw(b, t, h, 3 * k).to(dtype).transpose(1, 2)
        states = list(parts.chunk(3, dim=-1))
    else:
        states = [parts[:, :h], parts[:, h : h + g], parts[:, h + g :]]
    # What is not held yet holds nothing that may be read.
    held = [torch.full((b, g, slots, k), torch.nan, device=device, dtype=dtype) for _ in range(2)]
    for buffer in held:
        buffer[:, :, :start] = draw(b, g, start, k).to(dtype)
    angle = draw(b, t, turned // 2).repeat(1, 1, 2)
    rotary = (angle.cos().to(dtype), angle.sin().to(dtype)) if turned else None
    mask = draw(b, start + t) > 0 if pads else None
    return [*states, *held], {"start": start, "rotary": rotary, "key_mask": mask}


def definition(states, start, rotary, key_mask):
    """(output, keys, values) in fp64, one query after the other, rotation as a product of complex numbers."""
    query, key, value, keys, values = (state.double().clone() for state in states)

    def turn(x):
        if rotary is None:
            return x
        cos, sin = (part.double()[:, None, :, : part.shape[-1] // 2] for part in rotary)
        half = cos.shape[-1]
        both = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
        return torch.cat([both.real, both.imag, x[..., 2 * half :]], dim=-1)

    query, key, stop = turn(query), turn(key), start + query.shape[2]
    keys[:, :, start:stop], values[:, :, start:stop] = key, value
    output = torch.zeros(*query.shape[:3], values.shape[-1], dtype=torch.double, device=query.device)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        g, shown = h // (query.shape[1] // keys.shape[1]), torch.arange(start + t + 1, device=query.device)
        shown = shown if key_mask is None else shown[key_mask[b, : start + t + 1]]
        if len(shown):
            scores = keys[b, g, shown] @ query[b, h, t] * query.shape[-1] ** -0.5
            output[b, h, t] = scores.softmax(0) @ values[b, g, shown]
    return output.transpose(1, 2), keys, values


def run(impl, states, options):
    states = [*states[:3], *(held.clone() for held in states[3:])]
    output = few_key_attention(*states, **options, impl=impl)
    return output, *states[3:]


def check(impl, dtype, shape, device="cpu"):
    states, options = inputs(*shape, dtype, device)
    exact = definition(states, **options)
    standard, results = run("reference", states, options), run(impl, states, options)
    stop = options["start"] + shape[3]
    for index, (result, plain, wanted) in enumerate(zip(results, standard, exact, strict=True)):
        if index:
            assert result[:, :, stop:].isnan().all(), "a slot beyond the new keys was written"
            result, plain, wanted = (tensor[:, :, :stop] for tensor in (result, plain, wanted))
        allowed = (plain.double() - wanted).norm() + torch.finfo(dtype).eps * wanted.norm()
        assert (result.double() - wanted).norm() <= 1.5 * allowed, ("output", "keys", "values")[index]
        assert result.dtype == dtype and result.shape == wanted.shape


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_reference_is_attention_over_turned_keys(dtype, shape):
    states, options = inputs(*shape, dtype)
    bound = 8 * torch.finfo(dtype).eps
    for result, wanted in zip(run("reference", states, options), definition(states, **options), strict=True):
        wanted = wanted.nan_to_num(0.0)
        assert (result.double().nan_to_num(0.0) - wanted).norm() <= bound * wanted.norm()


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_under_the_interpreter(dtype, shape):
    check("triton", dtype, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (256, 16, 16, 2, 5, 0, 128, 32, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_on_a_gpu(dtype, shape):
    if shape[0] == 256:
        # The definition takes its queries one by one.
        states, options = inputs(*shape, dtype, "cuda")
        wide = [state.double() for state in states]
        options["rotary"] = tuple(part.double() for part in options["rotary"])
        exact = run("reference", wide, options)[0]
        options["rotary"] = tuple(part.to(dtype) for part in options["rotary"])
        plain, result = (run(impl, states, options)[0].double() for impl in ("reference", "triton"))
        allowed = (plain - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (result - exact).norm() <= 1.5 * allowed
        return
    check("triton", dtype, shape, "cuda")


def test_steps_of_one_token_are_those_of_all_at_once():
    states, options = inputs(2, 4, 2, 5, 6, 0, 16, 4, False, torch.float64)
    whole, keys, _ = run("reference", states, options)
    held = [buffer.clone() for buffer in states[3:]]
    for t in range(5):
        new = [state[:, :, t : t + 1] for state in states[:3]]
        rotary = tuple(part[:, t : t + 1] for part in options["rotary"])
        output = few_key_attention(*new, *held, t, rotary=rotary)
        torch.testing.assert_close(output[:, 0], whole[:, t])
    assert torch.equal(held[0][:, :, :5], keys[:, :, :5])


def test_what_does_not_fit_is_refused():
    states, options = inputs(2, 4, 2, 1, 5, 3, 16, 4, True, torch.float32)
    query, key, value, keys, values = states

    def call(*given, impl="reference", **changes):
        return few_key_attention(*(given or states), **{**options, **changes}, impl=impl)

    with pytest.raises(ValueError, match="`key` and `value` of few_key_attention must be"):
        call(query[:, :3], key, value, keys, values)
    with pytest.raises(ValueError, match="`held_keys` and `held_values`"):
        call(query, key, value, keys[..., :4], values)
    with pytest.raises(ValueError, match="`start` .* must leave room for 1 new keys among 5 slots, got 5"):
        call(start=5, key_mask=None)
    with pytest.raises(ValueError, match="`rotary`"):
        call(rotary=(torch.ones(2, 1, 3), torch.ones(2, 1, 3)))
    with pytest.raises(ValueError, match="`key_mask`"):
        call(key_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`impl`"):
        call(impl="fast")
