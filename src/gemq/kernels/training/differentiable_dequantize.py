"""Weights of many packed matrices in the compute type, differentiable in scales and offsets, with nothing kept between.

Forward and backward each unpack the codes. On a GPU a kernel does it, which writes the weights and nothing else; with
torch's operations some matrices at a time, for in float32 a layer's experts all at once take more memory than all else.
Shapes: E matrices, R rows, C columns, G groups a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.modules import PackedMatrices
from gemq.quant.packing import PackedMatrix, unpack_codes
from gemq.quant.widths import LEVELS, Width

UNPACKED_TOGETHER = 1 << 26
"""Weights that torch's operations unpack at once: in float32 on their way."""


def codes_of(matrices: Sequence[PackedMatrix], widths: Sequence[Width], group_size: int) -> TorchCodes | KernelCodes:
    """Codes of E matrices on one device, as that device unpacks them."""
    kind = KernelCodes if matrices[0].codes.device.type == "cuda" else TorchCodes
    return kind(matrices, widths, group_size)


class TorchCodes:
    """E matrices' codes, those of one width together."""

    def __init__(self, matrices: Sequence[PackedMatrix], widths: Sequence[Width], group_size: int):
        self.group = group_size
        members: dict[Width, list[int]] = defaultdict(list)
        for e, width in enumerate(widths):
            members[width].append(e)
        self.packed = {w: torch.stack([matrices[e].codes for e in some]) for w, some in members.items()}
        self.places = {w: torch.tensor(some, device=matrices[0].codes.device) for w, some in members.items()}

    def held(self) -> list[Tensor]:
        """Tensors that can wait elsewhere."""
        return list(self.packed.values())

    def unpacked(self, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of some matrices, [n] int64, and their codes [n, R, C] uint8, until all were given."""
        for width, places in self.places.items():
            packed = self.packed[width]
            most = max(1, UNPACKED_TOGETHER // (packed.shape[1] * columns))
            for some, codes in zip(places.split(most), packed.split(most), strict=True):
                yield some, unpack_codes(codes, width, self.group)

    def weights(self, scales: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, R, C] in ``dtype``, rounded once."""
        columns = scales.shape[-1] * self.group
        out = torch.empty(*scales.shape[:2], columns, dtype=dtype, device=scales.device)
        for some, part in self.unpacked(columns):
            groups = part.unflatten(-1, (scales.shape[-1], -1)).float()
            weight = torch.addcmul(offsets[some].unsqueeze(-1), groups, scales[some].unsqueeze(-1))
            out[some] = weight.flatten(-2).to(dtype)
        return out

    def grid_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of scales and offsets, [E, R, G] float32, from that of the weights [E, R, C]."""
        groups = gradient.shape[-1] // self.group
        of_scales, of_offsets = (gradient.new_zeros(*gradient.shape[:2], groups, dtype=torch.float32) for _ in range(2))
        for some, part in self.unpacked(gradient.shape[-1]):
            slope = gradient[some].float().unflatten(-1, (groups, -1))
            of_offsets[some] = slope.sum(-1)
            of_scales[some] = slope.mul_(part.unflatten(-1, (groups, -1))).sum(-1)
        return of_scales, of_offsets


class KernelCodes:
    """E matrices' codes one after the other, for Triton kernels. Functions as of ``TorchCodes``."""

    def __init__(self, matrices: Sequence[PackedMatrix], widths: Sequence[Width], group_size: int):
        flat = PackedMatrices(matrices, widths, group_size)
        self.codes, self.table, self.group = flat.codes, flat.table, group_size
        self.levels = [LEVELS[width] for width in set(widths)]

    def held(self) -> list[Tensor]:
        return [self.codes, self.table]

    def weights(self, scales: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        from gemq.kernels.grouped.dequantize import (  # triton comes with torch for CUDA, not for CPUs
            dequantize,
            levels_mask,
        )

        rows, columns = scales.shape[1], scales.shape[2] * self.group
        grids = scales.contiguous(), offsets.contiguous()
        return dequantize(self.codes, *grids, self.table, levels_mask(self.levels), rows, columns, self.group, dtype)

    def grid_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        from gemq.kernels.grouped.dequantize import grid_gradients, levels_mask

        return grid_gradients(gradient, self.codes, self.table, levels_mask(self.levels), self.group)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scales: Tensor, offsets: Tensor, codes: TorchCodes | KernelCodes, dtype: torch.dtype
    ) -> Tensor:
        ctx.codes = codes
        return codes.weights(scales, offsets, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.codes.grid_gradients(gradient), None, None)


def weights(scales: Tensor, offsets: Tensor, codes: TorchCodes | KernelCodes, dtype: torch.dtype) -> Tensor:
    """``scale * code + offset``: [E, R, C] in ``dtype``.

    scales, offsets: [E, R, G] float32
    """
    return _Weights.apply(scales, offsets, codes, dtype)
