"""Quantization of matrices with trellis codes: rotation, row scales and error feedback.

Shapes: E matrices, R rows, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemq.quant import trellis, trellis_feedback
from gemq.quant.grid import nearest_scales
from gemq.quant.hessian import factorize
from gemq.quant.rotation import rotate, rotate_hessian
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth

OUTPUT_DAMPENING = 0.05
"""Share of the mean of an output Hessian's diagonal that is added to it. Values from 0.01 to 0.2 measure alike."""

LARGEST_REFIT = 2.0
"""Most by which the fit to both Hessians changes the scale of a row."""


class OutputFactor(NamedTuple):
    """Hessians of the outputs of matrices.

    Attributes:
        hessian: [E, R, R] float32.
        upper: [E, R, R] float32, factor of ``hessian`` in units of the rows' scales, see ``hessian.factorize``.
    """

    hessian: Tensor
    upper: Tensor


class RotatedProblem(NamedTuple):
    """Matrices and Hessians of their inputs, rotated, and the factor for error feedback.

    Attributes:
        weight: [E, R, C] float32.
        hessian: [E, C, C] float32.
        upper: [E, C, C] float32, see ``hessian.factorize``.
        scales: [E, R] float32, the root mean square of each row, rounded as scales are stored.
        outputs: Hessians of the outputs and their factor; None for error feedback between columns alone.
        retries: Number of Hessians that needed more dampening.
    """

    weight: Tensor
    hessian: Tensor
    upper: Tensor
    scales: Tensor
    outputs: OutputFactor | None
    retries: int

    def select(self, experts: list[int]) -> RotatedProblem:
        """Return the problem of some of the matrices, without their retries."""
        if len(experts) == len(self.weight):
            return RotatedProblem(self.weight, self.hessian, self.upper, self.scales, self.outputs, 0)
        outputs = None
        if self.outputs is not None:
            outputs = OutputFactor(self.outputs.hessian[experts], self.outputs.upper[experts])
        inputs = (self.weight[experts], self.hessian[experts], self.upper[experts])
        return RotatedProblem(*inputs, self.scales[experts], outputs, 0)


def rotated_problem(
    weight: Tensor, hessian: Tensor, dampening: float, output_hessian: Tensor | None = None
) -> RotatedProblem:
    """Rotate the inputs of matrices.

    Args:
        weight: [E, R, C], any float dtype.
        hessian: [E, C, C], of the inputs of each matrix.
        dampening: Share of the mean of a Hessian's diagonal that is added to its diagonal.
        output_hessian: [E, R, R] float32, second moments of the gradient at the outputs, if they are known.
    """
    hessian = rotate_hessian(hessian.float())  # under the same name, which frees the original
    factor = factorize(hessian, dampening)
    weight = rotate(weight.float())
    scales = nearest_scales(weight.square().mean(2).sqrt())
    if output_hessian is None:
        return RotatedProblem(weight, hessian, factor.upper, scales, None, factor.retries)
    in_units = output_hessian * scales.unsqueeze(2) * scales.unsqueeze(1)
    output_factor = factorize(in_units, OUTPUT_DAMPENING)
    outputs = OutputFactor(output_hessian, output_factor.upper)
    return RotatedProblem(weight, hessian, factor.upper, scales, outputs, factor.retries + output_factor.retries)


def quantize(problem: RotatedProblem, width: TrellisWidth) -> TrellisMatrix:
    """Quantize matrices at one width.

    A row is divided by its root mean square and encoded with error feedback. Then its scale is chosen anew, as the best
    for its codes by the Hessians.

    Args:
        problem: The matrices.
        width: Width of all of them.

    Returns:
        Matrices [E, ...].

    Raises:
        UserError: 16 does not divide R or C.
    """
    weight, scales, outputs = problem.weight, problem.scales, problem.outputs
    table = trellis.byte_sum_table(trellis.STATE_BITS).to(weight.device)
    search = _search(weight.device)
    scaled = weight / scales.unsqueeze(2)
    if outputs is None:
        words, values = trellis_feedback.quantize_ldlq(scaled, problem.upper, width.eighths, table, search)
        values *= scales.unsqueeze(2)
        refit = trellis_feedback.refit_rows(weight, values, problem.hessian)
        gain = trellis_feedback.LDLQ_GAIN
    else:
        words, values = trellis_feedback.quantize_ldlq_both(
            scaled, problem.upper, outputs.upper, width.eighths, table, search
        )
        values *= scales.unsqueeze(2)
        refit = trellis_feedback.refit_rows_both(weight, values, problem.hessian, outputs.hessian)
        refit = refit.clamp(1 / LARGEST_REFIT, LARGEST_REFIT)
        gain = trellis_feedback.OUTPUT_LDLQ_GAIN
    # rings decode to values of the table, which are larger by the gain
    return TrellisMatrix.pack(words, scales * refit / gain, width, trellis.STATE_BITS)


def _search(device: torch.device) -> trellis.Viterbi:
    """Return the implementation of the Viterbi algorithm for a device."""
    if device.type != "cuda":
        return trellis.viterbi
    from gemq.quant import trellis_kernel  # needs triton, which CPU builds of torch lack

    return trellis_kernel.viterbi
