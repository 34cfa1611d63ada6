"""GPTQ's column loop on a GPU: one Triton program processes some rows of one matrix in one group of columns.

The columns of a group are in registers while its grid is fitted and its errors are distributed inside it. The effect of
the errors of all previous groups is one batched product before the kernel, so that a weight is read once and only
errors are written. The reference is ``gptq._column_loop``.

Shapes: W widths, E experts, R rows, C columns, G group size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant.gptq import LLOYD_ROUNDS, WIDER
from gemq.quant.grid import Quantized
from gemq.quant.grid_kernel import nearest, nearest_code
from gemq.quant.step_kernel import encode

ROWS_TIMES_COLUMNS = 2048
"""Weights of one program: 16 in each of 128 threads."""

_ROUNDS, _WIDER = tl.constexpr(LLOYD_ROUNDS), tl.constexpr(WIDER)


@triton.jit
def _codes(x, offset, step, max_code):
    """Return the codes of weights x as floats."""
    return nearest_code((x - offset) / step, max_code)


@triton.jit
def _fit_grid(values, pivots, max_code):
    """Fit a grid to each row of ``values`` [ROWS, G]: see ``gptq.fit_grid``. Returns scale and offset [ROWS]."""
    relative = tl.min(pivots, 0) / pivots
    importance = relative * relative
    importance = (importance / tl.sum(importance, 0))[None, :]
    low = tl.min(values, 1)
    scale = (tl.max(values, 1) - low) / max_code
    offset = low
    mean = tl.sum(importance * values, 1)
    for _ in range(_ROUNDS):
        step = tl.where(scale > 0, scale, 1.0)
        code = _codes(values, offset[:, None], step[:, None], max_code)
        mean_code = tl.sum(importance * code, 1)
        spread = code - mean_code[:, None]
        weighted = importance * spread
        variance = tl.sum(weighted * spread, 1)
        slope = tl.sum(weighted * values, 1) / tl.maximum(variance, 1e-20)
        scale = tl.where((variance > 1e-12) & (slope > 0), slope, scale)
        offset = mean - scale * mean_code
    stored_scale, _ = nearest(tl.where(max_code > 15, scale * _WIDER, scale), offset, max_code)
    offset = tl.where(stored_scale < 1.2 * scale, mean + (offset - mean) * (stored_scale / scale), offset)
    return nearest(stored_scale, offset, max_code)


@triton.jit(do_not_specialize=["start"])
def _group_kernel(
    x,  # [E, W * R, G] float32, the group with the errors of previous groups applied
    upper,  # [E, C, C] float32
    max_codes,  # [E, W] float32
    errors,  # [E, W * R, C] float32
    codes,  # [W, E, R, C] uint8
    scales,  # [W, E, R, C / G] float32
    offsets,
    soft_codes,  # [W, E, R, C] float32, or int16 as in ``step_kernel``; any tensor without HAS_SOFT_CODES
    rows,
    columns,
    experts,
    start,  # first column of the group
    soft_code_stride,  # from one width to the next
    WIDTHS: tl.constexpr,
    HAS_SOFT_CODES: tl.constexpr,
    ROWS: tl.constexpr,
    G: tl.constexpr,
):
    """Quantize ``ROWS`` rows of one group of one matrix at one width."""
    blocks = tl.cdiv(rows, ROWS)
    matrix = tl.program_id(0) // blocks
    expert, width = matrix // WIDTHS, matrix % WIDTHS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    mask = row_mask[:, None]
    column = tl.arange(0, G)
    max_code = tl.load(max_codes + matrix)
    triangle = upper + (expert.to(tl.int64) * columns + start) * columns + start
    pivots = tl.load(triangle + column * (columns + 1))
    input_row = matrix.to(tl.int64) * rows + row  # in E, W, R
    values = tl.load(x + input_row[:, None] * G + column[None, :], mask=mask, other=0.0)

    scale, offset = _fit_grid(values, pivots, max_code)
    result_row = (width * experts + expert).to(tl.int64) * rows + row  # in W, E, R
    group = result_row * (columns // G) + start // G
    tl.store(scales + group, scale, mask=row_mask)
    tl.store(offsets + group, offset, mask=row_mask)

    # A column is final once those before it are processed: codes and errors of all columns are computed at the end.
    for j in range(G):
        current = tl.sum(tl.where(column[None, :] == j, values, 0.0), 1)
        error = current - (offset + _codes(current, offset, scale, max_code) * scale)
        error = error / tl.load(triangle + j * (columns + 1))
        factors = tl.load(triangle + j * columns + column, mask=column > j, other=0.0)
        values -= error[:, None] * factors[None, :]

    scale, offset = scale[:, None], offset[:, None]
    code = _codes(values, offset, scale, max_code)
    error = (values - (offset + code * scale)) / pivots[None, :]
    matrix_column = start + column[None, :]
    tl.store(errors + input_row[:, None] * columns + matrix_column, error, mask=mask)
    tl.store(codes + result_row[:, None] * columns + matrix_column, code.to(tl.uint8), mask=mask)
    if HAS_SOFT_CODES:
        row_start = width.to(tl.int64) * soft_code_stride + (expert.to(tl.int64) * rows + row[:, None]) * columns
        soft_code = (values - offset) / scale
        if soft_codes.dtype.element_ty == tl.int16:
            soft_code = encode(soft_code, max_code, 0.5)
        tl.store(soft_codes + row_start + matrix_column, soft_code, mask=mask)


def quantize(weight: Tensor, upper: Tensor, max_code: Tensor, group_size: int, soft_codes: Tensor | None) -> Quantized:
    """Quantize matrices [E, R, C] to grids [W, E, ...].

    Args:
        weight: As in ``gptq.gptq``.
        upper: As in ``gptq.gptq``.
        max_code: [W, E] float32, the largest code of each matrix.
        group_size: As in ``gptq.gptq``.
        soft_codes: As in ``gptq.gptq``. Those of one width are contiguous.
    """
    experts, rows, columns = weight.shape
    widths = len(max_code)
    max_codes = max_code.T.contiguous()
    upper = upper.contiguous()
    codes = torch.empty(widths, experts, rows, columns, dtype=torch.uint8, device=weight.device)
    scales = codes.new_empty(*codes.shape[:3], columns // group_size, dtype=torch.float32)
    offsets = torch.empty_like(scales)
    errors = weight.new_empty(experts, widths * rows, columns, dtype=torch.float32)
    assert soft_codes is None or soft_codes[0].is_contiguous()
    block = max(1, ROWS_TIMES_COLUMNS // group_size)
    for start in range(0, columns, group_size):
        stop = start + group_size
        x = weight[:, None, :, start:stop].float().expand(-1, widths, -1, -1)
        x = x.reshape(experts, widths * rows, group_size).contiguous()
        if start:
            x = torch.baddbmm(x, errors[:, :, :start], upper[:, :start, start:stop], alpha=-1)
        _group_kernel[(experts * widths * triton.cdiv(rows, block),)](
            x,
            upper,
            max_codes,
            errors,
            codes,
            scales,
            offsets,
            codes if soft_codes is None else soft_codes,
            rows,
            columns,
            experts,
            start,
            0 if soft_codes is None else soft_codes.stride(0),
            WIDTHS=widths,
            HAS_SOFT_CODES=soft_codes is not None,
            ROWS=block,
            G=group_size,
            num_warps=4,
        )
    return Quantized(codes, scales, offsets)
