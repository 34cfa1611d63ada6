"""``x W^T`` for matrices with trellis codes and many rows of x, on tensor cores. Weights are decoded in registers.

As ``kernels.grouped.matmul``, for one kind of matrix only. Columns of x are rotated and in the order in which a thread
decodes weights (``rotation.rotate_operand``). The products are of integers, the values of codes in units of
``values.VALUE_UNIT``. Scales of rows are applied to the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import activated, gated, kernel_arguments
from gemq.kernels.grouped.matmul import _split_gate_up
from gemq.kernels.grouped.routing import Routing
from gemq.kernels.trellis.launch import TrellisArguments
from gemq.kernels.trellis.operands import as_operand, operand_positions, period_values, reaches_first_word
from gemq.kernels.trellis.values import VALUE_UNIT, period_words
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant.grid_kernel import decode_scale

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its dot treats bfloat16 as integers


class TileConfig(NamedTuple):
    """Tile sizes and launch options of the kernel.

    Attributes:
        block_m: pairs of a program
        block_n: rows of W of a program, at least 16 for each warp
        block_k: columns of one step, a multiple of 32
        warps: warps of a program
        stages: pipeline stages
        registers: most registers of a thread, or None
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None


def config_for(pairs: int, experts: int, dtype: torch.dtype) -> TileConfig:
    """Return the tile for ``pairs`` pairs over ``experts`` experts."""
    if dtype == torch.float32:
        return TileConfig(32, 32, 32, 4, 2)
    padded_mean = 1.5 * (pairs / experts)
    if padded_mean <= 16:
        return TileConfig(16, 64, 64, 4, 3)
    if padded_mean <= 32:
        return TileConfig(32, 64, 64, 4, 3)
    if padded_mean <= 64:
        return TileConfig(64, 128, 64, 8, 3)
    return TileConfig(128, 128, 64, 8, 3, 128)  # with so few registers, an SM of Hopper runs two programs


@triton.jit
def _byte(word: Tile):
    """Return the byte at which a word starts, as a number that is known not to be negative."""
    return (word * 4).to(tl.uint32).to(tl.int64)


