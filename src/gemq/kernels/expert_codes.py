"""The codes of one projection of all experts of a layer: where they lie, and how single experts are read and set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gemq.quant.stored_matrix import StoredMatrix, dequantize_matrix, stored_matrix
from gemq.quant.widths import AnyWidth
from gemq.runtime.integers import round_up

ALIGNMENT = 16
"""Each expert's codes start at a multiple of this many bytes: the widest load of a GPU thread."""


class ExpertCodes(nn.Module):
    """The same projection of all experts of a layer, [rows, columns] each, with any kind of codes.

    The codes lie in a buffer of the layer, or in host memory.

    Attributes:
        codes: uint8, the experts' codes in order, each aligned; the pool of all layers if experts are offloaded
            (``kernels.offload``)
        scales: uint8, of all experts
        widths: width of each expert
        rows: rows of a matrix
        columns: columns of a matrix
        state_bits: bits of a state of trellis codes; None for other codes
        host_codes: codes of offloaded experts, in host memory, in one piece or several
    """

    codes: Tensor
    scales: Tensor
    widths: tuple[AnyWidth, ...]
    rows: int
    columns: int
    state_bits: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.host_codes: dict[int, list[Tensor]] = {}
        self._starts: list[int] = []

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.widths)

    def code_bytes(self, expert: int) -> int:
        """Return the bytes of one expert's codes."""
        raise NotImplementedError

    def kernel_sizes(self) -> tuple[int, ...]:
        """Return the sizes that kernels are compiled for."""
        raise NotImplementedError

    def matrix(self, expert: int) -> StoredMatrix:
        """Return views of one expert's tensors, in the layout of the checkpoint. Codes in several pieces are copied."""
        raise NotImplementedError

    def set_matrix(self, expert: int, matrix: StoredMatrix) -> None:
        """Copy one expert's tensors into the buffers. Raises ValueError if a shape or dtype differs."""
        for target, source in zip(self.matrix(expert).tensors(), matrix.tensors(), strict=True):
            if target.shape != source.shape or target.dtype != source.dtype:
                raise ValueError(
                    f"expert {expert}: {source.dtype} {list(source.shape)}, not {target.dtype} {list(target.shape)}"
                )
            target.copy_(source)

    def set_tensors(self, expert: int, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Copy one expert's tensors, by their names in a checkpoint. Raises ValueError if a shape or dtype differs."""
        self.set_matrix(expert, stored_matrix(tensors, prefix, self.widths[expert], self.state_bits))

    def dequantize(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return the weights of one expert: [rows, columns] in ``dtype``."""
        matrix = self.matrix(expert)
        return dequantize_matrix(replace(matrix, codes=matrix.codes.to(matrix.scales.device))).to(dtype)

    def place_codes(self, pool: Tensor, starts: list[int], host_codes: dict[int, list[Tensor]]) -> None:
        """Read codes from other memory from now on.

        Args:
            pool: uint8, what kernels read
            starts: first byte in it of each expert's codes
            host_codes: codes of experts that are copied there only while their layer runs
        """
        self.codes, self.host_codes, self._starts = pool, host_codes, starts

    def stored_codes(self, expert: int) -> Tensor:
        """Return one expert's codes, flat: a view, or a copy of codes in several pieces."""
        if expert in self.host_codes:
            pieces = self.host_codes[expert]
            return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[: self.code_bytes(expert)]
        start = self._starts[expert]
        return self.codes[start : start + self.code_bytes(expert)]

    def _allocate_codes(self, device: torch.device) -> None:
        """Create the buffer of codes. The widths and sizes are set before."""
        end = 0
        for expert in range(self.num_experts):
            self._starts.append(end)
            end += round_up(self.code_bytes(expert), ALIGNMENT)
        self.register_buffer("codes", torch.zeros(end, dtype=torch.uint8, device=device), persistent=False)
