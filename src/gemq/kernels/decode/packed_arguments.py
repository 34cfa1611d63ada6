"""Packed matrices as operators and kernels take them: plain tensors and integers.

``torch.library`` operators cannot take modules or tuples of mixed types. They take two lists instead: ``tensors`` and
``sizes`` of ``PackedArguments``. ``from_lists`` restores the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import triton
from torch import Tensor

from gemq.kernels.decode.linear_fusion import MAX_LINEARS

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedMatrices


class PackedArguments(NamedTuple):
    """One projection of all experts as operators take it, from ``modules.PackedMatrices``: ``tensors`` and ``sizes``.

    Attributes:
        codes: uint8
        scales: uint8
        offsets: uint8
        table: [E, 3] int64
        bias: [E, rows], or None
        rows: rows of each matrix
        group_size: columns that share a scale
        levels: levels of the widths that a kernel is compiled for
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    table: Tensor
    bias: Tensor | None
    rows: int
    group_size: int
    levels: Sequence[int]

    @classmethod
    def from_module(cls, matrices: PackedMatrices, bias: Tensor | None, levels: Sequence[int]) -> PackedArguments:
        """Return the matrices of a packed module with the bias [E, rows] of the projection."""
        return cls(
            matrices.codes,
            matrices.scales,
            matrices.offsets,
            matrices.table,
            bias,
            matrices.rows,
            matrices.group_size,
            levels,
        )

    @classmethod
    def from_lists(cls, tensors: Sequence[Tensor], sizes: Sequence[int]) -> PackedArguments:
        """Restore the matrices from ``tensors`` and ``sizes``."""
        codes, scales, offsets, table = tensors[:4]
        bias = tensors[4] if len(tensors) > 4 else None
        rows, group_size = sizes[:2]
        return cls(codes, scales, offsets, table, bias, rows, group_size, sizes[2:])

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors as an operator's argument. The bias is absent if there is none."""
        tensors = [self.codes, self.scales, self.offsets, self.table]
        return tensors if self.bias is None else [*tensors, self.bias]

    @property
    def sizes(self) -> list[int]:
        """The integers as an operator's argument: rows, group size, and the levels."""
        return [self.rows, self.group_size, *self.levels]

    @property
    def num_experts(self) -> int:
        """Number of matrices."""
        return self.table.shape[0]

    def kernel_pointers(self, placeholder: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in the order of the kernels' arguments. ``placeholder`` replaces a missing bias."""
        bias = placeholder if self.bias is None else self.bias
        return (self.codes, self.scales, self.offsets, self.table, bias)


class FusedLinears(NamedTuple):
    """One to three matrices of the same columns and width. Their rows are concatenated in the output.

    Attributes:
        codes: [rows, bytes] uint8 of each matrix
        scales: [rows, groups] uint8 of each matrix
        offsets: [rows, groups] uint8 of each matrix
        biases: [rows] of each matrix, or empty
        levels: levels of the width
        group_size: columns that share a scale
    """

    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    offsets: Sequence[Tensor]
    biases: Sequence[Tensor]
    levels: int
    group_size: int

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each matrix."""
        return tuple(codes.shape[0] for codes in self.codes)

    @property
    def padded_rows(self) -> list[int]:
        """Rows of three matrices. Missing matrices have no rows."""
        return [*self.rows, *[0] * (MAX_LINEARS - len(self.codes))]

    def kernel_pointers(self, placeholder: Tensor) -> list[Tensor]:
        """Return the tensors in the order of the kernels' arguments, three of each kind.

        ``placeholder`` replaces missing biases. The first matrix replaces missing matrices, which are never read.
        """
        biases = list(self.biases) or [placeholder] * len(self.codes)
        pointers: list[Tensor] = []
        for tensors in (self.codes, self.scales, self.offsets, biases):
            pointers += tensors
            pointers += [tensors[0]] * (MAX_LINEARS - len(tensors))
        return pointers

    def num_blocks(self, block_rows: int) -> int:
        """Return the number of blocks of ``block_rows`` rows over all matrices."""
        return sum(triton.cdiv(rows, block_rows) for rows in self.rows)
