"""Error feedback for trellis codes: each tile of a matrix is corrected for the errors of those before it.

``quant.rotation`` has made the rows look Gaussian before (LDLQ: Tseng et al., "QuIP#", arXiv:2402.04396).

Shapes: E matrices, R rows, C columns, S = 2^L states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.quant.trellis import TILE_SIDE, TILE_WEIGHTS, Viterbi, decode, encode, viterbi

LDLQ_GAIN = 0.92
"""Factor of weights of unit variance before they are encoded with error feedback. Feedback adds to their variance."""

OUTPUT_LDLQ_GAIN = 0.88
"""The same with error feedback between rows as well, which adds more."""

FIT_PULL = 1e-3
"""Pull of the factors of rows towards one, as a share of the mean diagonal of their system of equations."""


def check_tiles(rows: int, columns: int) -> None:
    """Raise a UserError if 16 does not divide the rows or columns of a matrix."""
    if rows % TILE_SIDE or columns % TILE_SIDE:
        raise UserError(
            f"a matrix of {rows} x {columns} weights cannot be cut into tiles of {TILE_SIDE} x {TILE_SIDE}: such a "
            "matrix has no trellis codes"
        )


def quantize_ldlq(
    weight: Tensor, upper: Tensor, width_eighths: int, table: Tensor, search: Viterbi = viterbi
) -> tuple[Tensor, Tensor]:
    """Quantize rotated matrices with error feedback between blocks of 16 columns.

    With the inverse of the Hessian U^T U, the error D of a matrix costs |D U^-1|^2. Blocks are encoded from first to
    last. Each is corrected for the errors of the blocks before it (QTIP, section 2.1, with the factor of
    ``hessian.factorize``).

    Args:
        weight: [E, R, C] float32, with rows of mean square one. 16 divides R and C.
        upper: [E, C, C] float32, from ``hessian.factorize`` for the Hessians of the matrices' inputs.
        width_eighths: Width in eighths of a bit.
        table: [S] float32.
        search: Implementation of the Viterbi algorithm.

    Returns:
        Rings [E, R / 16, C / 16, width_eighths] int32, and their values [E, R, C] float32.

    Raises:
        UserError: 16 does not divide R or C.
    """
    experts, rows, columns = weight.shape
    check_tiles(rows, columns)
    shape = (experts, rows // TILE_SIDE, columns // TILE_SIDE, width_eighths)
    words = torch.empty(shape, dtype=torch.int32, device=weight.device)
    values = torch.empty_like(weight)
    errors = torch.empty_like(weight)  # D U^-1
    for start in range(0, columns, TILE_SIDE):
        stop = start + TILE_SIDE
        block = weight[:, :, start:stop]
        if start:
            block = torch.baddbmm(block, errors[:, :, :start], upper[:, :start, start:stop], alpha=-1)
        rings = encode(block.reshape(-1, TILE_WEIGHTS) * LDLQ_GAIN, width_eighths, table, search)
        words[:, :, start // TILE_SIDE] = rings.view(experts, -1, width_eighths)
        decoded = (decode(rings, width_eighths, table) / LDLQ_GAIN).view(experts, rows, TILE_SIDE)
        values[:, :, start:stop] = decoded
        triangle = upper[:, start:stop, start:stop]
        errors[:, :, start:stop] = torch.linalg.solve_triangular(triangle, block - decoded, upper=True, left=False)
    return words, values


def quantize_ldlq_both(
    weight: Tensor,
    upper: Tensor,
    output_upper: Tensor,
    width_eighths: int,
    table: Tensor,
    search: Viterbi = viterbi,
) -> tuple[Tensor, Tensor]:
    """Quantize rotated matrices with error feedback between blocks of columns and blocks of rows.

    With the inverses U^T U and V^T V of the Hessians of inputs and outputs, the error D costs |F|^2 with
    F = V^-T D U^-1 (Tseng et al., "YAQA", arXiv:2505.22988). Tile (i, j) is corrected for the errors E = D U^-1 of the
    tiles before it in its row, and for the errors F of the tiles above it. So tiles on one antidiagonal do not depend
    on each other, and are encoded at the same time.

    Args:
        weight: [E, R, C] float32, with rows of mean square one. 16 divides R and C.
        upper: [E, C, C] float32, U from ``hessian.factorize`` for the Hessians of the matrices' inputs.
        output_upper: [E, R, R] float32, V for the Hessians of their outputs, in units of the rows of ``weight``.
        width_eighths: Width in eighths of a bit.
        table: [S] float32.
        search: Implementation of the Viterbi algorithm.

    Returns:
        As ``quantize_ldlq``.

    Raises:
        UserError: 16 does not divide R or C.
    """
    experts, rows, columns = weight.shape
    check_tiles(rows, columns)
    row_blocks, column_blocks = rows // TILE_SIDE, columns // TILE_SIDE
    words = weight.new_empty((experts, row_blocks, column_blocks, width_eighths), dtype=torch.int32)
    values = torch.empty_like(weight)
    # Blocks come first, so that those of an antidiagonal are one slice. Its columns fall while its rows rise, so that
    # blocks of columns are in reverse order.
    weight_tiles = _tiles(weight)
    value_tiles = _tiles(values)
    column_factors = upper.view(experts, columns, column_blocks, TILE_SIDE).permute(2, 0, 1, 3).flip(0).contiguous()
    row_factors = output_upper.view(experts, rows, row_blocks, TILE_SIDE).permute(2, 0, 3, 1).contiguous()  # transposed
    column_triangles = _diagonal_blocks(upper).flip(0)
    row_triangles = _diagonal_blocks(output_upper).mT
    row_errors = weight.new_zeros(row_blocks, experts, TILE_SIDE, columns)  # E
    both_errors = weight.new_zeros(column_blocks, experts, rows, TILE_SIDE)  # F
    for diagonal in range(row_blocks + column_blocks - 1):
        first, stop = max(0, diagonal - column_blocks + 1), min(row_blocks, diagonal + 1)
        row_slice = slice(first, stop)
        column_slice = slice(column_blocks - 1 - diagonal + first, column_blocks - 1 - diagonal + stop)
        row = torch.arange(first, stop, device=weight.device)
        column = diagonal - row
        columns_before, rows_before = TILE_SIDE * (diagonal - first), TILE_SIDE * (stop - 1)
        left = row_errors[row_slice, :, :, :columns_before].flatten(0, 1)
        factors = column_factors[column_slice, :, :columns_before].flatten(0, 1)
        block = torch.baddbmm(weight_tiles[row, column].flatten(0, 1), left, factors, alpha=-1)
        above = both_errors[column_slice, :, :rows_before].flatten(0, 1)
        pull = row_factors[row_slice, :, :, :rows_before].flatten(0, 1) @ above
        triangle = column_triangles[column_slice].flatten(0, 1)
        target = torch.baddbmm(block, pull, triangle, alpha=-1)
        rings = encode(target.reshape(-1, TILE_WEIGHTS) * OUTPUT_LDLQ_GAIN, width_eighths, table, search)
        decoded = (decode(rings, width_eighths, table) / OUTPUT_LDLQ_GAIN).view_as(target)
        error = torch.linalg.solve_triangular(triangle, block - decoded, upper=True, left=False)
        row_triangle = row_triangles[row_slice].flatten(0, 1)
        tile_error = torch.linalg.solve_triangular(row_triangle, error - pull, upper=False)
        words[:, row, column] = rings.view(stop - first, experts, width_eighths).transpose(0, 1)
        tile_shape = (stop - first, experts, TILE_SIDE, TILE_SIDE)
        value_tiles[row, column] = decoded.view(tile_shape)
        row_errors.unflatten(3, (column_blocks, TILE_SIDE))[row, :, :, column] = error.view(tile_shape)
        both_errors.unflatten(2, (row_blocks, TILE_SIDE))[column_blocks - 1 - column, :, row] = tile_error.view(
            tile_shape
        )
    return words, values


def _tiles(matrix: Tensor) -> Tensor:
    """Return a view of matrices [E, R, C] as tiles [R / 16, C / 16, E, 16, 16]."""
    tiles = matrix.unflatten(2, (-1, TILE_SIDE)).unflatten(1, (-1, TILE_SIDE))
    return tiles.permute(1, 3, 0, 2, 4)


def _diagonal_blocks(matrix: Tensor) -> Tensor:
    """Return the blocks on the diagonal of matrices [E, N, N]: [N / 16, E, 16, 16]."""
    return _tiles(matrix).diagonal(dim1=0, dim2=1).movedim(-1, 0)


def refit_rows(weight: Tensor, restored: Tensor, hessian: Tensor) -> Tensor:
    """Return the factors [E, R] of the rows of ``restored`` that are best by the Hessian.

    Args:
        weight: [E, R, C] float32.
        restored: [E, R, C] float32, its quantized version.
        hessian: [E, C, C] float32, of the inputs of both.
    """
    product = restored @ hessian
    norm = (product * restored).sum(2)
    return torch.where(norm > 0, (product * weight).sum(2) / norm.clamp_min(1e-30), torch.ones_like(norm))


def refit_rows_both(weight: Tensor, restored: Tensor, hessian: Tensor, output_hessian: Tensor) -> Tensor:
    """Return the factors [E, R] of the rows of ``restored`` that are best by the Hessians of inputs and outputs.

    They minimize tr(D^T G D H) for the error D, the Hessian H of inputs and G of outputs. A small pull towards one
    keeps rows whose outputs do not matter.

    Args:
        weight: [E, R, C] float32.
        restored: [E, R, C] float32, its quantized version.
        hessian: [E, C, C] float32, of the inputs of both.
        output_hessian: [E, R, R] float32, of their outputs.
    """
    product = restored @ hessian
    system = output_hessian * (product @ restored.mT)
    diagonal = system.diagonal(dim1=1, dim2=2)
    pull = (FIT_PULL * diagonal.mean(1, keepdim=True)).clamp_min(1e-30)
    right = (output_hessian * (product @ weight.mT)).sum(2) + pull
    diagonal.add_(pull)
    factor, info = torch.linalg.cholesky_ex(system)
    factors = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    return torch.where((info == 0).unsqueeze(1), factors, refit_rows(weight, restored, hessian))
