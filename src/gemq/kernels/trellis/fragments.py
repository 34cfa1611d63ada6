"""Products of tiles of 16 x 32 decoded weights with eight vectors on the tensor cores (Triton device functions).

Triton's own ``tl.dot`` would move every decoded weight through shared memory. Here each thread decodes the weights that
the instruction (mma.m16n8k16) expects of it, so none moves. The sum over columns has no order, so that thread 4 g + q
may take the eight columns of period q of a row as its columns of two instructions: one word of 16 bytes of a vector,
and one window of the codes in each of the rows g and g + 8.

A tile of threads is [32, J, R]: the threads of a warp, steps that warps share, rows of tiles.

The inline assembly is NVIDIA's. PORTABLE uses ordinary arithmetic, for the interpreter and other GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.triton_types import Tile


@triton.constexpr_function
def product_asm():
    """Return PTX that multiplies a 16 x 16 and a 16 x 8 fragment of float16 and adds float32."""
    return (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.jit
def _halves(word: Tile):
    """Return the two float16 of each word as float32."""
    low = word.to(tl.int16).to(tl.float16, bitcast=True)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _partial_product(a: Tile, b: Tile):
    """Multiply row g of ``a`` [32, J, R] in thread 4 g + q with vector n of ``b`` [32, J, 1] in thread 4 n + q.

    Returns:
        The products with vectors 2 q and 2 q + 1, in thread 4 g + q.
    """
    J: tl.constexpr = a.shape[1]
    R: tl.constexpr = a.shape[2]
    a_low, a_high = _halves(a)
    b_low, b_high = _halves(b)
    total = tl.reshape(a_low, [8, 1, 4, J, R]) * tl.reshape(b_low, [1, 8, 4, J, b.shape[2]])
    total += tl.reshape(a_high, [8, 1, 4, J, R]) * tl.reshape(b_high, [1, 8, 4, J, b.shape[2]])
    by_parity = tl.permute(tl.reshape(tl.sum(total, 2), [8, 4, 2, J, R]), [0, 1, 3, 4, 2])
    return tl.split(tl.reshape(by_parity, [32, J, R, 2]))


@triton.jit
def add_product(
    c0: Tile,
    c1: Tile,
    c2: Tile,
    c3: Tile,
    a0: Tile,
    a1: Tile,
    a2: Tile,
    a3: Tile,
    b0: Tile,
    b1: Tile,
    PORTABLE: tl.constexpr,
):
    """Return sums plus products. Tiles are [32, J, R], those of vectors [32, J, 1], of thread 4 g + q.

    Args:
        c0: sum of row g and vector 2 q, float32
        c1: of row g and vector 2 q + 1
        c2: of row g + 8 and vector 2 q
        c3: of row g + 8 and vector 2 q + 1
        a0: weights of row g in two columns, words of two float16
        a1: weights of row g + 8 in the same columns
        a2: weights of row g in two other columns
        a3: weights of row g + 8 in these
        b0: vector g in the columns of ``a0``
        b1: vector g in the columns of ``a2``
    """
    if PORTABLE:
        even, odd = _partial_product(a0, b0)
        c0, c1 = c0 + even, c1 + odd
        even, odd = _partial_product(a2, b1)
        c0, c1 = c0 + even, c1 + odd
        even, odd = _partial_product(a1, b0)
        c2, c3 = c2 + even, c3 + odd
        even, odd = _partial_product(a3, b1)
        return c0, c1, c2 + even, c3 + odd
    else:
        return tl.inline_asm_elementwise(
            product_asm(),
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
