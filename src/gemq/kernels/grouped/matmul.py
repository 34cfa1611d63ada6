"""``x W^T`` for packed W and many rows of x, on tensor cores. Weights are unpacked in registers.

One kernel serves all experts, or one dense matrix. Its tile is [BLOCK_N rows of W, BLOCK_M rows of x], the transpose of
the output's tile: on Hopper, the left operand of a tensor core instruction may come from registers, where the weights
are unpacked, while x streams through shared memory. Pairs of token and expert are those of ``routing``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import activated, gated, kernel_arguments
from gemq.kernels.grouped.dequantize import PackedWeights
from gemq.kernels.grouped.routing import Routing
from gemq.kernels.grouped.unpack import NUM_WIDTHS, ONE_BITS, levels_at, load_weights, only_levels
from gemq.kernels.packed_layout import group_bytes
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant.grid_kernel import decode_offset, decode_scale

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its dot treats bfloat16 as integers


class TileConfig(NamedTuple):
    """Tile sizes and launch options of the kernel.

    Attributes:
        block_m: pairs, or rows of x, of a program
        block_n: rows of W of a program
        block_k: columns of one step, at most a group
        warps: warps of a program
        stages: pipeline stages
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def config_for(pairs: int, experts: int, dtype: torch.dtype) -> TileConfig:
    """Return the tile for ``pairs`` pairs over ``experts`` experts.

    It depends on the mean number of pairs of an expert, which the host knows. There are few values, so that kernels are
    compiled few times.
    """
    if dtype == torch.float32:
        return TileConfig(32, 32, 32, 4, 2)
    padded_mean = 1.5 * (pairs / experts)
    if padded_mean <= 16:
        return TileConfig(16, 64, 128, 4, 3)
    if padded_mean <= 32:
        return TileConfig(32, 64, 128, 4, 3)
    if padded_mean <= 64:
        return TileConfig(64, 128, 128, 8, 2)
    return TileConfig(128, 64, 128, 4, 2)  # H100, 2048 tokens of OLMoE: 883 us; 958 with 128 rows of W and 8 warps


