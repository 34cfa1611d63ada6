"""Second moments of a matrix's inputs, and the factor that GPTQ takes from them.

Knows nothing of models: rows of inputs go in, one Hessian per expert comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.resources.ranks import Ranks, ShardedSum

BLOCK = 128
"""Columns that ``factorize`` takes at once on a GPU."""


class Moments:
    """Sums of x x^T and counts for E matrices with C input columns, in float32.

    sums:   [E, C, C] float32; what they are of all rows, ``finish`` says
    counts: [E] int64, rows added
    """

    def __init__(self, experts: int, columns: int, device: torch.device):
        self.sums = torch.zeros(experts, columns, columns, device=device)
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)
        self._shards, self._closed = ShardedSum(), 0
        self._mean: Tensor | None = None
        self._parked: Sequence[Tensor] | None = None

    def add(self, rows: Tensor, counts: list[int]) -> None:
        """Adds rows [P, C] sorted by expert, ``counts`` rows of each."""
        self._mean = None
        added = torch.tensor(counts).to(self.counts.device, non_blocking=True)
        self.counts += added
        if rows.is_cuda and rows.dtype != torch.float32:
            from gemq.quant import gram_kernel  # triton comes with torch for CUDA, not for CPUs

            gram_kernel.add(self.sums, rows, added.cumsum(0))
            return
        for e, x in enumerate(rows.split(counts)):
            if len(x):
                x = x.float()
                self.sums[e].addmm_(x.T, x)

    def close(self, shards: int) -> None:
        """Ends a shard, this rank's number ``shards`` counted from 1: the next rows are added up apart (see ``ranks``).

        The last shard is ended by ``finish``.
        """
        for _ in range(shards - self._closed):  # several, if no rows came before
            self._shards.add([self.sums])
            self.sums = torch.zeros_like(self.sums)
        self._closed = shards

    def finish(self, ranks: Ranks) -> None:
        """Adds up all shards of all ranks."""
        if self._closed:
            self._shards.add([self.sums])
            (self.sums,) = self._shards.total()
        ranks.add_up(self.sums, self.counts)
        if self.sums.is_cuda:
            from gemq.quant import gram_kernel

            gram_kernel.mirror(self.sums)

    def park(self, keep: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Lets the sums wait elsewhere until ``hessians`` asks for some. ``keep``: [E, C, C] -> what gives [C, C]s."""
        self._find_mean()
        self._parked, self.sums = keep(self.sums), self.sums.new_empty(0)

    def hessians(self, shrink: float, experts: slice = slice(None)) -> Tensor:
        """Mean second moments [E, C, C], each mixed with the layer's mean as if it had ``shrink`` * mean n more tokens.

        An expert that saw no token gets the layer's mean alone. With no token in the whole layer: the identity.
        ``experts`` picks those that are wanted. Call when all rows are added.
        """
        which = range(len(self.counts))[experts]
        mean = self._find_mean()
        if mean is None:
            columns = (self.sums if self._parked is None else self._parked[0]).shape[-1]
            return torch.eye(columns, device=self.counts.device).expand(len(which), -1, -1).clone()
        extra = shrink * self.counts.sum() / len(self.counts)
        counts = self.counts[experts].view(-1, 1, 1)
        extra = torch.where(counts > 0, extra, torch.ones_like(extra))
        found = extra * mean
        if self._parked is None:
            found += self.sums[experts]
        else:
            for one, e in zip(found, which, strict=True):
                one += self._parked[e]
        return found.div_(counts + extra)

    def _find_mean(self) -> Tensor | None:
        """The layer's mean second moments [C, C], found once; None without any token."""
        if self._mean is None and (total := self.counts.sum()) > 0:
            self._mean = self.sums.sum(0).div_(total)
        return self._mean


class Factor(NamedTuple):
    """What GPTQ needs of E Hessians.

    upper:   [E, C, C] float32, upper Cholesky factor of the inverse of the damped Hessian
    retries: how many of the E needed more damping than asked for
    """

    upper: Tensor
    retries: int


def factorize(hessians: Tensor, damping: float) -> Factor:
    """Upper Cholesky factors of the damped inverses of Hessians [E, C, C].

    ``damping`` times the mean of the diagonal is added to it. Where that leaves a matrix singular, the damping of that
    matrix is multiplied by ten until it is not; such matrices are counted. Inputs that are always zero get a diagonal
    of one, so that their weights are simply rounded.
    """
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal = torch.where(diagonal <= 0, torch.ones_like(diagonal), diagonal)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    pending = torch.arange(len(hessians), device=hessians.device)
    upper: Tensor | None = None
    retries = 0
    amount = max(damping, 1e-6)
    for attempt in range(12):
        damped = hessians[pending]
        damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal[pending] + amount * mean[pending])
        inverse, failed = _in_blocks(damped) if damped.is_cuda else _at_once(damped)
        bad = failed | ~torch.isfinite(inverse.sum((1, 2)))  # what is not finite makes the sum so
        if upper is None and not bad.any():
            return Factor(inverse, 0)
        upper = torch.empty_like(hessians) if upper is None else upper
        upper[pending[~bad]] = inverse[~bad]
        pending = pending[bad]
        if not len(pending):
            return Factor(upper, retries)
        if attempt == 0:
            retries = len(pending)
        amount *= 10
    raise ArithmeticError("a Hessian is not finite: the model's activations overflow; try --dtype float32")


def _at_once(h: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factors of the inverses of h [E, C, C], and which of them failed [E]."""
    # H = R R^T with R upper (a Cholesky factor of H read backwards), so R^-1 is the factor of the inverse
    reverse, failed = torch.linalg.cholesky_ex(h.flip(-1, -2))
    identity = torch.eye(h.shape[-1], device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(reverse.flip(-1, -2), identity, upper=True), failed != 0


def _in_blocks(h: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """As ``_at_once``, of which only blocks on the diagonal are left and the rest is batched products.

    On a GPU the libraries' batched factorizations are made for small matrices. Overwrites h.
    """
    columns = h.shape[-1]
    inverse = torch.zeros_like(h)
    failed = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for start in reversed(range(0, columns, size)):
        stop = min(start + size, columns)
        here, before, after = slice(start, stop), slice(0, start), slice(stop, columns)
        block, wrong = _at_once(h[:, here, here])  # what is left of H here; R^-1's block
        failed |= wrong
        inverse[:, here, here] = block
        # the block's rows right of it: R^-1 R = 1 solved for them
        inverse[:, here, after] = -(block @ h[:, here, after]) @ inverse[:, after, after]
        # R's columns above the block, and what they explain of the rest of H
        panel = h[:, before, here] @ block.mT
        h[:, before, here] = panel
        h[:, before, before].baddbmm_(panel, panel.mT, alpha=-1)
    return inverse, failed
