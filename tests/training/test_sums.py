"""Sums of gradients over blocks: the bits of an fp32 sum, and no memory of somebody else."""

import pytest
import torch

from hf_longattn.training.sums import GradientSum


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [5, 1 << 20])
def test_the_bits_are_those_of_an_fp32_sum(count, dtype, size):
    parts = [torch.randn(size).to(dtype) for _ in range(count)]
    expected = parts[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for part in parts[1:]:
        expected += part
    total, wide = GradientSum(), GradientSum()
    for part in (None, *parts, None):
        total.add(part)
        wide.add(part)
    assert torch.equal(total.rounded(dtype), expected.to(dtype))
    assert torch.equal(wide.wide(), expected) and wide.wide().dtype == expected.dtype
    assert wide.wide_like(parts[0]) is wide.wide()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_written_over_later_is_copied(dtype):
    buffer = torch.ones(4, 1 << 20, dtype=dtype)
    small = torch.ones(3, dtype=dtype)
    for part in (buffer[1], small):
        total = GradientSum()
        total.add(part)
        buffer.zero_(), small.zero_()
        assert bool((total.rounded(dtype) == 1).all())
        buffer.fill_(1), small.fill_(1)
    # A part that is kept as it is must not be written to, either.
    part = torch.ones(1 << 20, dtype=dtype)
    total = GradientSum()
    for _ in range(3):
        total.add(part)
    assert bool((part == 1).all()) and bool((total.rounded(dtype) == 3).all())


def test_no_part_is_no_gradient():
    total = GradientSum()
    total.add(None)
    assert total.rounded(torch.float32) is None and total.wide() is None
    zeros = total.wide_like(torch.ones(3, dtype=torch.bfloat16))
    assert zeros.dtype == torch.float32 and not zeros.any()
