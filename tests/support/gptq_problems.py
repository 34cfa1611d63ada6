"""Random weights and Hessians for tests of GPTQ, and the objective that it minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.quant.grid import Quantized
from gemq.quant.widths import Width

ALL = tuple(Width)
DAMPENING = 0.01


def inputs(experts: int, tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs [E, T, C] with columns of uneven size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, tokens, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(experts, columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    return (x + x @ mix) * torch.rand(columns, generator=generator, dtype=torch.float64).add(0.1)


def problem(experts: int = 2, rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [E, R, C] float32 and Hessians [E, C, C] float64."""
    x = inputs(experts, 4 * columns, columns, seed)
    weight = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed + 99)) * 0.05
    return weight, x.mT @ x / x.shape[1]


def objective(weight: Tensor, q: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) in float64, summed over leading dimensions."""
    error = weight.double() - q.double()
    return ((error @ hessian.double()) * error).sum((-1, -2))


def pick(q: Quantized, width: int, expert: int | None = None) -> Quantized:
    return Quantized(*(t[width] if expert is None else t[width, expert] for t in q))
