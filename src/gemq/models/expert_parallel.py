"""Expert parallelism: each rank computes the pairs of token and expert whose experts it holds.

On GPUs, where experts run as grouped products, each rank sums over its pairs and the sums are all-reduced. Modules
around the experts run on each rank's windows of a micro-batch if these can be divided (``sharded``), and the inputs of
the experts are all-gathered. Otherwise every rank runs them on all windows. On a CPU the result equals that of one rank
bit for bit: pairs are concatenated, never summed.

Shapes: P pairs of token and expert, sorted by expert, T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemq.models import grouped
from gemq.models.structure import Experts
from gemq.runtime.ranks import Ranks

_SHARDING = "gemq_split"
"""Attribute of an experts module that is sharded."""


@dataclass(frozen=True)
class ExpertSharding:
    """``count`` experts divided over ``ranks``. The module holds the weights of this rank's experts.

    Attributes:
        ranks: the processes that share the experts
        count: number of experts of all ranks
        sharded: every rank has other tokens [T', ...], equally many; otherwise all ranks have the same tokens
    """

    ranks: Ranks
    count: int
    sharded: bool = False

    @property
    def local_experts(self) -> slice:
        """This rank's experts."""
        return self.ranks.local_slice(self.count)

    def broadcast_routing(self, top_k_index: Tensor) -> Tensor:
        """Returns rank 0's routing [T, K] on all ranks: on GPUs, rounding could make it differ."""
        if self.sharded or top_k_index.device.type == "cpu":
            return top_k_index
        index = top_k_index.contiguous().clone()
        self.ranks.broadcast_into(index, 0)
        return index

    def all_gather(self, rows: Tensor) -> Tensor:
        """Returns the rows [T, ...] of the tokens of all ranks."""
        return self.ranks.all_gather(rows) if self.sharded else rows

    def reduce(self, rows: Tensor) -> Tensor:
        """Returns the sum of ``rows`` [T, ...] over ranks, for the tokens of this rank. Overwrites ``rows``."""
        if self.sharded:
            return self.ranks.reduce_scatter(rows)
        self.ranks.all_reduce(rows)
        return rows

    def rows_by_rank(self, counts: Sequence[int]) -> list[slice]:
        """Returns each rank's range of pairs, where ``counts`` are the pairs of each expert."""
        ends = [0, *itertools.accumulate(counts)]
        return [slice(ends[experts.start], ends[experts.stop]) for experts in self.ranks.slices(self.count)]

    def local_pairs(self, rows: Tensor, rows_by_rank: list[slice]) -> Tensor:
        """Selects this rank's rows of [P, H], which all ranks have. Their gradients are gathered from all ranks."""
        return _LocalPairs.apply(rows, self.ranks, rows_by_rank)

    def gather_pairs(self, local_rows: Tensor, rows_by_rank: list[slice]) -> Tensor:
        """Gathers the rows [P, H] of all pairs on every rank. Their gradient must be equal on all ranks."""
        return _GatherPairs.apply(local_rows, self.ranks, rows_by_rank)

    def gather_weights(self, top_k_weights: Tensor) -> Tensor:
        """Returns the routing weights [T, K] of all tokens, of which every rank uses a part.

        Their gradient is summed over ranks.
        """
        return _GatherWeights.apply(top_k_weights, self)


def local_expert_slice(model: Any, experts: Experts, ranks: Ranks) -> slice:
    """Returns this rank's experts of a layer that runs on several ranks.

    These are all experts where the module's class computes them itself (see ``models.experts_adapter``). Such a module
    is not sharded.
    """
    is_adopted = hasattr(model.get_submodule(experts.path), "batched_rows")
    return slice(0, experts.count) if is_adopted else ranks.local_slice(experts.count)


def can_shard_windows(model: Any, experts: Experts, ranks: Ranks) -> bool:
    """Returns whether ranks can run a layer's experts on other tokens each. Only grouped products support this."""
    if local_expert_slice(model, experts, ranks) == slice(0, experts.count):
        return False
    module = model.get_submodule(experts.path)
    x = torch.empty(0, dtype=model.dtype, device=ranks.device)
    return grouped.usable(x, *(getattr(module, matrix.name) for matrix in experts.matrices))


@contextmanager
def shard_experts(model: Any, experts: Experts | None, ranks: Ranks, sharded: bool = False) -> Iterator[None]:
    """Shards a layer's experts while the context is open.

    Args:
        model: its layer holds the weights of this rank's experts (see ``local_expert_slice``)
        experts: of the layer; None in a dense layer
        ranks: the processes that share the experts
        sharded: whether every rank runs other tokens
    """
    if experts is None or local_expert_slice(model, experts, ranks) == slice(0, experts.count):
        yield
        return
    module = model.get_submodule(experts.path)
    setattr(module, _SHARDING, ExpertSharding(ranks, experts.count, sharded))
    try:
        yield
    finally:
        delattr(module, _SHARDING)


def gather_experts(model: Any, experts: Experts, ranks: Ranks, local_tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gathers tensors [E, ...] of all experts from those of each rank's experts (see ``local_expert_slice``)."""
    if local_expert_slice(model, experts, ranks) == slice(0, experts.count):
        return [ranks.broadcast(tensor, 0) for tensor in local_tensors]
    return ranks.all_gather_cat(local_tensors)


def sharding_of(module: Any) -> ExpertSharding | None:
    """Returns the sharding of an experts module; None if it holds all experts."""
    return getattr(module, _SHARDING, None)


class _GatherWeights(torch.autograd.Function):
    """All-gather whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, sharding: ExpertSharding) -> Tensor:
        """[T', K] -> [T, K]."""
        ctx.sharding = sharding
        gathered = sharding.all_gather(weights)
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """[T, K] -> [T', K]."""
        return ctx.sharding.reduce(gradient.contiguous().clone()), None


class _LocalPairs(torch.autograd.Function):
    """Selection of this rank's rows, whose gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, rows_by_rank: list[slice]) -> Tensor:
        """[P, H] -> [P', H]."""
        ctx.ranks, ctx.rows_by_rank, ctx.num_pairs = ranks, rows_by_rank, len(rows)
        return rows[rows_by_rank[ranks.rank]].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """[P', H] -> [P, H]."""
        return _gather_rows(gradient, ctx.ranks, ctx.rows_by_rank, ctx.num_pairs), None, None


class _GatherPairs(torch.autograd.Function):
    """Gather of all ranks' rows, whose gradient is selected."""

    @staticmethod
    def forward(ctx: Any, local_rows: Tensor, ranks: Ranks, rows_by_rank: list[slice]) -> Tensor:
        """[P', H] -> [P, H]."""
        ctx.ranks, ctx.rows_by_rank = ranks, rows_by_rank
        return _gather_rows(local_rows, ranks, rows_by_rank, rows_by_rank[-1].stop)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """[P, H] -> [P', H]."""
        return gradient[ctx.rows_by_rank[ctx.ranks.rank]].contiguous(), None, None


def _gather_rows(local_rows: Tensor, ranks: Ranks, rows_by_rank: list[slice], num_pairs: int) -> Tensor:
    """Returns the rows [P, H] of all ranks, where each rank has its range of ``rows_by_rank``."""
    rows = local_rows.new_zeros(num_pairs, local_rows.shape[1])
    rows[rows_by_rank[ranks.rank]] = local_rows
    ranks.broadcast_slices(rows, rows_by_rank)
    return rows
