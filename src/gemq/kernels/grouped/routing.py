"""Pairs of token and expert, sorted by expert on the device; and the sum over a token's experts.

A *pair* is one of a token's K choices: pair p belongs to token p // K. Nothing here waits for the GPU and no
shape depends on its data, so that a CUDA graph can capture it; no atomics, so that equal inputs give equal bits.
Knows nothing of weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Routing(NamedTuple):
    """Pairs in the order of their experts, cut into tiles of at most ``block`` pairs of one expert.

    order:  [P] int32, pairs sorted by expert, in their own order within one; past the last routed pair undefined
    starts: [E + 1] int32, place of each expert's first pair in order; starts[E] is the number of routed pairs
    tiles:  [ceil(P / block) + E] int32, the expert that a tile works for, or -1

    Expert e's tiles begin at starts[e] // block + e: there is always room for the next expert's.
    """

    order: Tensor
    starts: Tensor
    tiles: Tensor
    block: int


@triton.jit(do_not_specialize=["pairs", "num_tiles", "tile"])
def _sort_kernel(index, order, starts, tiles, pairs, num_tiles, tile, BLOCK: tl.constexpr):
    """Program e: finds the pairs of expert e and writes their part of ``order`` and ``tiles``.

    Every program reads all indices, which lie in L2; none waits for another.
    """
    expert = tl.program_id(0)
    before, at = 0, 0
    while at < pairs:
        p = at + tl.arange(0, BLOCK)
        chosen = tl.load(index + p, mask=p < pairs, other=2147483647)
        before += tl.sum(((chosen >= 0) & (chosen < expert)).to(tl.int32))
        at += BLOCK
    place, at = before, 0
    while at < pairs:
        p = at + tl.arange(0, BLOCK)
        mine = (tl.load(index + p, mask=p < pairs, other=2147483647) == expert).to(tl.int32)
        rank = tl.cumsum(mine, 0)
        tl.store(order + place + rank - 1, p, mask=mine != 0)
        place += tl.sum(mine)
        at += BLOCK
    tl.store(starts + expert, before)
    first, after = before // tile + expert, place // tile + expert + 1
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, place)
        after = num_tiles
    used = (place - before + tile - 1) // tile
    at = 0
    while at < num_tiles:
        t = at + tl.arange(0, BLOCK)
        tl.store(tiles + t, tl.where(t < first + used, expert, -1), mask=(t >= first) & (t < after))
        at += BLOCK


def sort_pairs(top_k_index: Tensor, experts: int, block: int) -> Routing:
    """Pairs of top_k_index [T, K] int by expert.

    Indices below 0 and from ``experts`` up mark unused slots, which are left out: vLLM gives -1 to padding tokens.
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
def _combine_kernel(y, index, weights, out, columns, experts, K: tl.constexpr, BLOCK: tl.constexpr):
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
    """Weighted sum over each token's K pairs, in float32 and in their order: y [T * K, H] -> [T, H] in y's dtype.

    Rows of unused slots are not read.
    """
    tokens, k = top_k_index.shape
    out = torch.empty(tokens, y.shape[-1], dtype=y.dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(y.shape[-1]))
    _combine_kernel[(tokens, triton.cdiv(y.shape[-1], block))](
        y, top_k_index.contiguous(), top_k_weights.contiguous(), out, y.shape[-1], experts, k, block
    )
    return out
