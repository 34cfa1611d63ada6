"""Sums of x x^T, or of y x^T, on a GPU: one launch for the rows of all matrices, on tensor cores.

Products of 16-bit numbers are exact in float32, in which they are accumulated, so that nothing is lost against
converting the rows first. A sum of x x^T is symmetric: only tiles on and above the diagonal are computed, and
``mirror`` fills in the others. The references are the loops in ``hessian.HessianAccumulator.add`` and
``compensation.ChangeAccumulator.add``.

Shapes: E matrices, C columns, P rows sorted by matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE, STEP = 128, 64
"""Columns of a tile of the sums, and rows that are multiplied in one step."""


@triton.jit
def _product_kernel(
    y,  # [P, C]
    x,  # [P, C]
    ends,  # [E] int32 or int64
    sums,  # [E, C, C] float32
    columns,
    SYMMETRIC: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute tile t of matrix e in program (t, e).

    Tiles are counted row by row. With SYMMETRIC only tiles (i, j <= i) are counted, and stored at (j, i).
    """
    tile, matrix = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        # invert t = i * (i + 1) / 2 + j, and correct the rounding of the root
        i = ((tl.sqrt((8 * tile + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        j = tile - i * (i + 1) // 2
    else:
        i, j = tile % tl.cdiv(columns, TILE), tile // tl.cdiv(columns, TILE)
    start = tl.load(ends + matrix - 1, mask=matrix > 0, other=0)
    end = tl.load(ends + matrix)
    if start == end:
        return
    left, right = j * TILE + tl.arange(0, TILE), i * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for step_start in tl.range(start, end, STEP):
        row = step_start + tl.arange(0, STEP)
        offset = row[:, None].to(tl.int64) * columns
        row_mask = row[:, None] < end
        a = tl.load(y + offset + left[None, :], mask=row_mask & (left[None, :] < columns), other=0.0)
        b = tl.load(x + offset + right[None, :], mask=row_mask & (right[None, :] < columns), other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    target = sums + (matrix.to(tl.int64) * columns + left[:, None]) * columns + right[None, :]
    mask = (left[:, None] < columns) & (right[None, :] < columns)
    tl.store(target, tl.load(target, mask=mask, other=0.0) + total, mask=mask)


def add(sums: Tensor, rows: Tensor, ends: Tensor) -> None:
    """Add x x^T of rows to the tiles of ``sums`` on and above the diagonal.

    Args:
        sums: [E, C, C] float32.
        rows: [P, C], sorted by matrix.
        ends: [E] int32 or int64 on the device, end of each matrix's rows.
    """
    tiles = triton.cdiv(sums.shape[1], TILE)
    _launch(sums, rows, rows, ends, tiles * (tiles + 1) // 2, is_symmetric=True)


def add_products(sums: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add y x^T of rows to ``sums``.

    Args:
        sums: [E, C, C] float32.
        left: [P, C], rows y sorted by matrix.
        right: [P, C], rows x of the same dtype.
        ends: [E] int32 or int64 on the device, end of each matrix's rows.
    """
    _launch(sums, left, right, ends, triton.cdiv(sums.shape[1], TILE) ** 2, is_symmetric=False)


def _launch(sums: Tensor, left: Tensor, right: Tensor, ends: Tensor, tiles: int, *, is_symmetric: bool) -> None:
    """Run the kernel on ``tiles`` tiles of each matrix."""
    if len(right):
        _product_kernel[(tiles, len(sums))](
            left.contiguous(),
            right.contiguous(),
            ends,
            sums,
            sums.shape[1],
            SYMMETRIC=is_symmetric,
            TILE=TILE,
            STEP=STEP,
            num_warps=4,
            num_stages=3,
        )


def mirror(sums: Tensor) -> None:
    """Fill in the tiles that ``add`` leaves out, so that ``sums`` [E, C, C] are symmetric."""
    for matrix_sum in sums:
        matrix_sum.triu_()
        matrix_sum += matrix_sum.triu(1).T
