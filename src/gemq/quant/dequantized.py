"""Weights of many packed matrices in the compute type, differentiable in scales and offsets, with nothing kept between.

Forward and backward each unpack the codes, some matrices at a time: in float32, a layer's experts all at once take more
memory than all else. Knows tensors only. Shapes: E matrices, R rows, C columns, G groups a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Codes = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives numbers of some matrices, [n] int64 on the device, and their codes [n, R, C] uint8, until all were given."""


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scales: Tensor, offsets: Tensor, codes: Codes, columns: int, dtype: torch.dtype) -> Tensor:
        ctx.codes, ctx.shape = codes, scales.shape
        out = torch.empty(*scales.shape[:2], columns, dtype=dtype, device=scales.device)
        for some, part in codes():
            groups = part.unflatten(-1, (scales.shape[-1], -1)).float()
            weight = torch.addcmul(offsets[some].unsqueeze(-1), groups, scales[some].unsqueeze(-1))
            out[some] = weight.flatten(-2).to(dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_scales, of_offsets = (torch.zeros(ctx.shape, device=gradient.device) for _ in range(2))
        for some, part in ctx.codes():
            groups = part.unflatten(-1, (ctx.shape[-1], -1))
            slope = gradient[some].float().unflatten(-1, (ctx.shape[-1], -1))
            of_offsets[some] = slope.sum(-1)
            of_scales[some] = slope.mul_(groups).sum(-1)
        return of_scales, of_offsets, None, None, None


def weights(scales: Tensor, offsets: Tensor, codes: Codes, columns: int, dtype: torch.dtype) -> Tensor:
    """``scale * code + offset`` in float32, rounded once: [E, R, C] in ``dtype``.

    scales, offsets: [E, R, G] float32
    """
    return _Weights.apply(scales, offsets, codes, columns, dtype)
