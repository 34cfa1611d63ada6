"""One matrix of a layer's experts with trellis codes in distillation: codes stay packed, row scales are trained.

Shapes: E experts, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemq.kernels.trellis.dense import trellis_weight
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.layers.reconstruction import QuantizedLayer
from gemq.layers.trellis_experts import TrainableScales, row_scales
from gemq.models.structure import Experts, Matrix
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth


class TrellisStudentExperts:
    """Like ``packed_layer.PackedExperts``, for trellis codes."""

    def __init__(self, quantized: QuantizedLayer, experts: Experts, matrix: Matrix, widths: Sequence[TrellisWidth]):
        """
        Args:
            quantized: The layer as it is stored.
            experts: Structure of its experts.
            matrix: Which of their matrices.
            widths: Width of each expert.
        """
        self.matrix = matrix
        self.names = experts.stored_names(matrix)
        matrices = []
        for name, width in zip(self.names, widths, strict=True):
            matrices.append(TrellisMatrix.from_tensors(quantized.tensors, name, width))
        self.packed = TrellisMatrices(matrices)
        self.grids = TrainableScales(row_scales(matrices))

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [E, R, C], differentiable in the scales."""
        return trellis_weight(self.packed, self.grids.scales(), dtype=dtype)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, for offloading."""
        return [*self.packed.buffers(), self.grids.base, *self.grids.grids()]

    def result(self) -> dict[str, Tensor]:
        """Return encoded scales by their names in a checkpoint, on the CPU."""
        scale_bytes = self.grids.result()
        tensors = {}
        for index, name in enumerate(self.names):
            tensors[f"{name}.scales"] = scale_bytes[index].to("cpu", copy=True)
        return tensors
