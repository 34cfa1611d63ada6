"""Products of routed tokens with their experts' weights: torch's grouped product on tensor cores, or a loop.

The grouped product is for bfloat16 on a GPU. It never waits for the device.

Shapes: P pairs of token and expert, sorted by expert, E experts, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.activation import SILU, Activation, activation_of
from gemq.runtime.compat import transformers_private

ALIGNMENT = 8
"""Rows and columns must be multiples of this, which is 16 bytes."""


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Returns whether ``linear`` supports rows like x [P, C] with each of these weights [E, R, C]."""
    return (
        x.device.type == "cuda"
        and all(x.dtype == weight.dtype == torch.bfloat16 for weight in weights)
        and not any(size % ALIGNMENT for weight in weights for size in weight.shape[1:])
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


class _GroupedLinear(torch.autograd.Function):
    """One linear per expert as a single grouped product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """x [P, C], weight [E, R, C], ends [E] -> [P, R]."""
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient [P, R] -> gradients of x and weight."""
        x, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = F.grouped_mm(gradient, weight, offs=ends) if ctx.needs_input_grad[0] else None
        # the weight's own layout [R, C]: the training step of the weight reads it in that order
        grad_weight = F.grouped_mm(gradient.mT, x, offs=ends) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Applies one linear per expert as a grouped product. Differentiable in x and weight.

    Args:
        x: [P, C]
        weight: [E, R, C]
        ends: [E] int32 on the device, the end of each expert's pairs; the last is P

    Returns:
        [P, R].
    """
    return _GroupedLinear.apply(x.contiguous(), weight, ends)


class _LoopedLinear(torch.autograd.Function):
    """One linear per expert in a loop.

    Every product is written to its place in the result, since a concatenation costs up to a third of the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
        """x [P, C], weight [E, R, C], bias [E, R] -> [P, R]."""
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        output = x.new_empty(len(x), weight.shape[1])
        for e, (x_rows, output_rows) in enumerate(zip(x.split(counts), output.split(counts), strict=True)):
            if not len(x_rows):
                continue
            if bias is None:
                torch.mm(x_rows, weight[e].T, out=output_rows)
            else:
                torch.addmm(bias[e], x_rows, weight[e].T, out=output_rows)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient [P, R] -> gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = weight.new_empty(weight.shape) if needs_weight else None
        grad_bias = gradient.new_zeros(weight.shape[:2]) if needs_bias else None
        start = 0
        for e, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            start += count
            if grad_weight is not None and count:
                torch.mm(gradient[rows].T, x[rows], out=grad_weight[e])
            elif grad_weight is not None:
                grad_weight[e].zero_()
            if grad_x is not None and count:
                torch.mm(gradient[rows], weight[e], out=grad_x[rows])
            if grad_bias is not None:
                grad_bias[e] = gradient[rows].sum(0)
        return grad_x, grad_weight, grad_bias, None


def looped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """Applies one linear per expert in a loop. Differentiable in x, weight and bias.

    Args:
        x: [P, C]
        weight: [E, R, C]
        bias: [E, R], or None
        counts: number of pairs of each expert

    Returns:
        [P, R].
    """
    return _LoopedLinear.apply(x, weight, bias, counts)


def gate(module: Any, x: Tensor) -> Tensor:
    """Applies an experts module's gate, [P, 2 I] -> [P, I]: SiLU gates as one kernel, others as the module does."""
    from gemq.kernels.training.expert_ops import silu_gate  # triton comes with torch for CUDA, not for CPUs

    is_silu_gate = activation_of(module) == Activation(SILU, gated=True)
    return silu_gate(x) if is_silu_gate else transformers_private.expert_activation(module)(x)
