"""The bytes of scales and offsets, for Triton kernels: what ``grid`` says, and the same results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant import grid

_SHIFT, _FIRST = tl.constexpr(grid.MANTISSA_SHIFT), tl.constexpr(grid.FIRST_SCALE)
_HALF = tl.constexpr(1 << (grid.MANTISSA_SHIFT - 1))
_ZERO, _DOWN = tl.constexpr(grid.ZERO), tl.constexpr(-float(grid.PARTS))  # offsets count downwards
_POSITIVE, _NEGATIVE = (tl.constexpr(span) for span in grid.LEAST_SPAN)
_WIDENED = tl.constexpr(grid.WIDENED)
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point


@triton.jit
def nearest_code(x, highest):
    """Float32 ``x`` as the nearest whole number from 0 to ``highest``; ties go to even, as torch rounds."""
    return (tl.minimum(tl.maximum(x, 0.0), highest) + _ROUNDING) - _ROUNDING


@triton.jit
def decode_scale(byte):
    """float32; ``byte`` of any integer type."""
    return ((byte.to(tl.int32) + _FIRST) << _SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def decode_offset(byte, scale, highest):
    """float32; ``highest`` code float32 or a constant, and broadcasts."""
    return scale * (highest / _DOWN) * (byte.to(tl.int32) - _ZERO).to(tl.float32)


@triton.jit
def encode(scale, offset, highest):
    """The bytes nearest to float32 ``scale`` and ``offset``, as int32."""
    least = tl.maximum(offset * _POSITIVE, offset * -_NEGATIVE) / highest
    scale = tl.where(least > scale * 1.001, least * _WIDENED, scale)
    bits = tl.maximum(scale, 0.0).to(tl.int32, bitcast=True)
    scale_byte = ((bits + _HALF) >> _SHIFT) - _FIRST
    scale_byte = tl.minimum(tl.maximum(scale_byte, 0), 255)
    part = offset / (decode_scale(scale_byte) * (highest / _DOWN)) + _ZERO
    return scale_byte, nearest_code(part, 255.0).to(tl.int32)


@triton.jit
def nearest(scale, offset, highest):
    """The scale and offset (float32) that are stored in place of these."""
    scale_byte, offset_byte = encode(scale, offset, highest)
    scale = decode_scale(scale_byte)
    return scale, decode_offset(offset_byte, scale, highest)


@triton.jit
def change_grid(base_scale, base_offset, scale_change, offset_change, highest):
    """Stored scale and offset (float32) of changes relative to the scale."""
    return nearest(base_scale * (1 + scale_change), base_offset + base_scale * offset_change, highest)


@triton.jit
def _changed_kernel(
    scale_changes, offset_changes, base_scales, base_offsets, highest, scales, offsets, count, each, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    base_scale = tl.load(base_scales + at, mask=inside, other=0.0)
    base_offset = tl.load(base_offsets + at, mask=inside, other=0.0)
    scale_change = tl.load(scale_changes + at, mask=inside, other=0.0)
    offset_change = tl.load(offset_changes + at, mask=inside, other=0.0)
    high = tl.load(highest + at // each, mask=inside, other=1.0)
    scale, offset = change_grid(base_scale, base_offset, scale_change, offset_change, high)
    tl.store(scales + at, scale, mask=inside)
    tl.store(offsets + at, offset, mask=inside)


def changed(
    scale_changes: Tensor, offset_changes: Tensor, base_scales: Tensor, base_offsets: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor]:
    """Stored scales and offsets of changes relative to the scales, all [E, R, G] float32, in one pass.

    highest: [E, 1, 1] float32
    """
    parts = [t.contiguous() for t in (scale_changes, offset_changes, base_scales, base_offsets)]
    scales, offsets = torch.empty_like(parts[2]), torch.empty_like(parts[2])
    count, block = scales.numel(), 1024
    _changed_kernel[(triton.cdiv(count, block),)](
        *parts, highest.contiguous(), scales, offsets, count, scales[0].numel(), BLOCK=block
    )
    return scales, offsets
