"""Up to three packed matrices with the same columns in one launch (Triton device functions).

Their rows follow each other in the output; a program belongs to one of them. A matrix that is not there has no rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(program, rows_0, rows_1, M: tl.constexpr):
    """Which of the matrices a program works for, the number of its block of M rows, and rows of the matrices before."""
    blocks_0, blocks_1 = tl.cdiv(rows_0, M), tl.cdiv(rows_1, M)
    which = (program >= blocks_0).to(tl.int32) + (program >= blocks_0 + blocks_1).to(tl.int32)
    zero = program * 0
    block = program - of_three(which, zero, zero + blocks_0, zero + blocks_0 + blocks_1)
    return which, block, of_three(which, zero, zero + rows_0, zero + rows_0 + rows_1)


@triton.jit
def of_three(which, first, second, third):
    """Scalars or pointers."""
    return tl.where(which == 0, first, tl.where(which == 1, second, third))
