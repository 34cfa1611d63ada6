"""Tiles of weights in registers from packed codes (Triton device functions).

A code's bits are moved to the top of a float32 mantissa, below an exponent of 1.0. The float then reads
1 + code / levels, exactly, and one multiply-add with constants of the group gives the weight. This avoids integer
conversions, which GPUs execute at a sixteenth of the rate. Codes are read as 32-bit words where a group's planes allow.
The layout is that of ``docs/checkpoint-format.md``.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from gemq.kernels.packed_layout import code_bits, group_bytes
from gemq.kernels.triton_types import Pointer, Scalar, Tile

ONE_BITS = 0x3F800000
"""Bits of float32 1.0. Kernels take it as an argument: a value known only at run time stays in a register, and one
instruction instead of two combines it with the code's bits."""

ALL_LEVELS = (2, 3, 4, 8, 16, 256)
"""Levels of the widths. Kernels are compiled for a set of widths, given as a bit mask over this tuple."""

NUM_WIDTHS = tl.constexpr(len(ALL_LEVELS))


def levels_mask(levels: Iterable[int]) -> int:
    """Return the set of widths to compile for: the four common ones, or all. This keeps compilations few."""
    common = ALL_LEVELS[:4]
    if set(levels) <= set(common):
        return sum(width_bit(value) for value in common)
    return 2 ** len(ALL_LEVELS) - 1


def width_bit(levels: int) -> int:
    """Return the set that contains one width only."""
    return 1 << ALL_LEVELS.index(levels)


@triton.constexpr_function
def levels_at(i: int):
    """Return the levels of bit ``i`` of a set of widths."""
    return ALL_LEVELS[i]


@triton.constexpr_function
def only_levels(widths: int):
    """Return the levels of a set's only width."""
    return ALL_LEVELS[widths.bit_length() - 1]


@triton.jit
def _move_to_top(words: Tile, shift: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """Move BITS bits from position ``shift`` to position TOP and clear all other bits."""
    if shift > TOP:  # noqa: SIM108 - the compiler chooses the branch
        moved = words >> (shift - TOP)
    else:
        moved = words << (TOP - shift)
    return moved & (((1 << BITS) - 1) << TOP)


@triton.jit
def _planes(
    words: Tile,
    byte: tl.constexpr,
    field: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
):
    """[R, J] words -> [R, COUNT * J]: fields ``field`` ... ``field + COUNT - 1`` of one byte, concatenated."""
    if COUNT == 1:
        return _move_to_top(words, 8 * byte + field * BITS, BITS, TOP)
    else:
        left = _planes(words, byte, field, COUNT // 2, BITS, TOP)
        right = _planes(words, byte, field + COUNT // 2, COUNT // 2, BITS, TOP)
        pair = tl.permute(tl.join(left, right), (0, 2, 1))
        return tl.reshape(pair, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _interleave(a: Tile, b: Tile):
    """[R, J], [R, J] -> [R, 2 J]: a0 b0 a1 b1 ..."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _load_planes(
    rows: Pointer,
    mask: Tile,
    START: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load the codes of columns START ... START + BLOCK of a group, moved to bit TOP: [R, BLOCK] int32.

    Args:
        rows: [R] pointers to the planes of each row's group
        mask: [R]
        ALIGNED: whether groups start at multiples of 4 bytes
    """
    PLANE: tl.constexpr = GROUP * BITS // 8  # bytes of a plane, and columns that share a field
    USED: tl.constexpr = PLANE if PLANE < BLOCK else BLOCK  # bytes of the plane that this block reads
    COUNT: tl.constexpr = BLOCK // USED
    if ALIGNED and USED % 4 == 0:
        word_pointers = (rows + START % PLANE).to(tl.pointer_type(tl.int32))
        words = tl.load(word_pointers[:, None] + tl.arange(0, USED // 4)[None, :], mask=mask[:, None], other=0)
        # Interleaving bytes last makes neighboring columns neighboring registers, which pair up without moves.
        even = _interleave(
            _planes(words, 0, START // PLANE, COUNT, BITS, TOP), _planes(words, 2, START // PLANE, COUNT, BITS, TOP)
        )
        odd = _interleave(
            _planes(words, 1, START // PLANE, COUNT, BITS, TOP), _planes(words, 3, START // PLANE, COUNT, BITS, TOP)
        )
        return _interleave(even, odd)
    else:
        words = tl.load((rows + START % PLANE)[:, None] + tl.arange(0, USED)[None, :], mask=mask[:, None], other=0)
        return _planes(words.to(tl.int32), 0, START // PLANE, COUNT, BITS, TOP)


@triton.jit
def _load_ternary(rows: Pointer, mask: Tile, START: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """As _load_planes, for five base-3 digits in a byte. Each column loads its own byte, most of them from L1.

    With u = byte / 3^(i + 1) in 21 fractional bits, the integer part of 3 * (u mod 1) is digit i. This is exact for
    bytes 0 ... 242.
    """
    GROUP_BYTES: tl.constexpr = (GROUP + 4) // 5
    column = START + tl.arange(0, BLOCK)
    byte = tl.load(rows[:, None] + (column % GROUP_BYTES)[None, :], mask=mask[:, None], other=0).to(tl.int32)
    i = column // GROUP_BYTES
    third = tl.where(i == 0, 699051, tl.where(i == 1, 233017, tl.where(i == 2, 77673, tl.where(i == 3, 25891, 8631))))
    return ((byte * third[None, :]) & 0x1FFFFF) * 3 & (3 << 21)


@triton.jit
def load_weights(
    rows: Pointer,
    mask: Tile,
    scale: Tile,
    offset: Tile,
    one_bits: Scalar,
    START: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load the weights of columns START ... START + BLOCK of one group of each row: [R, BLOCK] in DTYPE.

    Args:
        rows: [R] pointers to uint8, the group's first byte
        mask: [R]
        scale: [R] float32
        offset: [R] float32
        one_bits: ONE_BITS
    """
    BITS: tl.constexpr = code_bits(LEVELS)
    ALIGNED: tl.constexpr = group_bytes(LEVELS, GROUP) % 4 == 0  # false for 16 columns at 3 bits: 6 bytes
    if LEVELS == 3:
        bits = _load_ternary(rows, mask, START, GROUP, BLOCK) ^ one_bits
    elif LEVELS == 8:
        # With ^ instead of |, the compiler keeps the order of operations: two for each code instead of three.
        bits = _load_planes(rows, mask, START, 2, 20, GROUP, BLOCK, ALIGNED) ^ one_bits
        bits |= _load_planes(rows + GROUP // 4, mask, START, 1, 22, GROUP, BLOCK, ALIGNED)
    else:
        bits = _load_planes(rows, mask, START, BITS, 23 - BITS, GROUP, BLOCK, ALIGNED) ^ one_bits
    value = bits.to(tl.float32, bitcast=True)
    step = scale * (1 << BITS)
    if tl.float32 == DTYPE:  # exact, then rounded once as in the reference
        return (value - 1.0) * step[:, None] + offset[:, None]
    else:  # rounding the constant costs at most 2^-16 of a step
        return (value * step[:, None] + (offset - step)[:, None]).to(DTYPE)
