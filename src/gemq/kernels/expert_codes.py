"""Where the codes of the experts of a layer lie: in a buffer of the layer, or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemq.quant.widths import AnyWidth


class ExpertCodes(nn.Module):
    """The codes of one projection of all experts of a layer, of any kind of codes.

    Attributes:
        codes: uint8, the experts' codes in order, each aligned; the pool of all layers if experts are offloaded
            (``kernels.offload``)
        widths: width of each expert
        host_codes: codes of offloaded experts, in host memory, in one piece or several
    """

    codes: Tensor
    widths: tuple[AnyWidth, ...]

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
