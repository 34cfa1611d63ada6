"""``x W^T`` for packed W and many rows of x: tiles on tensor cores, weights unpacked in registers.

One kernel serves all experts at once, or one dense matrix. Its tile is [BLOCK_N rows of W, BLOCK_M rows of x], the
transpose of the output's: on Hopper the left operand of a tensor core instruction may come from registers, where
the weights are unpacked, while x streams through shared memory. Pairs of token and expert as in ``routing``.
Knows nothing of modules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import activated, gated, kernel_arguments
from gemq.kernels.grouped.dequantize import ONE_BITS, WIDTHS_TO_TRY, group_bytes, levels_at, load_weights, only_levels
from gemq.kernels.grouped.routing import Routing
from gemq.quant.grid_kernel import decode_offset, decode_scale

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its dot takes bfloat16 for integers


class Config(NamedTuple):
    """Tile of one program and how it is run."""

    block_m: int  # pairs or rows of x
    block_n: int  # rows of W
    block_k: int  # columns at once, within one group
    warps: int
    stages: int


def config_for(pairs: int, experts: int, dtype: torch.dtype) -> Config:
    """Chosen from the mean number of pairs an expert gets, which the host knows; few values, few compilations."""
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2)
    mean = pairs / experts
    for block_m, config in (
        (16, Config(16, 64, 128, 4, 3)),
        (32, Config(32, 64, 128, 4, 3)),
        (64, Config(64, 128, 128, 8, 2)),
    ):
        if 1.5 * mean <= block_m:
            return config
    return Config(128, 64, 128, 4, 2)  # H100, 2048 tokens of OLMoE: 883 us; 958 with 128 rows of W and 8 warps


@triton.jit
def _accumulate(
    acc,
    x,
    x_mask,
    codes,
    scales,
    offsets,
    row,
    row_mask,
    one_bits,
    groups,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acc [N, M] + W [N, all columns] x^T. x points at the first columns of each pair, [BLOCK, M]."""
    group_length = group_bytes(LEVELS, GROUP)
    codes += row.to(tl.int64) * (groups * group_length)
    scales += row.to(tl.int64) * groups
    offsets += row.to(tl.int64) * groups
    next_scale = tl.load(scales, mask=row_mask, other=0)
    next_offset = tl.load(offsets, mask=row_mask, other=0)
    for group in range(groups):
        scale = decode_scale(next_scale)
        offset = decode_offset(next_offset, scale, LEVELS - 1.0)
        following = tl.minimum(group + 1, groups - 1)  # a load's latency is longer than unpacking
        next_scale = tl.load(scales + following, mask=row_mask, other=0)
        next_offset = tl.load(offsets + following, mask=row_mask, other=0)
        for h in tl.static_range(GROUP // BLOCK):
            w = load_weights(
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
                w, tile = w.to(tl.float32), tile.to(tl.float32)
            acc = tl.dot(w, tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _halves(acc, M: tl.constexpr, N: tl.constexpr):
    """[N, M] whose rows are eight gates, eight ups, and so on -> gate and up, [N / 2, M].

    Eight, because a thread then holds both and nothing moves between threads.
    """
    parts = tl.permute(tl.reshape(acc, (N // 16, 2, 8, M)), (0, 2, 3, 1))
    gate, up = tl.split(parts)
    return tl.reshape(gate, (N // 2, M)), tl.reshape(up, (N // 2, M))


# ``groups`` is not specialized: Triton 3.6 fails to compile some tiles for a constant loop of one iteration.
@triton.jit(do_not_specialize=["pairs", "groups"])
def _matmul_kernel(
    x,
    codes,
    scales,
    offsets,
    table,
    bias,
    out,
    order,
    starts,
    tiles,
    num_rows,
    pairs,
    groups,  # of a row
    one_bits,
    limit,
    alpha,
    shift,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTED: tl.constexpr,
    GATHER: tl.constexpr,  # x row of a pair: its place in ``order``, or the token order[place] // GATHER
    SCATTER: tl.constexpr,  # out row: place, or order[place]
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(num_rows, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if ROUTED:
        expert = tl.load(tiles + tile)
        if expert < 0:
            return
        start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
        place = start + (tile - (start // BLOCK_M + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        expert, end = 0, pairs
        place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < end
    if GATHER or SCATTER:
        pair = tl.load(order + place, mask=inside, other=0)
    x_row = (pair // GATHER if GATHER else place).to(tl.int64)
    out_row = (pair if SCATTER else place).to(tl.int64)

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
    for i in tl.static_range(WIDTHS_TO_TRY):
        if (WIDTHS >> i) & 1:  # noqa: SIM102 - the outer is the compiler's
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
        added = tl.load(bias + expert.to(tl.int64) * num_rows + row if ROUTED else bias + row, mask=row_mask, other=0.0)
        acc += added.to(tl.float32)[:, None]

    if GATED:
        gate, up = _halves(acc, BLOCK_M, BLOCK_N)
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


class Packed(NamedTuple):
    """Packed matrices of one shape, as in PackedMatrices: one an expert, or a single dense one."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    table: Tensor | None  # None: a single matrix
    bias: Tensor | None  # [E, rows]
    widths: int  # levels_mask, of a single matrix width_bit
    rows: int
    group_size: int


def matmul(
    x: Tensor,
    w: Packed,
    config: Config,
    routing: Routing | None,
    top_k: int = 0,
    scatter: bool = False,
    activation: Activation = RAW,
) -> Tensor:
    """All pairs times their expert's matrix: [P, rows], or [P, rows / 2] with a gated activation, in x's dtype.

    x is [T, columns] with top_k = K, or [P, columns] in the order of ``routing`` with 0. Output rows lie in the order
    of ``routing``, with ``scatter`` in that of the pairs; rows that no routed pair owns are left unwritten. Without
    routing: x [P, columns] times the one matrix.
    """
    pairs = routing.order.shape[0] if routing else x.shape[0]
    order, starts, tiles = (routing.order, routing.starts, routing.tiles) if routing else (w.codes,) * 3
    num_tiles = tiles.shape[0] if routing else triton.cdiv(pairs, config.block_m)
    numbers, constants = kernel_arguments(activation)
    out = torch.empty(pairs, w.rows // 2 if activation.gated else w.rows, dtype=x.dtype, device=x.device)
    _matmul_kernel[(num_tiles * triton.cdiv(w.rows, config.block_n),)](
        *(
            x,
            w.codes,
            w.scales,
            w.offsets,
            w.codes if w.table is None else w.table,
            w.codes if w.bias is None else w.bias,
            out,
        ),
        *(order, starts, tiles, w.rows, pairs, x.shape[-1] // w.group_size, ONE_BITS, *numbers),
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
