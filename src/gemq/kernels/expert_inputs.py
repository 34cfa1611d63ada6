"""What differs between the experts modules of families: the first matrix, biases, and how they are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def first_matrix_name(module: Any) -> str:
    """Return the name of an experts module's first matrix."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def projections_with_bias(module: Any) -> list[tuple[Any, Tensor | None]]:
    """Return gate and up (or up alone), and down, each with its bias [E, rows] or None."""
    names = (first_matrix_name(module), "down_proj")
    return [(getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None) for name in names]


def routing_from_batched_rows(rows: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return routing for a family that passes its experts one batch of rows per expert.

    The router's weight is already multiplied into the rows. Rows of experts that a token did not choose are zero.
    They get an index past the last expert.

    Args:
        rows: [R, H] with R = experts * tokens
        experts: number of experts

    Returns:
        Expert index [R, 1] and weight [R, 1].
    """
    expert = torch.arange(experts, device=rows.device).repeat_interleave(len(rows) // experts)
    index = torch.where((rows != 0).any(-1), expert, experts)
    return index.unsqueeze(1), rows.new_ones(len(rows), 1)


def identity_experts_output(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Tensor:
    """Return the contribution of identity experts, which return their input.

    Args:
        hidden: [T, H]
        top_k_index: [T, K]; identity experts have the indices from ``experts`` up
        top_k_weights: [T, K]
        experts: number of experts with weights

    Returns:
        [T, H], the input times the sum of the identity experts' weights.
    """
    identity_weights = top_k_weights.masked_fill(top_k_index < experts, 0)
    return hidden * identity_weights.sum(1, keepdim=True).to(hidden.dtype)
