"""Packed codes -> tiles of weights in registers, for Triton kernels that multiply whole tiles or write weights out.

A code's bits go to the top of a float32 mantissa and an exponent of 1.0 is put above them, so that the value is
1 + code / levels, exactly, and one multiply-add with group constants gives the weight: no integer conversion,
which GPUs do at a sixteenth of the rate. Codes are read as 32-bit words where a group's planes allow. Knows the
layout of ``docs/checkpoint-format.md``; knows nothing of matrix products, experts' routing or modules.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant.grid_kernel import decode_offset, decode_scale

ONE_BITS = 0x3F800000
"""float32 1.0. Handed to kernels as an argument: known at run time only, the compiler keeps it in a register and
needs one instruction instead of two to put it above the code's bits."""

ALL_LEVELS = (2, 3, 4, 8, 16, 256)
"""Levels of the widths. Kernels take the set that occurs as a bit mask over this tuple and compile only those."""

WIDTHS_TO_TRY = tl.constexpr(len(ALL_LEVELS))
BLOCK_COLUMNS = 128
"""Columns of a group that are unpacked at once, at most."""


def levels_mask(levels: Iterable[int]) -> int:
    """The set of widths to compile for: the four that experts mostly get, or all there are. Few compilations."""
    low = sum(width_bit(value) for value in ALL_LEVELS[:4])
    return low if set(levels) <= set(ALL_LEVELS[:4]) else 2 ** len(ALL_LEVELS) - 1


def width_bit(levels: int) -> int:
    """The set of one width."""
    return 1 << ALL_LEVELS.index(levels)


@triton.constexpr_function
def levels_at(i):
    return ALL_LEVELS[i]


@triton.constexpr_function
def only_levels(widths):
    """Levels of the width in a set of one."""
    return ALL_LEVELS[widths.bit_length() - 1]


@triton.constexpr_function
def code_bits(levels):
    """Bits that hold a code."""
    return (levels - 1).bit_length()


@triton.constexpr_function
def group_bytes(levels, group):
    """Bytes that the codes of one group take."""
    return (group + 4) // 5 if levels == 3 else group * (levels.bit_length() - 1) // 8


