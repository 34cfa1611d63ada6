"""Dense matrices from trellis codes, differentiable in their row scales.

Forward and backward each decode, and nothing dense is kept between them. On a GPU, one kernel decodes matrices of all
widths. On a CPU, torch's operations decode one matrix at a time.

Shapes: E matrices, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.quant.grid import decode_scales

ALL = slice(None)
"""All experts of a layer."""


class _Weight(torch.autograd.Function):
    """Differentiable dense matrices; see ``trellis_weight``."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, matrices: TrellisMatrices, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return the matrices."""
        ctx.matrices, ctx.experts, ctx.dtype = matrices, experts, scales.dtype
        rows, columns = matrices.rows, matrices.columns
        if matrices.codes.device.type == "cuda":
            # Triton is installed with torch for CUDA, not with torch for CPUs.
            from gemq.kernels.trellis.dense_kernel import dense

            tensors = (matrices.codes, matrices.table[experts], scales.contiguous())
            return dense(*tensors, rows, columns, matrices.state_bits, dtype)
        out = torch.empty(len(scales), rows, columns, dtype=dtype, device=scales.device)
        for target, scale, unscaled in zip(out, scales, _unscaled(matrices, experts), strict=True):
            target.copy_(unscaled * scale.unsqueeze(1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the scales."""
        matrices: TrellisMatrices = ctx.matrices
        if gradient.device.type == "cuda":
            from gemq.kernels.trellis.dense_kernel import scale_gradients

            table = matrices.table[ctx.experts]
            grad_scales = scale_gradients(gradient, matrices.codes, table, matrices.state_bits)
        else:
            grad_scales = gradient.new_empty(gradient.shape[:2], dtype=torch.float32)
            for target, grad, unscaled in zip(grad_scales, gradient, _unscaled(matrices, ctx.experts), strict=True):
                torch.sum(unscaled.mul_(grad), 1, out=target)
        return grad_scales.to(ctx.dtype), None, None, None


def _unscaled(matrices: TrellisMatrices, experts: slice) -> Iterator[Tensor]:
    """Yield the weights of a range of experts before row scales: [R, C] float32 each."""
    for expert in range(matrices.num_experts)[experts]:
        yield matrices.matrix(expert).unscaled()


def dequantize_expert(matrices: TrellisMatrices, expert: int, dtype: torch.dtype) -> Tensor:
    """As ``matrices.dequantize(expert, dtype)``, by a kernel on a GPU."""
    experts = slice(expert, expert + 1)
    return trellis_weight(matrices, decode_scales(matrices.scales[experts]), experts, dtype)[0]


def trellis_weight(
    matrices: TrellisMatrices, scales: Tensor, experts: slice = ALL, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return dense matrices, differentiable in their row scales.

    Args:
        matrices: gives the codes. Its own scales are not used
        scales: [E, R] of any float type
        experts: range of E experts
        dtype: dtype of the result

    Returns:
        [E, R, C] in ``dtype``, computed in float32 and rounded once.
    """
    return _Weight.apply(scales, matrices, experts, dtype)
