"""Dequantized weights of many packed matrices, differentiable in scales and offsets.

Forward and backward each unpack the codes, and nothing is kept between them. On a GPU, a kernel unpacks all matrices
and writes only the weights. On a CPU, torch's operations unpack a few matrices at a time: in float32, all experts of a
layer would take more memory than everything else.

Shapes: E matrices, R rows, C columns, G groups of a row.
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
from gemq.quant.widths import Width

MAX_CHUNK_WEIGHTS = 1 << 26
"""Maximum number of weights that torch's operations unpack in one step. Intermediate results are float32."""


def copy_codes(matrices: Sequence[PackedMatrix]) -> TorchCodes | KernelCodes:
    """Copy the codes of E matrices on one device into the form that the device unpacks."""
    kind = KernelCodes if matrices[0].codes.device.type == "cuda" else TorchCodes
    return kind(matrices)


class TorchCodes:
    """Codes of E matrices, stacked by width, for torch's operations."""

    def __init__(self, matrices: Sequence[PackedMatrix]):
        """Stack the codes of all matrices of each width."""
        self.group_size = matrices[0].group_size
        indices_by_width: dict[Width, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            indices_by_width[matrix.width].append(index)
        device = matrices[0].codes.device
        self.packed: dict[Width, Tensor] = {}
        self.indices: dict[Width, Tensor] = {}
        for width, indices in indices_by_width.items():
            self.packed[width] = torch.stack([matrices[index].codes for index in indices])
            self.indices[width] = torch.tensor(indices, device=device)

    def offloadable_tensors(self) -> list[Tensor]:
        """Return the tensors that can be offloaded between two uses."""
        return list(self.packed.values())

    def unpacked_chunks(self, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the indices [n] int64 and codes [n, R, C] uint8 of a few matrices at a time, over all matrices."""
        for width, indices in self.indices.items():
            packed = self.packed[width]
            chunk = max(1, MAX_CHUNK_WEIGHTS // (packed.shape[1] * columns))
            for chunk_indices, chunk_codes in zip(indices.split(chunk), packed.split(chunk), strict=True):
                yield chunk_indices, unpack_codes(chunk_codes, width, self.group_size)

    def weights(self, scales: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights [E, R, C] in ``dtype``, rounded once."""
        groups = scales.shape[-1]
        columns = groups * self.group_size
        out = torch.empty(*scales.shape[:2], columns, dtype=dtype, device=scales.device)
        for indices, codes in self.unpacked_chunks(columns):
            grouped_codes = codes.unflatten(-1, (groups, -1)).float()
            weight = torch.addcmul(offsets[indices].unsqueeze(-1), grouped_codes, scales[indices].unsqueeze(-1))
            out[indices] = weight.flatten(-2).to(dtype)
        return out

    def grid_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of scales and offsets, [E, R, G] float32, from that of the weights [E, R, C]."""
        experts, rows, columns = gradient.shape
        groups = columns // self.group_size
        grad_scales = gradient.new_zeros(experts, rows, groups, dtype=torch.float32)
        grad_offsets = torch.zeros_like(grad_scales)
        for indices, codes in self.unpacked_chunks(columns):
            grad = gradient[indices].float().unflatten(-1, (groups, -1))
            grad_offsets[indices] = grad.sum(-1)
            grad_scales[indices] = grad.mul_(codes.unflatten(-1, (groups, -1))).sum(-1)
        return grad_scales, grad_offsets


class KernelCodes:
    """Codes of E matrices in one flat buffer, for Triton kernels. Methods as in ``TorchCodes``."""

    def __init__(self, matrices: Sequence[PackedMatrix]):
        """Copy the codes of all matrices into a flat buffer with a table."""
        flat = PackedMatrices(matrices)
        self.codes, self.table, self.group_size, self.levels = flat.codes, flat.table, flat.group_size, flat.levels

    def offloadable_tensors(self) -> list[Tensor]:
        """Return the tensors that can be offloaded between two uses."""
        return [self.codes, self.table]

    def weights(self, scales: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights [E, R, C] in ``dtype``, rounded once."""
        # Triton is installed with torch for CUDA, not with torch for CPUs.
        from gemq.kernels.grouped.dequantize import PackedWeights, dequantize
        from gemq.kernels.grouped.unpack import levels_mask

        _, rows, groups = scales.shape
        grids = scales.contiguous(), offsets.contiguous()
        w = PackedWeights(self.codes, *grids, self.table, None, levels_mask(self.levels), rows, self.group_size)
        return dequantize(w, groups * self.group_size, dtype)

    def grid_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of scales and offsets, [E, R, G] float32, from that of the weights [E, R, C]."""
        from gemq.kernels.grouped.dequantize import grid_gradients
        from gemq.kernels.grouped.unpack import levels_mask

        return grid_gradients(gradient, self.codes, self.table, levels_mask(self.levels), self.group_size)


class _Dequantize(torch.autograd.Function):
    """Differentiable dequantization; see ``dequantize_weights``."""

    @staticmethod
    def forward(
        ctx: Any, scales: Tensor, offsets: Tensor, codes: TorchCodes | KernelCodes, dtype: torch.dtype
    ) -> Tensor:
        """Return the weights."""
        ctx.codes = codes
        return codes.weights(scales, offsets, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of scales and offsets."""
        return (*ctx.codes.grid_gradients(gradient), None, None)


def dequantize_weights(scales: Tensor, offsets: Tensor, codes: TorchCodes | KernelCodes, dtype: torch.dtype) -> Tensor:
    """Return ``scale * code + offset``, differentiable in scales and offsets.

    Args:
        scales: [E, R, G] float32
        offsets: [E, R, G] float32
        codes: codes of the E matrices
        dtype: dtype of the result

    Returns:
        [E, R, C] in ``dtype``.
    """
    return _Dequantize.apply(scales, offsets, codes, dtype)
