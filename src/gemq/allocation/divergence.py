"""How far one prediction is from another. Knows no files.

Shapes: V vocabulary, N windows, B windows in a micro-batch, S tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.models.replay import Replay
from gemq.runtime.activation_store import Batches

ROWS = 1024
"""Positions whose logits are compared at once: bounds the memory that a large vocabulary takes."""


def chunks(positions: int) -> Iterator[slice]:
    """The slices in which ``positions`` positions are compared."""
    return (slice(start, min(start + ROWS, positions)) for start in range(0, positions, ROWS))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over positions, from log probabilities [positions, V]: float64 scalar."""
    return (log_p.exp() * (log_p - log_q)).sum().double()


@torch.no_grad()
def windows_kl(replay: Replay, start: Activations, exact: Batches, states: Sequence[Batches]) -> list[Tensor]:
    """Each state's KL(full precision || state) per token of each window, in nats: float64 [N], in their stored order.

    start:  the windows in front of the first layer
    exact:  what the last layer gives in full precision; [B, S, H] a micro-batch
    states: what it gives in other models. The tail is the model's own for all of them
    As in ``evaluate``, what would predict the token behind the window does not count.
    """
    found: list[Tensor] = []
    for batch, ids in enumerate(start.ids):
        kl = torch.zeros(len(states), len(ids), dtype=torch.float64, device=replay.device)
        for part in replay.windows_together(ids):
            expected = replay.logits(ids[part], exact[batch][part])[:, :-1].float().log_softmax(-1)
            for i, state in enumerate(states):  # one of them on the device at a time
                kl[i, part] = _of_windows(expected, replay.logits(ids[part], state[batch][part]))
        found.append(kl / (ids.shape[1] - 1))
    every = torch.cat(list(replay.ranks.gather_micro_batches(found, start.total)), 1).cpu()
    return list(torch.empty(len(states), len(start.order), dtype=torch.float64).index_copy_(1, start.order, every))


def _of_windows(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL of each window, summed over positions: float64 [B], from [B, S - 1, V] and [B, S, V]."""
    found = torch.zeros(len(log_p), dtype=torch.float64, device=log_p.device)
    for row, (p, q) in enumerate(zip(log_p, logits, strict=True)):
        for some in chunks(len(p)):
            found[row] += divergence(p[some], q[some].float().log_softmax(-1))
    return found
