"""Periods of eight weights as tiles of registers (Triton device functions).

See ``values`` for periods. ``as_operand`` gives each thread the weights that it decoded as its part of the left operand
of the tensor cores, so that no weight moves between threads. For this the columns of a matrix are permuted, and those
of the other operand with them (``operand_columns``). A sum over columns does not depend on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.trellis.values import centered_sum, end_distance, funnel, period_words, state
from gemq.kernels.triton_types import Pointer, Scalar, Tile

PORTABLE = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether to use no inline assembly."""


@triton.jit
def reaches_first_word(eighths: Scalar, STATE_BITS: tl.constexpr):
    """Whether the states of a period may reach into the first of its three words."""
    return eighths - (eighths >> 3) + STATE_BITS > 33


@triton.jit
def _value(high: Tile, low: Tile, eighths: Scalar, i: tl.constexpr, STATE_BITS: tl.constexpr):
    """Return the value of weight i of each period, in units of VALUE_UNIT."""
    return centered_sum(state(high, low, end_distance(i, eighths), STATE_BITS, PORTABLE), PORTABLE)


@triton.jit
def period_values(last: Tile, middle: Tile, first: Tile, shift: Tile, eighths: Scalar, STATE_BITS: tl.constexpr):
    """Return the eight values of each period as integers in float32, in units of VALUE_UNIT: [..., 2, 2, 2].

    The number of a weight in its period in binary is the index of the last three dimensions, lowest bit first.

    Args:
        last: [...] uint32, last words of the periods' windows
        middle: [...] the words before them
        first: [...] the words before those, any value unless ``reaches_first_word``
        shift: [...] int32 from ``period_words``
        eighths: width in eighths of a bit
    """
    low = funnel(middle, last, shift, PORTABLE)
    high = funnel(first, middle, shift, PORTABLE)
    v01 = tl.join(_value(high, low, eighths, 0, STATE_BITS), _value(high, low, eighths, 1, STATE_BITS))
    v23 = tl.join(_value(high, low, eighths, 2, STATE_BITS), _value(high, low, eighths, 3, STATE_BITS))
    v45 = tl.join(_value(high, low, eighths, 4, STATE_BITS), _value(high, low, eighths, 5, STATE_BITS))
    v67 = tl.join(_value(high, low, eighths, 6, STATE_BITS), _value(high, low, eighths, 7, STATE_BITS))
    return tl.join(tl.join(v01, v23), tl.join(v45, v67))


@triton.jit
def operand_positions(R: tl.constexpr, J: tl.constexpr, WARPS: tl.constexpr):
    """Return the row and the period of each number that a program decodes for ``as_operand``: [R * J] each.

    Threads take the numbers in turn. A thread then gets the rows and columns that it holds as left operand of ``mma``
    and ``wgmma``: of 16 rows, a warp's thread has two, and of 32 columns in ``operand_columns`` order one period.
    """
    number = tl.arange(0, R * J)
    REPEATS: tl.constexpr = R // (16 * WARPS)
    half = number // (32 * WARPS) % 2
    repeat = number // (64 * WARPS) % REPEATS
    row = number // 4 % 8 + half * 8 + number // 32 % WARPS * 16 + repeat * (16 * WARPS)
    period = number % 4 + number // (64 * WARPS * REPEATS) * 4
    return row, period


@triton.jit
def as_operand(values: Tile, R: tl.constexpr, J: tl.constexpr, WARPS: tl.constexpr):
    """Return ``period_values`` [R * J, 2, 2, 2] at ``operand_positions`` as rows of weights: [R, 8 J].

    Columns are in the order of ``operand_columns``.
    """
    REPEATS: tl.constexpr = R // (16 * WARPS)
    split = tl.reshape(values, (J // 4, REPEATS, 2, WARPS, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (1, 3, 2, 4, 0, 8, 7, 5, 6)), (R, 8 * J))


@triton.jit
def operand_columns(position: Tile):
    """Return the column of a matrix at each position of an operand.

    The order is that of the left operand of ``mma``: a thread of four has columns 2 j, 2 j + 1, 2 j + 8, 2 j + 9 of
    sixteen. Of 32 positions, thread j gets the period j.
    """
    thread = (position >> 1) & 3
    number = (position & 1) | ((position >> 3) & 3) << 1
    return (position & ~31) | thread << 3 | number


@triton.jit
def decode_block(
    words: Pointer,
    row: Tile,
    first_column: Scalar,
    columns: Scalar,
    eighths: Scalar,
    STATE_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load the values of rows and columns of one matrix in units of VALUE_UNIT: [R, COLUMNS] float32.

    Args:
        words: the matrix's first word
        row: [R] rows of the matrix
        first_column: 8 divides it
        columns: columns of the matrix; values of columns past them are arbitrary
        eighths: width in eighths of a bit
    """
    period = first_column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    inside = period < columns // 8
    last, middle, first, shift = period_words((row & 15)[:, None] * 2 + (period & 1), eighths)
    tile = words + (((row >> 4) * (columns // 16)).to(tl.int64)[:, None] + (period >> 1)) * eighths
    last_word = tl.load(tile + last, mask=inside, other=0)
    middle_word = tl.load(tile + middle, mask=inside, other=0)
    first_word = tl.load(tile + first, mask=inside & reaches_first_word(eighths, STATE_BITS), other=0)
    values = period_values(last_word, middle_word, first_word, shift, eighths, STATE_BITS)
    return tl.reshape(tl.permute(values, (0, 1, 4, 3, 2)), (row.shape[0], COLUMNS))
