"""Affine grids: matrices as codes, scales and offsets.

One format serves every width: ``w = scale * code + offset`` with one fp16 scale and offset per row and group of
consecutive input columns. One bit is therefore two free levels and every kernel is one formula.
Knows nothing of models or files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """Matrices of one width on their grids. Leading dimensions (experts) are free.

    codes:   [..., rows, columns] uint8, values 0 .. levels - 1
    scales:  [..., rows, columns // group_size] float16
    offsets: [..., rows, columns // group_size] float16
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale * code + offset`` in float32, then rounded once to ``dtype``: [..., rows, columns]."""
    groups, columns = q.scales.shape[-1], q.codes.shape[-1]
    codes = q.codes.reshape(*q.codes.shape[:-1], groups, columns // groups).float()
    w = torch.addcmul(q.offsets.float().unsqueeze(-1), codes, q.scales.float().unsqueeze(-1))
    return w.reshape(q.codes.shape).to(dtype)


def dequantize_each(q: Quantized, dtype: torch.dtype) -> Tensor:
    """``dequantize`` of matrices [E, R, C], one at a time: in float32 all at once may be larger than all else."""
    weight = torch.empty(q.codes.shape, dtype=dtype, device=q.codes.device)
    for one, *parts in zip(weight, *q, strict=True):
        one.copy_(dequantize(Quantized(*parts)))
    return weight
