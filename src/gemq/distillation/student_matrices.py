"""One matrix of a layer's experts in distillation: codes stay packed, scales and offsets are trained.

Shapes: E experts, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemq.kernels.training.differentiable_dequantize import copy_codes, dequantize_weights
from gemq.kernels.trellis.dense import trellis_weight
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.layers.reconstruction import QuantizedLayer
from gemq.layers.trellis_experts import TrainableScales, row_scales
from gemq.models.structure import Experts, Matrix
from gemq.quant.gptq import max_codes
from gemq.quant.grid import Quantized, encode
from gemq.quant.packing import PackedMatrix
from gemq.quant.trainable import TrainableMatrices
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth, Width


class AffineStudentMatrix:
    """One matrix of all experts with affine codes. Scales and offsets are trained."""

    def __init__(self, quantized: QuantizedLayer, experts: Experts, matrix: Matrix, widths: Sequence[Width]):
        """
        Args:
            quantized: The layer as it is stored.
            experts: Structure of its experts.
            matrix: Which of their matrices.
            widths: Width of each expert.
        """
        self.matrix, self.widths = matrix, widths
        self.names = experts.stored_names(matrix)
        packed = []
        for name, width in zip(self.names, self.widths, strict=True):
            packed.append(PackedMatrix.from_tensors(quantized.tensors, name, width))
        self.codes = copy_codes(packed)
        grids = [one_matrix.grids() for one_matrix in packed]
        scales = torch.stack([expert_scales for expert_scales, _ in grids])
        offsets = torch.stack([expert_offsets for _, expert_offsets in grids])
        # the codes stay packed in ``codes``: ``TrainableMatrices`` only trains scales and offsets here
        q = Quantized(packed[0].codes, scales, offsets)
        self.grids = TrainableMatrices(q, max_codes(self.widths, scales.device), None)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [E, R, C], differentiable in scales and offsets."""
        scales, offsets = self.grids.grid()
        return dequantize_weights(scales, offsets, self.codes, dtype)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, for offloading."""
        grids = self.grids
        return [*self.codes.offloadable_tensors(), grids.base_scale, grids.base_offset, grids.max_code, *grids.grids()]

    def result(self) -> dict[str, Tensor]:
        """Return encoded scales and offsets by their names in a checkpoint, on the CPU."""
        q = self.grids.result()
        scale_bytes, offset_bytes = encode(q.scales, q.offsets, self.grids.max_code)
        tensors = {}
        for index, name in enumerate(self.names):
            tensors[f"{name}.scales"] = scale_bytes[index].to("cpu", copy=True)
            tensors[f"{name}.offsets"] = offset_bytes[index].to("cpu", copy=True)
        return tensors


class TrellisStudentMatrix:
    """One matrix of all experts with trellis codes. Row scales are trained."""

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


StudentMatrix = AffineStudentMatrix | TrellisStudentMatrix
