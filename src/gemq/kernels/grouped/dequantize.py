"""Dequantization of whole matrices, and gradients of their scales and offsets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.grouped.unpack import NUM_WIDTHS, ONE_BITS, levels_at, load_weights, only_levels
from gemq.kernels.packed_layout import group_bytes
from gemq.kernels.triton_types import Pointer, Scalar
from gemq.quant.grid_kernel import decode_offset, decode_scale

BLOCK_ROWS = 64
"""Rows of one program."""

MAX_BLOCK_COLUMNS = 128
"""Columns of a group that are unpacked in one step."""


class PackedWeights(NamedTuple):
    """Packed matrices of one shape: one per expert in flat buffers (see PackedMatrices), or a single dense one.

    Attributes:
        codes: uint8
        scales: uint8, or float32 in training
        offsets: as scales
        table: [E, 3] int64, None for a single matrix
        bias: [E, rows], [rows] for a single matrix, or None
        widths: set of widths to compile for (``levels_mask``; ``width_bit`` of a single matrix)
        rows: rows of each matrix
        group_size: columns that share a scale
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    table: Tensor | None
    bias: Tensor | None
    widths: int
    rows: int
    group_size: int


@triton.jit
def _dequantize_kernel(
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    table: Pointer,
    out: Pointer,
    num_rows: Scalar,
    groups: Scalar,
    one_bits: Scalar,
    HAS_TABLE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, g, e) writes rows i * ROWS ... of group g of expert e."""
    expert, group = tl.program_id(2), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    scale_index = row.to(tl.int64) * groups + group
    if HAS_TABLE:
        levels = tl.load(table + 3 * expert)
        codes += tl.multiple_of(tl.load(table + 3 * expert + 1), 16)
        scale_index += tl.load(table + 3 * expert + 2)
    else:
        levels: tl.constexpr = only_levels(WIDTHS)  # type: ignore[no-redef]
    scale = tl.load(scales + scale_index, mask=mask, other=0)
    offset = tl.load(offsets + scale_index, mask=mask, other=0)
    if scales.dtype.element_ty == tl.uint8:  # float32 in training
        scale = decode_scale(scale)
        offset = decode_offset(offset, scale, levels - 1.0)
    target = out + (expert.to(tl.int64) * num_rows + row) * (groups * GROUP) + group * GROUP
    for i in tl.static_range(NUM_WIDTHS):
        if (WIDTHS >> i) & 1:  # noqa: SIM102 - evaluated by the compiler, unlike the inner condition
            if levels == levels_at(i):
                length = group_bytes(levels_at(i), GROUP)
                first_byte = codes + row.to(tl.int64) * (groups * length) + group * length
                for h in tl.static_range(GROUP // BLOCK):
                    weights = load_weights(
                        first_byte,
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
                    tl.store(target[:, None] + (h * BLOCK + tl.arange(0, BLOCK))[None, :], weights, mask=mask[:, None])


@triton.jit
def _grid_gradients_kernel(
    gradient: Pointer,
    codes: Pointer,
    table: Pointer,
    grad_scales: Pointer,
    grad_offsets: Pointer,
    num_rows: Scalar,
    groups: Scalar,
    one_bits: Scalar,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, g, e) computes rows i * ROWS ... of group g of expert e."""
    expert, group = tl.program_id(2), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    levels = tl.load(table + 3 * expert)
    codes += tl.multiple_of(tl.load(table + 3 * expert + 1), 16)
    scale_index = (expert.to(tl.int64) * num_rows + row) * groups + group
    gradients = gradient + scale_index * GROUP
    zero = tl.zeros([ROWS], tl.float32)
    grad_scale, grad_offset = zero, zero
    for i in tl.static_range(NUM_WIDTHS):
        if (WIDTHS >> i) & 1:  # noqa: SIM102 - evaluated by the compiler, unlike the inner condition
            if levels == levels_at(i):
                length = group_bytes(levels_at(i), GROUP)
                first_byte = codes + row.to(tl.int64) * (groups * length) + group * length
                for h in tl.static_range(GROUP // BLOCK):
                    # With scale 1 and offset 0, weights are codes.
                    code = load_weights(
                        first_byte, mask, zero + 1, zero, one_bits, h * BLOCK, levels_at(i), GROUP, BLOCK, tl.float32
                    )
                    column = h * BLOCK + tl.arange(0, BLOCK)
                    grad = tl.load(gradients[:, None] + column[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
                    grad_scale += tl.sum(grad * code, 1)
                    grad_offset += tl.sum(grad, 1)
    tl.store(grad_scales + scale_index, grad_scale, mask=mask)
    tl.store(grad_offsets + scale_index, grad_offset, mask=mask)


def dequantize(w: PackedWeights, columns: int, dtype: torch.dtype) -> Tensor:
    """Return all matrices dequantized: [E, rows, columns] in ``dtype``, with E = 1 for a single matrix."""
    experts = 1 if w.table is None else w.table.shape[0]
    groups = columns // w.group_size
    out = torch.empty(experts, w.rows, columns, dtype=dtype, device=w.codes.device)
    _dequantize_kernel[(triton.cdiv(w.rows, BLOCK_ROWS), groups, experts)](
        w.codes,
        w.scales,
        w.offsets,
        w.codes if w.table is None else w.table,
        out,
        w.rows,
        groups,
        ONE_BITS,
        HAS_TABLE=w.table is not None,
        WIDTHS=w.widths,
        GROUP=w.group_size,
        BLOCK=min(w.group_size, MAX_BLOCK_COLUMNS),
        ROWS=BLOCK_ROWS,
        num_warps=4,
    )
    return out


def grid_gradients(
    gradient: Tensor, codes: Tensor, table: Tensor, widths: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of all matrices' scales and offsets.

    Args:
        gradient: [E, rows, columns] gradient of the weights, of any float type
        codes: uint8, as in ``PackedWeights``
        table: [E, 3] int64
        widths: set of widths (``levels_mask``)
        group_size: columns that share a scale

    Returns:
        Gradients of the scales and of the offsets, [E, rows, groups] float32 each.
    """
    experts, rows, columns = gradient.shape
    groups = columns // group_size
    grad_scales = torch.empty(experts, rows, groups, dtype=torch.float32, device=gradient.device)
    grad_offsets = torch.empty_like(grad_scales)
    _grid_gradients_kernel[(triton.cdiv(rows, BLOCK_ROWS), groups, experts)](
        gradient.contiguous(),
        codes,
        table,
        grad_scales,
        grad_offsets,
        rows,
        groups,
        ONE_BITS,
        WIDTHS=widths,
        GROUP=group_size,
        BLOCK=min(group_size, MAX_BLOCK_COLUMNS),
        ROWS=BLOCK_ROWS,
        num_warps=4,
    )
    return grad_scales, grad_offsets
