"""Codes of 1, 1.6, 2, 3, 4 and 8 bits <-> bytes, without padding waste.

Inside each group of G consecutive columns the layout is planar: byte j of an n-byte plane holds the codes
j, j + n, j + 2n, ... A kernel that reads consecutive bytes then gets consecutive columns out of every bit
position, and never shuffles. Three bits are a 2-bit plane followed by a 1-bit plane; ternary holds five
codes a byte in base 3. ``docs/checkpoint-format.md`` gives an example. Pure torch: knows nothing of models
or files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gemq.quant.grid import Quantized, decode, encode
from gemq.quant.widths import LEVELS, Width, bytes_per_group


class PackedMatrix(NamedTuple):
    """Matrices of one width as they are stored. Leading dimensions (experts) are free.

    codes:   [..., rows, groups * bytes_per_group] uint8
    scales:  [..., rows, groups] uint8, as ``quant.grid`` encodes them
    offsets: [..., rows, groups] uint8, likewise
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor

    @classmethod
    def pack(cls, q: Quantized, width: Width, group_size: int) -> PackedMatrix:
        return cls(pack_codes(q.codes, width, group_size), *encode(q.scales, q.offsets, LEVELS[width] - 1))

    def unpack(self, width: Width, group_size: int) -> Quantized:
        return Quantized(unpack_codes(self.codes, width, group_size), *self.grids(width))

    def grids(self, width: Width) -> tuple[Tensor, Tensor]:
        """Scales and offsets, float32."""
        return decode(self.scales, self.offsets, LEVELS[width] - 1)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """``{prefix}.codes``, ``.scales`` and ``.offsets``: the tensors under their names in a checkpoint."""
        return {f"{prefix}.{part}": tensor for part, tensor in self._asdict().items()}


def pack_codes(codes: Tensor, width: Width, group_size: int) -> Tensor:
    """[..., rows, columns] uint8 codes -> [..., rows, columns / group_size * bytes_per_group] uint8."""
    groups = codes.reshape(*codes.shape[:-1], -1, group_size)
    if width == 8:
        packed = groups
    elif width == 3:
        packed = torch.cat([_pack_plane(groups & 3, 2), _pack_plane(groups >> 2, 1)], dim=-1)
    elif width == 1.6:
        packed = _pack_ternary(groups)
    else:
        packed = _pack_plane(groups, int(width))
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_codes(packed: Tensor, width: Width, group_size: int) -> Tensor:
    """[..., rows, groups * bytes_per_group] uint8 -> [..., rows, groups * group_size] uint8 codes."""
    groups = packed.reshape(*packed.shape[:-1], -1, bytes_per_group(width, group_size))
    if width == 8:
        codes = groups
    elif width == 3:
        low, high = groups.split([group_size // 4, group_size // 8], dim=-1)
        codes = _unpack_plane(low, 2) | (_unpack_plane(high, 1) << 2)
    elif width == 1.6:
        codes = _unpack_ternary(groups, group_size)
    else:
        codes = _unpack_plane(groups, int(width))
    return codes.reshape(*packed.shape[:-1], -1)


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    """[..., G] codes below 2**bits -> [..., G * bits / 8] bytes; bits divides 8."""
    per_byte = 8 // bits
    slots = codes.unflatten(-1, (per_byte, -1))
    packed = slots[..., 0, :].clone()
    for i in range(1, per_byte):
        packed |= slots[..., i, :] << (i * bits)
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _pack_ternary(codes: Tensor) -> Tensor:
    """[..., G] codes 0 .. 2 -> [..., ceil(G / 5)] bytes 0 .. 242; codes beyond G count as 0."""
    group_size = codes.shape[-1]
    n = bytes_per_group(1.6, group_size)
    digits = F.pad(codes, (0, 5 * n - group_size)).unflatten(-1, (5, n))
    packed = digits[..., 4, :].clone()
    for i in (3, 2, 1, 0):
        packed = packed * 3 + digits[..., i, :]
    return packed


def _unpack_ternary(packed: Tensor, group_size: int) -> Tensor:
    digits = []
    for _ in range(5):
        quotient = torch.div(packed, 3, rounding_mode="floor")
        digits.append(packed - quotient * 3)
        packed = quotient
    return torch.cat(digits, dim=-1)[..., :group_size]
