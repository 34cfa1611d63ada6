"""A vector of 16-bit floats in fixed point, in words as ``dots`` takes them (Triton device functions).

Legend: G group size, NG groups of a row, S groups taken at once, L lanes: threads side by side that share S groups, an
equal part of a group each, W words of four bytes that a lane has of a plane.

Each group gets 16 bits by its largest value: the error is 2^-16 of that, while the floats came with 2^-9 of each
value. All threads of a program turn the vector into words together and hand them to the lanes through shared memory,
once. Does not know what the words are multiplied with.
"""

# mypy: disable-error-code="assignment,has-type"
from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.decode.dots import fields_of, split
from gemq.kernels.decode.tiles import window

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float plus this has the nearest integer in its low bits."""

THIRD = tl.constexpr(26)
"""Columns between the digits of a ternary byte."""


@triton.constexpr_function
def plane_words(levels, G):
    """Words of a group's plane (3 bits: its low one; ternary: the window that holds the group)."""
    return 8 if levels == 3 else G // (4 * fields_of(levels))


@triton.constexpr_function
def words_at_once(levels, G, words):
    """Of ``words`` of codes that a lane has, those that one load brings: windows of ternary start at multiples of 8
    bytes only, and the high plane of 3 bits has half as many.
    """
    return int(min(words, {3: 2, 8: max(1, G // 32)}.get(int(levels), 4), 4))


@triton.constexpr_function
def lanes_of_group(levels, G, columns):
    """Lanes that share a group if a lane is to have ``columns`` of it. A ternary group is one lane's."""
    return 1 if levels == 3 else int(min(max(1, G // columns), plane_words(levels, G)))


@triton.constexpr_function
def groups_at_once(levels, G, NG, columns):
    """S: what a warp takes of a row at most."""
    return int(min(32 // lanes_of_group(levels, G, columns), triton.next_power_of_2(NG)))


@triton.constexpr_function
def lanes_of(levels, G, NG, columns):
    """L."""
    return int(groups_at_once(levels, G, NG, columns) * lanes_of_group(levels, G, columns))


@triton.constexpr_function
def covered(levels, G, NG):
    """Whether words of a plane start at multiples of four bytes and four columns share a word's place."""
    if levels == 3:
        return G == 128 and window(levels, G, NG) == 8
    return G % (32 if levels in (2, 8) else 16) == 0


@triton.jit
def _quarter(v, k: tl.constexpr, TYPE: tl.constexpr):
    """Number k of the four floats in v, int64, as float32."""
    return (v >> (16 * k)).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def _pack(a, b, c, d, PLAIN: tl.constexpr):
    """Four tiles of float32, integers within 16 bits once MAGIC has been added -> words of high and of low bytes."""
    if PLAIN:
        a, b = (a - MAGIC).to(tl.int32), (b - MAGIC).to(tl.int32)
        c, d = (c - MAGIC).to(tl.int32), (d - MAGIC).to(tl.int32)
        low = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | ((d & 255) << 24)
        high = ((a >> 8) & 255) | (((b >> 8) & 255) << 8) | (((c >> 8) & 255) << 16) | (((d >> 8) & 255) << 24)
        return high, low
    else:
        return tl.inline_asm_elementwise(
            "{\n.reg .b32 s, t;\nprmt.b32 s, $2, $3, 0x5410;\nprmt.b32 t, $4, $5, 0x5410;\n"
            "prmt.b32 $0, s, t, 0x7531;\nprmt.b32 $1, s, t, 0x6420;\n}",
            "=&r,=r,r,r,r,r",
            (a, b, c, d),
            dtype=(tl.int32, tl.int32),
            is_pure=False,  # or Triton would compute it again in each warp to save a trip through shared memory
            pack=1,
        )


@triton.jit
def _two_columns_later(words, after, PLAIN: tl.constexpr):
    """Words [L, 2] -> words that start two columns later; ``after`` are the two behind."""
    if PLAIN:
        following = tl.join(tl.split(words)[1], tl.split(after)[0])
        return ((words >> 16) & 0xFFFF) | (following << 16)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5432;\nprmt.b32 $1, $3, $4, 0x5432;",
            "=&r,=&r,r,r,r,r",
            (words, after),
            tl.int32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def fixed_point(
    x,
    first,
    end,
    FULL: tl.constexpr,  # no group is at ``end`` or beyond
    LEVELS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Groups ``first`` to ``first + S`` of x, zero from ``end`` on -> words of high and of low bytes for ``dots.dot``,
    tuples of int32 [L, 1, WIDE]; their scale and the lane's part of the sum of x, float32 [L, 1].

    Words follow a lane's columns field by field. Of ternary come those that start two columns later, too.
    """
    SHARING: tl.constexpr = L // S
    s, c = tl.arange(0, S), tl.arange(0, G // 4)
    group = (first + s)[:, None]
    fours = x.to(tl.pointer_type(tl.int64)) + group * (G // 4) + c[None, :]
    v = tl.load(fours) if FULL else tl.load(fours, mask=group < end, other=0)
    type: tl.constexpr = x.dtype.element_ty
    x0, x1, x2, x3 = _quarter(v, 0, type), _quarter(v, 1, type), _quarter(v, 2, type), _quarter(v, 3, type)
    largest = tl.max(tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3))), 1)
    largest = tl.maximum(largest, 1e-30)
    total = tl.sum((x0 + x1) + (x2 + x3), 1)
    # Combined activations of ternary must fit too: x_i - 3 x_(i-1).
    LIMIT: tl.constexpr = 8191.0 if LEVELS == 3 else 32767.0
    per_one = (LIMIT / largest)[:, None]
    x0, x1, x2, x3 = x0 * per_one + MAGIC, x1 * per_one + MAGIC, x2 * per_one + MAGIC, x3 * per_one + MAGIC
    if LEVELS == 3:
        pairs = x.to(tl.pointer_type(tl.int32)) + group * (G // 2) + (2 * c[None, :] - THIRD // 2)
        inside = (4 * c[None, :] >= THIRD) & (group < end)
        inside_too = (4 * c[None, :] + 2 >= THIRD) & (group < end)
        before = tl.load(pairs, mask=inside, other=0).to(tl.int64)
        after = tl.load(pairs + 1, mask=inside_too, other=0).to(tl.int64)
        x0 -= 3.0 * (_quarter(before, 0, type) * per_one + MAGIC - MAGIC)
        x1 -= 3.0 * (_quarter(before, 1, type) * per_one + MAGIC - MAGIC)
        x2 -= 3.0 * (_quarter(after, 0, type) * per_one + MAGIC - MAGIC)
        x3 -= 3.0 * (_quarter(after, 1, type) * per_one + MAGIC - MAGIC)
    high, low = _pack(x0, x1, x2, x3, PLAIN)
    # Both in one: a lane's words come from other threads through shared memory, and that costs by the trip.
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    if LEVELS != 3:
        FIELDS: tl.constexpr = fields_of(LEVELS)
        both = tl.permute(tl.reshape(both, [S, FIELDS, SHARING, G // (4 * FIELDS * SHARING)]), [0, 2, 1, 3])
        both = tl.reshape(both, [L, G // (4 * SHARING)])
    words = split(both, WIDE)
    highs, lows = (), ()
    for i in tl.static_range(len(words)):
        highs = highs + ((words[i] >> 32).to(tl.int32),)  # noqa: RUF005 - Triton cannot unpack
        lows = lows + (words[i].to(tl.int32),)  # noqa: RUF005
    if LEVELS == 3:
        for i in tl.static_range(len(words)):
            highs = highs + (_two_columns_later(highs[i], highs[min(i + 1, 15)], PLAIN),)  # noqa: RUF005
            lows = lows + (_two_columns_later(lows[i], lows[min(i + 1, 15)], PLAIN),)  # noqa: RUF005
    high, low = (), ()
    for i in tl.static_range(len(highs)):
        high = high + (highs[i][:, None, :],)  # noqa: RUF005
        low = low + (lows[i][:, None, :],)  # noqa: RUF005
    scale = tl.broadcast_to((largest * (1.0 / LIMIT))[:, None], [S, SHARING])
    part = tl.broadcast_to((total * (1.0 / SHARING))[:, None], [S, SHARING])
    return high, low, tl.reshape(scale, [L])[:, None], tl.reshape(part, [L])[:, None]
