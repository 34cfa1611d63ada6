"""The module that holds the trellis codes of all experts of a layer (see ``kernels.modules``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemq.kernels.expert_codes import ExpertCodes
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth

ALIGNMENT = 16
"""Each expert's codes start at a multiple of this many bytes, and the table counts in this unit."""


class TrellisMatrices(ExpertCodes):
    """The same projection of all experts of a layer, [rows, columns] each, in flat buffers.

    Attributes:
        codes: as in ``ExpertCodes``. Those of an expert are [rows / 16, columns / 16 * 4 * eighths]
        scales: [experts, rows] uint8
        table: [experts, 2] int32: the width in eighths of a bit, and the first byte in codes divided by ALIGNMENT
        state_bits: bits of a state
    """

    widths: tuple[TrellisWidth, ...]
    scales: Tensor
    table: Tensor

    def __init__(self, matrices: Sequence[TrellisMatrix]) -> None:
        """Copy the experts' matrices, all on one device, into flat buffers."""
        super().__init__()
        self.widths = tuple(matrix.width for matrix in matrices)
        self.state_bits = matrices[0].state_bits
        self.rows, self.columns = matrices[0].scales.shape[-1], matrices[0].columns
        device = matrices[0].codes.device

        end = 0
        for matrix in matrices:
            self._starts.append(end)
            end += -(-matrix.codes.numel() // ALIGNMENT) * ALIGNMENT
        table = [[width.eighths, start // ALIGNMENT] for width, start in zip(self.widths, self._starts, strict=True)]
        self.register_buffer("codes", torch.zeros(end, dtype=torch.uint8, device=device), persistent=False)
        scales = torch.empty(len(matrices), self.rows, dtype=torch.uint8, device=device)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("table", torch.tensor(table, dtype=torch.int32, device=device), persistent=False)
        for expert, matrix in enumerate(matrices):
            self.set_matrix(expert, matrix)

    def kernel_sizes(self) -> tuple[Any, ...]:
        """Return the sizes that kernels are compiled for."""
        return (self.rows, self.columns, self.state_bits)

    def code_bytes(self, expert: int) -> int:
        """Return the bytes of one expert's codes."""
        return self.rows * self.columns * self.widths[expert].eighths // 64

    def place_codes(self, pool: Tensor, starts: list[int], host_codes: dict[int, list[Tensor]]) -> None:
        """As in ``ExpertCodes``."""
        super().place_codes(pool, starts, host_codes)
        if pool.numel() // ALIGNMENT >= 1 << 31:
            self.table = self.table.long()
        self.table[:, 1] = torch.tensor(starts) // ALIGNMENT

    def matrix(self, expert: int) -> TrellisMatrix:
        """Return views of one expert's tensors, in the layout of the checkpoint. Codes in several pieces are copied."""
        codes = self.stored_codes(expert).view(self.rows // 16, -1)
        return TrellisMatrix(codes, self.scales[expert], self.widths[expert], self.state_bits)

    def set_matrix(self, expert: int, matrix: TrellisMatrix) -> None:
        """Copy one expert's tensors into the buffers. Raises ValueError if a shape or dtype differs."""
        target = self.matrix(expert)
        for field in TrellisMatrix.FIELDS:
            destination, source = getattr(target, field), getattr(matrix, field)
            if destination.shape != source.shape or destination.dtype != source.dtype:
                raise ValueError(
                    f"expert {expert}: {source.dtype} {list(source.shape)}, "
                    f"not {destination.dtype} {list(destination.shape)}"
                )
            destination.copy_(source)

    def set_tensors(self, expert: int, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Copy one expert's tensors, by their names in a checkpoint. Raises ValueError if a shape or dtype differs."""
        self.set_matrix(expert, TrellisMatrix.from_tensors(tensors, prefix, self.widths[expert], self.state_bits))

    def dequantize(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return the weights of one expert: [rows, columns] in ``dtype``."""
        matrix = self.matrix(expert)
        return replace(matrix, codes=matrix.codes.to(matrix.scales.device)).dequantize(dtype)

    def extra_repr(self) -> str:
        """Describe the sizes when the module is printed."""
        size = f"rows={self.rows}, columns={self.columns}, state_bits={self.state_bits}"
        return f"experts={self.num_experts}, {size}"