@triton.jit
def _accumulate(
    acc: Tile,
    x: Pointer,
    words: Pointer,
    row: Tile,
    period: Tile,
    columns: Scalar,
    eighths: Scalar,
    STATE_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Return acc [N, M] plus rows of W [N, columns] times x^T, over all columns.

    Args:
        x: [BLOCK, M] pointers to the first columns of each pair
        words: the matrix's first word
        row: row of W of each number of ``operand_positions``
        period: period of each number
        EVEN: whether BLOCK divides the columns
    """
    last, middle, first, shift = period_words((row & 15) * 2 + (period & 1), eighths)
    tile = period >> 1
    start = ((row >> 4) * (columns // 16) + tile) * eighths
    last, middle, first = _byte(start + last), _byte(start + middle), _byte(start + first)
    steps = tl.cdiv(columns, BLOCK)
    advance = (BLOCK // 4) * eighths
    reaches = reaches_first_word(eighths, STATE_BITS)
    inside = tile < columns // 16
    next_last = tl.load((words + last).to(tl.pointer_type(tl.uint32)), mask=None if EVEN else inside)
    next_middle = tl.load((words + middle).to(tl.pointer_type(tl.uint32)), mask=None if EVEN else inside)
    next_first = tl.load(
        (words + first).to(tl.pointer_type(tl.uint32)), mask=reaches if EVEN else reaches & inside, other=0
    )
    for step in range(steps):
        last_word, middle_word, first_word = next_last, next_middle, next_first
        words += tl.where(step + 1 < steps, advance, 0)  # loaded ahead: the latency is longer than decoding takes
        if not EVEN:
            inside = (step + 1) * (BLOCK // 16) + tile < columns // 16
        next_last = tl.load((words + last).to(tl.pointer_type(tl.uint32)), mask=None if EVEN else inside)
        next_middle = tl.load((words + middle).to(tl.pointer_type(tl.uint32)), mask=None if EVEN else inside)
        next_first = tl.load(
            (words + first).to(tl.pointer_type(tl.uint32)), mask=reaches if EVEN else reaches & inside, other=0
        )
        values = period_values(last_word, middle_word, first_word, shift, eighths, STATE_BITS)
        weights = as_operand(values, acc.shape[0], BLOCK // 8, WARPS).to(x.dtype.element_ty)
        x_tile = tl.load(x + step * BLOCK)
        if _INTERPRETED:
            weights, x_tile = weights.to(tl.float32), x_tile.to(tl.float32)
        acc = tl.dot(weights, x_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _matrix_row(
    n: Tile, block: Scalar, num_rows: Scalar, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the matrix row at row n of a tile: gate and up alternate by eight. Rows past the last become row 0."""
    if GATED:
        half = num_rows // 2
        column = block * (BLOCK // 2) + n // 16 * 8 + n % 8
        is_up = n % 16 // 8
        row = column * 2 + is_up if INTERLEAVED else column + is_up * half
        return tl.where(column < half, row, 0)
    else:
        row = block * BLOCK + n
        return tl.where(row < num_rows, row, 0)


@triton.jit(do_not_specialize=["pairs"])
def _matmul_kernel(
    x: Pointer,
    codes: Pointer,
    scales: Pointer,
    table: Pointer,
    bias: Pointer,
    out: Pointer,
    order: Pointer,
    starts: Pointer,
    tiles: Pointer,
    num_rows: Scalar,
    columns: Scalar,
    x_stride: Scalar,
    pairs: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    STATE_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr,  # row of x: the position in ``order`` if 0, else the token order[position] // GATHER
    SCATTER: tl.constexpr,  # row of out: order[position], else the position
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program for each tile of pairs and each block of rows. See ``matmul``."""
    blocks = tl.cdiv(num_rows, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    position = start + (tile - (start // BLOCK_M + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = position < end
    position = tl.where(inside, position, start)  # loads need no mask then
    if GATHER or SCATTER:
        pair = tl.load(order + position)
    x_row = (pair // GATHER if GATHER else position).to(tl.int64)
    out_row = (pair if SCATTER else position).to(tl.int64)

    row = _matrix_row(tl.arange(0, BLOCK_N), block, num_rows, GATED, INTERLEAVED, BLOCK_N)
    n, period = operand_positions(BLOCK_N, BLOCK_K // 8, WARPS)
    operand_row = _matrix_row(n, block, num_rows, GATED, INTERLEAVED, BLOCK_N)
    eighths = tl.load(table + 2 * expert).to(tl.int32)
    words = codes + tl.load(table + 2 * expert + 1).to(tl.int64) * 16
    x_tile = x + x_row[None, :] * x_stride + tl.arange(0, BLOCK_K)[:, None]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = _accumulate(
        acc,
        x_tile,
        words,
        operand_row,
        period,
        columns,
        eighths,
        STATE_BITS,
        EVEN,
        BLOCK_K,
        WARPS,
    )
    first_row = expert.to(tl.int64) * num_rows
    acc *= (decode_scale(tl.load(scales + first_row + row)) * VALUE_UNIT)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + first_row + row).to(tl.float32)[:, None]

    if GATED:
        gate, up = _split_gate_up(acc, BLOCK_M, BLOCK_N)
        y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
        out_column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = num_rows // 2
    else:
        y = activated(acc, limit, alpha, ACTIVATION, CLAMP)
        out_column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        width = num_rows
    y = tl.trans(y.to(out.dtype.element_ty))
    target = out + out_row[:, None] * width + out_column[None, :]
    tl.store(target, y, mask=inside[:, None] & (out_column < width)[None, :])


def padded_columns(columns: int, config: TileConfig) -> int:
    """Return the columns of x for a product with matrices of ``columns`` columns."""
    return triton.cdiv(columns, config.block_k) * config.block_k


def matmul(
    x: Tensor,
    w: TrellisArguments,
    config: TileConfig,
    routing: Routing,
    top_k: int = 0,
    scatter: bool = False,
    activation: Activation = RAW,
) -> Tensor:
    """Multiply all pairs with their expert's matrix.

    Args:
        x: from ``rotate_operand``: [T, padded] with ``top_k``, else [P, padded] in the order of ``routing``
        w: the experts' matrices
        config: tile sizes
        routing: pairs sorted by expert
        top_k: experts of a token, to gather a pair's token from x; 0 if x has a row for each pair
        scatter: whether output rows are in the order of pairs instead of the order of ``routing``
        activation: applied to the products

    Returns:
        [P, rows], or [P, rows / 2] with a gated activation, in x's dtype. Rows without a routed pair are not written.
    """
    order, starts, tiles, _ = routing
    pairs, num_tiles = order.shape[0], tiles.shape[0]
    numbers, constants = kernel_arguments(activation)
    out = torch.empty(pairs, w.rows // 2 if activation.gated else w.rows, dtype=x.dtype, device=x.device)
    _matmul_kernel[(num_tiles * triton.cdiv(w.rows, config.block_n),)](
        x,
        w.codes,
        w.scales,
        w.table,
        w.codes if w.bias is None else w.bias,
        out,
        order,
        starts,
        tiles,
        w.rows,
        w.columns,
        x.shape[1],
        pairs,
        *numbers,
        STATE_BITS=w.state_bits,
        HAS_BIAS=w.bias is not None,
        GATHER=top_k,
        SCATTER=scatter,
        **constants,
        EVEN=w.columns % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        WARPS=min(config.warps, config.block_n // 16),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return out
