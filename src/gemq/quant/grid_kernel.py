"""Bytes of scales and offsets in Triton kernels, with the same results as ``grid``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant import grid

_SHIFT, _FIRST = tl.constexpr(grid.MANTISSA_SHIFT), tl.constexpr(grid.FIRST_SCALE)
_HALF = tl.constexpr(1 << (grid.MANTISSA_SHIFT - 1))
_ZERO = tl.constexpr(grid.ZERO)
_NEGATIVE_STEPS = tl.constexpr(-float(grid.OFFSET_STEPS))  # larger bytes are smaller offsets
_POSITIVE, _NEGATIVE = (tl.constexpr(span) for span in grid.LEAST_SPAN)
_WIDENED = tl.constexpr(grid.WIDENED)
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits

CHANGED_BLOCK = 1024
"""Groups of one program of ``changed``."""


@triton.jit
def nearest_code(x, max_code):
    """Round float32 ``x`` to the nearest integer from 0 to ``max_code``. Ties go to even, as in torch."""
    return (tl.minimum(tl.maximum(x, 0.0), max_code) + _ROUNDING) - _ROUNDING


@triton.jit
def decode_scale(byte):
    """Return the float32 scale of ``byte``, of any integer type."""
    return ((byte.to(tl.int32) + _FIRST) << _SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def decode_offset(byte, scale, max_code):
    """Return the float32 offset of ``byte``. ``max_code`` is float32 or a constant, and broadcasts."""
    return scale * (max_code / _NEGATIVE_STEPS) * (byte.to(tl.int32) - _ZERO).to(tl.float32)


@triton.jit
def encode(scale, offset, max_code):
    """Return the bytes nearest to float32 ``scale`` and ``offset``, as int32."""
    least_scale = tl.maximum(offset * _POSITIVE, offset * -_NEGATIVE) / max_code
    scale = tl.where(least_scale > scale * 1.001, least_scale * _WIDENED, scale)
    bits = tl.maximum(scale, 0.0).to(tl.int32, bitcast=True)
    scale_byte = ((bits + _HALF) >> _SHIFT) - _FIRST
    scale_byte = tl.minimum(tl.maximum(scale_byte, 0), 255)
    offset_byte = offset / (decode_scale(scale_byte) * (max_code / _NEGATIVE_STEPS)) + _ZERO
    return scale_byte, nearest_code(offset_byte, 255.0).to(tl.int32)


@triton.jit
def nearest(scale, offset, max_code):
    """Round a scale and an offset to the nearest values (float32) that can be stored."""
    scale_byte, offset_byte = encode(scale, offset, max_code)
    scale = decode_scale(scale_byte)
    return scale, decode_offset(offset_byte, scale, max_code)


@triton.jit
def change_grid(base_scale, base_offset, scale_change, offset_change, max_code):
    """Return the stored scale and offset (float32) after changes relative to the scale."""
    return nearest(base_scale * (1 + scale_change), base_offset + base_scale * offset_change, max_code)


@triton.jit
def _changed_kernel(
    scale_changes,
    offset_changes,
    base_scales,
    base_offsets,
    max_codes,
    scales,
    offsets,
    num_groups,
    groups_per_matrix,
    BLOCK: tl.constexpr,
):
    """Compute ``change_grid`` of ``BLOCK`` groups."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < num_groups
    base_scale = tl.load(base_scales + group, mask=mask, other=0.0)
    base_offset = tl.load(base_offsets + group, mask=mask, other=0.0)
    scale_change = tl.load(scale_changes + group, mask=mask, other=0.0)
    offset_change = tl.load(offset_changes + group, mask=mask, other=0.0)
    max_code = tl.load(max_codes + group // groups_per_matrix, mask=mask, other=1.0)
    scale, offset = change_grid(base_scale, base_offset, scale_change, offset_change, max_code)
    tl.store(scales + group, scale, mask=mask)
    tl.store(offsets + group, offset, mask=mask)


def changed(
    scale_changes: Tensor, offset_changes: Tensor, base_scales: Tensor, base_offsets: Tensor, max_code: Tensor
) -> tuple[Tensor, Tensor]:
    """Return stored scales and offsets after changes relative to the scales, in one pass.

    Args:
        scale_changes: [E, R, G] float32.
        offset_changes: Likewise.
        base_scales: Likewise.
        base_offsets: Likewise.
        max_code: [E, 1, 1] float32.
    """
    base_scales = base_scales.contiguous()
    scales, offsets = torch.empty_like(base_scales), torch.empty_like(base_scales)
    num_groups, groups_per_matrix = scales.numel(), scales[0].numel()
    _changed_kernel[(triton.cdiv(num_groups, CHANGED_BLOCK),)](
        scale_changes.contiguous(),
        offset_changes.contiguous(),
        base_scales,
        base_offsets.contiguous(),
        max_code.contiguous(),
        scales,
        offsets,
        num_groups,
        groups_per_matrix,
        BLOCK=CHANGED_BLOCK,
    )
    return scales, offsets
