"""Rows of a packed matrix times a few columns of activations, for the kernels of ``decode_kernels``.

Legend: G group size, NG groups of a row, n bytes of a plane in a group, J n rounded up to a power of two from
16, S groups taken at once, M rows, N columns.

The tensor cores multiply codes, group by group, and for offsets once more ones: a group's sum of x then costs
no reduction and lies where it is needed. Sums are float32. Does not know how a byte becomes floats (``fields``).
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
from gemq.quant.grid_kernel import decode_offset, decode_scale


@triton.constexpr_function
def tile_bytes(plane_bytes):
    return max(16, triton.next_power_of_2(plane_bytes))


@triton.jit
def _dot(a, x, d, KIND: tl.constexpr):
    """d + a x for a [S, M, J] operand and activations x [S, J, N] in their own dtype."""
    if KIND == SPLIT:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        d = tl.dot(a, low, d)
        d = tl.dot(a, middle, d)
        return tl.dot(a, high, d)
    else:
        return tl.dot(a, x.to(a.dtype), d, input_precision="ieee")


@triton.constexpr_function
def group_bytes(levels, G):
    """Bytes of a group's codes."""
    if levels == 3:
        return -(-G // 5)
    return G * {2: 1, 4: 2, 8: 3, 16: 4, 256: 8}[int(levels)] // 8


@triton.constexpr_function
def window(levels, G, NG):
    """Alignment of the windows of J bytes in which ternary groups are read, 0 for none.

    26 bytes start anywhere even. A window of 32 that starts at a multiple of 8 has them all, and the same place in
    every row if rows are a multiple of 8 bytes. It must end with the last group at the latest.
    """
    n = int(group_bytes(levels, G))
    for align in (8, 4):
        if levels == 3 and NG * n % align == 0 and n + align - math.gcd(n, align) == tile_bytes(n):
            return align
    return 0


@triton.jit
def _group_dots(
    codes,  # [1] pointer to the matrix
    at,  # [S, M] which group of the matrix
    group,  # [S] which group of the row
    x,  # [N] pointers to the first element of each column
    x_mask,  # [S, N]
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
):
    """Per group: codes times x, and sums of x (every row the same). Both [S, M, N] float32."""
    BYTES: tl.constexpr = group_bytes(LEVELS, G)
    STEP: tl.constexpr = G // 4 if LEVELS == 8 else BYTES  # columns between the fields of a byte
    J: tl.constexpr = tile_bytes(STEP)
    ALIGN: tl.constexpr = window(LEVELS, G, NG)
    S: tl.constexpr = at.shape[0]
    M: tl.constexpr = at.shape[1]
    N: tl.constexpr = x.shape[0]
    j = tl.arange(0, J)
    if ALIGN > 0:
        first = (at * BYTES) // ALIGN * ALIGN
        w = tl.load(codes + first[:, :, None] + j[None, None, :])
        column = j[None, :] - (group * BYTES % ALIGN)[:, None]
        inside = (column >= 0) & (column < BYTES)
    else:
        byte = codes + (at * BYTES)[:, :, None]
        column = j + tl.zeros_like(group)[:, None]
        inside = column < STEP
        if J == STEP:
            w = tl.load(byte + j[None, None, :])
        else:
            w = tl.load(byte + j[None, None, :], mask=(j < STEP)[None, None, :], other=0)
    if LEVELS == 3:
        fields = ternary_fields(w, KIND)
    elif LEVELS == 8:
        UPPER: tl.constexpr = G // 8
        upper = tl.load(byte + (STEP + j % UPPER)[None, None, :])
        # A load that never happens: only of loads does Triton convert the layout before, not after, they become floats.
        never = tl.broadcast_to((at < 0)[:, :, None], w.shape)
        half = (j // UPPER).to(tl.uint8)[None, None, :]
        if UPPER < 4:  # groups of 16: the half changes within a word, and the assembly takes one shift for all of it
            upper = upper >> half
            half = tl.zeros_like(half)
        half = tl.load(byte + j[None, None, :], mask=never, other=half)
        fields = three_bit_fields(w, upper, half, KIND)
    elif LEVELS == 256:
        lower, _ = plane_fields(w, 4, KIND, lower_byte(KIND), 1)
        _, upper = plane_fields(w, 4, KIND, upper_byte(KIND), 16)
        fields = (lower, upper)
    else:
        fields = plane_fields(w, 4 if LEVELS == 16 else LEVELS // 2, KIND, lower_byte(KIND), 1)
    ones = tl.full(w.shape, 1.0, float_type(KIND))
    d = tl.zeros([S, M, N], tl.float32)
    sums = tl.zeros([S, M, N], tl.float32)
    x_group = x[None, None, :] + (group[:, None] * G + column)[:, :, None]
    for i in tl.static_range(len(fields)):
        mask = x_mask[:, None, :]
        if J != STEP:
            mask = mask & inside[:, :, None]
        if (i + 1) * STEP > G and LEVELS != 256:
            mask = mask & (column < G - i * STEP)[:, :, None]
        v = tl.load(x_group + (0 if LEVELS == 256 else i * STEP), mask=mask, other=0.0)
        d = _dot(fields[i], v, d, KIND)
        if LEVELS != 256 or i == 0:
            sums = _dot(ones, v, sums, KIND)
    return d, sums


@triton.jit
def rows_times_columns(
    codes,  # pointers to the matrix
    scales,
    offsets,
    row,  # [M] int32, below the matrix' rows
    x,  # [N] pointers to the first element of each column
    x_mask,  # [N]
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    S: tl.constexpr,
):
    """[M, N] float32: rows of one packed matrix times the columns."""
    FACTOR: tl.constexpr = factor(LEVELS, KIND)
    BIAS: tl.constexpr = bias(LEVELS, KIND)
    s = tl.arange(0, S)
    total = tl.zeros([S, row.shape[0], x.shape[0]], tl.float32)
    next_at = row[None, :] * NG + tl.minimum(s, NG - 1)[:, None]
    next_scale, next_offset = tl.load(scales + next_at), tl.load(offsets + next_at)
    for g in tl.range(0, NG, S, num_stages=1):  # asynchronous copies were slower
        group = g + s
        mask = x_mask[None, :] & (group < NG)[:, None]
        if NG % S != 0:  # beyond the last group: its bytes times x = 0
            group = tl.minimum(group, NG - 1)
        at = row[None, :] * NG + group[:, None]
        scale = decode_scale(next_scale)
        offset = decode_offset(next_offset, scale, LEVELS - 1.0)
        if NG > S:  # an iteration ahead, for these are waited for last
            next_at = row[None, :] * NG + tl.minimum(group + S, NG - 1)[:, None]
            next_scale, next_offset = tl.load(scales + next_at), tl.load(offsets + next_at)
        d, sums = _group_dots(codes, at, group, x, mask, LEVELS, KIND, G, NG)
        total += (scale * FACTOR)[:, :, None] * d
        total += (offset - scale * (FACTOR * BIAS))[:, :, None] * sums
    return tl.sum(total, 0)


@triton.jit
def any_width(
    levels,
    codes,
    scales,
    offsets,
    row,
    x,
    x_mask,
    WIDTHS: tl.constexpr,  # tuple of the levels that may occur
    KIND: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    S: tl.constexpr,
):
    """``rows_times_columns`` for the width that ``levels`` names: one branch each."""
    y = tl.zeros([row.shape[0], x.shape[0]], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if levels == WIDTHS[i]:
            y = rows_times_columns(codes, scales, offsets, row, x, x_mask, WIDTHS[i], KIND, G, NG, S)
    return y
