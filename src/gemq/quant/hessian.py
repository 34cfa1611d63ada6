"""Second moments of a matrix's inputs, and the factor that GPTQ takes from them.

Knows nothing of models: rows of inputs go in, one Hessian per expert comes out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments:
    """Sums of x x^T and counts for E matrices with C input columns, in float32.

    sums:   [E, C, C] float32
    counts: [E] int64, rows added
    """

    def __init__(self, experts: int, columns: int, device: torch.device):
        self.sums = torch.zeros(experts, columns, columns, device=device)
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, counts: list[int]) -> None:
        """Adds rows [P, C] sorted by expert, ``counts`` rows of each."""
        for e, x in enumerate(rows.split(counts)):
            if len(x):
                x = x.float()
                self.sums[e].addmm_(x.T, x)
        self.counts += torch.tensor(counts, device=self.counts.device)

    def hessians(self, shrink: float) -> Tensor:
        """Mean second moments [E, C, C], each mixed with the layer's mean as if it had ``shrink`` * mean n more tokens.

        An expert that saw no token gets the layer's mean alone. With no token in the whole layer: the identity.
        """
        total = self.counts.sum()
        if total == 0:
            return torch.eye(self.sums.shape[-1], device=self.sums.device).expand_as(self.sums).clone()
        mean = self.sums.sum(0) / total
        extra = shrink * total / len(self.counts)
        counts = self.counts.view(-1, 1, 1)
        extra = torch.where(counts > 0, extra, torch.ones_like(extra))
        return (self.sums + extra * mean) / (counts + extra)


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
    h = hessians.clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    pending = torch.arange(len(h), device=h.device)
    upper = torch.empty_like(h)
    retries = 0
    amount = max(damping, 1e-6)
    for attempt in range(12):
        damped = h[pending] + amount * torch.diag_embed(mean[pending].expand(-1, h.shape[-1]))
        # H = R R^T with R upper (a Cholesky factor of H read backwards), so R^-1 is the factor of the inverse
        reverse, failed = torch.linalg.cholesky_ex(damped.flip(-1, -2))
        identity = torch.eye(h.shape[-1], device=h.device).expand_as(damped)
        inverse = torch.linalg.solve_triangular(reverse.flip(-1, -2), identity, upper=True)
        bad = (failed != 0) | ~torch.isfinite(inverse).flatten(1).all(1)
        upper[pending[~bad]] = inverse[~bad]
        pending = pending[bad]
        if not len(pending):
            return Factor(upper, retries)
        if attempt == 0:
            retries = len(pending)
        amount *= 10
    raise ArithmeticError("a Hessian is not finite: the model's activations overflow; try --dtype float32")
