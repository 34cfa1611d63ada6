"""Gradients through the kernels, and through scales and offsets.

Forward is the kernels', backward the reference's arithmetic, which dequantizes again: no matrix is kept from
one to the other. Packed modules hold scales and offsets as bits, which have no gradient: ``linear_with_grids`` and
``experts_with_grids`` take them as tensors. Distillation trains them through
``kernels.training.differentiable_dequantize`` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gemq.kernels import reference
from gemq.quant.packing import unpack_codes
from gemq.quant.widths import Width

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear


class _ForwardOf(torch.autograd.Function):
    """``forward(*inputs)`` with the gradients of ``twin(*inputs)``; parameters are inputs of neither."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, twin: Callable, count: int, *tensors: Tensor) -> Tensor:
        ctx.twin, ctx.count = twin, count
        ctx.save_for_backward(*tensors)
        return forward(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors
        inputs = [x.detach().requires_grad_(need) for x, need in zip(tensors[: ctx.count], needs, strict=False)]
        # Parameters enter the twin through its module, so they are differentiated as they are.
        sources = [x for x, need in zip([*inputs, *tensors[ctx.count :]], needs, strict=True) if need]
        with torch.enable_grad():
            out = ctx.twin(*inputs)
        found = iter(torch.autograd.grad(out, sources, grad, allow_unused=True))
        return (None, None, None, *(next(found) if need else None for need in needs))


def experts_with_grad(
    forward: Callable, module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``forward(module, hidden, top_k_index, top_k_weights)``, differentiable in all but the indices."""
    return _ForwardOf.apply(
        lambda x, w: forward(module, x, top_k_index, w),
        lambda x, w: reference.experts_forward(module, x, top_k_index, w),
        2,
        hidden,
        top_k_weights,
        *module.parameters(),
    )


def linear_with_grad(forward: Callable, module: PackedLinear, x: Tensor) -> Tensor:
    """``forward(module, x)``, differentiable in x and the bias."""
    return _ForwardOf.apply(
        lambda x: forward(module, x),
        lambda x: reference.linear_forward(module, x),
        1,
        x,
        *module.parameters(),
    )


class _LinearWithGrids(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, width: Width, group_size: int
    ) -> Tensor:
        ctx.save_for_backward(x, codes, scales, offsets)
        ctx.width, ctx.group_size = width, group_size
        return F.linear(x, _weight(codes, scales, offsets, width, group_size)[0].to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales, offsets = ctx.saved_tensors
        weight, groups = _weight(codes, scales, offsets, ctx.width, ctx.group_size)
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_scales = grad_offsets = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            # w = scale * code + offset, so both gradients are sums over a group of dL/dw.
            of_weight = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float().view_as(groups)
            grad_scales = (of_weight * groups).sum(-1).to(scales.dtype)
            grad_offsets = of_weight.sum(-1).to(offsets.dtype)
        return grad_x, None, grad_scales, grad_offsets, None, None


def _weight(codes: Tensor, scales: Tensor, offsets: Tensor, width: Width, group_size: int) -> tuple[Tensor, Tensor]:
    """float32 [rows, columns], and the codes as float32 [rows, groups, group_size]."""
    groups = unpack_codes(codes, width, group_size).float().view(*scales.shape, group_size)
    weight = torch.addcmul(offsets.float()[..., None], groups, scales.float()[..., None])
    return weight.view(scales.shape[0], -1), groups


def linear_with_grids(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    width: Width,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., columns] times a packed matrix with given grids -> [..., rows]. Differentiable in all but the codes.

    codes:           [rows, groups * bytes per group] uint8
    scales, offsets: [rows, groups], of any float dtype
    """
    y = _LinearWithGrids.apply(x, codes, scales, offsets, width, group_size)
    return y if bias is None else y + bias.to(y.dtype)


def experts_with_grids(
    module: PackedExperts,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    grids: dict[str, tuple[Tensor, Tensor]],
) -> Tensor:
    """``reference.experts_forward`` with given grids, differentiable in them too.

    grids: projection -> (scales, offsets), [E, rows, groups] each, of any float dtype
    """

    def product(name: str, expert: int, x: Tensor) -> Tensor:
        matrices = getattr(module, name)
        scales, offsets = (grid[expert] for grid in grids[name])
        width = matrices.widths[expert]
        return linear_with_grids(x, matrices.matrix(expert).codes, scales, offsets, width, matrices.group_size)

    return reference.experts_forward(module, hidden, top_k_index, top_k_weights, product)
