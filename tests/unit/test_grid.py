"""Scales and offsets of one byte: what the bytes stand for, and which are nearest."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch
import triton
import triton.language as tl

from gemq.quant import grid_kernel
from gemq.quant.gptq import max_codes
from gemq.quant.grid import decode, encode, nearest
from gemq.quant.widths import Width

BYTES = torch.arange(256, dtype=torch.uint8)
ALL_BYTE_PAIRS = torch.meshgrid(BYTES, BYTES, indexing="ij")
MAX_CODES = [width.max_code for width in Width]


@pytest.mark.parametrize("max_code", MAX_CODES)
def test_every_pair_of_bytes_comes_back(max_code):
    scales, offsets = decode(*ALL_BYTE_PAIRS, max_code)
    assert all(map(torch.equal, encode(scales, offsets, max_code), ALL_BYTE_PAIRS))
    # the page's formula, in float64: float32 holds both exactly
    s, z = (byte.double() for byte in ALL_BYTE_PAIRS)
    expected = torch.exp2((s // 8) - 24) * (1 + s % 8 / 8)
    assert torch.equal(scales.double(), expected)
    assert torch.equal(offsets.double(), expected * max_code * (64 - z) / 128)


@pytest.mark.parametrize("max_code", MAX_CODES)
def test_nearest_is_near(max_code):
    """Scales to a sixteenth at most, offsets to a 256th of the span."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(5000, generator=generator) * 28 - 22)
    offset = -scale * max_code * (torch.rand(5000, generator=generator) * 1.8 - 0.4)
    stored_scale, stored_offset = nearest(scale, offset, max_code)
    assert ((stored_scale / scale - 1).abs() <= 1 / 16).all()
    assert ((stored_offset - offset).abs() <= stored_scale * max_code / 255).all()


@pytest.mark.parametrize("max_code", MAX_CODES)
@pytest.mark.parametrize("value", [1.0, -1.0, 1e-4, -250.0])
def test_groups_far_from_zero_stay_there(value, max_code):
    """The span of 0.01 around 1 is wider than asked for, but where it should be."""
    scale, offset = nearest(torch.tensor(0.01 * abs(value) / max_code), torch.tensor(value), max_code)
    assert offset.item() == pytest.approx(value, rel=1e-2)
    assert scale.item() * max_code < 2.4 * abs(value)


@triton.jit
def _nearest_kernel(scales, offsets, max_code, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale, offset = (
        tl.load(scales + index, mask=index < n, other=0.0),
        tl.load(offsets + index, mask=index < n, other=0.0),
    )
    scale, offset = grid_kernel.nearest(scale, offset, tl.load(max_code))
    tl.store(scales + index, scale, mask=index < n)
    tl.store(offsets + index, offset, mask=index < n)


@pytest.mark.parametrize("max_code", MAX_CODES)
def test_kernels_round_alike(max_code):
    generator = torch.Generator().manual_seed(1)
    scale = torch.cat([torch.exp2(torch.rand(2000, generator=generator) * 40 - 30), torch.tensor([0.0, -1.0, 1e30])])
    offset = scale * max_code * (torch.rand(2003, generator=generator) * 4 - 3)
    ours = [t.clone().to(DEVICE) for t in (scale, offset)]
    _nearest_kernel[(2,)](*ours, torch.tensor([float(max_code)], device=DEVICE), len(scale), BLOCK=1024)
    for result, reference in zip(ours, nearest(scale, offset, max_code), strict=True):
        same = result.cpu() == reference
        assert same.float().mean() > 0.999  # a division may round a tie to the other side
        torch.testing.assert_close(result.cpu(), reference, rtol=0.13, atol=1e-6)


def test_changes_in_one_pass():
    """The kernel that distillation takes on a GPU, against the plain formula."""
    generator = torch.Generator().manual_seed(2)
    base = [torch.rand(3, 5, 7, generator=generator) + 0.5, -torch.rand(3, 5, 7, generator=generator)]
    changes = [0.2 * torch.randn(3, 5, 7, generator=generator) for _ in range(2)]
    max_code = max_codes((Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT), torch.device("cpu")).view(-1, 1, 1)
    expected = nearest(base[0] * (1 + changes[0]), base[1] + base[0] * changes[1], max_code)
    results = grid_kernel.changed(*(t.to(DEVICE) for t in (*changes, *base, max_code)))
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), reference)
