"""Decode on a CPU in bfloat16, with PyTorch's own product of bfloat16 activations and 4-bit weights.

PyTorch vectorises that product by hand; it reads a quarter of bfloat16's bytes and so beats even the unquantized
model, where ``reference`` spends nearly all its time on writing weights out. A matrix is brought into its layout at
first use and kept: that costs as much as a few products of ``reference``, and 4.25 to 5 bits a weight of memory (twice
that at 8 bits) beside the packed ones, for the experts that are really chosen.

Numerics: each scale, and the value halfway up the grid, are rounded to bfloat16, as the reference rounds each weight;
measured errors against float64 are within a tenth of each other. Not bit for bit the dequantized model, therefore
never chosen in float32. Knows nothing of gradients: ``covers`` refuses what needs one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gemq.kernels import reference
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import LEVELS, Width

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices

MOST_TOKENS = 16
"""With more rows at once, bringing every chosen expert into another layout would outweigh the products."""

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16
"""What PyTorch's layout asks for."""


class _Int4(NamedTuple):
    """4-bit weights in PyTorch's layout, with [groups, rows, 2] bfloat16: scales, and values of code 8."""

    codes: Tensor
    grid: Tensor
    group_size: int

    def product(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, self.group_size, self.grid)


class _Kept(NamedTuple):
    version: tuple[int, ...]
    parts: tuple[_Int4, ...]


_kept: WeakKeyDictionary[nn.Module, dict[int, _Kept]] = WeakKeyDictionary()


def covers(module: PackedExperts | PackedLinear, x: Tensor) -> bool:
    """Whether this file serves ``module`` on activations x [..., columns]; ``reference`` serves the rest."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.numel() > MOST_TOKENS * x.shape[-1]:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return False
    one: Any = module
    if hasattr(module, "out_features"):
        sizes = [(one.out_features, one.group_size)]
    else:
        sizes = [(matrices.rows, matrices.group_size) for matrices in one._packed().values()]
    return all(rows % ROW_MULTIPLE == 0 and group_size in GROUP_SIZES for rows, group_size in sizes)


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for up to ``MOST_TOKENS`` tokens."""
    return reference.experts_forward(module, hidden, top_k_index, top_k_weights, partial(_expert_product, module))


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """[..., columns] -> [..., rows]."""
    parts = _repacked(module, 0, module.matrix(), module.width, module.group_size)
    y = _product(parts, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
    bias: Tensor | None = module.bias
    return y if bias is None else y + bias


def _expert_product(module: PackedExperts, projection: str, e: int, x: Tensor) -> Tensor:
    matrices: PackedMatrices = getattr(module, projection)
    return _product(_repacked(matrices, e, matrices.matrix(e), matrices.widths[e], matrices.group_size), x)


def _product(parts: tuple[_Int4, ...], x: Tensor) -> Tensor:
    y = parts[0].product(x)
    for part in parts[1:]:
        y = y + part.product(x)
    return y


def _repacked(module: nn.Module, e: int, matrix: PackedMatrix, width: Width, group_size: int) -> tuple[_Int4, ...]:
    """The matrix in PyTorch's layout, from the last call or made now. Made again after its weights were changed."""
    version = tuple(0 if t.is_inference() else t._version for t in matrix)
    kept = _kept.setdefault(module, {})
    if e not in kept or kept[e].version != version:
        kept[e] = _Kept(version, _repack(matrix, width, group_size))
    return kept[e].parts


def _repack(matrix: PackedMatrix, width: Width, group_size: int) -> tuple[_Int4, ...]:
    """``w = scale * code + offset`` as one or two matrices ``grid scale * (nibble - 8) + middle``.

    The middle is taken where it is small, since it is rounded: halfway up the grid.
    """
    codes, scales, offsets = matrix.unpack(width, group_size)
    codes, levels = codes.int(), LEVELS[width]
    if levels <= 8:  # twice as fine a grid has a nibble for the halfway point: 8
        return (_int4(2 * codes + (9 - levels), scales / 2, offsets + scales * ((levels - 1) / 2), group_size),)
    if levels == 16:
        return (_int4(codes, scales, offsets + 8 * scales, group_size),)
    high = _int4(codes >> 4, 16 * scales, torch.zeros_like(offsets), group_size)
    return high, _int4(codes & 15, scales, offsets + (8 * 16 + 8) * scales, group_size)


def _int4(nibbles: Tensor, scales: Tensor, middles: Tensor, group_size: int) -> _Int4:
    grid = torch.stack([scales, middles], -1).transpose(0, 1).contiguous().bfloat16()
    return _Int4(torch._convert_weight_to_int4pack_for_cpu(nibbles, 1), grid, group_size)
