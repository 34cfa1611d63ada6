"""Values of trellis codes from the words of a ring (Triton device functions).

Eight neighboring weights, a period, add ``eighths`` bits to the ring. Period p of a tile is half p % 2 of row p // 2.
Its last state ends where the window of the period ends, and the other states end ``end_distance`` bits earlier. All
states lie in the last 32 bits of the window if the width is at most ``narrow_eighths``, and in its 64 bits always. So a
period takes two or three words, one or two funnel shifts, and one shift per weight, whatever the width is: ``eighths``
is a number that the compiler does not know.

A value is a sum of four bytes. Added to the bit pattern of a suitable float, the sum becomes that float's mantissa, so
no integer is converted.

The inline assembly is NVIDIA's. PORTABLE uses ordinary arithmetic, for the interpreter and other GPUs.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.triton_types import Scalar, Tile, Tiles
from gemq.quant import trellis
from gemq.quant.widths import MAX_EIGHTHS

MEAN = tl.constexpr(float(trellis.BYTES_MEAN))
VALUE_UNIT = tl.constexpr(1.0 / trellis.BYTES_DEVIATION)
"""A value is (sum of bytes - MEAN) * VALUE_UNIT."""

_MULTIPLIER = tl.constexpr(trellis.MULTIPLIER)


@triton.constexpr_function
def narrow_eighths(state_bits: int):
    """Return the largest width whose periods take a single window of 32 bits."""
    eighths = range(1, MAX_EIGHTHS + 1)
    return max(e for e in eighths if e - e // trellis.PERIOD + int(state_bits) <= trellis.WORD_BITS)


@triton.jit
def funnel(high: Tile, low: Tile, shift: Tile, PORTABLE: tl.constexpr):
    """Return the lowest 32 bits of the 64 bits ``high``, ``low`` (uint32) after a shift by 0 to 31 to the right."""
    if PORTABLE:
        joined = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        return (joined >> shift.to(tl.uint64)).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def period_words(period: Tile, eighths: Scalar):
    """Return where the window of a period ends.

    Args:
        period: 0 ... 31, int32
        eighths: width, int32

    Returns:
        The last word of the window, the two words before it in the ring, and the bits of the last word that follow the
        window. All int32.
    """
    last_bit = (period + 1) * eighths - 1
    word = last_bit >> 5
    previous = tl.where(word > 0, word, eighths) - 1
    before_previous = tl.where(previous > 0, previous, eighths) - 1
    return word, previous, before_previous, 31 - (last_bit & 31)


@triton.jit
def end_distance(i: tl.constexpr, eighths: Scalar):
    """Return how many bits before the end of its window the state of weight ``i`` of a period ends."""
    return eighths - (((i + 1) * eighths) >> 3)


@triton.jit
def state(high: Tile, low: Tile, distance: Scalar, STATE_BITS: tl.constexpr, PORTABLE: tl.constexpr):
    """Return the states (uint32) that end ``distance`` bits before the ends of windows of 64 bits."""
    shifted = funnel(high, low, tl.broadcast_to(distance, low.shape), PORTABLE)
    return shifted & ((1 << STATE_BITS) - 1)


@triton.constexpr_function
def sum_asm():
    """Return PTX that adds the bytes of $1 to the bit pattern of 2^23."""
    return "dp4a.u32.u32 $0, $1, 0x01010101, 0x4b000000;"


@triton.jit
def byte_total(product: Tile):
    """Return the sum of bytes, int32."""
    total = (product & 255) + ((product >> 8) & 255) + ((product >> 16) & 255) + (product >> 24)
    return total.to(tl.int32)


@triton.jit
def centered_sum(states: Tile, PORTABLE: tl.constexpr):
    """Return the sum of bytes minus MEAN as float32: an integer, and the value in units of VALUE_UNIT."""
    product = states * _MULTIPLIER
    if PORTABLE:
        return byte_total(product).to(tl.float32) - MEAN
    else:
        # 2^23 plus an integer has the integer in its mantissa
        total = tl.inline_asm_elementwise(sum_asm(), "=r,r", [product], tl.int32, is_pure=True, pack=1)
        return total.to(tl.float32, bitcast=True) - (8388608.0 + MEAN)


@triton.jit
def state_shifts(eighths: Scalar, STATE_BITS: tl.constexpr, NARROW: tl.constexpr, MULTIPLIED: tl.constexpr):
    """Return the numbers with which ``period_products`` shifts the first seven weights of a period, as uint32.

    They are the distances of their states from the ends of ``half_windows``, or for the first MULTIPLIED weights the
    powers of two that move the states to the upper ends. The last weight's state ends with its window.
    """
    shifts = ()
    for i in tl.static_range(7):
        distance = end_distance(i, eighths)
        if not NARROW and i < 4:
            distance -= end_distance(3, eighths)
        if i < MULTIPLIED:
            # The compilers make a product with 1 << n a shift again. They do not recognize a power from its exponent.
            exponent = (127 + 32 - STATE_BITS) - distance
            shift = (exponent << 23).to(tl.float32, bitcast=True).to(tl.uint32)
        else:
            shift = distance.to(tl.uint32)
        shifts = shifts + (shift,)  # noqa: RUF005
    return shifts


@triton.jit
def half_windows(
    last: Tile, middle: Tile, first: Tile, shift: Tile, eighths: Scalar, NARROW: tl.constexpr, PORTABLE: tl.constexpr
):
    """Return the 32 bits with the states of the first four weights of a period, and those of the other four.

    Args:
        last: last words of the windows of periods, uint32
        middle: the words before them
        first: the words before those, any value if NARROW
        shift: from ``period_words``
        eighths: width in eighths of a bit
        NARROW: whether the width is at most ``narrow_eighths``; both results are then the same
    """
    low = funnel(middle, last, shift, PORTABLE)
    if NARROW:
        return low, low
    else:
        high = funnel(first, middle, shift, PORTABLE)
        return funnel(high, low, tl.broadcast_to(end_distance(3, eighths), low.shape), PORTABLE), low


@triton.jit
def period_products(windows: Tiles, shifts: Tiles, STATE_BITS: tl.constexpr, MULTIPLIED: tl.constexpr):
    """Return the eight products of a period, whose bytes add up to the values plus MEAN: a tuple of uint32.

    GPUs shift and mask in another unit than they multiply in. A product with a power of two and a shift to the right
    replace a shift and a mask, and so balance the load of the units.

    Args:
        windows: from ``half_windows``
        shifts: from ``state_shifts``
        MULTIPLIED: weights whose shift is a power of two, 0 to 7
    """
    products = ()
    for i in tl.static_range(8):
        window = windows[i // 4]
        if i < MULTIPLIED:
            states = (window * shifts[i]) >> (32 - STATE_BITS)
        elif i < 7:
            states = (window >> shifts[i]) & ((1 << STATE_BITS) - 1)
        else:
            states = window & ((1 << STATE_BITS) - 1)
        products = products + (states * _MULTIPLIER,)  # noqa: RUF005
    return products
