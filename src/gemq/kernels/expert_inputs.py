"""Routing of experts modules that are not called with the usual index and weight: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def routing_of_rows(rows: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Index [R, 1] and weight [R, 1] of batched rows [R, H], R = experts * tokens.

    The router's weight is in the rows already: those of experts that a token did not choose are zero, and get an index
    past the last expert.
    """
    expert = torch.arange(experts, device=rows.device).repeat_interleave(len(rows) // experts)
    index = torch.where((rows != 0).any(-1), expert, experts)
    return index.unsqueeze(1), rows.new_ones(len(rows), 1)


def passed_on(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Tensor:
    """What experts that return their input add: [T, H] for hidden [T, H] and routing [T, K]."""
    idle = top_k_weights.masked_fill(top_k_index < experts, 0)
    return hidden * idle.sum(1, keepdim=True).to(hidden.dtype)
