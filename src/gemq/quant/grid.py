"""Affine grids: a matrix as integer codes with a scale and an offset per group.

Every width uses the same format, ``w = scale * code + offset``. A group is a number of consecutive input columns of one
row. One bit means two free levels, so that every kernel implements one formula.

A scale and an offset take one byte each. Scales have eight steps an octave, from 2^-24 to 240:
``scale = 2^(byte // 8 - 24) * (1 + byte % 8 / 8)``. Offsets are multiples of 1/128 of the span of the codes:
``offset = scale * max_code * (64 - byte) / 128``. float32 represents both exactly. Code that fits or trains grids
rounds them to these values with ``nearest``, so that codes are chosen for the stored grid. The bytes that this coarse
format saves are worth far more than the accuracy it costs (docs/lab-log.md, entry 40).

Must not import models or files. ``grid_kernel`` implements the same for Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MANTISSA_SHIFT = 20
"""Position of a scale's byte in the bits of its float32."""

FIRST_SCALE = (127 - 24) << 3
"""Value of these bits for the byte 0: the exponent of 2^-24."""

LAST_SCALE, LARGEST_SCALE = 255, 240.0
"""The largest byte and its scale."""

SMALL_WEIGHT = 2.0**-17
"""A matrix with no larger weight would need scales below 2^-24 at 8 bits."""

OFFSET_STEPS = 128
"""Offsets are multiples of the span of the codes divided by this."""

ZERO = 64
"""Byte of the offset 0. Offsets range from -191 to 64 parts, and the usual value of -64 is in the middle."""

LEAST_SPAN = (OFFSET_STEPS / ZERO, OFFSET_STEPS / (255 - ZERO))
"""Smallest span of the codes for which a byte can hold a positive and a negative offset, in units of that offset."""

WIDENED = 1.07
"""Factor by which a span that is too small is widened beyond the minimum, as a margin for the rounding of its scale."""


class Quantized(NamedTuple):
    """Matrices of one width on their grids, with any leading dimensions such as experts.

    Attributes:
        codes: [..., rows, columns] uint8, values 0 .. levels - 1
        scales: [..., rows, columns // group_size] float32, values that a byte can represent
        offsets: [..., rows, columns // group_size] float32, likewise
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Quantized:
        """Apply ``function`` to codes, scales and offsets."""
        return Quantized(function(self.codes), function(self.scales), function(self.offsets))

    def select(self, index: Any) -> Quantized:
        """Index the leading dimensions of codes, scales and offsets."""
        return Quantized(self.codes[index], self.scales[index], self.offsets[index])

    @staticmethod
    def cat(batches: Sequence[Quantized], dim: int) -> Quantized:
        """Concatenate along ``dim``. A single batch is returned without a copy."""
        if len(batches) == 1:
            return batches[0]
        codes, scales, offsets = zip(*batches, strict=True)
        return Quantized(torch.cat(codes, dim), torch.cat(scales, dim), torch.cat(offsets, dim))


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute ``scale * code + offset`` in float32, rounded once to ``dtype``: [..., rows, columns]."""
    groups, columns = q.scales.shape[-1], q.codes.shape[-1]
    codes = q.codes.reshape(*q.codes.shape[:-1], groups, columns // groups).float()
    w = torch.addcmul(q.offsets.unsqueeze(-1), codes, q.scales.unsqueeze(-1))
    return w.reshape(q.codes.shape).to(dtype)


def dequantize_each(q: Quantized, dtype: torch.dtype) -> Tensor:
    """Dequantize matrices [E, R, C] one at a time.

    All of them in float32 could take more memory than anything else in the job.
    """
    weight = torch.empty(q.codes.shape, dtype=dtype, device=q.codes.device)
    for index, matrix in enumerate(weight):
        matrix.copy_(dequantize(q.select(index)))
    return weight


def encode(scales: Tensor, offsets: Tensor, max_code: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the bytes (uint8) nearest to scales and offsets.

    An offset beyond the range of its byte widens the scale, so that a group far from zero keeps its place.

    Args:
        scales: Any float dtype.
        offsets: Same shape.
        max_code: Largest code of the width; broadcasts.
    """
    scales, offsets = scales.float(), offsets.float()
    positive, negative = LEAST_SPAN
    least_scale = torch.maximum(offsets * positive, offsets * -negative) / max_code
    scales = torch.where(least_scale > scales * 1.001, least_scale * WIDENED, scales)
    scale_bytes = encode_scales(scales)
    offset_bytes = ZERO - offsets / (decode_scales(scale_bytes) * (max_code / OFFSET_STEPS))
    return scale_bytes, offset_bytes.round().clamp(0, 255).to(torch.uint8)


def decode(scale_bytes: Tensor, offset_bytes: Tensor, max_code: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets (float32) of stored bytes. ``max_code`` broadcasts."""
    scales = decode_scales(scale_bytes)
    return scales, scales * (max_code / OFFSET_STEPS) * (ZERO - offset_bytes.float())


def nearest(scales: Tensor, offsets: Tensor, max_code: Tensor | float) -> tuple[Tensor, Tensor]:
    """Round scales and offsets to the nearest values (float32) that can be stored. ``max_code`` broadcasts."""
    scale_bytes, offset_bytes = encode(scales, offsets, max_code)
    return decode(scale_bytes, offset_bytes, max_code)


def nearest_scales(scales: Tensor) -> Tensor:
    """Round scales to the nearest values (float32) that can be stored."""
    return decode_scales(encode_scales(scales))


def largest_weights(weight: Tensor) -> Tensor:
    """Return the largest absolute weight of each matrix of ``weight`` [E, R, C]: [E] float32."""
    weight = weight.detach()
    return torch.maximum(weight.amax((1, 2)), -weight.amin((1, 2))).float()


def below_scales(weight: Tensor) -> int:
    """Count the matrices [E, R, C] that are not zero and whose weights are all too small for the smallest scale."""
    largest = largest_weights(weight)
    return int(((largest > 0) & (largest < SMALL_WEIGHT)).sum())


def encode_scales(scales: Tensor) -> Tensor:
    """Return the bytes (uint8) nearest to scales, float32."""
    bits = scales.clamp_min(0).contiguous().view(torch.int32)
    half = 1 << (MANTISSA_SHIFT - 1)
    return (((bits + half) >> MANTISSA_SHIFT) - FIRST_SCALE).clamp(0, 255).to(torch.uint8)


def decode_scales(scale_bytes: Tensor) -> Tensor:
    """Return the scales (float32) of stored bytes."""
    return ((scale_bytes.int() + FIRST_SCALE) << MANTISSA_SHIFT).view(torch.float32)
