"""Affine grids: matrices as codes, scales and offsets.

One format serves every width: ``w = scale * code + offset`` with one scale and offset per row and group of consecutive
input columns. One bit is therefore two free levels and every kernel is one formula.

A scale and an offset take a byte each. Scales have eight steps an octave, from 2^-24 to 240:
``scale = 2^(byte // 8 - 24) * (1 + byte % 8 / 8)``. Offsets are 128ths of what the codes span:
``offset = scale * highest code * (64 - byte) / 128``. float32 holds both exactly. Whoever fits or trains grids rounds
them to these (``nearest``), so that codes are chosen for what is stored; coarse as they are, the bytes they save are
worth many times the accuracy they cost (docs/lab-log.md, entry 40).

Knows nothing of models or files. ``grid_kernel`` has the same for Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MANTISSA_SHIFT = 20
"""Where a scale's byte begins in the bits of its float32."""

FIRST_SCALE = (127 - 24) << 3
"""The byte 0 there: the exponent of 2^-24."""

LAST_SCALE, LARGEST_SCALE = 255, 240.0
"""The largest byte and what it stands for."""

SMALL_WEIGHT = 2.0**-17
"""With no larger weight in a matrix, scales of 8 bits would have to be smaller than 2^-24."""

PARTS = 128
"""Offsets are in these parts of the codes' span."""

ZERO = 64
"""Byte of the offset 0: offsets reach from -191 to 64 parts, and the usual -64 lies in the middle."""

LEAST_SPAN = (PARTS / ZERO, PARTS / (255 - ZERO))
"""The codes' span in units of a positive and of a negative offset, at least: with less, the byte would not reach."""

WIDENED = 1.07
"""By how much more such a span is widened, so that the rounding of its scale takes nothing of it."""


class Quantized(NamedTuple):
    """Matrices of one width on their grids. Leading dimensions (experts) are free.

    codes:   [..., rows, columns] uint8, values 0 .. levels - 1
    scales:  [..., rows, columns // group_size] float32, with values that a byte stands for
    offsets: [..., rows, columns // group_size] float32, likewise
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale * code + offset`` in float32, then rounded once to ``dtype``: [..., rows, columns]."""
    groups, columns = q.scales.shape[-1], q.codes.shape[-1]
    codes = q.codes.reshape(*q.codes.shape[:-1], groups, columns // groups).float()
    w = torch.addcmul(q.offsets.unsqueeze(-1), codes, q.scales.unsqueeze(-1))
    return w.reshape(q.codes.shape).to(dtype)


def dequantize_each(q: Quantized, dtype: torch.dtype) -> Tensor:
    """``dequantize`` of matrices [E, R, C], one at a time: in float32 all at once may be larger than all else."""
    weight = torch.empty(q.codes.shape, dtype=dtype, device=q.codes.device)
    for one, *parts in zip(weight, *q, strict=True):
        one.copy_(dequantize(Quantized(*parts)))
    return weight


def encode(scales: Tensor, offsets: Tensor, highest: Tensor | float) -> tuple[Tensor, Tensor]:
    """The bytes (uint8) nearest to scales and offsets of any float type; ``highest`` code broadcasts.

    Offsets beyond what their byte reaches widen the scale, so that a group far from zero stays where it is.
    """
    scales, offsets = scales.float(), offsets.float()
    positive, negative = LEAST_SPAN
    least = torch.maximum(offsets * positive, offsets * -negative) / highest
    scales = torch.where(least > scales * 1.001, least * WIDENED, scales)
    bits = scales.clamp_min(0).contiguous().view(torch.int32)
    half = 1 << (MANTISSA_SHIFT - 1)
    scale_bytes = (((bits + half) >> MANTISSA_SHIFT) - FIRST_SCALE).clamp(0, 255).to(torch.uint8)
    parts = ZERO - offsets / (_scales(scale_bytes) * (highest / PARTS))
    return scale_bytes, parts.round().clamp(0, 255).to(torch.uint8)


def decode(scale_bytes: Tensor, offset_bytes: Tensor, highest: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scales and offsets (float32) that bytes stand for; ``highest`` code broadcasts."""
    scales = _scales(scale_bytes)
    return scales, scales * (highest / PARTS) * (ZERO - offset_bytes.float())


def nearest(scales: Tensor, offsets: Tensor, highest: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scales and offsets (float32) that are stored in place of these."""
    return decode(*encode(scales, offsets, highest), highest)


def largest_weights(weight: Tensor) -> Tensor:
    """The largest absolute weight of each of the matrices [E, R, C]: [E] float32."""
    weight = weight.detach()
    return torch.maximum(weight.amax((1, 2)), -weight.amin((1, 2))).float()


def below_scales(weight: Tensor) -> int:
    """How many of the matrices [E, R, C] hold weights, and only weights so small that scales do not resolve them."""
    largest = largest_weights(weight)
    return int(((largest > 0) & (largest < SMALL_WEIGHT)).sum())


def _scales(scale_bytes: Tensor) -> Tensor:
    return ((scale_bytes.int() + FIRST_SCALE) << MANTISSA_SHIFT).view(torch.float32)
