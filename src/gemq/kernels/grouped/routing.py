"""Routing on the device: pairs of token and expert sorted by expert, and the sum over a token's experts.

A *pair* is one of a token's K choices: pair p belongs to token p // K. The host never waits for the GPU and no shape
depends on data, so that a CUDA graph can capture these functions. There are no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.triton_types import Pointer, Scalar


class Routing(NamedTuple):
    """Pairs sorted by expert, divided into tiles of at most ``block`` pairs of one expert.

    Tiles of expert e begin at starts[e] // block + e, which always leaves enough tiles for the next expert's start.

    Attributes:
        order: [P] int32, pairs sorted by expert, stable; undefined past the last routed pair
        starts: [E + 1] int32, position of each expert's first pair in ``order``; starts[E] counts all routed pairs
        tiles: [ceil(P / block) + E] int32, expert of each tile, or -1
        block: pairs of a tile
    """

    order: Tensor
    starts: Tensor
    tiles: Tensor
    block: int


@triton.jit(do_not_specialize=["pairs", "num_tiles", "tile_size"])
def _sort_kernel(
    index: Pointer,
    order: Pointer,
    starts: Pointer,
    tiles: Pointer,
    pairs: Scalar,
    num_tiles: Scalar,
    tile_size: Scalar,
    BLOCK: tl.constexpr,
):
    """Program e finds the pairs of expert e and writes its part of ``order`` and ``tiles``.

    Every program reads all indices, which are in the L2 cache. No program waits for another.
    """
    expert = tl.program_id(0)
    start, offset = 0, 0  # start: number of pairs of the experts below this one
    while offset < pairs:
        pair = offset + tl.arange(0, BLOCK)
        chosen = tl.load(index + pair, mask=pair < pairs, other=2147483647)
        start += tl.sum(((chosen >= 0) & (chosen < expert)).to(tl.int32))
        offset += BLOCK
    end, offset = start, 0
    while offset < pairs:
        pair = offset + tl.arange(0, BLOCK)
        is_chosen = (tl.load(index + pair, mask=pair < pairs, other=2147483647) == expert).to(tl.int32)
        rank = tl.cumsum(is_chosen, 0)
        tl.store(order + end + rank - 1, pair, mask=is_chosen != 0)
        end += tl.sum(is_chosen)
        offset += BLOCK
    tl.store(starts + expert, start)
    first_tile, next_tile = start // tile_size + expert, end // tile_size + expert + 1
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, end)
        next_tile = num_tiles
    used_tiles = (end - start + tile_size - 1) // tile_size
    offset = 0
    while offset < num_tiles:
        tile = offset + tl.arange(0, BLOCK)
        tl.store(
            tiles + tile,
            tl.where(tile < first_tile + used_tiles, expert, -1),
            mask=(tile >= first_tile) & (tile < next_tile),
        )
        offset += BLOCK


def sort_pairs(top_k_index: Tensor, experts: int, block: int) -> Routing:
    """Sort the pairs of top_k_index [T, K] int by expert.

    Indices outside 0 ... ``experts`` - 1 mark unused slots, which are left out. vLLM marks padding tokens with -1.

    Args:
        top_k_index: [T, K] int
        experts: number of experts
        block: pairs of a tile
    """
    pairs = top_k_index.numel()
    num_tiles = triton.cdiv(pairs, block) + experts
    order, starts, tiles = (
        torch.empty(n, dtype=torch.int32, device=top_k_index.device) for n in (pairs, experts + 1, num_tiles)
    )
    _sort_kernel[(experts,)](
        top_k_index.contiguous(), order, starts, tiles, pairs, num_tiles, block, 1024 if pairs <= 1024 else 4096
    )
    return Routing(order, starts, tiles, block)


@triton.jit
def _combine_kernel(
    y: Pointer,
    index: Pointer,
    weights: Pointer,
    out: Pointer,
    columns: Scalar,
    experts: Scalar,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, b) sums block b of the columns of token t's pairs."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        pair = token * K + k
        expert = tl.load(index + pair)
        routed = (expert >= 0) & (expert < experts)
        weight = tl.load(weights + pair).to(tl.float32)
        value = tl.load(y + pair * columns + column, mask=inside & routed, other=0.0).to(tl.float32)
        total += tl.where(routed, weight, 0.0) * value
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


def combine(y: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Tensor:
    """Return the weighted sum over each token's K pairs, computed in float32 and in the order of slots.

    Args:
        y: [T * K, H] outputs of the pairs; rows of unused slots are not read
        top_k_index: [T, K] int
        top_k_weights: [T, K]
        experts: number of experts

    Returns:
        [T, H] in y's dtype.
    """
    tokens, k = top_k_index.shape
    out = torch.empty(tokens, y.shape[-1], dtype=y.dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(y.shape[-1]))
    _combine_kernel[(tokens, triton.cdiv(y.shape[-1], block))](
        y, top_k_index.contiguous(), top_k_weights.contiguous(), out, y.shape[-1], experts, k, block
    )
    return out
