"""How far one prediction is from another. Knows no files; V is the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemq.models.stream import Replay

ROWS = 1024
"""Positions whose logits are compared at once: bounds the memory that a large vocabulary takes."""


def chunks(positions: int) -> Iterator[slice]:
    """The slices in which ``positions`` positions are compared."""
    return (slice(start, min(start + ROWS, positions)) for start in range(0, positions, ROWS))


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, summed over positions, from log probabilities [positions, V]."""
    return (log_p.exp() * (log_p - log_q)).sum().item()


@torch.no_grad()
def window_kl(replay: Replay, ids: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """KL(full precision || candidate) per token of each window, in nats: float64 [B], from last hidden states.

    ids: int64 [B, S]; teacher, student: [B, S, H]. The tail is the model's own for both. As in ``evaluate``, what
    would predict the token behind the window does not count.
    """
    expected, logits = replay.logits(ids, teacher), replay.logits(ids, student)
    positions = ids.shape[1] - 1
    kl = torch.zeros(len(ids), dtype=torch.float64)
    for row in range(len(ids)):
        for part in chunks(positions):
            log_p, log_q = (x[row, part].float().log_softmax(-1) for x in (expected, logits))
            kl[row] += divergence(log_p, log_q)
    return kl / positions
