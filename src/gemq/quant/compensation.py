"""Weights of a matrix that make up for a change of its inputs.

The down projection D of an expert reads h' where it read h, once the matrix before it is quantized. The error of the
expert's output, |D' h' - D h|^2 averaged over tokens, is smallest for

    D' = D (1 + X H^-1),  H = mean of h' h'^T,  X = mean of (h - h') h'^T

(like the asymmetric calibration of "GPTAQ", arXiv:2504.02692, in closed form). D' is what gets quantized.

Shapes: E matrices, R rows, C columns, P rows of inputs sorted by matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.errors import NotFiniteError
from gemq.quant.hessian import factorize, rows_by_matrix


class ChangeAccumulator:
    """Accumulates the sums of (h - h') h'^T of E matrices, in float32.

    Attributes:
        sums: [E, C, C] float32.
    """

    def __init__(self, experts: int, columns: int, device: torch.device):
        self.sums = torch.zeros(experts, columns, columns, device=device)

    def add(self, inputs: Tensor, differences: Tensor, ends: Tensor) -> None:
        """Add rows.

        Args:
            inputs: [P, C], h'.
            differences: [P, C], h - h'.
            ends: [E] integers on the rows' device, end of each matrix's rows. Rows past the last end are ignored.
        """
        if inputs.is_cuda and inputs.dtype != torch.float32:
            from gemq.quant import gram_kernel  # needs triton, which CPU builds of torch lack

            gram_kernel.add_products(self.sums, differences, inputs, ends)
            return
        for index, rows in rows_by_matrix(ends):
            self.sums[index].addmm_(differences[rows].float().T, inputs[rows].float())


def compensate(weight: Tensor, hessian: Tensor, change: Tensor, dampening: float) -> Tensor:
    """Return the weights D' that make up for a change of their inputs.

    Args:
        weight: [E, R, C], D.
        hessian: [E, C, C] float32, H.
        change: [E, C, C] float32, X.
        dampening: Share of the mean of H's diagonal that is added to the diagonal.

    Returns:
        [E, R, C], dtype of ``weight``.

    Raises:
        NotFiniteError: H or X has elements that are not finite.
    """
    upper = factorize(hessian, dampening).upper  # H^-1 = U^T U
    original = weight.float()
    correction = original @ change @ upper.mT @ upper
    if not torch.isfinite(correction.sum()):
        raise NotFiniteError(
            "the model's activations overflow, so that no weights can make up for their changes: try --dtype float32, "
            "or look for weights that are far too large"
        )
    return (original + correction).to(weight.dtype)
