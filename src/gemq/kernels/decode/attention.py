"""Attention of one new token of each sequence over a static cache, on a GPU.

Legend: B sequences, H heads, N heads of keys and values, L length of the cache, D head size.

All sequences see the same places, ``bounds[0]`` up to ``bounds[1]``, which are read on the device, so that a CUDA graph
captures it; what lies beyond in the cache is never read. A program takes many places of one head at once, without
tensor cores, for which one token is too little; heads that share keys and values read them from the L2 cache. Few heads
are cut between programs whose parts a second launch puts together. All arithmetic is float32.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.decode import launch

BLOCK, LEAST = 256, 64
"""Places that a program takes at once, at most, and that are worth a program of their own."""

PROGRAMS = 256
"""Programs for which heads are cut at most: two for each multiprocessor of a large GPU."""

ELEMENTS = 64
"""Of a block's keys, and of its values, that a thread holds."""


@triton.jit
def _attend_more(query, k, v, place, end, d, inside, most, sums, mixed, D: tl.constexpr):
    """The running softmax (largest score, sum, weighted sum of values) with the places [BLOCK] before ``end`` too."""
    seen = place < end
    mask = seen[:, None] & inside[None, :]
    at = place[:, None] * D + d[None, :]
    keys = tl.load(k + at, mask=mask, other=0.0)
    values = tl.load(v + at, mask=mask, other=0.0)
    scores = tl.where(seen, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
    new = tl.maximum(most, tl.max(scores, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    chances = tl.exp(scores - base)
    fade = tl.exp(most - base)
    sums = sums * fade + tl.sum(chances, 0)
    mixed = mixed * fade + tl.sum(values.to(tl.float32) * chances[:, None], 0)
    return new, sums, mixed


@triton.jit
def _attend_kernel(
    q,  # [B, H, D]
    k,  # [B, N, L, D]
    v,
    bounds,  # [2] int32
    out,  # [B, H, D], or float32 [B, H, PARTS, D]
    largest,  # float32 [B, H, PARTS]
    total,
    scaling,
    length,
    SHARING: tl.constexpr,  # H / N
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D or more
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # is all that a program takes
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [B * H, PARTS]."""
    if PDL and PARTS > 1:
        gdc_launch_dependents()
    head, part = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(bounds), tl.load(bounds + 1)
    own = tl.cdiv(end - first, PARTS)
    first += part * own
    end = tl.minimum(first + own, end)
    d = tl.arange(0, WIDTH)
    inside = d < D
    k += (head // SHARING).to(tl.int64) * length * D
    v += (head // SHARING).to(tl.int64) * length * D
    mixed = tl.zeros([WIDTH], tl.float32)
    most, sums = float("-inf"), 0.0
    query = tl.load(q + head * D + d, mask=inside, other=0.0).to(tl.float32) * scaling
    place = first + tl.arange(0, BLOCK)
    if ONE_BLOCK:
        most, sums, mixed = _attend_more(query, k, v, place, end, d, inside, most, sums, mixed, D)
    else:
        while first < end:
            most, sums, mixed = _attend_more(query, k, v, place, end, d, inside, most, sums, mixed, D)
            first += BLOCK
            place += BLOCK
    at = head * PARTS + part
    if PARTS == 1:
        tl.store(out + at * D + d, (mixed / sums).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + at * D + d, mixed, mask=inside)
        tl.store(largest + at, most)
        tl.store(total + at, sums)


@triton.jit
def _combine_kernel(
    mixed, largest, total, out, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr
):
    """Grid [B * H]: the parts of a head into one. PARTS is a power of two."""
    if PDL:  # starts while the parts are made
        gdc_wait()
    head = tl.program_id(0)
    p, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    most = tl.load(largest + head * PARTS + p)
    weight = tl.exp(most - tl.max(most, 0))
    weight /= tl.sum(weight * tl.load(total + head * PARTS + p), 0)
    at = (head * PARTS + p)[:, None] * D + d[None, :]
    parts = tl.load(mixed + at, mask=(d < D)[None, :], other=0.0)
    tl.store(out + head * D + d, tl.sum(parts * weight[:, None], 0).to(out.dtype.element_ty), mask=d < D)


def parts_of(length: int, heads: int) -> int:
    """Programs that share one of ``heads`` heads over a cache of ``length`` places, a power of two."""
    return 1 << max(1, min(PROGRAMS // heads, length // LEAST)).bit_length() - 1


@torch.library.custom_op("gemq::decode_attention", mutates_args=())
def decode_attention(query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """query [B, H, D], keys and values [B, N, L, D] -> [B, H, D].

    bounds: [2] int32, the first place seen and the one behind the last
    """
    batch, heads, size = query.shape
    groups, length = keys.shape[1:3]
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    out = torch.empty_like(query)
    parts = parts_of(length, batch * heads)
    single = parts == 1
    mixed = out if single else query.new_empty(batch, heads, parts, size, dtype=torch.float32)
    largest, total = (out if single else query.new_empty(batch, heads, parts, dtype=torch.float32) for _ in range(2))
    width, pdl = max(16, triton.next_power_of_2(size)), launch.starts_early(query.device)
    own = triton.cdiv(length, parts)
    block = min(BLOCK, triton.next_power_of_2(own))
    _attend_kernel[(batch * heads, parts)](
        *(query, keys, values, bounds, mixed, largest, total, scaling, length),
        SHARING=heads // groups,
        D=size,
        WIDTH=width,
        BLOCK=block,
        ONE_BLOCK=own <= block,
        PARTS=parts,
        PDL=pdl,
        num_warps=max(4, min(16, block * width // (32 * ELEMENTS))),
    )
    if not single:
        early = {"launch_pdl": True} if pdl else {}
        _combine_kernel[(batch * heads,)](mixed, largest, total, out, size, width, parts, pdl, **early)
    return out


@decode_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)
