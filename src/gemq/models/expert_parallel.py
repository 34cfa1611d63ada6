"""A layer's experts over several ranks: each computes the routed pairs of its own, and all get every pair's output.

In grouped products on GPUs, ranks add up the sums over their own pairs, and nothing waits. What surrounds the experts
each rank computes for its own windows of a micro-batch, where these can be dealt out (``dealt``), and gives all ranks
what the experts receive; else every rank computes it alike. On a CPU the result is that of one rank to the bit: there
pairs are put together, never added up.

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
    """``count`` experts over ``ranks``; the weights that a module has meanwhile are those of this rank's experts.

    dealt: a rank has tokens [T', ...] of its own, as many as the others; else all have the same
    """

    ranks: Ranks
    count: int
    dealt: bool = False

    @property
    def own(self) -> slice:
        """This rank's experts."""
        return self.ranks.part(self.count)

    def same(self, top_k_index: Tensor) -> Tensor:
        """The routing [T, K] that all ranks take of a token: on a GPU, roundings could give each its own."""
        if self.dealt or top_k_index.device.type == "cpu":
            return top_k_index
        chosen = top_k_index.contiguous().clone()
        self.ranks.overwrite(chosen, 0)
        return chosen

    def spread(self, rows: Tensor) -> Tensor:
        """All tokens' rows [T, ...] from those that this rank has."""
        return self.ranks.spread(rows) if self.dealt else rows

    def add_up(self, rows: Tensor) -> Tensor:
        """Every rank's sum [T, ...], of the tokens that this rank has. Overwrites ``rows``."""
        if self.dealt:
            return self.ranks.collect(rows)
        self.ranks.add_up(rows)
        return rows

    def rows(self, counts: Sequence[int]) -> list[slice]:
        """Each rank's pairs, of ``counts`` pairs of each expert."""
        ends = [0, *itertools.accumulate(counts)]
        return [slice(ends[part.start], ends[part.stop]) for part in self.ranks.parts(self.count)]

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
    return slice(0, experts.count) if adopted else ranks.part(experts.count)


def may_deal(model: Any, experts: Experts, ranks: Ranks) -> bool:
    """Whether a layer's experts, run on several ranks, take each rank's own tokens: in grouped products alone."""
    if own_experts(model, experts, ranks) == slice(0, experts.count):
        return False
    module = model.get_submodule(experts.path)
    x = torch.empty(0, dtype=model.dtype, device=ranks.device)
    return grouped.usable(x, *(getattr(module, matrix.name) for matrix in experts.matrices))


@contextmanager
def split_experts(model: Any, experts: Experts | None, ranks: Ranks, dealt: bool = False) -> Iterator[None]:
    """Lets a layer run with the weights of ``own_experts`` alone, the others being those of the other ranks.

    dealt: each rank runs it on tokens of its own
    """
    if experts is None or own_experts(model, experts, ranks) == slice(0, experts.count):
        yield
        return
    module = model.get_submodule(experts.path)
    setattr(module, _SPLIT, Split(ranks, experts.count, dealt))
    try:
        yield
    finally:
        delattr(module, _SPLIT)


def join_experts(model: Any, experts: Experts, ranks: Ranks, own: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [E, ...] of all experts, from those of each rank's ``own_experts``."""
    if own_experts(model, experts, ranks) == slice(0, experts.count):
        return [ranks.broadcast(tensor, 0) for tensor in own]
    return ranks.join(own)


def split_of(module: Any) -> Split | None:
    return getattr(module, _SPLIT, None)


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: Split) -> Tensor:
        ctx.split = split
        whole = split.spread(tensor)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.split.add_up(gradient.contiguous().clone()), None


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
    ranks.fill(whole, rows)
    return whole
