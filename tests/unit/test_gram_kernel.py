"""Second moments on tensor cores against float64."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch

from gemq.quant import gram_kernel

torch.set_num_threads(1)

KIND = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""The interpreter multiplies the bits of bfloat16 numbers as if they were integers."""


@pytest.mark.parametrize(("counts", "columns"), [([70, 0, 1, 129], 96), ([0, 65], 272), ([200], 128)])
def test_sums_of_16_bit_rows_are_those_of_float32(counts, columns):
    """Products of such numbers are exact in float32, so only its sums round."""
    generator = torch.Generator().manual_seed(columns)
    sums = torch.zeros(len(counts), columns, columns, device=DEVICE)
    expected = torch.zeros(len(counts), columns, columns, dtype=torch.float64)
    for _ in range(2):
        rows = torch.randn(sum(counts), columns, generator=generator).to(KIND)
        gram_kernel.add(sums, rows.to(DEVICE), torch.tensor(counts, device=DEVICE).cumsum(0))
        for e, x in enumerate(rows.double().split(counts)):
            expected[e] += x.T @ x
    gram_kernel.mirror(sums)
    assert torch.equal(sums, sums.mT)
    torch.testing.assert_close(sums.double().cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("counts", "columns"), [([70, 0, 1, 129], 96), ([0, 65], 272)])
def test_sums_of_products_of_different_rows(counts, columns):
    generator = torch.Generator().manual_seed(columns)
    left, right = (torch.randn(sum(counts), columns, generator=generator).to(KIND) for _ in range(2))
    sums = torch.ones(len(counts), columns, columns, device=DEVICE)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0)
    gram_kernel.add_products(sums, left.to(DEVICE), right.to(DEVICE), ends)
    for e, (y, x) in enumerate(zip(left.double().split(counts), right.double().split(counts), strict=True)):
        torch.testing.assert_close(sums[e].double().cpu(), 1 + y.T @ x, rtol=1e-5, atol=1e-4)


def test_no_rows():
    sums = torch.ones(2, 16, 16, device=DEVICE)
    rows, ends = torch.zeros(0, 16, device=DEVICE).to(KIND), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    gram_kernel.add(sums, rows, ends)
    gram_kernel.add_products(sums, rows, rows, ends)
    assert sums.eq(1).all()
