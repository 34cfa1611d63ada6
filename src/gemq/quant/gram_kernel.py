"""Sums of x x^T on a GPU: one launch for all matrices' rows, on tensor cores.

Products of 16-bit numbers are exact in float32, in which they are added up: nothing is lost against converting the rows
first. A sum is symmetric, so only its tiles on and above the diagonal are computed; ``mirror`` fills in the rest. The
reference is the loop in ``hessian.Moments.add``. Knows tensors only.

Shapes: E matrices, C columns, P rows sorted by matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE, STEP = 128, 64
"""Columns of a tile of the sums, and rows that are multiplied at once."""


@triton.jit
def _gram_kernel(
    x,  # [P, C]
    ends,  # [E] int32 or int64
    sums,  # [E, C, C] float32
    columns,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (t, e): tile number t of matrix e; tiles (i, j <= i) are counted row by row and lie at (j, i)."""
    tile, matrix = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt((8 * tile + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    start = tl.load(ends + matrix - 1, mask=matrix > 0, other=0)
    end = tl.load(ends + matrix)
    if start == end:
        return
    left, right = j * TILE + tl.arange(0, TILE), i * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in tl.range(start, end, STEP):
        row = first + tl.arange(0, STEP)
        at = x + row[:, None].to(tl.int64) * columns
        inside = row[:, None] < end
        a = tl.load(at + left[None, :], mask=inside & (left[None, :] < columns), other=0.0)
        b = tl.load(at + right[None, :], mask=inside & (right[None, :] < columns), other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    target = sums + (matrix.to(tl.int64) * columns + left[:, None]) * columns + right[None, :]
    inside = (left[:, None] < columns) & (right[None, :] < columns)
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


def add(sums: Tensor, rows: Tensor, ends: Tensor) -> None:
    """Adds x x^T of the rows [P, C] to sums [E, C, C] float32, tiles below the diagonal left out.

    ends: [E] int32 or int64 on the device, where each matrix's rows end
    """
    experts, columns, _ = sums.shape
    tiles = triton.cdiv(columns, TILE)
    if len(rows):
        _gram_kernel[(tiles * (tiles + 1) // 2, experts)](
            rows.contiguous(), ends, sums, columns, TILE=TILE, STEP=STEP, num_warps=4, num_stages=3
        )


def mirror(sums: Tensor) -> None:
    """Fills in what ``add`` left out: sums [E, C, C] are symmetric afterwards."""
    for one in sums:
        one.triu_()
        one += one.triu(1).T
