"""How a decoding step rounds the state in fp32: up or down, with the odds of what rounding cuts off.

A step adds a small change to a large state. Rounded to the nearest number, equal tokens err in the same
direction at every step: after a million of them the state is wrong by up to one part in a hundred, and a
change of less than half an ulp is lost for good. Here a sum that lies a share r of the way from one fp32
number to the next becomes the next one with odds r: errors have mean 0 and add up like a random walk.

**Bound.** A rounding errs with a variance of r (1 - r) <= 1/4 ulp^2 and an ulp is at most 2^-23 of the state.
With a decay lambda, n steps leave an error of

    rms <= 2^-23 / 2 * sqrt(min(n, 1 / (1 - lambda^2))), 6.1e-5 for a million steps without decay,

of the largest size that the state had, and 3.5e-5 where it grows with the steps; evenly spread r, as of
random tokens, give 0.82 of that.

**Where the odds come from.** Not from a counter or a generator: from the bits of the state's tile and of the
token, so that a step gives the same bits wherever, beside whatever and however often it is taken. All of a
tile's elements draw from one sum over its bits. An element that drew from its own bits alone would stay for
good once a change of under one ulp has been refused, as one rounded to the nearest does. Of n elements, all
must refuse: what may be lost are changes of less than about ln(1 / (1 - lambda)) / n ulp, where n is 4096
from K = V = 128 on.

    seed   = sum_ij bits(S_ij) (G i | 1) mod 2^32      G = 2^32 / the golden ratio
    draw   = (mix(seed ^ (bits(k_i) + G i)) ^ mix(seed ^ (bits(v_j) - G (j + 1)))) >> 9
    S'     = S + change to the nearest, and rest = S + change - S' exactly (Knuth, TAOCP 2, 4.2.2)
    S_ij   = S'_ij + sign(rest_ij) ulp(S'_ij) where |rest_ij| > 2^-23 draw_ij ulp(S'_ij), else S'_ij

`mix` is the finaliser of MurmurHash3 (A. Appleby) but for its last line, which moves bits down that are cut
off here. The draws of a tile are independent in pairs, which is what a variance needs. A sum that is an fp32
number has no rest and is that number; infinities and NaN pass as they are.
"""

import torch
from torch import Tensor

from hf_longattn.kernels.lightning_attention.tiling import choose_step_tiling

GOLDEN = 0x9E3779B9
# The multipliers of `mix`.
FIRST, SECOND = 0x85EBCA6B, 0xC2B2AE35
SIGN, EXPONENT = 1 << 31, 0xFF << 23
# An ulp of 1, and its bits. What is drawn are the fractions of numbers from one ulp to two.
ULP, ULP_BITS = 2.0**-23, (127 - 23) << 23


def _signed(bits: int) -> int:
    """The int32 number of 32 given bits: torch computes with these."""
    return bits - (1 << 32) if bits >> 31 else bits


def _shift(x: Tensor, count: int) -> Tensor:
    """Shifts int32 right, zeros coming in."""
    return (x >> count).bitwise_and_((1 << 32 - count) - 1)


def _mix(x: Tensor) -> Tensor:
    x = _shift(x, 16).bitwise_xor_(x).mul_(_signed(FIRST))
    return _shift(x, 13).bitwise_xor_(x).mul_(_signed(SECOND))


def _draws(state: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Fractions of an ulp, one an element of a tile (B, H, K, C)."""
    golden, (rows, columns) = _signed(GOLDEN), state.shape[2:]
    numbers = torch.arange(max(rows, columns), device=state.device, dtype=torch.int32) * golden
    weights = (numbers[:rows] | 1)[:, None]
    seed = (state.view(torch.int32) * weights).sum((2, 3), dtype=torch.int32)
    key, value = key.view(torch.int32) + numbers[:rows], value.view(torch.int32) - numbers[:columns] - golden
    bits = _shift(_mix(torch.cat((key, value), -1).bitwise_xor_(seed[..., None])), 9)
    bits = bits[..., :rows, None] ^ (bits[..., None, rows:] | ULP_BITS)
    return bits.view(torch.float32).sub_(ULP)


def _add_to_tile(state: Tensor, change: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`add` for the value columns that one program of the kernel owns; in place, as new memory costs more."""
    nearest = state + change
    added = nearest - state
    rest = change.sub_(added).add_(added.sub_(nearest).add_(state))
    # Finite, so that 0 times the size of infinity is 0.
    size = (nearest.view(torch.int32) & EXPONENT).view(torch.float32).clamp_(max=2.0**127)
    draws = _draws(state, key, value).mul_(size)
    away = torch.gt(rest.abs(), draws, out=draws)
    return nearest.addcmul_(size.copysign_(rest), away, value=ULP)


def add(state: Tensor, change: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """state + change, rounded as the module says; fp64 to the nearest.

    Args:
        state: (B, H, K, V) fp32 or fp64.
        change: (B, H, K, V), what the token adds; overwritten.
        key: (B, H, K) in the state's dtype, of the token.
        value: (B, H, V).

    Returns:
        (B, H, K, V). No gradient in fp32.
    """
    if state.dtype != torch.float32:
        return state + change
    width = choose_step_tiling(*state.shape[2:])[0]
    tiles = zip(*(x.split(width, -1) for x in (state, change, value)), strict=True)
    return torch.cat([_add_to_tile(s, c, key, v) for s, c, v in tiles], -1)
