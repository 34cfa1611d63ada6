"""Rows of a packed matrix times a few columns of activations on the tensor cores, for the kernels of ``tensor_core``.

Legend: S groups of a step, M rows, N columns (tokens), J bytes of a tile: a plane's bytes in a group, rounded up to a
power of two from 16.

The tensor cores multiply codes group by group. For the offsets, they also multiply ones, so that a group's sum of x
needs no reduction and has the same layout as the products. Sums are float32. ``bit_fields`` turns bytes into floats.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from gemq.kernels.decode.bit_fields import (
    SPLIT,
    bias,
    factor,
    float_type,
    lower_byte,
    plane_fields,
    ternary_fields,
    three_bit_fields,
    upper_byte,
)
from gemq.kernels.packed_layout import group_bytes
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant.grid_kernel import decode_offset, decode_scale


@triton.constexpr_function
def tile_bytes(plane_bytes: int):
    """Return the bytes of a tile for a plane."""
    return max(16, triton.next_power_of_2(plane_bytes))


@triton.constexpr_function
def window_alignment(levels: int, group_size: int, num_groups: int):
    """Return the alignment of the windows in which ternary groups are read, 0 for no windows.

    The 26 bytes of a group start at any even byte. A window of 32 bytes that starts at a multiple of 8 contains them.
    Windows are at the same position in every row if rows are a multiple of 8 bytes. The last window must not extend
    past the last group.
    """
    length = int(group_bytes(levels, group_size))
    for alignment in (8, 4):
        is_aligned = num_groups * length % alignment == 0
        fits = length + alignment - math.gcd(length, alignment) == tile_bytes(length)
        if levels == 3 and is_aligned and fits:
            return alignment
    return 0


@triton.jit
def _dot(a: Tile, x: Tile, acc: Tile, OPERAND: tl.constexpr):
    """Return acc + a x for an operand a [S, M, J] and activations x [S, J, N] in their own dtype."""
    if OPERAND == SPLIT:
        high = x.to(tl.bfloat16)
        remainder = x - high.to(tl.float32)
        middle = remainder.to(tl.bfloat16)
        low = (remainder - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a, low, acc)
        acc = tl.dot(a, middle, acc)
        return tl.dot(a, high, acc)
    else:
        return tl.dot(a, x.to(a.dtype), acc, input_precision="ieee")


@triton.jit
def _group_dots(
    codes: Pointer,  # the matrix
    matrix_group: Tile,  # [S, M] groups, counted over the matrix
    group: Tile,  # [S] groups, counted over the row
    x: Pointer,  # [N] the first element of each column
    x_mask: Tile,  # [S, N]
    LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
):
    """Return, for each group, codes times x, and sums of x (the same in every row). Both [S, M, N] float32."""
    GROUP_BYTES: tl.constexpr = group_bytes(LEVELS, GROUP_SIZE)
    FIELD_STRIDE: tl.constexpr = GROUP_SIZE // 4 if LEVELS == 8 else GROUP_BYTES  # columns between fields of a byte
    TILE_BYTES: tl.constexpr = tile_bytes(FIELD_STRIDE)
    ALIGNMENT: tl.constexpr = window_alignment(LEVELS, GROUP_SIZE, NUM_GROUPS)
    S: tl.constexpr = matrix_group.shape[0]
    M: tl.constexpr = matrix_group.shape[1]
    N: tl.constexpr = x.shape[0]
    j = tl.arange(0, TILE_BYTES)
    if ALIGNMENT > 0:
        window = (matrix_group * GROUP_BYTES) // ALIGNMENT * ALIGNMENT
        w = tl.load(codes + window[:, :, None] + j[None, None, :])
        column = j[None, :] - (group * GROUP_BYTES % ALIGNMENT)[:, None]
        inside = (column >= 0) & (column < GROUP_BYTES)
    else:
        group_start = codes + (matrix_group * GROUP_BYTES)[:, :, None]
        column = j + tl.zeros_like(group)[:, None]
        inside = column < FIELD_STRIDE
        if TILE_BYTES == FIELD_STRIDE:
            w = tl.load(group_start + j[None, None, :])
        else:
            w = tl.load(group_start + j[None, None, :], mask=(j < FIELD_STRIDE)[None, None, :], other=0)
    if LEVELS == 3:
        fields = ternary_fields(w, OPERAND)
    elif LEVELS == 8:
        UPPER: tl.constexpr = GROUP_SIZE // 8  # bytes of the high plane
        upper = tl.load(group_start + (FIELD_STRIDE + j % UPPER)[None, None, :])
        # This load never happens. Only for loads does Triton convert the layout before they become floats, not after.
        never = tl.broadcast_to((matrix_group < 0)[:, :, None], w.shape)
        half = (j // UPPER).to(tl.uint8)[None, None, :]
        if UPPER < 4:  # groups of 16: the half changes within a word, but the assembly takes one shift for a word
            upper = upper >> half
            half = tl.zeros_like(half)
        half = tl.load(group_start + j[None, None, :], mask=never, other=half)
        fields = three_bit_fields(w, upper, half, OPERAND)
    elif LEVELS == 256:
        lower, _ = plane_fields(w, 4, OPERAND, lower_byte(OPERAND), 1)
        _, upper = plane_fields(w, 4, OPERAND, upper_byte(OPERAND), 16)
        fields = (lower, upper)
    else:
        fields = plane_fields(w, 4 if LEVELS == 16 else LEVELS // 2, OPERAND, lower_byte(OPERAND), 1)
    ones = tl.full(w.shape, 1.0, float_type(OPERAND))
    products = tl.zeros([S, M, N], tl.float32)
    sums = tl.zeros([S, M, N], tl.float32)
    x_group = x[None, None, :] + (group[:, None] * GROUP_SIZE + column)[:, :, None]
    for i in tl.static_range(len(fields)):
        mask = x_mask[:, None, :]
        if TILE_BYTES != FIELD_STRIDE:
            mask = mask & inside[:, :, None]
        if (i + 1) * FIELD_STRIDE > GROUP_SIZE and LEVELS != 256:
            mask = mask & (column < GROUP_SIZE - i * FIELD_STRIDE)[:, :, None]
        v = tl.load(x_group + (0 if LEVELS == 256 else i * FIELD_STRIDE), mask=mask, other=0.0)
        products = _dot(fields[i], v, products, OPERAND)
        if LEVELS != 256 or i == 0:
            sums = _dot(ones, v, sums, OPERAND)
    return products, sums


@triton.jit
def rows_times_columns(
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    row: Tile,
    x: Pointer,
    x_mask: Tile,
    LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
):
    """Multiply rows of one packed matrix with the columns: [M, N] float32.

    Args:
        codes: the matrix's codes
        scales: the matrix's scales
        offsets: the matrix's offsets
        row: [M] int32, valid rows
        x: [N] pointers to the first element of each column
        x_mask: [N]
    """
    FACTOR: tl.constexpr = factor(LEVELS, OPERAND)
    BIAS: tl.constexpr = bias(LEVELS, OPERAND)
    s = tl.arange(0, STEP_GROUPS)
    total = tl.zeros([STEP_GROUPS, row.shape[0], x.shape[0]], tl.float32)
    next_group = row[None, :] * NUM_GROUPS + tl.minimum(s, NUM_GROUPS - 1)[:, None]
    next_scale, next_offset = tl.load(scales + next_group), tl.load(offsets + next_group)
    for g in tl.range(0, NUM_GROUPS, STEP_GROUPS, num_stages=1):  # asynchronous copies were slower
        group = g + s
        mask = x_mask[None, :] & (group < NUM_GROUPS)[:, None]
        if NUM_GROUPS % STEP_GROUPS != 0:  # past the last group: its bytes times x = 0
            group = tl.minimum(group, NUM_GROUPS - 1)
        matrix_group = row[None, :] * NUM_GROUPS + group[:, None]
        scale = decode_scale(next_scale)
        offset = decode_offset(next_offset, scale, LEVELS - 1.0)
        if NUM_GROUPS > STEP_GROUPS:  # loaded an iteration ahead, since these loads finish last
            next_group = row[None, :] * NUM_GROUPS + tl.minimum(group + STEP_GROUPS, NUM_GROUPS - 1)[:, None]
            next_scale, next_offset = tl.load(scales + next_group), tl.load(offsets + next_group)
        products, sums = _group_dots(codes, matrix_group, group, x, mask, LEVELS, OPERAND, GROUP_SIZE, NUM_GROUPS)
        total += (scale * FACTOR)[:, :, None] * products
        total += (offset - scale * (FACTOR * BIAS))[:, :, None] * sums
    return tl.sum(total, 0)


@triton.jit
def any_width(
    levels: Scalar,
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    row: Tile,
    x: Pointer,
    x_mask: Tile,
    COMPILED_LEVELS: tl.constexpr,  # tuple: levels of the widths to compile for
    OPERAND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
):
    """Run ``rows_times_columns`` for the width with ``levels``, in a branch for each width."""
    y = tl.zeros([row.shape[0], x.shape[0]], tl.float32)
    for i in tl.static_range(len(COMPILED_LEVELS)):
        if levels == COMPILED_LEVELS[i]:
            y = rows_times_columns(
                codes, scales, offsets, row, x, x_mask, COMPILED_LEVELS[i], OPERAND, GROUP_SIZE, NUM_GROUPS, STEP_GROUPS
            )
    return y
