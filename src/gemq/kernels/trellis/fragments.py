"""Products of tiles of 16 x 32 coded weights with four vectors on the tensor cores (Triton device functions).

The value of a weight is a sum of the four bytes of a product. So a weight is four operands of the instruction
(mma.m16n8k32) with integers of eight bits, and the tensor cores add up the bytes. Vectors are integers of 16 bits, in
two digits of eight bits, which are two of the eight columns of the instruction. The products are exact.

Each thread computes the weights that the instruction expects of it, so none moves between threads. The sum over columns
has no order, so that thread 4 g + q may take the eight columns of period q of a row as its columns of four
instructions: eight bytes of a digit of a vector, and one window of the codes in each of the rows g and g + 8.

A tile of threads is [32, J, R]: the threads of a warp, warps that share a row, rows of tiles.

The inline assembly is NVIDIA's. PORTABLE uses ordinary arithmetic, for the interpreter and other GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.trellis.values import byte_total
from gemq.kernels.triton_types import Tile, Tiles


@triton.constexpr_function
def product_asm():
    """Return PTX that multiplies a 16 x 32 and a 32 x 8 fragment of bytes and adds int32."""
    return (
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.constexpr_function
def repeat_asm(i):
    """Return PTX that repeats byte i of $1 four times."""
    return f"prmt.b32 $0, $1, 0, {0x1111 * int(i):#06x};"


@triton.jit
def repeat_byte(word: Tile, i: tl.constexpr, PORTABLE: tl.constexpr):
    """Return words of four times byte i of ``word`` (int32)."""
    if PORTABLE:
        return ((word >> (8 * i)) & 255) * 0x01010101
    else:
        return tl.inline_asm_elementwise(repeat_asm(i), "=r,r", [word], tl.int32, is_pure=True, pack=1)


@triton.jit
def _partial_product(a: Tile, b: Tile):
    """Multiply row g of ``a`` [32, J, R] in thread 4 g + q with column n of ``b`` [32, J, 1] in thread 4 n + q.

    Returns:
        The products with columns 2 q and 2 q + 1, in thread 4 g + q.
    """
    J: tl.constexpr = a.shape[1]
    R: tl.constexpr = a.shape[2]
    digit = b.to(tl.int8, bitcast=False).to(tl.int32)
    total = tl.reshape(byte_total(a), [8, 1, 4, J, R]) * tl.reshape(digit, [1, 8, 4, J, b.shape[2]])
    by_parity = tl.permute(tl.reshape(tl.sum(total, 2), [8, 4, 2, J, R]), [0, 1, 3, 4, 2])
    return tl.split(tl.reshape(by_parity, [32, J, R, 2]))


@triton.jit
def add_product(sums: Tiles, a0: Tile, a1: Tile, a2: Tile, a3: Tile, b0: Tile, b1: Tile, PORTABLE: tl.constexpr):
    """Return sums plus products. Tiles are [32, J, R], those of vectors [32, J, 1], of thread 4 g + q.

    Args:
        sums: int32 of row g and column 2 q, row g and column 2 q + 1, and the same of row g + 8
        a0: products of states of row g in one column of the matrix, uint32
        a1: of row g + 8 in the same column
        a2: of row g in another column
        a3: of row g + 8 in this column
        b0: four times column g of the vectors at the column of ``a0``
        b1: at the column of ``a2``
    """
    if PORTABLE:
        first, second = _partial_product(a0, b0), _partial_product(a2, b1)
        third, fourth = _partial_product(a1, b0), _partial_product(a3, b1)
        upper = (sums[0] + first[0] + second[0], sums[1] + first[1] + second[1])
        return (upper[0], upper[1], sums[2] + third[0] + fourth[0], sums[3] + third[1] + fourth[1])
    else:
        return tl.inline_asm_elementwise(
            product_asm(),
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