@triton.jit
def _to_top(words, shift: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """Moves the BITS bits from position ``shift`` to position TOP and clears all others."""
    if shift > TOP:  # noqa: SIM108 - a branch of the compiler
        moved = words >> (shift - TOP)
    else:
        moved = words << (TOP - shift)
    return moved & (((1 << BITS) - 1) << TOP)


@triton.jit
def _planes(words, byte: tl.constexpr, first: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """[R, J] words -> [R, COUNT * J]: one byte's planes ``first`` and following, side by side."""
    if COUNT == 1:
        return _to_top(words, 8 * byte + first * BITS, BITS, TOP)
    else:
        left = _planes(words, byte, first, COUNT // 2, BITS, TOP)
        right = _planes(words, byte, first + COUNT // 2, COUNT // 2, BITS, TOP)
        pair = tl.permute(tl.join(left, right), (0, 2, 1))
        return tl.reshape(pair, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _interleave(a, b):
    """[R, J], [R, J] -> [R, 2 J]: a0 b0 a1 b1 ..."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _load_planes(
    rows,
    mask,
    START: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Codes of the columns START ... START + BLOCK of a group, moved to bit TOP: [R, BLOCK] int32.

    ``rows`` points at the planes of each row's group. ALIGNED: groups start at multiples of 4 bytes.
    """
    N: tl.constexpr = GROUP * BITS // 8  # bytes of a plane, and columns
    J: tl.constexpr = N if N < BLOCK else BLOCK  # of which this block needs
    COUNT: tl.constexpr = BLOCK // J
    if ALIGNED and J % 4 == 0:
        at = (rows + START % N).to(tl.pointer_type(tl.int32))
        words = tl.load(at[:, None] + tl.arange(0, J // 4)[None, :], mask=mask[:, None], other=0)
        # Bytes last: neighbouring columns are then neighbouring registers, which pair up without moves.
        even = _interleave(
            _planes(words, 0, START // N, COUNT, BITS, TOP), _planes(words, 2, START // N, COUNT, BITS, TOP)
        )
        odd = _interleave(
            _planes(words, 1, START // N, COUNT, BITS, TOP), _planes(words, 3, START // N, COUNT, BITS, TOP)
        )
        return _interleave(even, odd)
    else:
        words = tl.load((rows + START % N)[:, None] + tl.arange(0, J)[None, :], mask=mask[:, None], other=0)
        return _planes(words.to(tl.int32), 0, START // N, COUNT, BITS, TOP)


@triton.jit
def _load_ternary(rows, mask, START: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """As _load_planes for five base-3 digits a byte: each column loads its own byte, most of them from L1.

    With u = byte / 3^(i + 1) in 21 fractional bits, the whole part of 3 * (u mod 1) is digit i: exact for 0 ... 242.
    """
    N: tl.constexpr = (GROUP + 4) // 5
    column = START + tl.arange(0, BLOCK)
    byte = tl.load(rows[:, None] + (column % N)[None, :], mask=mask[:, None], other=0).to(tl.int32)
    i = column // N
    third = tl.where(i == 0, 699051, tl.where(i == 1, 233017, tl.where(i == 2, 77673, tl.where(i == 3, 25891, 8631))))
    return ((byte * third[None, :]) & 0x1FFFFF) * 3 & (3 << 21)


@triton.jit
def load_weights(
    rows,
    mask,
    scale,
    offset,
    one_bits,
    START: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weights of the columns START ... START + BLOCK of one group of each row: [R, BLOCK] in DTYPE.

    rows: [R] pointers to uint8, the group's first byte; mask [R]; scale, offset [R] float32; one_bits: ONE_BITS.
    """
    BITS: tl.constexpr = code_bits(LEVELS)
    ALIGNED: tl.constexpr = group_bytes(LEVELS, GROUP) % 4 == 0  # not of 16 columns at 3 bits: 6 bytes
    if LEVELS == 3:
        bits = _load_ternary(rows, mask, START, GROUP, BLOCK) ^ one_bits
    elif LEVELS == 8:
        # ^ and not |: the compiler then keeps the order of operations, two for each code instead of three
        bits = _load_planes(rows, mask, START, 2, 20, GROUP, BLOCK, ALIGNED) ^ one_bits
        bits |= _load_planes(rows + GROUP // 4, mask, START, 1, 22, GROUP, BLOCK, ALIGNED)
    else:
        bits = _load_planes(rows, mask, START, BITS, 23 - BITS, GROUP, BLOCK, ALIGNED) ^ one_bits
    value = bits.to(tl.float32, bitcast=True)
    step = scale * (1 << BITS)
    if tl.float32 == DTYPE:  # exact, then one rounding as in the reference
        return (value - 1.0) * step[:, None] + offset[:, None]
    else:  # the constant's own rounding is 2^-16 of a step at most
        return (value * step[:, None] + (offset - step)[:, None]).to(DTYPE)


@triton.jit
def _dequantize_kernel(
    codes,
    scales,
    offsets,
    table,
    out,
    num_rows,
    groups,
    one_bits,
    HAS_TABLE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, g, e): rows i * ROWS ... of expert e, group g."""
    expert, group = tl.program_id(2), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    at = row.to(tl.int64) * groups + group
    if HAS_TABLE:
        levels = tl.load(table + 3 * expert)
        codes += tl.multiple_of(tl.load(table + 3 * expert + 1), 16)
        at += tl.load(table + 3 * expert + 2)
    else:
        levels: tl.constexpr = only_levels(WIDTHS)  # type: ignore[no-redef]
    scale, offset = tl.load(scales + at, mask=mask, other=0), tl.load(offsets + at, mask=mask, other=0)
    if scales.dtype.element_ty == tl.uint8:  # else float32, in training
        scale = decode_scale(scale)
        offset = decode_offset(offset, scale, levels - 1.0)
    target = out + (expert.to(tl.int64) * num_rows + row) * (groups * GROUP) + group * GROUP
    for i in tl.static_range(WIDTHS_TO_TRY):
        if (WIDTHS >> i) & 1:  # noqa: SIM102 - the outer is the compiler's
            if levels == levels_at(i):
                n = group_bytes(levels_at(i), GROUP)
                first = codes + row.to(tl.int64) * (groups * n) + group * n
                for h in tl.static_range(GROUP // BLOCK):
                    w = load_weights(
                        first,
                        mask,
                        scale,
                        offset,
                        one_bits,
                        h * BLOCK,
                        levels_at(i),
                        GROUP,
                        BLOCK,
                        out.dtype.element_ty,
                    )
                    tl.store(target[:, None] + (h * BLOCK + tl.arange(0, BLOCK))[None, :], w, mask=mask[:, None])


@triton.jit
def _grid_gradients_kernel(
    gradient,
    codes,
    table,
    of_scales,
    of_offsets,
    num_rows,
    groups,
    one_bits,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, g, e): rows i * ROWS ... of expert e, group g."""
    expert, group = tl.program_id(2), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    levels = tl.load(table + 3 * expert)
    codes += tl.multiple_of(tl.load(table + 3 * expert + 1), 16)
    at = (expert.to(tl.int64) * num_rows + row) * groups + group
    slopes = gradient + at * GROUP
    zero = tl.zeros([ROWS], tl.float32)
    of_scale, of_offset = zero, zero
    for i in tl.static_range(WIDTHS_TO_TRY):
        if (WIDTHS >> i) & 1:  # noqa: SIM102 - the outer is the compiler's
            if levels == levels_at(i):
                n = group_bytes(levels_at(i), GROUP)
                first = codes + row.to(tl.int64) * (groups * n) + group * n
                for h in tl.static_range(GROUP // BLOCK):
                    code = load_weights(
                        first, mask, zero + 1, zero, one_bits, h * BLOCK, levels_at(i), GROUP, BLOCK, tl.float32
                    )
                    column = h * BLOCK + tl.arange(0, BLOCK)
                    slope = tl.load(slopes[:, None] + column[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
                    of_scale += tl.sum(slope * code, 1)
                    of_offset += tl.sum(slope, 1)
    tl.store(of_scales + at, of_scale, mask=mask)
    tl.store(of_offsets + at, of_offset, mask=mask)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor | None,
    widths: int,
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """All matrices of flat buffers (see PackedMatrices): [E, rows, columns] in ``dtype``. widths: levels_mask.

    scales, offsets: bytes, or float32 as in training

    Without a table: one matrix, widths a width_bit, E = 1.
    """
    experts, groups = 1 if table is None else table.shape[0], columns // group_size
    out = torch.empty(experts, rows, columns, dtype=dtype, device=codes.device)
    _dequantize_kernel[(triton.cdiv(rows, 64), groups, experts)](
        codes,
        scales,
        offsets,
        codes if table is None else table,
        out,
        rows,
        groups,
        ONE_BITS,
        HAS_TABLE=table is not None,
        WIDTHS=widths,
        GROUP=group_size,
        BLOCK=min(group_size, BLOCK_COLUMNS),
        ROWS=64,
        num_warps=4,
    )
    return out


def grid_gradients(
    gradient: Tensor, codes: Tensor, table: Tensor, widths: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of all matrices' scales and offsets, [E, rows, groups] float32 each, from that of their weights.

    gradient: [E, rows, columns] of any float type; codes, table, widths as in ``dequantize``.
    """
    experts, rows, columns = gradient.shape
    groups = columns // group_size
    of_scales, of_offsets = (
        torch.empty(experts, rows, groups, dtype=torch.float32, device=gradient.device) for _ in range(2)
    )
    _grid_gradients_kernel[(triton.cdiv(rows, 64), groups, experts)](
        gradient.contiguous(),
        codes,
        table,
        of_scales,
        of_offsets,
        rows,
        groups,
        ONE_BITS,
        WIDTHS=widths,
        GROUP=group_size,
        BLOCK=min(group_size, BLOCK_COLUMNS),
        ROWS=64,
        num_warps=4,
    )
    return of_scales, of_offsets
