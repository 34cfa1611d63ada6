"""GPTQ's column loop on a GPU: one Triton program takes a few rows of one matrix through one group of columns.

A group's columns are in registers while its grid is fitted and its errors are spread inside it. What the errors of
all groups before do to a group is one batched product in front of the kernel, so that a weight is read once and only
errors are written. The reference is ``gptq._column_loop``. Knows tensors only.

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
"""Weights that one program holds: 16 in each of 128 threads."""

_ROUNDS, _WIDER = tl.constexpr(LLOYD_ROUNDS), tl.constexpr(WIDER)


@triton.jit
def _codes(x, offset, step, highest):
    """Codes of weights x as floats."""
    return nearest_code((x - offset) / step, highest)


@triton.jit(do_not_specialize=["start"])
def _group_kernel(
    x,  # [E, W * R, G] float32, the group with the errors of those before it
    upper,  # [E, C, C] float32
    highest,  # [E, W] float32
    errors,  # [E, W * R, C] float32
    codes,  # [W, E, R, C] uint8
    scales,  # [W, E, R, C / G] float32
    offsets,
    latents,  # [W, E, R, C] float32, or int16 as in ``step_kernel``; any tensor if not wanted
    rows,
    columns,
    experts,
    start,
    latent_stride,  # from one width to the next
    WIDTHS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    ROWS: tl.constexpr,
    G: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    matrix = tl.program_id(0) // blocks
    expert, width = matrix // WIDTHS, matrix % WIDTHS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, G)
    high = tl.load(highest + matrix)
    triangle = upper + (expert.to(tl.int64) * columns + start) * columns + start
    pivots = tl.load(triangle + column * (columns + 1))
    of_all = matrix.to(tl.int64) * rows + row  # row among E, W, R
    values = tl.load(x + of_all[:, None] * G + column[None, :], mask=inside[:, None], other=0.0)

    # the grid: rounding and weighted least squares in turn
    relative = tl.min(pivots, 0) / pivots
    importance = relative * relative
    importance = (importance / tl.sum(importance, 0))[None, :]
    low = tl.min(values, 1)
    scale = (tl.max(values, 1) - low) / high
    offset = low
    mean = tl.sum(importance * values, 1)
    for _ in range(_ROUNDS):
        step = tl.where(scale > 0, scale, 1.0)
        code = _codes(values, offset[:, None], step[:, None], high)
        mean_code = tl.sum(importance * code, 1)
        spread = code - mean_code[:, None]
        weighted = importance * spread
        variance = tl.sum(weighted * spread, 1)
        slope = tl.sum(weighted * values, 1) / tl.maximum(variance, 1e-20)
        scale = tl.where((variance > 1e-12) & (slope > 0), slope, scale)
        offset = mean - scale * mean_code
    stored, _ = nearest(tl.where(high > 15, scale * _WIDER, scale), offset, high)
    offset = tl.where(stored < 1.2 * scale, mean + (offset - mean) * (stored / scale), offset)
    scale, offset = nearest(stored, offset, high)
    of_result = (width * experts + expert).to(tl.int64) * rows + row
    group = of_result * (columns // G) + start // G
    tl.store(scales + group, scale, mask=inside)
    tl.store(offsets + group, offset, mask=inside)

    # a column is final once those before it are done: codes and errors can be taken from all of them at the end
    for j in range(G):
        now = tl.sum(tl.where(column[None, :] == j, values, 0.0), 1)
        error = now - (offset + _codes(now, offset, scale, high) * scale)
        error = error / tl.load(triangle + j * (columns + 1))
        later = tl.load(triangle + j * columns + column, mask=column > j, other=0.0)
        values -= error[:, None] * later[None, :]

    scale, offset = scale[:, None], offset[:, None]
    code = _codes(values, offset, scale, high)
    error = (values - (offset + code * scale)) / pivots[None, :]
    place = start + column[None, :]
    tl.store(errors + of_all[:, None] * columns + place, error, mask=inside[:, None])
    tl.store(codes + of_result[:, None] * columns + place, code.to(tl.uint8), mask=inside[:, None])
    if HAS_LATENTS:
        of_latents = width.to(tl.int64) * latent_stride + (expert.to(tl.int64) * rows + row[:, None]) * columns
        latent = (values - offset) / scale
        if latents.dtype.element_ty == tl.int16:
            latent = encode(latent, high, 0.5)
        tl.store(latents + of_latents + place, latent, mask=inside[:, None])


def quantize(weight: Tensor, upper: Tensor, highest: Tensor, group_size: int, latents: Tensor | None) -> Quantized:
    """Matrices [E, R, C] on grids [W, E, ...]: as ``gptq._column_loop``, which says what the arguments are.

    highest: [W, E] float32
    """
    experts, rows, columns = weight.shape
    widths = len(highest)
    high = highest.T.contiguous()
    upper = upper.contiguous()
    codes = torch.empty(widths, experts, rows, columns, dtype=torch.uint8, device=weight.device)
    scales = codes.new_empty(*codes.shape[:3], columns // group_size, dtype=torch.float32)
    offsets = torch.empty_like(scales)
    errors = weight.new_empty(experts, widths * rows, columns, dtype=torch.float32)
    assert latents is None or latents[0].is_contiguous()
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
            high,
            errors,
            codes,
            scales,
            offsets,
            codes if latents is None else latents,
            rows,
            columns,
            experts,
            start,
            0 if latents is None else latents.stride(0),
            WIDTHS=widths,
            HAS_LATENTS=latents is not None,
            ROWS=block,
            G=group_size,
            num_warps=4,
        )
    return Quantized(codes, scales, offsets)
