"""Matrices with trellis codes as they are stored.

A matrix W is diag(scales) Q B: Q are the values of the codes (``quant.trellis``), and B rotates the inputs
(``quant.rotation``). Scales are bytes, encoded as ``quant.grid`` describes.

Shapes: R rows, C columns, any leading dimensions such as experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gemq.quant import trellis
from gemq.quant.grid import decode_scales, encode_scales
from gemq.quant.rotation import rotate_back
from gemq.quant.widths import TrellisWidth

CHUNK_WEIGHTS = 1 << 22
"""Weights whose states are looked up in one batch. A state takes 8 bytes."""


@dataclass(frozen=True, eq=False)
class TrellisMatrix:
    """Matrices of one width with trellis codes, with any leading dimensions such as experts.

    Attributes:
        codes: [..., R / 16, C / 16 * 4 * eighths] uint8, the tiles of a row of tiles from left to right. A tile is
            ``eighths`` words of 32 bits, lowest byte first.
        scales: [..., R] uint8
        width: Width of the codes.
        state_bits: Bits of a state (L).
    """

    FIELDS: ClassVar = ("codes", "scales")
    """Names of the tensors."""

    codes: Tensor
    scales: Tensor
    width: TrellisWidth
    state_bits: int

    @classmethod
    def pack(cls, words: Tensor, scales: Tensor, width: TrellisWidth, state_bits: int) -> TrellisMatrix:
        """Pack rings [..., R / 16, C / 16, eighths] int32, and scales [..., R] float32 that a byte can represent."""
        return cls(words.contiguous().view(torch.uint8).flatten(-2), encode_scales(scales), width, state_bits)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        prefix: str,
        width: TrellisWidth,
        state_bits: int | None = None,
    ) -> TrellisMatrix:
        """Look the tensors up by their names in a checkpoint; the inverse of ``named``."""
        codes, scales = (tensors[f"{prefix}.{field}"] for field in cls.FIELDS)
        return cls(codes, scales, width, trellis.STATE_BITS if state_bits is None else state_bits)

    @classmethod
    def cat(cls, batches: Sequence[TrellisMatrix]) -> TrellisMatrix:
        """Concatenate batches of matrices of one width along their first dimension."""
        codes = torch.cat([batch.codes for batch in batches])
        return cls(codes, torch.cat([batch.scales for batch in batches]), batches[0].width, batches[0].state_bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def columns(self) -> int:
        """Columns of a matrix."""
        return self.codes.shape[-1] // (4 * self.width.eighths) * trellis.TILE_SIDE

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return codes and scales."""
        return self.codes, self.scales

    def words(self) -> Tensor:
        """Return the rings: [..., R / 16, C / 16, eighths] int32."""
        tiles = self.columns // trellis.TILE_SIDE
        return self.codes.unflatten(-1, (tiles, -1)).contiguous().view(torch.int32)

    def values(self) -> Tensor:
        """Return Q, the values of the codes before scales and rotation: [..., R, C] float32."""
        table = trellis.byte_sum_table(self.state_bits).to(self.codes.device)
        words = self.words().flatten(0, -3)
        rows_of_tiles, tiles = words.shape[:2]
        values = torch.empty(
            rows_of_tiles, trellis.TILE_SIDE, tiles * trellis.TILE_SIDE, dtype=table.dtype, device=table.device
        )
        chunk = max(1, CHUNK_WEIGHTS // (tiles * trellis.TILE_WEIGHTS))
        for start in range(0, rows_of_tiles, chunk):
            decoded = trellis.decode(words[start : start + chunk], self.width.eighths, table)
            side_by_side = decoded.unflatten(-1, (trellis.TILE_SIDE, trellis.TILE_SIDE)).transpose(1, 2)
            values[start : start + chunk] = side_by_side.flatten(2)
        return values.view(*self.scales.shape, -1)

    def unscaled(self) -> Tensor:
        """Return Q B, the weights before row scales: [..., R, C] float32."""
        return rotate_back(self.values())

    def row_scales(self) -> Tensor:
        """Return the row scales: [..., R] float32."""
        return decode_scales(self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the weights in float32, rounded once to ``dtype``: [..., R, C]."""
        return (self.unscaled() * self.row_scales().unsqueeze(-1)).to(dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> TrellisMatrix:
        """Apply ``function`` to codes and scales."""
        return TrellisMatrix(function(self.codes), function(self.scales), self.width, self.state_bits)

    def select(self, index: Any) -> TrellisMatrix:
        """Index the leading dimensions."""
        return self.map(lambda tensor: tensor[index])

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors by their names in a checkpoint: ``{prefix}.codes`` and ``{prefix}.scales``."""
        return {f"{prefix}.codes": self.codes, f"{prefix}.scales": self.scales}
