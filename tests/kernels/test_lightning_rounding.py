"""How a decoding step rounds its state: exactly where it can, by the odds of the rest elsewhere, to a bound.

That the kernel has the same bits is tested in `test_lightning_attention.py`.
"""

import math

import pytest
import torch

from hf_longattn.kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    rounding,
)

ULP = 2.0**-23
SLOPES = [0.84, 1e-2, 3.9e-8, 0.0]
STEPS = 1 << 12


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def add(state, change, key=None, value=None):
    """`rounding.add` with a token of its own for every row."""
    key = torch.randn(*state.shape[:2], state.shape[2]) if key is None else key
    value = torch.randn(*state.shape[:2], state.shape[3]) if value is None else value
    return rounding.add(state, change.clone(), key, value)


def ulp(x):
    return 2.0 ** (torch.frexp(x.double())[1] - 24).double()


def test_sums_err_by_less_than_an_ulp_and_only_where_they_must():
    exponents = torch.randint(-30, 30, (2, 4, 8, 96, 64))
    state, change = (torch.randn(4, 8, 96, 64) * 2.0**e for e in exponents)
    state[0, 0], change[0, 1] = 0, 0
    # On a grid, sums are fp32 numbers; powers of two have neighbours at two distances.
    state[1] = torch.randint(-1000, 1000, (8, 96, 64)).float()
    change[1] = torch.randint(-1000, 1000, (8, 96, 64)).float()
    state[2] = 2.0 ** torch.randint(-5, 5, (8, 96, 64))
    exact = state.double() + change.double()
    actual = add(state, change).double()
    fits = exact.float().double() == exact
    assert torch.equal(actual[fits], exact[fits]) and 0.1 < fits.double().mean() < 0.9
    nearest = exact.float()
    assert ((actual - exact).abs()[~fits] < ulp(nearest)[~fits]).all()
    assert (actual.float() != nearest)[~fits].double().mean() > 0.1


