"""Expert parallelism: each rank computes the pairs of token and expert whose experts it holds.

On GPUs, where experts run as grouped products, each rank sums over its pairs and the sums are all-reduced. Modules
around the experts run on each rank's windows of a micro-batch if these can be divided (``sharded``), and the inputs of
the experts are all-gathered. Otherwise every rank runs them on all windows. On a CPU the result equals that of one rank
bit for bit: pairs are concatenated, never summed.

Shapes: P routed pairs sorted by expert, H hidden size.
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

_SPLIT = "gemq_split"


@dataclass(frozen=True)
class Split:
    """``count`` experts divided over ``ranks``. The module holds the weights of this rank's experts.

    Attributes:
        sharded: every rank has other tokens [T', ...], equally many; otherwise all ranks have the same tokens
    """

    ranks: Ranks
    count: int
    sharded: bool = False

    @property
    def own(self) -> slice:
        """This rank's experts."""
        return self.ranks.local_slice(self.count)

    def same(self, top_k_index: Tensor) -> Tensor:
        """The routing [T, K] of rank 0, for all ranks: on GPUs, rounding could make it differ."""
        if self.sharded or top_k_index.device.type == "cpu":
            return top_k_index
        chosen = top_k_index.contiguous().clone()
        self.ranks.broadcast_into(chosen, 0)
        return chosen

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows [T, ...] of the tokens of all ranks."""
        return self.ranks.all_gather(rows) if self.sharded else rows

    def reduce(self, rows: Tensor) -> Tensor:
        """The sum of ``rows`` [T, ...] over ranks, for the tokens of this rank. Overwrites ``rows``."""
        if self.sharded:
            return self.ranks.reduce_scatter(rows)
        self.ranks.all_reduce(rows)
        return rows

    def rows(self, counts: Sequence[int]) -> list[slice]:
        """Each rank's pairs, of ``counts`` pairs of each expert."""
        ends = [0, *itertools.accumulate(counts)]
        return [slice(ends[part.start], ends[part.stop]) for part in self.ranks.slices(self.count)]

    def take(self, pairs: Tensor, rows: list[slice]) -> Tensor:
        """This rank's rows of ``pairs`` [P, H], which every rank has. Their gradients come from all ranks."""
        return _Take.apply(pairs, self.ranks, rows)

    def with_all_gradients(self, tensor: Tensor) -> Tensor:
        """All tokens' rows [T, ...], of which every rank uses a part; the gradient is then the sum over all ranks."""
        return _Everywhere.apply(tensor, self)

    def join(self, own: Tensor, rows: list[slice]) -> Tensor:
        """All pairs [P, H] on every rank, from each rank's own. Every rank has the gradient of all."""
        return _Join.apply(own, self.ranks, rows)


def own_experts(model: Any, experts: Experts, ranks: Ranks) -> slice:
    """This rank's of a layer's experts where they run on several ranks.

    All of them where their class computes them itself (see ``models.experts_adapter``): it stays whole on every rank.
    """
    adopted = hasattr(model.get_submodule(experts.path), "batched_rows")
    return slice(0, experts.count) if adopted else ranks.local_slice(experts.count)


def can_shard_windows(model: Any, experts: Experts, ranks: Ranks) -> bool:
    """Whether a layer's experts, run on several ranks, take each rank's own tokens: in grouped products alone."""
    if own_experts(model, experts, ranks) == slice(0, experts.count):
        return False
    module = model.get_submodule(experts.path)
    x = torch.empty(0, dtype=model.dtype, device=ranks.device)
    return grouped.usable(x, *(getattr(module, matrix.name) for matrix in experts.matrices))


@contextmanager
def split_experts(model: Any, experts: Experts | None, ranks: Ranks, sharded: bool = False) -> Iterator[None]:
    """Lets a layer run with the weights of ``own_experts`` alone. Other ranks hold the other experts.

    sharded: every rank runs other tokens
    """
    if experts is None or own_experts(model, experts, ranks) == slice(0, experts.count):
        yield
        return
    module = model.get_submodule(experts.path)
    setattr(module, _SPLIT, Split(ranks, experts.count, sharded))
    try:
        yield
    finally:
        delattr(module, _SPLIT)


def join_experts(model: Any, experts: Experts, ranks: Ranks, own: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [E, ...] of all experts, from those of each rank's ``own_experts``."""
    if own_experts(model, experts, ranks) == slice(0, experts.count):
        return [ranks.broadcast(tensor, 0) for tensor in own]
    return ranks.all_gather_cat(own)


def split_of(module: Any) -> Split | None:
    return getattr(module, _SPLIT, None)


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: Split) -> Tensor:
        ctx.split = split
        whole = split.all_gather(tensor)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.split.reduce(gradient.contiguous().clone()), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, ranks: Ranks, rows: list[slice]) -> Tensor:
        ctx.ranks, ctx.rows, ctx.pairs = ranks, rows, len(pairs)
        return pairs[rows[ranks.rank]].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _joined(gradient, ctx.ranks, ctx.rows, ctx.pairs), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, rows: list[slice]) -> Tensor:
        ctx.ranks, ctx.rows = ranks, rows
        return _joined(own, ranks, rows, rows[-1].stop)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.rows[ctx.ranks.rank]].contiguous(), None, None


def _joined(own: Tensor, ranks: Ranks, rows: list[slice], pairs: int) -> Tensor:
    whole = own.new_zeros(pairs, own.shape[1])
    whole[rows[ranks.rank]] = own
    ranks.broadcast_slices(whole, rows)
    return whole