@triton.jit
def _accumulate(
    acc: Tile,
    x: Pointer,
    x_mask: Tile,
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    row: Tile,
    row_mask: Tile,
    one_bits: Scalar,
    groups: Scalar,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return acc [N, M] plus rows of W [N, columns] times x^T, over all columns.

    Args:
        x: [BLOCK, M] pointers to the first columns of each pair
        x_mask: [1, M]
        row: [N] rows of W
        row_mask: [N]
        groups: groups of a row
    """
    group_length = group_bytes(LEVELS, GROUP)
    codes += row.to(tl.int64) * (groups * group_length)
    scales += row.to(tl.int64) * groups
    offsets += row.to(tl.int64) * groups
    next_scale = tl.load(scales, mask=row_mask, other=0)
    next_offset = tl.load(offsets, mask=row_mask, other=0)
    for group in range(groups):
        scale = decode_scale(next_scale)
        offset = decode_offset(next_offset, scale, LEVELS - 1.0)
        next_group = tl.minimum(group + 1, groups - 1)  # loaded ahead: the latency is longer than unpacking takes
        next_scale = tl.load(scales + next_group, mask=row_mask, other=0)
        next_offset = tl.load(offsets + next_group, mask=row_mask, other=0)
        for h in tl.static_range(GROUP // BLOCK):
            weights = load_weights(
                codes + group * group_length,
                row_mask,
                scale,
                offset,
                one_bits,
                h * BLOCK,
                LEVELS,
                GROUP,
                BLOCK,
                x.dtype.element_ty,
            )
            tile = tl.load(x + (group * GROUP + h * BLOCK), mask=x_mask, other=0.0)
            if _INTERPRETED:
                weights, tile = weights.to(tl.float32), tile.to(tl.float32)
            acc = tl.dot(weights, tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _split_gate_up(acc: Tile, M: tl.constexpr, N: tl.constexpr):
    """[N, M] with alternating blocks of eight gate rows and eight up rows -> gate and up, [N / 2, M].

    With blocks of eight, a thread holds both rows of a pair, and no data moves between threads.
    """
    pairs = tl.permute(tl.reshape(acc, (N // 16, 2, 8, M)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(gate, (N // 2, M)), tl.reshape(up, (N // 2, M))


# ``groups`` is not specialized: Triton 3.6 fails to compile some tiles for a constant loop of one iteration.
@triton.jit(do_not_specialize=["pairs", "groups"])
def _matmul_kernel(
    x: Pointer,
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    table: Pointer,
    bias: Pointer,
    out: Pointer,
    order: Pointer,
    starts: Pointer,
    tiles: Pointer,
    num_rows: Scalar,
    pairs: Scalar,
    groups: Scalar,  # of a row
    one_bits: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTED: tl.constexpr,
    GATHER: tl.constexpr,  # row of x: the position in ``order`` if 0, else the token order[position] // GATHER
    SCATTER: tl.constexpr,  # row of out: order[position], else the position
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program for each tile of pairs and each block of rows. See ``matmul``."""
    blocks = tl.cdiv(num_rows, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if ROUTED:
        expert = tl.load(tiles + tile)
        if expert < 0:
            return
        start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
        position = start + (tile - (start // BLOCK_M + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        expert, end = 0, pairs
        position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = position < end
    if GATHER or SCATTER:
        pair = tl.load(order + position, mask=inside, other=0)
    x_row = (pair // GATHER if GATHER else position).to(tl.int64)
    out_row = (pair if SCATTER else position).to(tl.int64)

    n = tl.arange(0, BLOCK_N)
    if GATED:
        half = num_rows // 2
        column = block * (BLOCK_N // 2) + n // 16 * 8 + n % 8
        is_up = n % 16 // 8
        row = column * 2 + is_up if INTERLEAVED else column + is_up * half
        row_mask = column < half
    else:
        row = block * BLOCK_N + n
        row_mask = row < num_rows
    if ROUTED:
        levels = tl.load(table + 3 * expert)
        codes += tl.multiple_of(tl.load(table + 3 * expert + 1), 16)
        first_scale = tl.load(table + 3 * expert + 2)
        scales += first_scale
        offsets += first_scale
    else:
        levels: tl.constexpr = only_levels(WIDTHS)  # type: ignore[no-redef]
    x_tile = x + x_row[None, :] * (groups * GROUP) + tl.arange(0, BLOCK_K)[:, None]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in tl.static_range(NUM_WIDTHS):
        if (WIDTHS >> i) & 1:  # noqa: SIM102 - evaluated by the compiler, unlike the inner condition
            if levels == levels_at(i):
                acc = _accumulate(
                    acc,
                    x_tile,
                    inside[None, :],
                    codes,
                    scales,
                    offsets,
                    row,
                    row_mask,
                    one_bits,
                    groups,
                    levels_at(i),
                    GROUP,
                    BLOCK_K,
                )
    if HAS_BIAS:
        bias_row = bias + expert.to(tl.int64) * num_rows + row if ROUTED else bias + row
        acc += tl.load(bias_row, mask=row_mask, other=0.0).to(tl.float32)[:, None]

    if GATED:
        gate, up = _split_gate_up(acc, BLOCK_M, BLOCK_N)
        y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
        out_column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = num_rows // 2
    else:
        y = activated(acc, limit, alpha, ACTIVATION, CLAMP)
        out_column = block * BLOCK_N + n
        width = num_rows
    y = tl.trans(y.to(out.dtype.element_ty))
    target = out + out_row[:, None] * width + out_column[None, :]
    tl.store(target, y, mask=inside[:, None] & (out_column < width)[None, :])


def matmul(
    x: Tensor,
    w: PackedWeights,
    config: TileConfig,
    routing: Routing | None,
    top_k: int = 0,
    scatter: bool = False,
    activation: Activation = RAW,
) -> Tensor:
    """Multiply all pairs with their expert's matrix, or all rows of x with a single matrix.

    Args:
        x: [T, columns] with ``top_k``, else [P, columns] in the order of ``routing``; [P, columns] without routing
        w: packed matrices
        config: tile sizes
        routing: pairs sorted by expert, or None for a single matrix
        top_k: experts of a token, to gather a pair's token from x; 0 if x has a row for each pair
        scatter: whether output rows are in the order of pairs instead of the order of ``routing``
        activation: applied to the products

    Returns:
        [P, rows], or [P, rows / 2] with a gated activation, in x's dtype. Rows without a routed pair are not written.
    """
    if routing is None:
        pairs = x.shape[0]
        num_tiles = triton.cdiv(pairs, config.block_m)
        order = starts = tiles = w.codes  # never read
    else:
        order, starts, tiles, _ = routing
        pairs, num_tiles = order.shape[0], tiles.shape[0]
    numbers, constants = kernel_arguments(activation)
    out = torch.empty(pairs, w.rows // 2 if activation.gated else w.rows, dtype=x.dtype, device=x.device)
    _matmul_kernel[(num_tiles * triton.cdiv(w.rows, config.block_n),)](
        x,
        w.codes,
        w.scales,
        w.offsets,
        w.codes if w.table is None else w.table,
        w.codes if w.bias is None else w.bias,
        out,
        order,
        starts,
        tiles,
        w.rows,
        pairs,
        x.shape[-1] // w.group_size,
        ONE_BITS,
        *numbers,
        WIDTHS=w.widths,
        GROUP=w.group_size,
        HAS_BIAS=w.bias is not None,
        ROUTED=routing is not None,
        GATHER=top_k,
        SCATTER=scatter,
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=min(w.group_size, config.block_k),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
