"""Dense matrices from trellis codes in one launch, and gradients of their row scales.

Values in units of VALUE_UNIT are integers that float16 holds exactly, and so are their sums with signs in float32.
Tensor cores therefore rotate without rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.decode.launch import device_of
from gemq.kernels.trellis.operands import PORTABLE, decode_block
from gemq.kernels.trellis.rotation import sign_block
from gemq.kernels.trellis.values import VALUE_UNIT
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant.rotation import block_side

BLOCK_ROWS = 64
"""Rows of one program."""


@triton.jit
def _unscaled(
    words: Pointer,
    row: Tile,
    first_column: Scalar,
    columns: Scalar,
    eighths: Scalar,
    block: Tile,
    STATE_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a block of weights before row scales, divided by ``_factor``: [R, COLUMNS] float32."""
    values = decode_block(words, row, first_column, columns, eighths, STATE_BITS, COLUMNS)
    return tl.dot(values.to(block.dtype), block, input_precision="ieee")


@triton.jit
def _rotation_block(COLUMNS: tl.constexpr):
    """Return the signs of a block of the rotation."""
    number = tl.arange(0, COLUMNS)
    return sign_block(number[:, None], number[None, :], COLUMNS).to(tl.float32 if PORTABLE else tl.float16)


@triton.jit
def _dense_kernel(
    codes: Pointer,
    scales: Pointer,
    table: Pointer,
    out: Pointer,
    num_rows: Scalar,
    columns: Scalar,
    factor: Scalar,
    STATE_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, e) writes rows i * ROWS ... of expert e."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    row = tl.where(inside, row, 0)
    eighths = tl.load(table + 2 * expert).to(tl.int32)
    words = codes.to(tl.pointer_type(tl.uint32)) + tl.load(table + 2 * expert + 1).to(tl.int64) * 4
    out_row = expert * num_rows + row
    scale = factor * tl.load(scales + out_row).to(tl.float32)
    block = _rotation_block(COLUMNS)
    for first_column in range(0, columns, COLUMNS):
        values = _unscaled(words, row, first_column, columns, eighths, block, STATE_BITS, COLUMNS)
        column = first_column + tl.arange(0, COLUMNS)
        weights = (values * scale[:, None]).to(out.dtype.element_ty)
        target = out + out_row[:, None] * columns + column[None, :]
        tl.store(target, weights, mask=inside[:, None] & (column < columns)[None, :])


@triton.jit
def _scale_gradients_kernel(
    gradient: Pointer,
    codes: Pointer,
    table: Pointer,
    grad_scales: Pointer,
    num_rows: Scalar,
    columns: Scalar,
    factor: Scalar,
    STATE_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, e) computes rows i * ROWS ... of expert e."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    row = tl.where(inside, row, 0)
    eighths = tl.load(table + 2 * expert).to(tl.int32)
    words = codes.to(tl.pointer_type(tl.uint32)) + tl.load(table + 2 * expert + 1).to(tl.int64) * 4
    scale_index = expert * num_rows + row
    block = _rotation_block(COLUMNS)
    total = tl.zeros([ROWS], tl.float32)
    for first_column in range(0, columns, COLUMNS):
        values = _unscaled(words, row, first_column, columns, eighths, block, STATE_BITS, COLUMNS)
        column = first_column + tl.arange(0, COLUMNS)
        source = gradient + scale_index[:, None] * columns + column[None, :]
        grad = tl.load(source, mask=inside[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(grad * values, 1)
    tl.store(grad_scales + scale_index, total * factor, mask=inside)


def _factor(side: int) -> float:
    """Return what the integers of a rotated block of ``side`` columns are multiplied by."""
    return VALUE_UNIT.value * side**-0.5


def dense(
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    state_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return dense matrices, [E, rows, columns] in ``dtype``, rounded once.

    Args:
        codes: uint8, as in ``launch.TrellisArguments``
        table: [E, 2]
        scales: [E, rows] of any float type, contiguous
        rows: rows of a matrix
        columns: columns of a matrix
        state_bits: bits of a state
        dtype: dtype of the result
    """
    experts = len(table)
    out = torch.empty(experts, rows, columns, dtype=dtype, device=codes.device)
    side = block_side(columns)
    if experts:
        with device_of(codes):
            _dense_kernel[(triton.cdiv(rows, BLOCK_ROWS), experts)](
                codes,
                scales,
                table,
                out,
                rows,
                columns,
                _factor(side),
                STATE_BITS=state_bits,
                COLUMNS=side,
                ROWS=BLOCK_ROWS,
                num_warps=4,
            )
    return out


def scale_gradients(gradient: Tensor, codes: Tensor, table: Tensor, state_bits: int) -> Tensor:
    """Return the gradients of the scales, [E, rows] float32, from those of the matrices ``dense`` returns.

    Args:
        gradient: [E, rows, columns] of any float type
        codes: uint8, as for ``dense``
        table: [E, 2]
        state_bits: bits of a state
    """
    experts, rows, columns = gradient.shape
    grad_scales = torch.empty(experts, rows, dtype=torch.float32, device=gradient.device)
    side = block_side(columns)
    if experts:
        with device_of(codes):
            _scale_gradients_kernel[(triton.cdiv(rows, BLOCK_ROWS), experts)](
                gradient.contiguous(),
                codes,
                table,
                grad_scales,
                rows,
                columns,
                _factor(side),
                STATE_BITS=state_bits,
                COLUMNS=side,
                ROWS=BLOCK_ROWS,
                num_warps=4,
            )
    return grad_scales
