"""One of up to three packed matrices that share a launch (Triton device functions).

The matrices have the same columns, and their rows are concatenated in the output. A program computes rows of one
matrix. A missing matrix has no rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.triton_types import Scalar


@triton.jit
def locate_block(program: Scalar, rows_0: Scalar, rows_1: Scalar, BLOCK_ROWS: tl.constexpr):
    """Return a program's matrix, its block of rows in the matrix, and the number of rows in the matrices before."""
    blocks_0, blocks_1 = tl.cdiv(rows_0, BLOCK_ROWS), tl.cdiv(rows_1, BLOCK_ROWS)
    matrix = (program >= blocks_0).to(tl.int32) + (program >= blocks_0 + blocks_1).to(tl.int32)
    zero = program * 0
    block = program - select(matrix, zero, zero + blocks_0, zero + blocks_0 + blocks_1)
    return matrix, block, select(matrix, zero, zero + rows_0, zero + rows_0 + rows_1)


@triton.jit
def select(matrix: Scalar, value_0: Scalar, value_1: Scalar, value_2: Scalar):
    """Return the value (a scalar or pointer) of matrix 0, 1 or 2."""
    return tl.where(matrix == 0, value_0, tl.where(matrix == 1, value_1, value_2))
