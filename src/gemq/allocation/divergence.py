"""KL divergence between the predictions of two models. Must not import files.

Shapes: V vocabulary, N windows, B windows in a micro-batch, S tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.models.replay import Replay
from gemq.runtime.activation_store import ActivationStore

POSITIONS_PER_CHUNK = 1024
"""Positions whose logits are compared in one step: bounds the memory for a large vocabulary."""


def position_chunks(positions: int) -> Iterator[slice]:
    """Yields slices of ``POSITIONS_PER_CHUNK`` positions, out of ``positions``."""
    for start in range(0, positions, POSITIONS_PER_CHUNK):
        yield slice(start, min(start + POSITIONS_PER_CHUNK, positions))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over positions, from log probabilities [positions, V]: float64 scalar."""
    return (log_p.exp() * (log_p - log_q)).sum().double()


@torch.no_grad()
def windows_kl(
    replay: Replay, start: Activations, exact: ActivationStore, states: Sequence[ActivationStore]
) -> list[Tensor]:
    """The mean KL(full precision || model) per token of each window, in nats, for several models.

    All models have the tail of the full-precision model. As in ``evaluate``, the prediction at the last position of a
    window does not count.

    Args:
        replay: the full-precision model.
        start: the windows before the first layer.
        exact: outputs of the last layer in full precision, [B, S, H] per micro-batch.
        states: the same for each model to compare.

    Returns:
        float64 [N] for each model, in the stored order of the windows.
    """
    local_kl: list[Tensor] = []
    for batch, ids in enumerate(start.ids):
        kl = torch.zeros(len(states), len(ids), dtype=torch.float64, device=replay.device)
        for windows in replay.logit_chunks(ids):
            log_p = replay.logits(ids[windows], exact[batch][windows])[:, :-1].float().log_softmax(-1)
            for index, state in enumerate(states):  # one model's logits on the device at a time
                kl[index, windows] = _kl_by_window(log_p, replay.logits(ids[windows], state[batch][windows]))
        local_kl.append(kl / (ids.shape[1] - 1))
    in_batch_order = torch.cat(list(replay.ranks.gather_micro_batches(local_kl, start.total)), 1).cpu()
    result = torch.empty(len(states), len(start.order), dtype=torch.float64)
    return list(result.index_copy_(1, start.order, in_batch_order))


def _kl_by_window(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL of each window, summed over positions: float64 [B], from log_p [B, S - 1, V] and logits [B, S, V]."""
    kl = torch.zeros(len(log_p), dtype=torch.float64, device=log_p.device)
    for seq_len in range(len(log_p)):
        for positions in position_chunks(log_p.shape[1]):
            log_q = logits[seq_len, positions].float().log_softmax(-1)
            kl[seq_len] += kl_divergence(log_p[seq_len, positions], log_q)
    return kl
