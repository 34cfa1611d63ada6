"""The rotation of inputs (``quant.rotation``) as a product with a block of signs, on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.trellis.operands import operand_columns
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant import rotation

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its dot treats bfloat16 as integers

_SIGN_WORDS = tl.constexpr(tuple(rotation.SIGN_BITS >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)))

MIN_BLOCK = 32
"""Least columns of a product: the order of operands spans 32 columns."""

BLOCKS = 4
"""Blocks of columns of one program, which share the signs."""


@triton.jit
def signs(column: Tile):
    """Return whether each of the columns 0 to 127 of a block is negated, as 0 or 1."""
    words: tl.constexpr = _SIGN_WORDS
    word = tl.where(
        column < 64, tl.where(column < 32, words[0], words[1]), tl.where(column < 96, words[2], words[3])
    ).to(tl.uint32)
    return ((word >> (column & 31).to(tl.uint32)) & 1).to(tl.int32)


@triton.jit
def sign_block(output: Tile, column: Tile, SIDE: tl.constexpr):
    """Return the rotation without its factor 1 / sqrt(SIDE): 1, -1, or 0 between blocks, as float32.

    Args:
        output: numbers of rotated inputs, broadcast with ``column``
        column: numbers of inputs
    """
    parity = output & column & (SIDE - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    negative = (parity & 1) ^ signs(column & (SIDE - 1))
    return tl.where(output // SIDE == column // SIDE, 1.0 - 2.0 * negative.to(tl.float32), 0.0)


@triton.jit
def _signed_sums(x: Tile, block: Tile):
    """Multiply x with a block of signs."""
    if _INTERPRETED:
        x, block = x.to(tl.float32), block.to(tl.float32)
    return tl.dot(x, block)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
    x: Pointer,
    out: Pointer,
    num_rows: Scalar,
    columns: Scalar,
    padded: Scalar,
    factor: Scalar,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, j) writes rows i * ROWS ... of BLOCKS blocks of columns.

    float32 is split into three bfloat16 parts, without loss.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = (row < num_rows)[:, None]
    offset = tl.arange(0, BLOCK)
    block = sign_block(operand_columns(offset)[None, :], offset[:, None], SIDE)
    block = block.to(tl.float16 if x.dtype.element_ty == tl.float16 else tl.bfloat16)
    for i in range(BLOCKS):
        column = (tl.program_id(1) * BLOCKS + i) * BLOCK + offset
        source = x + row.to(tl.int64)[:, None] * columns + column[None, :]
        tile = tl.load(source, mask=row_mask & (column < columns)[None, :], other=0.0)
        if x.dtype.element_ty == tl.float32:
            high = tile.to(tl.bfloat16)
            middle = (tile - high.to(tl.float32)).to(tl.bfloat16)
            low = (tile - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
            rotated = _signed_sums(low, block) + _signed_sums(middle, block) + _signed_sums(high, block)
        else:
            rotated = _signed_sums(tile, block)
        rotated *= factor
        target = out + row.to(tl.int64)[:, None] * padded + column[None, :]
        tl.store(target, rotated.to(out.dtype.element_ty), mask=row_mask & (column < padded)[None, :])


def rotate_operand(x: Tensor, padded: int) -> Tensor:
    """Rotate the rows of x as the grouped product reads them.

    Args:
        x: [rows, columns], contiguous
        padded: columns of the result, a multiple of 32

    Returns:
        [rows, padded] in x's dtype, the columns in the order of ``operand_columns``, zero where x has no columns.
    """
    rows, columns = x.shape
    side = rotation.block_side(columns)
    block = max(side, MIN_BLOCK)
    out = torch.empty(rows, padded, dtype=x.dtype, device=x.device)
    block_rows = 32
    _rotate_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(padded, block * BLOCKS))](
        x, out, rows, columns, padded, side**-0.5, SIDE=side, BLOCK=block, BLOCKS=BLOCKS, ROWS=block_rows, num_warps=4
    )
    return out
