"""Matrices as they are stored, with affine or with trellis codes. The type of their width says which.

Shapes: E matrices, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gemq.quant.grid import dequantize
from gemq.quant.packing import PackedMatrix
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import AnyWidth, TrellisWidth

StoredMatrix = PackedMatrix | TrellisMatrix


def stored_matrix(
    tensors: Mapping[str, Tensor], prefix: str, width: AnyWidth, state_bits: int | None = None
) -> StoredMatrix:
    """Look matrices of one width up by the names of their tensors in a checkpoint.

    Args:
        tensors: By name.
        prefix: Name of the matrices.
        width: Of the codes.
        state_bits: Bits of a state of trellis codes. None: as many as new codes have.
    """
    if isinstance(width, TrellisWidth):
        return TrellisMatrix.from_tensors(tensors, prefix, width, state_bits)
    return PackedMatrix.from_tensors(tensors, prefix, width)


def concatenate(batches: Sequence[StoredMatrix]) -> StoredMatrix:
    """Concatenate batches of matrices of one width along their first dimension."""
    if isinstance(batches[0], TrellisMatrix):
        return TrellisMatrix.cat([batch for batch in batches if isinstance(batch, TrellisMatrix)])
    return PackedMatrix.cat([batch for batch in batches if isinstance(batch, PackedMatrix)])


def dequantize_matrix(matrix: StoredMatrix) -> Tensor:
    """Return the weights of matrices: [..., R, C] float32."""
    return matrix.dequantize() if isinstance(matrix, TrellisMatrix) else dequantize(matrix.unpack())
