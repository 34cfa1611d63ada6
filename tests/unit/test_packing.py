"""Packing: exact byte counts, the documented layout, and round trips of every width and group size."""

from __future__ import annotations

import pytest
import torch

from gemq.quant.grid import Quantized, nearest
from gemq.quant.packing import PackedMatrix, pack_codes, unpack_codes
from gemq.quant.widths import Width

GROUP_SIZES = (16, 32, 64, 128, 256)


def random_codes(width: Width, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, width.levels, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", Width)
def test_round_trip_and_bytes(width, group_size):
    codes = random_codes(width, 2, 5, 3 * group_size)
    packed = pack_codes(codes, width, group_size)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 5, 3 * width.group_bytes(group_size))
    assert torch.equal(unpack_codes(packed, width, group_size), codes)
    # Leading dimensions are free: a single matrix packs to the same bytes.
    assert torch.equal(pack_codes(codes[1], width, group_size), packed[1])


def test_ternary_bytes_per_group():
    assert [Width.TERNARY.group_bytes(g) for g in (16, 32, 64, 128)] == [4, 7, 13, 26]


@pytest.mark.parametrize("width", [Width.ONE_BIT, Width.TWO_BIT, Width.FOUR_BIT])
def test_planes_are_planar(width):
    """Byte j holds the codes j + i * n at bits i * b."""
    group_size, bits = 64, int(width.bits)
    n = group_size * bits // 8
    codes = random_codes(width, 1, group_size)[0]
    packed = pack_codes(codes[None], width, group_size)[0]
    for j in range(n):
        assert packed[j] == sum(int(codes[j + i * n]) << (i * bits) for i in range(8 // bits))


def test_three_bits_are_two_planes():
    codes = random_codes(Width.THREE_BIT, 1, 64)
    packed = pack_codes(codes, Width.THREE_BIT, 64)
    assert torch.equal(packed[:, :16], pack_codes(codes & 3, Width.TWO_BIT, 64))
    assert torch.equal(packed[:, 16:], pack_codes(codes >> 2, Width.ONE_BIT, 64))


def test_ternary_is_base_three():
    codes = random_codes(Width.TERNARY, 1, 64)[0]
    packed = pack_codes(codes[None], Width.TERNARY, 64)[0]
    n = 13
    for j in range(n):
        digits = [int(codes[j + i * n]) if j + i * n < 64 else 0 for i in range(5)]
        assert packed[j] == sum(3**i * digit for i, digit in enumerate(digits))


@pytest.mark.parametrize("width", Width)
def test_packed_matrix(width):
    rows, columns, group_size = 6, 128, 32
    scales, offsets = torch.rand(2, rows, columns // group_size)
    grids = nearest(scales, -offsets, width.max_code)
    q = Quantized(random_codes(width, rows, columns), *grids)
    packed = PackedMatrix.pack(q, width)
    assert packed.nbytes == width.matrix_bytes(rows, columns, group_size)
    assert all(torch.equal(a, b) for a, b in zip(packed.unpack(), q, strict=True))
    assert list(packed.named("x")) == ["x.codes", "x.scales", "x.offsets"]
