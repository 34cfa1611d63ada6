"""Products of routed tokens with their experts' weights: torch's grouped product on tensor cores, or a loop.

The grouped product is for bfloat16 on a GPU and waits for nothing.
Shapes: P pairs sorted by expert, E experts, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.activation import SILU, Activation, activation_of

ALIGNMENT = 8
"""Rows and columns are multiples of this: 16 bytes."""


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Whether ``linear`` takes rows like x [P, C] with each of these weights [E, R, C]."""
    return (
        x.device.type == "cuda"
        and all(x.dtype == weight.dtype == torch.bfloat16 for weight in weights)
        and not any(size % ALIGNMENT for weight in weights for size in weight.shape[1:])
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = F.grouped_mm(gradient, weight, offs=ends) if ctx.needs_input_grad[0] else None
        # rows of the result are the weight's: what trains the weight reads it in that order
        of_weight = F.grouped_mm(gradient.mT, x, offs=ends) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


def linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [P, C] and weight [E, R, C] -> [P, R], differentiable in both.

    ends: [E] int32 on the device, where each expert's pairs end; the last is P
    """
    return _Linear.apply(x.contiguous(), weight, ends)


class _Looped(torch.autograd.Function):
    """Every product lands where it belongs: putting parts together costs as much as a third of the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        for e, (rows, into) in enumerate(zip(x.split(counts), out.split(counts), strict=True)):
            if not len(rows):
                continue
            if bias is None:
                torch.mm(rows, weight[e].T, out=into)
            else:
                torch.addmm(bias[e], rows, weight[e].T, out=into)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        wanted = ctx.needs_input_grad
        of_x = torch.empty_like(x) if wanted[0] else None
        of_weight = weight.new_empty(weight.shape) if wanted[1] else None
        of_bias = gradient.new_zeros(weight.shape[:2]) if wanted[2] else None
        start = 0
        for e, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            start += count
            if of_weight is not None and count:
                torch.mm(gradient[rows].T, x[rows], out=of_weight[e])
            elif of_weight is not None:
                of_weight[e].zero_()
            if of_x is not None and count:
                torch.mm(gradient[rows], weight[e], out=of_x[rows])
            if of_bias is not None:
                of_bias[e] = gradient[rows].sum(0)
        return of_x, of_weight, of_bias, None


def looped(x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """x [P, C] and weight [E, R, C] -> [P, R], plus bias [E, R], differentiable.

    counts: pairs of each expert; one product each
    """
    return _Looped.apply(x, weight, bias, counts)


def gate(module: Any, x: Tensor) -> Tensor:
    """An experts module's gate, [P, 2 I] -> [P, I]: in one pass if it is the usual one."""
    from gemq.kernels.training.expert_ops import silu_gate  # triton comes with torch for CUDA, not for CPUs

    usual = activation_of(module) == Activation(SILU, gated=True)
    return silu_gate(x) if usual else module._apply_gate(x)
