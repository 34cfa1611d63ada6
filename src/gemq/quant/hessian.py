"""Hessians of a matrix's inputs, and the factor of their inverse that GPTQ uses.

The Hessian of a matrix is the second moment of its inputs, x x^T averaged over tokens. Must not import models: rows of
inputs go in, one Hessian per expert comes out.

Shapes: E matrices, C input columns, P rows sorted by matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.errors import NotFiniteError
from gemq.runtime.ranks import SINGLE, Ranks

BLOCK = 128
"""Columns of a block of ``_factor_in_blocks``."""

MAX_ATTEMPTS = 12
"""How often a Hessian is factorized, each time with ten times the dampening, before it is taken to be not finite."""


def rows_by_matrix(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the index and the rows of every matrix that has rows, from the end [E] of each matrix's rows."""
    for index, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        if end > start:
            yield index, slice(start, end)


class HessianAccumulator:
    """Accumulates the sums of x x^T and the row counts of E matrices, in float32.

    Attributes:
        sums: [E, C, C] float32; both triangles are valid once ``finish`` was called.
        counts: [E] int64, rows added.
    """

    def __init__(self, experts: int, columns: int, device: torch.device):
        self.sums = torch.zeros(experts, columns, columns, device=device)
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)
        self._mean: Tensor | None = None  # [C, C], over all matrices on all ranks
        self._num_rows = self.counts[:0]  # of all matrices on all ranks
        self._num_matrices = self.counts[:0]
        self._offloaded: Sequence[Tensor] | None = None

    def add(self, rows: Tensor, ends: Tensor) -> None:
        """Add rows.

        Args:
            rows: [P, C], sorted by matrix.
            ends: [E] integers on the rows' device, end of each matrix's rows. Rows past the last end are ignored.
        """
        self._mean = None
        self.counts += ends.diff(prepend=ends.new_zeros(1))
        if rows.is_cuda and rows.dtype != torch.float32:
            from gemq.quant import gram_kernel  # needs triton, which CPU builds of torch lack

            gram_kernel.add(self.sums, rows, ends)
            return
        for index, matrix_rows in rows_by_matrix(ends):
            x = rows[matrix_rows].float()
            self.sums[index].addmm_(x.T, x)

    def finish(self, ranks: Ranks = SINGLE) -> None:
        """Complete the sums after the last row was added.

        Args:
            ranks: Ranks that hold the other matrices of the layer. By default this rank holds all of them.
        """
        if self.sums.is_cuda:
            from gemq.quant import gram_kernel

            gram_kernel.mirror(self.sums)
        # Sums of float32 in float64 are exact, and therefore the same however the matrices are divided among ranks.
        # One at a time, since torch would first convert all of them to float64.
        mean = torch.zeros_like(self.sums[0], dtype=torch.float64)
        for matrix_sum in self.sums:
            mean += matrix_sum
        self._num_rows = self.counts.sum()
        self._num_matrices = torch.full_like(self.counts[0], len(self.counts))
        ranks.all_reduce(mean, self._num_rows, self._num_matrices)
        self._mean = mean.div_(self._num_rows.clamp_min(1)).float()

    def offload(self, store: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Offload the sums. ``hessians`` loads them back on demand.

        Args:
            store: Takes the sums [E, C, C] and returns a sequence that loads each [C, C].
        """
        if self._mean is None:
            self.finish()
        self._offloaded, self.sums = store(self.sums), self.sums.new_empty(0)

    def hessians(self, shrinkage: float, experts: slice = slice(None)) -> Tensor:
        """Return the Hessians of some matrices, shrunk towards the mean of all. Call after the last row was added.

        With M the mean over all rows, n the rows of a matrix and n' their mean over matrices, the result is
        (sum of x x^T + shrinkage * n' * M) / (n + shrinkage * n'). A matrix without rows gets M. Without any rows at
        all, the result is the identity.

        Args:
            shrinkage: Weight of the mean, in multiples of the mean number of rows.
            experts: Which matrices.

        Returns:
            [E, C, C] float32, memory of its own.
        """
        indices = range(len(self.counts))[experts]
        if self._mean is None:
            self.finish()
        assert self._mean is not None
        if not self._num_rows:
            identity = torch.eye(len(self._mean), device=self.counts.device)
            return identity.expand(len(indices), -1, -1).clone()
        extra_rows = self._extra_rows(shrinkage, experts)
        result = extra_rows * self._mean
        if self._offloaded is None:
            result += self.sums[experts]
        else:
            for hessian, index in zip(result, indices, strict=True):
                hessian += self._offloaded[index]
        return result.div_(self.num_rows(shrinkage, experts))

    def num_rows(self, shrinkage: float, experts: slice = slice(None)) -> Tensor:
        """Return what ``hessians`` divides its sums by, at least one: [E, 1, 1] float32."""
        return (self.counts[experts].view(-1, 1, 1) + self._extra_rows(shrinkage, experts)).clamp_min(1)

    def _extra_rows(self, shrinkage: float, experts: slice) -> Tensor:
        """Return how many rows of the mean are added to each matrix, [E, 1, 1]: one where it has none itself."""
        extra_rows = shrinkage * self._num_rows / self._num_matrices
        counts = self.counts[experts].view(-1, 1, 1)
        return torch.where(counts > 0, extra_rows, torch.ones_like(extra_rows))


class Factor(NamedTuple):
    """Factors of E Hessians for GPTQ.

    Attributes:
        upper: [E, C, C] float32, upper Cholesky factor of the inverse of the dampened Hessian.
        retries: How many of the E needed more dampening than requested.
    """

    upper: Tensor
    retries: int


def factorize(hessians: Tensor, dampening: float) -> Factor:
    """Compute upper Cholesky factors of the inverses of dampened Hessians.

    Where a dampened matrix is still singular, its dampening is multiplied by ten until it is not. Such matrices are
    counted. Inputs that are always zero get a diagonal of one, so that their weights are simply rounded.

    Args:
        hessians: [E, C, C].
        dampening: Share of the mean of the diagonal that is added to the diagonal.

    Raises:
        NotFiniteError: A Hessian has elements that are not finite.
    """
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal = torch.where(diagonal <= 0, torch.ones_like(diagonal), diagonal)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    pending = torch.arange(len(hessians), device=hessians.device)
    upper: Tensor | None = None
    retries = 0
    amount = max(dampening, 1e-6)
    for attempt in range(MAX_ATTEMPTS):
        dampened = hessians[pending]
        dampened.diagonal(dim1=-2, dim2=-1).copy_(diagonal[pending] + amount * mean[pending])
        inverse, failed = _factor_in_blocks(dampened) if dampened.is_cuda else _factor(dampened)
        bad = failed | ~torch.isfinite(inverse.sum((1, 2)))  # an element that is not finite makes the sum so
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


def _factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factors of the inverses of ``h`` [E, C, C], and which of them failed [E]."""
    # H = R R^T with R upper (a Cholesky factor of H read backwards), so R^-1 is the factor of the inverse
    reverse, info = torch.linalg.cholesky_ex(h.flip(-1, -2))
    identity = torch.eye(h.shape[-1], device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(reverse.flip(-1, -2), identity, upper=True), info != 0


def _factor_in_blocks(h: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Compute ``_factor`` from factors of blocks on the diagonal, with batched products for the other blocks.

    The batched factorizations of GPU libraries are made for small matrices. Overwrites ``h``.
    """
    columns = h.shape[-1]
    inverse = torch.zeros_like(h)
    failed = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for start in reversed(range(0, columns, size)):
        stop = min(start + size, columns)
        block, left, right = slice(start, stop), slice(0, start), slice(stop, columns)
        block_inverse, block_failed = _factor(h[:, block, block])  # of what remains of H in this block
        failed |= block_failed
        inverse[:, block, block] = block_inverse
        # rows of the block, right of it: R^-1 R = 1 solved for them
        inverse[:, block, right] = -(block_inverse @ h[:, block, right]) @ inverse[:, right, right]
        # columns of R above the block, and what they explain of the remaining H
        panel = h[:, left, block] @ block_inverse.mT
        h[:, left, block] = panel
        h[:, left, left].baddbmm_(panel, panel.mT, alpha=-1)
    return inverse, failed
