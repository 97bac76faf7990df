"""How the Triton scan of lightning attention is cut: tiles, warps and stages by head dim, segments by length.

A table rather than autotuning: no call times anything, so the first one is fast and a graph can capture it.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import triton_version
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs

# Sequences up to this long are not cut into segments, and no segment is shorter: summing what enters costs
# two launches.
SHORT = 2048
# Tokens a block at least: short, since a block is walked by one program while the segments wait for it.
BLOCK = 512
# Programs that a multiprocessor holds at once, for the number of segments.
PROGRAMS_PER_SM = 2


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(size: int) -> int:
    """The next one, `size` included."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class Tiling:
    """How a scan is cut: chunk length, value columns a program, warps, pipeline stages, and what is not
    rounded.

    `split` adds up 1 (scores), 2 (state) and 4 (decayed values): each is then multiplied as a sum of two bf16
    numbers. `gluon` takes the kernel of `triton_gluon.py`, which also knows 8 (a quarter of the state's key
    columns) and 16 (half of them).
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    split: int = 7
    gluon: bool = False


# What is multiplied exactly, by name: everything, or all but the scores. To round the scores as well moves
# the error of bf16 outputs from 1.66e-3 to 1.99e-3, and saves a product and the registers of its operand.
EVERYTHING, ALL_BUT_SCORES = 7, 6
# By the widest padded key dim that each serves: what runs where the sequences fill the GPU or can be cut,
TILINGS = {
    64: Tiling(64, 64, 4, 3, ALL_BUT_SCORES),
    128: Tiling(64, 64, 4, 2, ALL_BUT_SCORES),
    256: Tiling(64, 32, 4, 3, ALL_BUT_SCORES),
}
# and what runs where they are few and too short to be cut.
FEW_TILINGS = {
    64: Tiling(64, 32, 4, 4, ALL_BUT_SCORES),
    128: Tiling(64, 32, 4, 4, ALL_BUT_SCORES),
    256: Tiling(64, 16, 4, 3, ALL_BUT_SCORES),
}
# Programs below which short sequences are few.
FULL = 128
# Parts of the state's key columns that only the Gluon kernel multiplies exactly.
QUARTER_STATE, HALF_STATE = 8, 16
# What runs on Hopper GPUs in Gluon, by head dim: a program is a whole head over a segment, one fills a
# multiprocessor, and 3/4 of the state's rounding is left beside that of the output (1.97e-3 in all).
GLUON_TILINGS = {128: Tiling(64, 128, 8, 3, 1 + 4 + QUARTER_STATE, gluon=True)}
# Tokens and programs from which it runs; fewer are spread better by narrow tiles.
GLUON_LENGTH, GLUON_PROGRAMS = 256, 96
# Versions of Triton in which it compiles to what it should.
GLUON_VERSIONS = ((3, 6), (3, 9))
# Value columns a program and warps of a decoding step. 16 elements of the state a thread take 64 registers
# with what rounds them, so that four programs share a multiprocessor.
STEP_TILINGS = {128: (32, 8), 256: (16, 8)}


def _by_dim(table: dict, key_dim: int) -> Any:
    """The entry of the smallest dim that is not below `key_dim`, or the last."""
    return table[min((dim for dim in table if dim >= key_dim), default=max(table))]


def exact_columns(split: int, key_dim: int) -> int:
    """Key columns of the state that the Gluon kernel multiplies as a sum of two bf16 numbers."""
    shares = {2: key_dim, HALF_STATE: key_dim // 2, QUARTER_STATE: key_dim // 4}
    return max((columns for bit, columns in shares.items() if split & bit), default=0)


def takes_tma(tensor: Tensor) -> bool:
    """Whether tiles of a (B, H, T, D) tensor can be copied by the hardware: rows and strides of 16 bytes."""
    unit = 16 // tensor.element_size()
    strides = [s for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if n > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in strides)
    return aligned and tensor.stride(3) == 1


@functools.cache
def gluon_runs(device: torch.device) -> bool:
    """Whether `device` is a Hopper GPU and this Triton can compile the Gluon kernel for it."""
    oldest, newest = GLUON_VERSIONS
    if device.type != "cuda" or torch.version.hip or not oldest <= triton_version() <= newest:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def gluon_serves(inputs: ScanInputs, output: Tensor) -> bool:
    """Whether the Gluon kernel can run a scan, and has enough programs to fill the GPU.

    Args:
        inputs: what the scan reads.
        output: what it writes.

    Returns:
        False for packed documents, dtypes other than bf16, head dims not in `GLUON_TILINGS`, unaligned or
        repeated (expanded) tensors, and devices other than Hopper GPUs.
    """
    query, key, value, slopes, _, cu_seqlens = inputs
    batch, _, length, dim = query.shape
    if dim not in GLUON_TILINGS or value.shape[3] != dim or cu_seqlens is not None:
        return False
    if query.dtype != torch.bfloat16 or length < GLUON_LENGTH or not gluon_runs(query.device):
        return False
    programs = batch * slopes.shape[0] * max(1, length // SHORT)
    return programs >= GLUON_PROGRAMS and all(map(takes_tma, (query, key, value, output)))


def choose_tiling(
    key_dim: int, value_dim: int, dtype: torch.dtype, length: int, num_programs: int, gluon: bool = False
) -> Tiling:
    """The tiling for a problem of `num_programs` (batch x heads) sequences of `length` tokens.

    Args:
        key_dim: K.
        value_dim: V.
        dtype: of the inputs.
        length: T.
        num_programs: batch x heads.
        gluon: whether `gluon_serves` the problem.

    Returns:
        The tiling; the state takes K x block_v fp32 registers over the warps.
    """
    if gluon:
        return GLUON_TILINGS[key_dim]
    wide = max(16, _power_of_2(key_dim))
    if dtype == torch.float32:
        # Products of three TF32 terms hold their operands in registers.
        return Tiling(32, 32, 4, 2) if wide <= 64 else Tiling(16, 32, 8, 2)
    tiling = _by_dim(TILINGS, wide)
    columns = max(16, _power_of_2(value_dim))
    few = num_programs * _cdiv(value_dim, min(tiling.block_v, columns)) < FULL
    if length <= SHORT and few:
        # Too short to be cut into segments: narrower tiles occupy the GPU instead.
        tiling = _by_dim(FEW_TILINGS, wide)
    block_v = min(tiling.block_v, columns)
    while length <= SHORT and block_v > 16 and num_programs * _cdiv(value_dim, block_v) < FULL:
        block_v //= 2
    # Rounding a handful of scores may err by more than the average, and fp16 is asked for its precision.
    exact = dtype == torch.float16 or length <= tiling.chunk
    return replace(tiling, block_v=block_v, split=EVERYTHING if exact else tiling.split)


def choose_step_tiling(key_dim: int, value_dim: int) -> tuple[int, int]:
    """(value columns a program, warps) of a decoding step, whose state takes K x columns fp32 registers.

    Args:
        key_dim: K.
        value_dim: V.

    Returns:
        Both are powers of two.
    """
    columns, warps = _by_dim(STEP_TILINGS, max(16, _power_of_2(key_dim)))
    return min(_power_of_2(value_dim), columns), warps


def choose_segments(length: int, num_programs: int, num_slots: int) -> tuple[int, int]:
    """(segment length, block length) in tokens: the cut under which the last wave of programs wastes least.

    Args:
        length: T.
        num_programs: programs that one segment takes.
        num_slots: programs that the GPU runs at once.

    Returns:
        Both are multiples of 64, and the segment of the block. One segment holds everything if nothing is to
        be won.
    """

    def cost(count: int) -> float:
        # Waves of the whole length, and for every cut the tokens before it that are summed again.
        return -(-num_programs * count // num_slots) / count * (1 + 0.005 * (count - 1))

    count = min(range(1, max(1, min(length // SHORT, 64)) + 1), key=cost)
    tokens = _cdiv(length, count)
    block = max(BLOCK, 64 * _cdiv(tokens, 64 * 32))
    return block * max(1, _cdiv(tokens, block)), block
