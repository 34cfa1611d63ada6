"""Keeps the parameters that all ranks train identical across ranks, in each mode of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemq.runtime.ranks import Ranks


class GradientSync:
    """No communication: there is one rank, or all ranks compute the same gradients bit for bit, as CPUs do."""

    def sync_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make the gradients of replicated parameters equal on all ranks."""

    def all_reduce(self, total: Tensor) -> None:
        """Replace a sum over this rank's windows by the sum over all windows, in place."""

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over ranks of a mean over this rank's windows."""
        return value


class BroadcastSync(GradientSync):
    """Every GPU runs all windows and trains a part of the experts.

    GPUs round differently, so the gradients of rank 0 apply to all.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def sync_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Overwrite the gradients with those of rank 0."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
                self.ranks.broadcast_into(parameter.grad, 0)


class ShardedSync(GradientSync):
    """Every rank runs its own windows of each micro-batch. Gradients are summed."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def sync_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients over ranks."""
        set_gradients(parameters, [parameter.grad for parameter in parameters], self.ranks)

    def all_reduce(self, total: Tensor) -> None:
        """Sum over ranks, in place."""
        self.ranks.all_reduce(total)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over ranks. Overwrites ``value``."""
        self.ranks.all_reduce(value)
        return value / self.ranks.count


def gradient_sync(ranks: Ranks, *, windows_sharded: bool, experts_split: bool) -> GradientSync:
    """Return the strategy of a mode of training.

    Args:
        ranks: Processes that train one layer.
        windows_sharded: Whether each rank runs its own windows of every micro-batch.
        experts_split: Whether each rank trains a part of the experts.
    """
    if windows_sharded:
        return ShardedSync(ranks)
    if experts_split and ranks.shards_windows:
        return BroadcastSync(ranks)
    return GradientSync()


def set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], ranks: Ranks) -> None:
    """Set the gradients of parameters to their sum over ``ranks``."""
    if ranks.count > 1:
        local = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            local.append(torch.zeros_like(parameter) if gradient is None else gradient)
        gradients = ranks.all_reduce_coalesced(local)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
