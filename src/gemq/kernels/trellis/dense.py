"""Dense matrices from trellis codes, differentiable in their row scales.

Forward and backward each decode, and nothing dense is kept between them. On a GPU, one kernel decodes matrices of all
widths. On a CPU, torch's operations decode one matrix at a time.

Shapes: E matrices, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.trellis.experts import ALIGNMENT, TrellisMatrices
from gemq.quant.grid import decode_scales
from gemq.quant.trellis import TILE_SIDE
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth


class FlatCodes(NamedTuple):
    """Codes of E matrices of one shape in a flat buffer, as in ``experts.TrellisMatrices``.

    Attributes:
        codes: uint8, each matrix's codes at a multiple of 16 bytes
        table: [E, 2] integers: eighths of a bit, first byte of codes / 16. Its rows may be any selection of matrices
        columns: C
        state_bits: bits of a state
    """

    codes: Tensor
    table: Tensor
    columns: int
    state_bits: int

    def matrices(self, rows: int) -> Iterator[TrellisMatrix]:
        """Yield the matrices of ``rows`` rows, with scales of zero."""
        row_tiles, column_tiles = rows // TILE_SIDE, self.columns // TILE_SIDE
        for eighths, start in self.table.tolist():
            code_bytes = row_tiles * column_tiles * 4 * eighths
            codes = self.codes[ALIGNMENT * start : ALIGNMENT * start + code_bytes].view(row_tiles, -1)
            yield TrellisMatrix(codes, codes.new_zeros(rows), TrellisWidth(eighths), self.state_bits)


def _unscaled(matrix: TrellisMatrix, rotated: bool) -> Tensor:
    """Return Q B, or Q: [R, C] float32."""
    return matrix.unscaled() if rotated else matrix.values()


def decode_dense(
    codes: Tensor, table: Tensor, rows: int, columns: int, state_bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decode matrices of any widths, without scales and rotation.

    Args:
        codes: uint8, each matrix's codes at a multiple of 16 bytes
        table: [E, 2] integers: eighths of a bit, first byte of codes / 16
        rows: R
        columns: C
        state_bits: bits of a state
        dtype: dtype of the result

    Returns:
        Q, [E, R, C] in ``dtype``.
    """
    if codes.device.type == "cuda":
        # Triton is installed with torch for CUDA, not with torch for CPUs.
        from gemq.kernels.trellis.dense_kernel import dense

        return dense(codes, table, None, rows, columns, state_bits, False, dtype)
    out = torch.empty(len(table), rows, columns, dtype=dtype, device=codes.device)
    for target, matrix in zip(out, FlatCodes(codes, table, columns, state_bits).matrices(rows), strict=True):
        target.copy_(matrix.values())
    return out


class _Weight(torch.autograd.Function):
    """Differentiable dense matrices; see ``trellis_weight``."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, flat: FlatCodes, rotated: bool, dtype: torch.dtype) -> Tensor:
        """Return the matrices."""
        ctx.flat, ctx.rotated, ctx.dtype = flat, rotated, scales.dtype
        experts, rows = scales.shape
        if flat.codes.device.type == "cuda":
            from gemq.kernels.trellis.dense_kernel import dense

            tensors = (flat.codes, flat.table, scales.contiguous())
            return dense(*tensors, rows, flat.columns, flat.state_bits, rotated, dtype)
        out = torch.empty(experts, rows, flat.columns, dtype=dtype, device=scales.device)
        for target, scale, matrix in zip(out, scales, flat.matrices(rows), strict=True):
            target.copy_(_unscaled(matrix, rotated) * scale.unsqueeze(1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the scales."""
        flat: FlatCodes = ctx.flat
        if gradient.device.type == "cuda":
            from gemq.kernels.trellis.dense_kernel import scale_gradients

            grad_scales = scale_gradients(gradient, flat.codes, flat.table, flat.state_bits, ctx.rotated)
        else:
            grad_scales = gradient.new_empty(gradient.shape[:2], dtype=torch.float32)
            for target, grad, matrix in zip(grad_scales, gradient, flat.matrices(gradient.shape[1]), strict=True):
                torch.sum(_unscaled(matrix, ctx.rotated).mul_(grad), 1, out=target)
        return grad_scales.to(ctx.dtype), None, None, None


def dequantize_expert(matrices: TrellisMatrices, expert: int, dtype: torch.dtype) -> Tensor:
    """As ``matrices.dequantize(expert, dtype)``, by a kernel on a GPU."""
    flat = FlatCodes(matrices.codes, matrices.table[expert : expert + 1], matrices.columns, matrices.state_bits)
    return trellis_weight(flat, decode_scales(matrices.scales[expert : expert + 1]), dtype=dtype)[0]


def trellis_weight(flat: FlatCodes, scales: Tensor, rotated: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return dense matrices, differentiable in their row scales.

    Args:
        flat: the matrices' codes
        scales: [E, R] of any float type
        rotated: whether the matrices multiply plain inputs, as diag(scales) Q B, or rotated ones, as diag(scales) Q
        dtype: dtype of the result

    Returns:
        [E, R, C] in ``dtype``, computed in float32 and rounded once.
    """
    return _Weight.apply(scales, flat, rotated, dtype)
