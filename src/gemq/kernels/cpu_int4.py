"""Decode on a CPU in bfloat16, with PyTorch's own product of bfloat16 activations and 4-bit weights.

PyTorch vectorizes that product by hand. It reads a quarter of bfloat16's bytes and is faster than the unquantized
model, while ``reference`` spends nearly all its time on dequantizing. A matrix is converted into PyTorch's layout on
first use and cached. The conversion costs as much as a few products of ``reference``. The cache needs 4.25 to 5 bits
per weight (twice that at 8 bits) in addition to the packed weights, for those experts only that are chosen.

Numerics: each scale and the midpoint of each grid are rounded to bfloat16, as the reference rounds each weight. The
measured errors against float64 differ from the reference's by less than a tenth. Results are not bit for bit those of
the dequantized model, so this path is never used in float32. There are no gradients: ``covers`` rejects inputs that
need one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gemq.kernels import reference
from gemq.quant.packing import PackedMatrix
from gemq.runtime.compat import torch_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices

MAX_TOKENS = 16
"""With more rows, converting the layout of every chosen expert would cost more than the products."""

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16
"""Requirement of PyTorch's layout."""


class _Int4Matrix(NamedTuple):
    """4-bit weights in PyTorch's layout.

    Attributes:
        codes: codes 0 ... 15, packed by PyTorch
        grid: [groups, rows, 2] bfloat16, scales and the values of code 8
        group_size: columns that share a scale
    """

    codes: Tensor
    grid: Tensor
    group_size: int

    def product(self, x: Tensor) -> Tensor:
        """Multiply x [T, columns] with the matrix: [T, rows]."""
        return torch_private.int4_matmul(x, self.codes, self.group_size, self.grid)


class _Converted(NamedTuple):
    """A converted matrix, as terms of a sum, and the versions of the tensors that it was made from."""

    version: tuple[int, ...]
    terms: tuple[_Int4Matrix, ...]


_cache: WeakKeyDictionary[nn.Module, dict[int, _Converted]] = WeakKeyDictionary()
"""Converted matrices by module and expert index."""


def covers(module: PackedExperts | PackedLinear, x: Tensor) -> bool:
    """Whether this file supports ``module`` on activations x [..., columns]."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.numel() > MAX_TOKENS * x.shape[-1]:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return False
    return all(rows % ROW_MULTIPLE == 0 and group_size in GROUP_SIZES for rows, group_size in _matrix_sizes(module))


def _matrix_sizes(module: Any) -> list[tuple[int, int]]:
    """Return rows and group size of each of the module's matrices."""
    if hasattr(module, "out_features"):
        return [(module.out_features, module.group_size)]
    return [(matrices.rows, matrices.group_size) for matrices in module.packed_projections().values()]


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for up to ``MAX_TOKENS`` tokens."""
    return reference.experts_forward(module, hidden, top_k_index, top_k_weights, partial(_expert_product, module))


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """As ``reference.linear_forward``, for up to ``MAX_TOKENS`` rows of x."""
    terms = _converted_terms(module, 0, module.matrix())
    y = _sum_of_products(terms, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
    bias: Tensor | None = module.bias
    return y if bias is None else y + bias


def _expert_product(module: PackedExperts, projection: str, expert: int, x: Tensor) -> Tensor:
    """Multiply x [T, columns] with one expert's matrix."""
    matrices: PackedMatrices = getattr(module, projection)
    return _sum_of_products(_converted_terms(matrices, expert, matrices.matrix(expert)), x)


def _sum_of_products(terms: tuple[_Int4Matrix, ...], x: Tensor) -> Tensor:
    """Multiply x with the sum of the matrices."""
    y = terms[0].product(x)
    for matrix in terms[1:]:
        y = y + matrix.product(x)
    return y


def _converted_terms(module: nn.Module, expert: int, matrix: PackedMatrix) -> tuple[_Int4Matrix, ...]:
    """Return the matrix in PyTorch's layout from the cache. Convert it if it is new or its weights have changed."""
    version = tuple(0 if t.is_inference() else torch_private.write_count(t) for t in matrix.tensors())
    converted = _cache.setdefault(module, {})
    if expert not in converted or converted[expert].version != version:
        converted[expert] = _Converted(version, _convert(matrix))
    return converted[expert].terms


def _convert(matrix: PackedMatrix) -> tuple[_Int4Matrix, ...]:
    """Write ``scale * code + offset`` as one or two matrices ``scale * (nibble - 8) + midpoint``.

    PyTorch rounds the midpoint to bfloat16, so it is chosen where values are small: in the middle of the grid.
    """
    codes, scales, offsets = matrix.unpack()
    codes, levels, group_size = codes.int(), matrix.width.levels, matrix.group_size
    if levels <= 8:  # on a grid twice as fine, the midpoint is a code, and gets nibble 8
        midpoints = offsets + scales * ((levels - 1) / 2)
        return (_int4_matrix(2 * codes + (9 - levels), scales / 2, midpoints, group_size),)
    if levels == 16:
        return (_int4_matrix(codes, scales, offsets + 8 * scales, group_size),)
    high = _int4_matrix(codes >> 4, 16 * scales, torch.zeros_like(offsets), group_size)
    low = _int4_matrix(codes & 15, scales, offsets + (8 * 16 + 8) * scales, group_size)
    return high, low


def _int4_matrix(nibbles: Tensor, scales: Tensor, midpoints: Tensor, group_size: int) -> _Int4Matrix:
    """Pack nibbles [rows, columns] int32 with float32 scales and midpoints [rows, groups]."""
    grid = torch.stack([scales, midpoints], -1).transpose(0, 1).contiguous().bfloat16()
    return _Int4Matrix(torch_private.pack_int4(nibbles), grid, group_size)
