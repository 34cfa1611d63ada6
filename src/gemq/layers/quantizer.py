"""Quantization of batches of matrices with the settings of a recipe.

Shapes: E experts, W widths, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.quant.compensation import ChangeAccumulator, compensate
from gemq.quant.gptq import gptq, gptq_mixed, round_to_nearest
from gemq.quant.grid import Quantized
from gemq.quant.hessian import HessianAccumulator, factorize
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.trellis_quantize import quantize as trellis_quantize
from gemq.quant.trellis_quantize import rotated_problem
from gemq.quant.widths import TrellisWidth, Width, group_size_for

CHUNK_BYTES = 4 << 30
"""Upper bound for Hessians, factors and errors of the experts that GPTQ processes in one batch."""


TRELLIS_COPIES = 6
"""Float32 copies of the weights that error feedback of trellis codes works with."""

PRIOR_ROWS = 4
"""``Quantizer.compensate`` divides sums of changes over n rows of C columns by n + PRIOR_ROWS * C. An estimate from n
rows has a relative variance of about C / n, so that experts with few tokens are changed little."""

COMPENSATION_COPIES = 4
"""Float32 copies of the weights that ``Quantizer.compensate`` works with."""

COMPENSATION_BYTES = 1 << 30
"""Upper bound for Hessians, factors and weights of the experts in one batch of ``Quantizer.compensate``."""

OUTPUT_COPIES = 8
"""Float32 tensors as large as the Hessians of the outputs that their use takes: factors, and the fit of rows."""


@dataclass(frozen=True)
class Quantizer:
    """The settings of a recipe that decide codes.

    Attributes:
        method: ``gptq``, or ``rtn`` for rounding to nearest.
        group_size: Group size of the recipe. ``group`` returns that of a matrix.
        dampening: Share of the mean of a Hessian's diagonal that is added to its diagonal.
        shrinkage: Weight of the layer's mean Hessian in an expert's Hessian (see ``HessianAccumulator.hessians``).
        compensates: Whether down projections make up for the quantization of the matrix before them.
    """

    method: str
    group_size: int
    dampening: float
    shrinkage: float
    compensates: bool = True

    def quantize_all(
        self,
        weight: Tensor,
        hessians: HessianAccumulator,
        widths: tuple[Width, ...],
        soft_codes: Tensor | None = None,
        first_expert: int = 0,
        shrinkage: float | None = None,
    ) -> tuple[Quantized, int]:
        """Quantize every matrix at every width.

        Args:
            weight: [E, R, C].
            hessians: Of the matrices' inputs, possibly of more experts than those of ``weight``.
            widths: Widths to quantize at.
            soft_codes: [W, E, R, C], overwritten by the codes before rounding.
            first_expert: Index in ``hessians`` of the first expert of ``weight``.
            shrinkage: Replaces the recipe's.

        Returns:
            Grids [W, E, ...], and the number of Hessians that needed more dampening.
        """
        group = self.group(weight.shape[-1])
        if self.method == "rtn":
            return round_to_nearest(weight, widths, group), 0
        if shrinkage is None:
            shrinkage = self.shrinkage
        grids = []
        num_retries = 0
        for chunk in _expert_chunks(weight, len(widths)):
            experts = slice(chunk.start + first_expert, chunk.stop + first_expert)
            factor = factorize(hessians.hessians(shrinkage, experts), self.dampening)
            chunk_codes = None if soft_codes is None else soft_codes[:, chunk]
            grids.append(gptq(weight[chunk], factor.upper, widths, group, chunk_codes))
            num_retries += factor.retries
            del factor  # frees as much memory as the next chunk needs
        return Quantized.cat(grids, dim=1), num_retries

    def quantize_mixed(
        self, weight: Tensor, hessians: HessianAccumulator, widths: Sequence[Width], soft_codes: Tensor | None = None
    ) -> tuple[Quantized, int]:
        """Quantize every matrix at one width of its own.

        Args:
            weight: [E, R, C].
            hessians: Of the matrices' inputs.
            widths: One for each expert.
            soft_codes: [E, R, C], overwritten by the codes before rounding.

        Returns:
            Grids [E, ...], and the number of Hessians that needed more dampening.
        """
        group = self.group(weight.shape[-1])
        if self.method == "rtn":
            return self._round_mixed(weight, widths, group), 0
        grids = []
        num_retries = 0
        for chunk in _expert_chunks(weight, 1):
            factor = factorize(hessians.hessians(self.shrinkage, chunk), self.dampening)
            chunk_codes = None if soft_codes is None else soft_codes[chunk]
            grids.append(gptq_mixed(weight[chunk], factor.upper, widths[chunk], group, chunk_codes))
            num_retries += factor.retries
            del factor  # frees as much memory as the next chunk needs
        return Quantized.cat(grids, dim=0), num_retries

    def quantize_trellis(
        self, weight: Tensor, hessians: HessianAccumulator, widths: Sequence[TrellisWidth]
    ) -> tuple[list[TrellisMatrix], int]:
        """Quantize every matrix at every width with trellis codes.

        Args:
            weight: [E, R, C].
            hessians: Of the matrices' inputs.
            widths: Widths to quantize at.

        Returns:
            Matrices [E, ...] of each width, and the number of Hessians that needed more dampening.

        Raises:
            UserError: 16 does not divide R or C.
        """
        batches: list[list[TrellisMatrix]] = [[] for _ in widths]
        num_retries = 0
        for chunk in _expert_chunks(weight, TRELLIS_COPIES):
            problem = rotated_problem(weight[chunk], hessians.hessians(self.shrinkage, chunk), self.dampening)
            for width, matrices in zip(widths, batches, strict=True):
                matrices.append(trellis_quantize(problem, width))
            num_retries += problem.retries
            del problem  # frees as much memory as the next chunk needs
        return [TrellisMatrix.cat(matrices) for matrices in batches], num_retries

    def quantize_trellis_mixed(
        self,
        weight: Tensor,
        hessians: HessianAccumulator,
        widths: Sequence[TrellisWidth],
        output_hessians: Callable[[slice], Tensor] | None = None,
    ) -> tuple[list[TrellisMatrix], int]:
        """Quantize every matrix at one width of its own with trellis codes.

        Args:
            weight: [E, R, C].
            hessians: Of the matrices' inputs.
            widths: One for each expert.
            output_hessians: Returns the Hessians [E, R, R] float32 of the outputs of a range of the matrices. None:
                no error feedback between rows.

        Returns:
            The matrices one by one, and the number of Hessians that needed more dampening.
        """
        matrices: dict[int, TrellisMatrix] = {}
        num_retries = 0
        for chunk in _expert_chunks(weight, TRELLIS_COPIES, OUTPUT_COPIES if output_hessians else 0):
            outputs = output_hessians(chunk) if output_hessians else None
            # Hessians of inputs have no name here, so that they are freed once they are rotated.
            problem = rotated_problem(weight[chunk], hessians.hessians(self.shrinkage, chunk), self.dampening, outputs)
            for width in sorted(set(widths[chunk])):
                experts = [index for index in range(len(problem.weight)) if widths[chunk.start + index] == width]
                batch = trellis_quantize(problem.select(experts), width)
                for position, index in enumerate(experts):
                    matrices[chunk.start + index] = batch.select(position)
            num_retries += problem.retries
            del problem, outputs  # frees as much memory as the next chunk needs
        return [matrices[index] for index in range(len(weight))], num_retries

    def compensate(
        self, weight: Tensor, hessians: HessianAccumulator, changes: ChangeAccumulator, first_expert: int
    ) -> Tensor:
        """Return the weights that make up for a change of their inputs: see ``quant.compensation``.

        Few tokens change a matrix little: the sums of changes are divided by the number of rows of the Hessians, to
        which ``shrinkage`` adds rows of other matrices, and by further rows for each column.

        Args:
            weight: [E, R, C].
            hessians: Of the changed inputs, possibly of more experts than those of ``weight``.
            changes: Of the inputs of these experts.
            first_expert: Index in ``hessians`` of the first expert of ``weight``.

        Returns:
            [E, R, C], dtype of ``weight``.
        """
        result = torch.empty_like(weight)
        for chunk in _expert_chunks(weight, COMPENSATION_COPIES, max_bytes=COMPENSATION_BYTES):
            experts = slice(chunk.start + first_expert, chunk.stop + first_expert)
            num_rows = hessians.num_rows(self.shrinkage, experts) + PRIOR_ROWS * weight.shape[2]
            change = changes.sums[chunk] / num_rows
            hessian = hessians.hessians(self.shrinkage, experts)
            result[chunk] = compensate(weight[chunk], hessian, change, self.dampening)
        return result

    @staticmethod
    def _round_mixed(weight: Tensor, widths: Sequence[Width], group: int) -> Quantized:
        """Round every matrix [E, R, C] to nearest at its own width."""
        distinct = tuple(sorted(set(widths)))
        q = round_to_nearest(weight, distinct, group)
        width_index = torch.tensor([distinct.index(width) for width in widths], device=weight.device)
        return q.select((width_index, torch.arange(len(widths), device=weight.device)))

    def group(self, columns: int) -> int:
        """Return the group size of a matrix with ``columns`` inputs."""
        return group_size_for(columns, self.group_size)


def _expert_chunks(
    weight: Tensor, num_widths: int, output_copies: int = 0, max_bytes: int = CHUNK_BYTES
) -> Iterator[slice]:
    """Yield slices of the experts of ``weight`` [E, R, C] that are quantized in one batch.

    Args:
        weight: Of all experts.
        num_widths: Widths at which they are quantized, or copies of the weights.
        output_copies: Tensors as large as the Hessians of the outputs.
        max_bytes: Upper bound for what a batch of several experts takes.
    """
    experts, rows, columns = weight.shape
    bytes_per_expert = 4 * columns * (3 * columns + num_widths * rows) + 4 * output_copies * rows**2
    size = max(1, min(experts, max_bytes // bytes_per_expert))
    for start in range(0, experts, size):
        yield slice(start, min(start + size, experts))