def test_tiny_and_infinite_numbers_pass():
    tiny, top = 2.0**-149, torch.finfo(torch.float32).max
    rows = [(3 * tiny, -tiny), (2.0**-126, tiny), (-0.0, 0.0), (top, 0.0), (top, top), (-top, -top)]
    rows += [(math.inf, 1.0), (-math.inf, 1.0), (math.inf, -math.inf), (math.nan, 1.0), (1.0, math.nan)]
    state, change = torch.tensor(rows).T[:, None, None, None].clone()
    torch.testing.assert_close(add(state, change), state + change, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("start", [1.0, -1.5, 2.0**20 + 0.25], ids=str)
@pytest.mark.parametrize("share", [2**-6, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("tokens", ["other", "equal"])
def test_odds(start, share, tokens):
    """Sums end above with the odds of their rest, over other tokens and over equal ones on rising states."""
    rows = 64
    state = torch.full((rows, 1, 16, 32), start)
    unit = ulp(state).float()
    key = value = None
    if tokens == "equal":
        state = state + torch.arange(rows)[:, None, None, None] * unit
        key, value = torch.ones(rows, 1, 16), torch.ones(rows, 1, 32)
    change = torch.full_like(state, share) * unit
    moved = (add(state, change, key, value).double() - state.double()) / unit
    assert set(moved.unique().tolist()) <= {0.0, 1.0}
    variance = share * (1 - share) / moved.numel()
    assert abs(moved.mean() - share) < 5 * math.sqrt(variance)
    for axis in (0, 2, 3):
        means = moved.mean([d for d in range(4) if d != axis])
        # Draws of a tile are independent in pairs, so a mean varies as of independent ones. Not so its fourth
        # moment: with odds of 1/2 the signs of a tile are those of a column times a row, whose is up to 9.
        spread = (means - share).square().mean() / (variance * len(means))
        assert abs(spread - 1) < 5 * math.sqrt(8 / len(means))


def test_neighbours_draw_independently():
    """Two elements, two steps, or two rows of a batch in different states: no correlation."""
    state = 1 + torch.arange(4096)[:, None, None, None] * ULP + torch.zeros(1, 1, 4, 4)
    up = add(state, torch.full_like(state, ULP / 2), torch.ones(4096, 1, 4), torch.ones(4096, 1, 4)) - state
    signs = torch.sign(up / ULP - 0.5).double().flatten(1)
    between = signs.T @ signs / 4096 - torch.eye(16)
    after = signs[1:].T @ signs[:-1] / 4096
    assert max(between.abs().max(), after.abs().max()) < 5 / math.sqrt(4096)


def patterns(length, dims=16):
    """(4 patterns, 4 slopes, length, dims) keys and values, slopes and the states before.

    Equal tokens of ones; equal random tokens; 64 random tokens again and again; a state left alone, that only
    decays.
    """
    k, v = torch.randn(2, 4, 1, 64, dims)
    k[0] = v[0] = 1
    k[1], v[1] = k[1, :, :1], v[1, :, :1]
    k[3] = 0
    repeats = -(-length // 64)
    k, v = (x.repeat(1, 4, repeats, 1)[:, :, :length] for x in (k, v))
    state = torch.zeros(4, 4, dims, dims)
    state[3] = torch.randn(4, dims, dims)
    return k, v, torch.tensor(SLOPES), state


def bound(slopes, steps):
    """(patterns, slopes) bounds of `rounding.py` on the relative error, and the roundings of the changes.

    Those are three: of the product, of the forgotten share and of their difference, each 2^-24 of it. Where
    the state only decays, its errors shrink with it, and so they all count.
    """
    kept = torch.exp(-2 * slopes.double())
    counts = torch.minimum(torch.tensor(float(steps)), 1 / (1 - kept)).repeat(4, 1)
    counts[3] = steps
    changes = torch.ones(4, len(slopes))
    changes[3] = steps * slopes
    return ULP / 2 * (counts.sqrt() + 3 * changes)


def state_errors(steps):
    """(patterns, slopes) errors of the state relative to the exact one, after single steps."""
    k, v, slopes, state = patterns(steps)
    exact = lightning_attention(
        k.double(), k.double(), v.double(), slopes.double(),
        initial_state=state.double(), output_final_state=True,
    )[1]  # fmt: skip
    # A state that only decays is soon nothing but zeros.
    keep = exact.norm(dim=(2, 3)) > 1e-30
    lightning_attention_step(k, k, v, slopes, state, impl="reference")
    error = (state.double() - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    return torch.where(keep, error, 0), bound(slopes, steps)


def check_bound(steps, monkeypatch):
    errors, allowed = state_errors(steps)
    assert (errors <= allowed).all(), (errors, allowed)
    # The bound is not empty: rounded to the nearest, most patterns miss it.
    monkeypatch.setattr(rounding, "add", lambda state, change, key, value: state + change)
    nearest, _ = state_errors(steps)
    assert (nearest > allowed).any(0)[1:].all() and (nearest > 3 * allowed).any(0)[1:3].all(), nearest


def test_error_of_many_steps(monkeypatch):
    check_bound(STEPS, monkeypatch)


@pytest.mark.slow
def test_error_of_very_many_steps(monkeypatch):
    check_bound(8 * STEPS, monkeypatch)


def test_a_few_steps_equal_a_chunk():
    k, v, slopes, state = patterns(100)
    options = {"initial_state": state, "output_final_state": True}
    output, left = lightning_attention(k, k, v, slopes, **options)
    steps = lightning_attention_step(k, k, v, slopes, state)
    allowed = 2 * bound(slopes, 100)[:3].max()
    assert (left - state).norm() < allowed * left.norm()
    assert (output - steps).norm() < allowed * output.norm()


def test_same_bits_whoever_is_beside():
    """Rows alone, tokens one by one, heads alone, another layout: all give the bits of the whole."""
    k, v, slopes, before = patterns(7, dims=40)
    whole = before.clone()
    lightning_attention_step(k, k, v, slopes, whole)
    rows, tokens, heads = (before.clone() for _ in range(3))
    turned = before.transpose(2, 3).contiguous().transpose(2, 3)
    for i in range(4):
        one, head = slice(i, i + 1), [x[:, i : i + 1] for x in (k, k, v)]
        lightning_attention_step(k[one], k[one], v[one], slopes, rows[one])
        lightning_attention_step(*head, slopes[i : i + 1], heads[:, i : i + 1])
    for t in range(7):
        part = [x[:, :, t : t + 1] for x in (k, k, v)]
        lightning_attention_step(*part, slopes, tokens)
    lightning_attention_step(k, k, v, slopes, turned)
    for state in (rows, tokens, heads, turned):
        assert torch.equal(state, whole)
    assert not torch.equal(whole, before)


def test_absent_tokens_leave_the_bits_of_the_state():
    k, _, slopes, state = patterns(1)
    before = state.clone()
    lightning_attention_step(k, k, torch.zeros_like(k), torch.zeros_like(slopes), state)
    assert torch.equal(state, before)


def test_wide_states_are_added_plainly():
    state, change = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(add(state, change, state[..., 0], state[..., 0, :]), state + change)
