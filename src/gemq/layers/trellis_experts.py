"""One matrix of a layer's experts with trellis codes, at mixed widths, and the training of its row scales.

Codes stay as error feedback has left them. Row scales are trained as relative changes, and rounded to what a byte can
represent.

Shapes: E experts, R rows, C columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.kernels.trellis.dense import trellis_weight
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.quant import trellis
from gemq.quant.grid import decode_scales, encode_scales
from gemq.quant.trainable import rounded_to_scales
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth


@dataclass(frozen=True, eq=False)
class TrellisBatch:
    """Matrices of mixed widths.

    Attributes:
        codes: Codes of each matrix, as in ``TrellisMatrix``.
        widths: Width of each matrix.
        unscaled: [E, R, C] weights before row scales, in the dtype of the model.
        scales: [E, R] float32 row scales that bytes can represent.
    """

    codes: tuple[Tensor, ...]
    widths: tuple[TrellisWidth, ...]
    unscaled: Tensor
    scales: Tensor

    @classmethod
    def of(cls, matrices: Sequence[TrellisMatrix], dtype: torch.dtype) -> TrellisBatch:
        """Collect single matrices."""
        codes = tuple(matrix.codes for matrix in matrices)
        scales = row_scales(matrices)
        unscaled = trellis_weight(TrellisMatrices(matrices), torch.ones_like(scales), dtype=dtype)
        return cls(codes, tuple(matrix.width for matrix in matrices), unscaled, scales)

    def weight(self) -> Tensor:
        """Return the weights [E, R, C] in the dtype of the model."""
        return scaled(self.unscaled, self.scales)

    def gather(self, widths: Sequence[TrellisWidth], gather: Callable[[list[Tensor]], list[Tensor]]) -> TrellisBatch:
        """Return the matrices of all ranks' experts, without their unscaled weights.

        Args:
            widths: Width of every expert of the layer.
            gather: Concatenates tensors [E, ...] of all ranks along their first dimension.
        """
        longest = max(width.eighths for width in widths)
        tiles = self.unscaled.shape[2] // 4  # bytes of a row of tiles, for an eighth of a bit
        padded = self.codes[0].new_zeros(len(self.codes), self.codes[0].shape[0], tiles * longest)
        for index, codes in enumerate(self.codes):
            padded[index, :, : codes.shape[1]] = codes
        all_codes, all_scales = gather([padded, self.scales])
        cut = tuple(all_codes[index, :, : tiles * width.eighths] for index, width in enumerate(widths))
        return TrellisBatch(cut, tuple(widths), self.unscaled[:0], all_scales)

    def matrix(self, index: int) -> TrellisMatrix:
        """Return one matrix as it is stored."""
        codes = self.codes[index].contiguous()
        return TrellisMatrix(codes, encode_scales(self.scales[index]), self.widths[index], trellis.STATE_BITS)


def row_scales(matrices: Sequence[TrellisMatrix]) -> Tensor:
    """Return the row scales of single matrices: [E, R] float32."""
    return torch.stack([matrix.row_scales() for matrix in matrices])


@torch.no_grad()
def dequantize_experts(matrices: Sequence[TrellisMatrix], dtype: torch.dtype) -> Tensor:
    """Dequantize single matrices of one shape and any widths: [E, R, C] in ``dtype``."""
    return trellis_weight(TrellisMatrices(matrices), row_scales(matrices), dtype=dtype)


def scaled(unscaled: Tensor, scales: Tensor) -> Tensor:
    """Multiply weights [E, R, C] by row scales [E, R]. Stored scales are exact in bfloat16."""
    return unscaled * scales.to(unscaled.dtype).unsqueeze(2)


class TrainableScales:
    """Row scales in training.

    Attributes:
        base: [E, R] float32 scales where training starts.
        scale_change: [E, R], trained change of the scales, relative to them.
    """

    def __init__(self, base: Tensor):
        self.base = base
        self.scale_change = torch.zeros_like(base, requires_grad=True)

    def grids(self) -> list[Tensor]:
        """Return the trainable changes of scales."""
        return [self.scale_change]

    def scales(self) -> Tensor:
        """Return the row scales [E, R] float32 as they are stored; differentiable."""
        return rounded_to_scales(self.base * (1 + self.scale_change))

    @torch.no_grad()
    def result(self) -> Tensor:
        """Return the row scales [E, R] as bytes."""
        return encode_scales(self.scales())


class TrainableRows(TrainableScales):
    """E matrices with trellis codes, whose row scales are trained. Like ``quant.trainable.TrainableMatrices``."""

    soft_codes = None

    def __init__(self, batch: TrellisBatch):
        super().__init__(batch.scales)
        self.batch = batch

    def leaves(self) -> list[Tensor]:
        """Return the tensors that have gradients."""
        return self.grids()

    def trained(self) -> list[Tensor]:
        """Return the tensors that training changes."""
        return self.grids()

    def weight(self) -> Tensor:
        """Return the weights [E, R, C] in the dtype of the model; differentiable."""
        return scaled(self.batch.unscaled, self.scales())

    def keep_in_range(self) -> None:
        """Do nothing: there are no codes that a step could move out of their range."""

    def batch_result(self) -> TrellisBatch:
        """Return the matrices as trained so far."""
        return dataclasses.replace(self.batch, scales=decode_scales(self.result()))
