"""Sorts the routing of an experts call by expert.

Shapes: T tokens, K experts per token, P = T * K pairs of token and expert, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class RoutedPairs:
    """Pairs of token and expert of one experts call, sorted by expert.

    Attributes:
        token: [P] int64, row of the call's hidden states
        expert: [P] int64
        weight: [P] routing weights, differentiable where the call's weights are
        ends: [E] int32 on the device, the end of each expert's pairs
        positions: [T, K] int64, positions of a token's pairs; None unless all T * K pairs are included
        bias_experts: [E] int64, the experts whose biases apply, where these are not experts 0 to E - 1 of the module
        num_valid: [1] int32 on the device, number of pairs before those that ``route`` would drop; None if none
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    ends: Tensor
    positions: Tensor | None = None
    bias_experts: Tensor | None = None
    num_valid: Tensor | None = None

    @cached_property
    def counts(self) -> list[int]:
        """Number of pairs of each expert. Waits for the device on first access."""
        return _lengths(self.ends.tolist())

    def stack_copies(self, experts: slice, copies: int) -> RoutedPairs:
        """Selects the pairs of some experts and repeats them, each copy with expert numbers of its own.

        Args:
            experts: range of E' experts, with a start and a stop
            copies: number of versions of the experts' weights

        Returns:
            Pairs for stacked weights [copies * E', ...].
        """
        counts = self.counts[experts]
        start, num_pairs = sum(self.counts[: experts.start]), sum(counts)
        rows = slice(start, start + num_pairs)
        copy_index = torch.arange(copies, device=self.token.device).unsqueeze(1)
        repeated = RoutedPairs(
            token=self.token[rows].repeat(copies),
            expert=(self.expert[rows] - experts.start + copy_index * len(counts)).flatten(),
            weight=self.weight[rows].repeat(copies),
            ends=(self.ends[experts] - start + copy_index.int() * num_pairs).flatten(),
            bias_experts=torch.arange(experts.start, experts.stop, device=self.token.device).repeat(copies),
        )
        repeated.counts = counts * copies
        return repeated


def route(top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> RoutedPairs:
    """Sorts a call's routing by expert. Drops pairs whose index is past the last expert.

    Args:
        top_k_index: [T, K] int64
        top_k_weights: [T, K]
        experts: number of experts
    """
    expert, order, ends = _sort(top_k_index, experts)
    counts = _lengths(ends.tolist())
    num_pairs = sum(counts)
    order = order[:num_pairs]
    token = order // top_k_index.shape[-1]
    pairs = RoutedPairs(token, expert[:num_pairs], top_k_weights.reshape(-1)[order], ends)
    pairs.counts = counts
    return pairs


def route_without_sync(top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> RoutedPairs:
    """Like ``route``, but never waits for the device.

    Pairs whose index is past the last expert are assigned to the last expert with a weight of zero.
    """
    expert, order, ends = _sort(top_k_index, experts)
    weight = top_k_weights.reshape(-1)[order]
    weight = torch.where(expert < experts, weight, torch.zeros_like(weight))
    num_valid = ends[-1:].clone()
    ends[-1:].fill_(len(order))  # assigning a Python number would wait for the device
    token = order // top_k_index.shape[-1]
    return RoutedPairs(
        token,
        expert.clamp(max=experts - 1),
        weight,
        ends,
        positions=_positions(order, top_k_index),
        num_valid=num_valid,
    )


def route_local(top_k_index: Tensor, top_k_weights: Tensor, local_experts: slice) -> RoutedPairs:
    """Sorts the pairs of local experts to the front, numbered from the first local one. Never waits for the device.

    All other pairs follow them and belong to no expert.

    Args:
        top_k_index: [T, K] int64
        top_k_weights: [T, K]
        local_experts: range of experts, with a start and a stop
    """
    count = local_experts.stop - local_experts.start
    is_local = (top_k_index >= local_experts.start) & (top_k_index < local_experts.stop)
    local_index = torch.where(is_local, top_k_index - local_experts.start, count)
    expert, order, ends = _sort(local_index, count)
    return RoutedPairs(
        token=order // top_k_index.shape[-1],
        expert=expert.clamp(max=count - 1),
        weight=top_k_weights.reshape(-1)[order],
        ends=ends,
        positions=_positions(order, top_k_index),
        bias_experts=torch.arange(local_experts.start, local_experts.stop, device=order.device),
    )


def _positions(order: Tensor, top_k_index: Tensor) -> Tensor:
    """Returns the position [T, K] of each pair in ``order`` [T * K]."""
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return positions.view(top_k_index.shape)


def _lengths(ends: list[int]) -> list[int]:
    """Returns the lengths of consecutive ranges from their ends."""
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _sort(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts pairs by expert.

    Returns:
        The experts of the sorted pairs [T * K], the pairs' original positions [T * K], and ``RoutedPairs.ends``.
    """
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    expert_ids = torch.arange(experts, device=expert.device, dtype=expert.dtype)
    return expert, order, torch.searchsorted(expert, expert_ids, right=True, out_int32=True)
