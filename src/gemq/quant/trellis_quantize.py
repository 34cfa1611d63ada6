"""Quantization of matrices with trellis codes: rotation, row scales and error feedback.

Shapes: E matrices, R rows, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemq.quant import trellis
from gemq.quant.grid import nearest_scales
from gemq.quant.hessian import factorize
from gemq.quant.rotation import rotate, rotate_hessian
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth

LEAST_RIDGE = 1e-20
"""Least dampening. Blocks of inputs that are always zero have a Hessian of zero."""


class RotatedProblem(NamedTuple):
    """Matrices and Hessians of their inputs, rotated, and the factor for error feedback.

    Attributes:
        weight: [E, R, C] float32.
        hessian: [E, C, C] float32.
        upper: [E, C, C] float32, see ``hessian.factorize``.
        ridge: [E, 1, 1] float32, the dampening of each Hessian.
        retries: Number of Hessians that needed more dampening.
    """

    weight: Tensor
    hessian: Tensor
    upper: Tensor
    ridge: Tensor
    retries: int

    def select(self, experts: list[int]) -> RotatedProblem:
        """Return the problem of some of the matrices, without their retries."""
        if len(experts) == len(self.weight):
            return RotatedProblem(self.weight, self.hessian, self.upper, self.ridge, 0)
        ridge = self.ridge[experts]
        return RotatedProblem(self.weight[experts], self.hessian[experts], self.upper[experts], ridge, 0)


def rotated_problem(weight: Tensor, hessian: Tensor, dampening: float) -> RotatedProblem:
    """Rotate the inputs of matrices.

    Args:
        weight: [E, R, C], any float dtype.
        hessian: [E, C, C], of the inputs of each matrix.
        dampening: Share of the mean of a Hessian's diagonal that is added to its diagonal.
    """
    hessian = rotate_hessian(hessian.float())  # under the same name, which frees the original
    factor = factorize(hessian, dampening)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    ridge = (dampening * mean).clamp_min(LEAST_RIDGE).view(-1, 1, 1)
    return RotatedProblem(rotate(weight.float()), hessian, factor.upper, ridge, factor.retries)


def quantize(problem: RotatedProblem, width: TrellisWidth, sweeps: int = 0) -> TrellisMatrix:
    """Quantize matrices at one width.

    A row is divided by its root mean square and encoded with error feedback. Then its scale is chosen anew, as the best
    for its codes by the Hessian.

    Args:
        problem: The matrices.
        width: Width of all of them.
        sweeps: How often blocks of columns are encoded again for the errors of all others, with new scales after each
            sweep (``trellis.sweep``). Two lower the error by 5 %.

    Returns:
        Matrices [E, ...].

    Raises:
        UserError: 16 does not divide R or C.
    """
    weight = problem.weight
    table = trellis.byte_sum_table(trellis.STATE_BITS).to(weight.device)
    search = _search(weight.device)
    scales = nearest_scales(weight.square().mean(2).sqrt())
    words, values = trellis.quantize_ldlq(weight / scales.unsqueeze(2), problem.upper, width.eighths, table, search)
    values *= trellis.LDLQ_GAIN  # to values of the table
    scales = scales / trellis.LDLQ_GAIN
    scales *= trellis.refit_rows(weight, values * scales.unsqueeze(2), problem.hessian)
    for _ in range(sweeps):
        scales = nearest_scales(scales)
        trellis.sweep(
            weight / scales.unsqueeze(2),
            problem.hessian,
            problem.ridge,
            words,
            values,
            width.eighths,
            table,
            search,
        )
        scales = scales * trellis.refit_rows(weight, values * scales.unsqueeze(2), problem.hessian)
    return TrellisMatrix.pack(words, scales, width, trellis.STATE_BITS)


def _search(device: torch.device) -> trellis.Viterbi:
    """Return the implementation of the Viterbi algorithm for a device."""
    if device.type != "cuda":
        return trellis.viterbi
    from gemq.quant import trellis_kernel  # needs triton, which CPU builds of torch lack

    return trellis_kernel.viterbi
