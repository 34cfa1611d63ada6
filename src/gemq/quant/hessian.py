"""Second moments of a matrix's inputs, and the factor that GPTQ takes from them.

Knows nothing of models: rows of inputs go in, one Hessian per expert comes out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.errors import NotFiniteError
from gemq.runtime.ranks import SINGLE, Ranks

BLOCK = 128
"""Columns that ``factorize`` takes at once on a GPU."""


class Moments:
    """Sums of x x^T and counts for E matrices with C input columns, in float32.

    sums:   [E, C, C] float32; whole once ``finish`` was called
    counts: [E] int64, rows added
    """

    def __init__(self, experts: int, columns: int, device: torch.device):
        self.sums = torch.zeros(experts, columns, columns, device=device)
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)
        self._mean: Tensor | None = None  # of all matrices on all ranks [C, C]
        self._rows = self._matrices = self.counts[:0]  # how many rows they saw, and how many they are
        self._parked: Sequence[Tensor] | None = None

    def add(self, rows: Tensor, ends: Tensor) -> None:
        """Adds rows [P, C] sorted by matrix.

        ends: [E] whole numbers on the rows' device, where each matrix's rows end; rows behind the last are nobody's
        """
        self._mean = None
        self.counts += ends.diff(prepend=ends.new_zeros(1))
        if rows.is_cuda and rows.dtype != torch.float32:
            from gemq.quant import gram_kernel  # triton comes with torch for CUDA, not for CPUs

            gram_kernel.add(self.sums, rows, ends)
            return
        for e, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            if end > start:
                x = rows[start:end].float()
                self.sums[e].addmm_(x.T, x)

    def finish(self, ranks: Ranks = SINGLE) -> None:
        """Ends the adding of rows.

        ranks: those that have the other matrices of the layer; one by default, for a rank that has all of them
        """
        if self.sums.is_cuda:
            from gemq.quant import gram_kernel

            gram_kernel.mirror(self.sums)
        # In float64 sums of float32 are exact, and the same however the matrices are spread. One at a time: torch would
        # make all of them float64 first.
        mean = torch.zeros_like(self.sums[0], dtype=torch.float64)
        for one in self.sums:
            mean += one
        self._rows, self._matrices = self.counts.sum(), torch.full_like(self.counts[0], len(self.counts))
        ranks.all_reduce(mean, self._rows, self._matrices)
        self._mean = mean.div_(self._rows.clamp_min(1)).float()

    def park(self, keep: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Lets the sums wait elsewhere until ``hessians`` asks for some. ``keep``: [E, C, C] -> what gives [C, C]s."""
        if self._mean is None:
            self.finish()
        self._parked, self.sums = keep(self.sums), self.sums.new_empty(0)

    def hessians(self, shrink: float, experts: slice = slice(None)) -> Tensor:
        """Mean second moments [E, C, C], each mixed with the layer's mean as if it had ``shrink`` * mean n more tokens.

        An expert that saw no token gets the layer's mean alone. With no token in the whole layer: the identity.
        ``experts`` picks those that are wanted. Call when all rows are added.
        """
        which = range(len(self.counts))[experts]
        if self._mean is None:
            self.finish()
        assert self._mean is not None
        if not self._rows:
            return torch.eye(len(self._mean), device=self.counts.device).expand(len(which), -1, -1).clone()
        extra = shrink * self._rows / self._matrices
        counts = self.counts[experts].view(-1, 1, 1)
        extra = torch.where(counts > 0, extra, torch.ones_like(extra))
        found = extra * self._mean
        if self._parked is None:
            found += self.sums[experts]
        else:
            for one, e in zip(found, which, strict=True):
                one += self._parked[e]
        return found.div_(counts + extra)


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
    raise NotFiniteError(
        "the model's activations overflow, so that its Hessians are not finite: try --dtype float32, or look for "
        "weights that are far too large"
    )


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
