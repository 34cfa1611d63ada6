"""Hessians of the outputs of a layer's expert matrices: how much errors in their rows change the loss together.

Rounding errors of one column can cancel each other where the rest of the model does not tell outputs apart. Let G be
the second moment of the gradient of the loss at the output of a layer's experts (``allocation.scores``). It is the
Hessian of the outputs of every down projection D. An output r of the first matrix reaches the loss through one input
k(r) of D, with the derivative s[r]. So the Hessian of the first matrix's outputs is

    (D^T G D)[k(r), k(r')] * mean of s[r] s[r'] over the expert's tokens

if s and the gradient are independent (after "YAQA", arXiv:2505.22988, which takes both from one backward pass).

Shapes: E experts of this rank, R rows, H hidden size, I inputs of D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from gemq.models.experts import expert_weight, unit_of_row
from gemq.models.structure import Experts
from gemq.quant.hessian import HessianAccumulator


def is_practical(experts: Experts) -> bool:
    """Whether the Hessians of the first matrix's outputs take no more memory than those of the inputs.

    They take four times the memory of the Hessians of D's inputs. Wide experts, such as Mixtral's, do without.
    """
    first, down = experts.matrices
    return first.rows**2 <= first.columns**2 + down.columns**2


class OutputHessians:
    """Hessians of the outputs of both matrices, made for a few experts at a time."""

    def __init__(
        self,
        module: Any,
        experts: Experts,
        local_experts: slice,
        gradients: Tensor,
        slopes: HessianAccumulator | None,
        shrinkage: float,
    ):
        """
        Args:
            module: The experts module in full precision.
            experts: Its description.
            local_experts: The experts of this rank.
            gradients: [H, H] float32, G.
            slopes: Second moments of s of each expert of this rank, as of ``InputHessians.slopes``. None: the first
                matrix has no Hessians.
            shrinkage: Weight of the mean over experts in the moments of one expert.
        """
        first, down = experts.matrices
        self._first_name, self._gradients = first.name, gradients
        self._down = expert_weight(module, down.name)[local_experts]
        self._slopes, self._shrinkage = slopes, shrinkage
        self._unit = unit_of_row(module, first.rows).to(gradients.device)

    def for_matrix(self, name: str) -> Callable[[slice], Tensor] | None:
        """Return what makes the Hessians of one matrix for a range of this rank's experts; None if there are none."""
        if name == self._first_name and self._slopes is None:
            return None
        return partial(self.hessians, name)

    def hessians(self, name: str, chunk: slice) -> Tensor:
        """Return the Hessians [E, R, R] float32 of one matrix, for a range of this rank's experts."""
        if name != self._first_name:
            return self._gradients.expand(len(self._down[chunk]), -1, -1)
        assert self._slopes is not None
        down = self._down[chunk].float()
        by_unit = down.mT @ self._gradients @ down
        rows = self._unit.view(1, -1, 1).expand(len(down), -1, by_unit.shape[2])
        by_row = by_unit.gather(1, rows)
        columns = self._unit.expand(*by_row.shape[:2], -1)
        return self._slopes.hessians(self._shrinkage, chunk).mul_(by_row.gather(2, columns))
