"""The module that holds the trellis codes of all experts of a layer (see ``kernels.modules``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemq.kernels.expert_codes import ALIGNMENT, ExpertCodes
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth


class TrellisMatrices(ExpertCodes):
    """The trellis codes of a projection, in flat buffers.

    Attributes:
        codes: as in ``ExpertCodes``. Those of an expert are [rows / 16, columns / 16 * 4 * eighths]
        scales: [experts, rows] uint8
        table: [experts, 2] int32: the width in eighths of a bit, and the first byte in codes divided by ALIGNMENT
        state_bits: bits of a state
    """

    widths: tuple[TrellisWidth, ...]
    state_bits: int
    table: Tensor

    def __init__(self, matrices: Sequence[TrellisMatrix]) -> None:
        """Copy the experts' matrices, all on one device, into flat buffers."""
        super().__init__()
        self.widths = tuple(matrix.width for matrix in matrices)
        self.state_bits = matrices[0].state_bits
        self.rows, self.columns = matrices[0].scales.shape[-1], matrices[0].columns
        device = matrices[0].codes.device

        self._allocate_codes(device)
        table = [[width.eighths, start // ALIGNMENT] for width, start in zip(self.widths, self._starts, strict=True)]
        scales = torch.empty(len(matrices), self.rows, dtype=torch.uint8, device=device)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("table", torch.tensor(table, dtype=torch.int32, device=device), persistent=False)
        for expert, matrix in enumerate(matrices):
            self.set_matrix(expert, matrix)

    def kernel_sizes(self) -> tuple[int, ...]:
        """As in ``ExpertCodes``."""
        return (self.rows, self.columns, self.state_bits)

    def code_bytes(self, expert: int) -> int:
        """As in ``ExpertCodes``."""
        return self.widths[expert].code_bytes(self.rows, self.columns)

    def place_codes(self, pool: Tensor, starts: list[int], host_codes: dict[int, list[Tensor]]) -> None:
        """As in ``ExpertCodes``."""
        super().place_codes(pool, starts, host_codes)
        if pool.numel() // ALIGNMENT >= 1 << 31:
            self.table = self.table.long()
        self.table[:, 1] = torch.tensor(starts) // ALIGNMENT

    def matrix(self, expert: int) -> TrellisMatrix:
        """As in ``ExpertCodes``."""
        codes = self.stored_codes(expert).view(self.rows // 16, -1)
        return TrellisMatrix(codes, self.scales[expert], self.widths[expert], self.state_bits)

    def extra_repr(self) -> str:
        """Describe the sizes when the module is printed."""
        size = f"rows={self.rows}, columns={self.columns}, state_bits={self.state_bits}"
        return f"experts={self.num_experts}, {size}"
