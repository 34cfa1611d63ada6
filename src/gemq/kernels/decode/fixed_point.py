"""Conversion of a vector of 16-bit floats to fixed point, in words for ``dots`` (Triton device functions).

Legend: L lanes. A lane is a thread that computes a part of a row. Neighboring lanes share the STEP_GROUPS groups of a
step, and have an equal part of a group each.

Each group gets 16 bits, scaled by its largest value. The error is 2^-16 of that value, while the floats have an error
of 2^-9 of each value. All threads of a program convert the vector together and distribute the words to the lanes
through shared memory, once.
"""

# mypy: disable-error-code="assignment,has-type"
from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.decode.dots import fields_of, split
from gemq.kernels.decode.tiles import window_alignment
from gemq.kernels.triton_types import Pointer, Scalar, Tile

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23. A float plus this number has the nearest integer in its low bits."""

DIGIT_STRIDE = tl.constexpr(26)
"""Columns between the digits of a ternary byte."""


@triton.constexpr_function
def plane_words(levels: int, group_size: int):
    """Return the words of a group's plane: the low plane at 3 bits, the window with the group for ternary."""
    return 8 if levels == 3 else group_size // (4 * fields_of(levels))


@triton.constexpr_function
def words_per_load(levels: int, group_size: int, words: int):
    """Return how many of a lane's ``words`` of codes one load brings.

    Windows of ternary groups are aligned to 8 bytes only, and the high plane of 3 bits has half as many words.
    """
    limit = {3: 2, 8: max(1, group_size // 32)}.get(int(levels), 4)
    return int(min(words, limit, 4))


@triton.constexpr_function
def lanes_per_group(levels: int, group_size: int, columns_per_lane: int):
    """Return the lanes that share a group. A ternary group belongs to one lane."""
    return 1 if levels == 3 else int(min(max(1, group_size // columns_per_lane), plane_words(levels, group_size)))


@triton.constexpr_function
def groups_per_step(levels: int, group_size: int, num_groups: int, columns_per_lane: int):
    """Return the groups of a row that a warp computes in one step."""
    return int(min(32 // lanes_per_group(levels, group_size, columns_per_lane), triton.next_power_of_2(num_groups)))


@triton.constexpr_function
def num_lanes(levels: int, group_size: int, num_groups: int, columns_per_lane: int):
    """Return the lanes that share the groups of a step."""
    step_groups = groups_per_step(levels, group_size, num_groups, columns_per_lane)
    return int(step_groups * lanes_per_group(levels, group_size, columns_per_lane))


@triton.constexpr_function
def is_supported(levels: int, group_size: int, num_groups: int):
    """Whether a plane consists of aligned words of four bytes, and words of activations match them."""
    if levels == 3:
        return group_size == 128 and window_alignment(levels, group_size, num_groups) == 8
    return group_size % (32 if levels in (2, 8) else 16) == 0


@triton.jit
def _quarter(v: Tile, k: tl.constexpr, TYPE: tl.constexpr):
    """Return number k of the four 16-bit floats in v, int64, as float32."""
    return (v >> (16 * k)).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def _pack(a: Tile, b: Tile, c: Tile, d: Tile, PORTABLE: tl.constexpr):
    """Pack four tiles of 16-bit integers into words of their high bytes and words of their low bytes.

    The tiles are float32, integers to which MAGIC has been added.
    """
    if PORTABLE:
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
            is_pure=False,  # else Triton would recompute it in each warp to save a trip through shared memory
            pack=1,
        )


@triton.jit
def _two_columns_later(words: Tile, next_words: Tile, PORTABLE: tl.constexpr):
    """Return the words [L, 2] that start two columns after ``words`` [L, 2], which ``next_words`` follow."""
    if PORTABLE:
        following = tl.join(tl.split(words)[1], tl.split(next_words)[0])
        return ((words >> 16) & 0xFFFF) | (following << 16)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5432;\nprmt.b32 $1, $3, $4, 0x5432;",
            "=&r,=&r,r,r,r,r",
            (words, next_words),
            tl.int32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def fixed_point(
    x: Pointer,
    first_group: Scalar,
    end_group: Scalar,
    ALL_INSIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    PORTABLE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    LOAD_WORDS: tl.constexpr,
):
    """Convert groups ``first_group`` ... ``first_group + STEP_GROUPS`` of x. From ``end_group`` on, x counts as zero.

    Args:
        x: vector of 16-bit floats
        first_group: first group of the step
        end_group: first group after those of the program
        ALL_INSIDE: whether all steps end at ``end_group`` or before

    Returns:
        Words of high bytes and words of low bytes for ``dots.dot``, tuples of int32 [L, 1, LOAD_WORDS]; their scale and
        the lane's part of the sum of x, float32 [L, 1]. Words are in the order of a lane's columns, field by field. For
        ternary, the words that start two columns later follow.
    """
    LANES_PER_GROUP: tl.constexpr = LANES // STEP_GROUPS
    s, c = tl.arange(0, STEP_GROUPS), tl.arange(0, GROUP_SIZE // 4)
    group = (first_group + s)[:, None]
    fours = x.to(tl.pointer_type(tl.int64)) + group * (GROUP_SIZE // 4) + c[None, :]
    v = tl.load(fours) if ALL_INSIDE else tl.load(fours, mask=group < end_group, other=0)
    type: tl.constexpr = x.dtype.element_ty
    x0, x1, x2, x3 = _quarter(v, 0, type), _quarter(v, 1, type), _quarter(v, 2, type), _quarter(v, 3, type)
    largest = tl.max(tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3))), 1)
    largest = tl.maximum(largest, 1e-30)
    total = tl.sum((x0 + x1) + (x2 + x3), 1)
    # The combined activations of ternary codes must fit too: x_i - 3 x_(i-1).
    LIMIT: tl.constexpr = 8191.0 if LEVELS == 3 else 32767.0
    inverse_scale = (LIMIT / largest)[:, None]
    x0, x1 = x0 * inverse_scale + MAGIC, x1 * inverse_scale + MAGIC
    x2, x3 = x2 * inverse_scale + MAGIC, x3 * inverse_scale + MAGIC
    if LEVELS == 3:
        pairs = x.to(tl.pointer_type(tl.int32)) + group * (GROUP_SIZE // 2) + (2 * c[None, :] - DIGIT_STRIDE // 2)
        first_inside = (4 * c[None, :] >= DIGIT_STRIDE) & (group < end_group)
        second_inside = (4 * c[None, :] + 2 >= DIGIT_STRIDE) & (group < end_group)
        first_pair = tl.load(pairs, mask=first_inside, other=0).to(tl.int64)
        second_pair = tl.load(pairs + 1, mask=second_inside, other=0).to(tl.int64)
        x0 -= 3.0 * (_quarter(first_pair, 0, type) * inverse_scale + MAGIC - MAGIC)
        x1 -= 3.0 * (_quarter(first_pair, 1, type) * inverse_scale + MAGIC - MAGIC)
        x2 -= 3.0 * (_quarter(second_pair, 0, type) * inverse_scale + MAGIC - MAGIC)
        x3 -= 3.0 * (_quarter(second_pair, 1, type) * inverse_scale + MAGIC - MAGIC)
    high, low = _pack(x0, x1, x2, x3, PORTABLE)
    # High and low words in one number, since a lane gets them through shared memory, and each trip costs time.
    packed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    if LEVELS != 3:
        FIELDS: tl.constexpr = fields_of(LEVELS)
        LANE_WORDS: tl.constexpr = GROUP_SIZE // (4 * FIELDS * LANES_PER_GROUP)
        packed = tl.permute(tl.reshape(packed, [STEP_GROUPS, FIELDS, LANES_PER_GROUP, LANE_WORDS]), [0, 2, 1, 3])
        packed = tl.reshape(packed, [LANES, GROUP_SIZE // (4 * LANES_PER_GROUP)])
    words = split(packed, LOAD_WORDS)
    highs, lows = (), ()
    for i in tl.static_range(len(words)):
        highs = highs + ((words[i] >> 32).to(tl.int32),)  # noqa: RUF005 - Triton cannot unpack
        lows = lows + (words[i].to(tl.int32),)  # noqa: RUF005
    if LEVELS == 3:
        for i in tl.static_range(len(words)):
            highs = highs + (_two_columns_later(highs[i], highs[min(i + 1, 15)], PORTABLE),)  # noqa: RUF005
            lows = lows + (_two_columns_later(lows[i], lows[min(i + 1, 15)], PORTABLE),)  # noqa: RUF005
    high, low = (), ()
    for i in tl.static_range(len(highs)):
        high = high + (highs[i][:, None, :],)  # noqa: RUF005
        low = low + (lows[i][:, None, :],)  # noqa: RUF005
    scale = tl.broadcast_to((largest * (1.0 / LIMIT))[:, None], [STEP_GROUPS, LANES_PER_GROUP])
    lane_sum = tl.broadcast_to((total * (1.0 / LANES_PER_GROUP))[:, None], [STEP_GROUPS, LANES_PER_GROUP])
    return high, low, tl.reshape(scale, [LANES])[:, None], tl.reshape(lane_sum, [LANES])[:, None]
