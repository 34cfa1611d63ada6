"""Packing of codes of 1, 1.6, 2, 3, 4 and 8 bits into bytes, without padding.

Inside each group of G consecutive columns the layout is planar: byte j of an n-byte plane holds the codes
j, j + n, j + 2n, ... A kernel that reads consecutive bytes gets consecutive columns from every bit position and needs
no shuffles. Three bits are a 2-bit plane followed by a 1-bit plane. Ternary stores five codes a byte in base 3.
``docs/checkpoint-format.md`` gives an example. Plain torch: must not import models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gemq.quant.grid import Quantized, decode, encode
from gemq.quant.widths import Width


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Matrices of one width as they are stored, with any leading dimensions such as experts.

    Attributes:
        codes: [..., rows, groups * group_bytes] uint8
        scales: [..., rows, groups] uint8, encoded as ``quant.grid`` describes
        offsets: [..., rows, groups] uint8, likewise
        width: Width of the codes.
    """

    FIELDS: ClassVar = ("codes", "scales", "offsets")
    """Names of the tensors."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    width: Width

    @classmethod
    def pack(cls, q: Quantized, width: Width) -> PackedMatrix:
        """Pack matrices of one width."""
        scale_bytes, offset_bytes = encode(q.scales, q.offsets, width.max_code)
        return cls(pack_codes(q.codes, width, q.group_size), scale_bytes, offset_bytes, width)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str, width: Width) -> PackedMatrix:
        """Look the tensors up by their names in a checkpoint; the inverse of ``named``."""
        codes, scales, offsets = (tensors[f"{prefix}.{field}"] for field in cls.FIELDS)
        return cls(codes, scales, offsets, width)

    @classmethod
    def cat(cls, batches: Sequence[PackedMatrix]) -> PackedMatrix:
        """Concatenate batches of matrices of one width along their first dimension."""
        codes, scales, offsets = zip(*(batch.tensors() for batch in batches), strict=True)
        return cls(torch.cat(codes), torch.cat(scales), torch.cat(offsets), batches[0].width)

    @classmethod
    def stack(cls, matrices: Sequence[PackedMatrix]) -> PackedMatrix:
        """Stack single matrices of one width into a batch."""
        codes, scales, offsets = zip(*(matrix.tensors() for matrix in matrices), strict=True)
        return cls(torch.stack(codes), torch.stack(scales), torch.stack(offsets), matrices[0].width)

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return self.width.group_size(self.codes.shape[-1] // self.scales.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scales and offsets."""
        return self.codes, self.scales, self.offsets

    def unpack(self) -> Quantized:
        """Unpack codes and decode scales and offsets."""
        return Quantized(unpack_codes(self.codes, self.width, self.group_size), *self.grids())

    def grids(self) -> tuple[Tensor, Tensor]:
        """Return scales and offsets, float32."""
        return decode(self.scales, self.offsets, self.width.max_code)

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedMatrix:
        """Apply ``function`` to codes, scales and offsets."""
        return PackedMatrix(function(self.codes), function(self.scales), function(self.offsets), self.width)

    def select(self, index: Any) -> PackedMatrix:
        """Index the leading dimensions."""
        return self.map(lambda tensor: tensor[index])

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors by their names in a checkpoint: ``{prefix}.codes``, ``.scales`` and ``.offsets``."""
        return {f"{prefix}.{field}": tensor for field, tensor in zip(self.FIELDS, self.tensors(), strict=True)}


def pack_codes(codes: Tensor, width: Width, group_size: int) -> Tensor:
    """Pack codes [..., rows, columns] uint8 into [..., rows, groups * group_bytes] uint8."""
    groups = codes.reshape(*codes.shape[:-1], -1, group_size)
    if width is Width.EIGHT_BIT:
        packed = groups
    elif width is Width.THREE_BIT:
        packed = torch.cat([_pack_plane(groups & 3, 2), _pack_plane(groups >> 2, 1)], dim=-1)
    elif width is Width.TERNARY:
        packed = _pack_ternary(groups)
    else:
        packed = _pack_plane(groups, int(width.bits))
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_codes(packed: Tensor, width: Width, group_size: int) -> Tensor:
    """Unpack [..., rows, groups * group_bytes] uint8 into codes [..., rows, groups * group_size] uint8."""
    groups = packed.reshape(*packed.shape[:-1], -1, width.group_bytes(group_size))
    if width is Width.EIGHT_BIT:
        codes = groups
    elif width is Width.THREE_BIT:
        low, high = groups.split([group_size // 4, group_size // 8], dim=-1)
        codes = _unpack_plane(low, 2) | (_unpack_plane(high, 1) << 2)
    elif width is Width.TERNARY:
        codes = _unpack_ternary(groups, group_size)
    else:
        codes = _unpack_plane(groups, int(width.bits))
    return codes.reshape(*packed.shape[:-1], -1)


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., G] below 2**bits into [..., G * bits / 8] bytes. ``bits`` divides 8."""
    per_byte = 8 // bits
    slots = codes.unflatten(-1, (per_byte, -1))
    packed = slots[..., 0, :].clone()
    for i in range(1, per_byte):
        packed |= slots[..., i, :] << (i * bits)
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    """Unpack [..., G * bits / 8] bytes into codes [..., G]."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _pack_ternary(codes: Tensor) -> Tensor:
    """Pack codes [..., G] of 0 .. 2 into [..., ceil(G / 5)] bytes of 0 .. 242. Missing codes past G count as 0."""
    group_size = codes.shape[-1]
    num_bytes = Width.TERNARY.group_bytes(group_size)
    digits = F.pad(codes, (0, 5 * num_bytes - group_size)).unflatten(-1, (5, num_bytes))
    packed = digits[..., 4, :].clone()
    for i in (3, 2, 1, 0):
        packed = packed * 3 + digits[..., i, :]
    return packed


def _unpack_ternary(packed: Tensor, group_size: int) -> Tensor:
    """Unpack [..., ceil(G / 5)] bytes into codes [..., G]."""
    digits = []
    for _ in range(5):
        quotient = torch.div(packed, 3, rounding_mode="floor")
        digits.append(packed - quotient * 3)
        packed = quotient
    return torch.cat(digits, dim=-1)[..., :group_size]
