"""How far one prediction is from another. Pure functions on tensors; V is the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ROWS = 1024
"""Positions whose logits are compared at once: bounds the memory that a large vocabulary takes."""


def chunks(positions: int) -> Iterator[slice]:
    """The slices in which ``positions`` positions are compared."""
    return (slice(start, min(start + ROWS, positions)) for start in range(0, positions, ROWS))


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, summed over positions, from log probabilities [positions, V]."""
    return (log_p.exp() * (log_p - log_q)).sum().item()
