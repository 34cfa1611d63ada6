"""Attention of one new token of each sequence over a static cache, on a GPU.

Legend: B sequences, H heads, N heads of keys and values, L length of the cache, D head size.

All sequences attend to the same cache positions, from ``bounds[0]`` up to ``bounds[1]``. The kernel reads the bounds on
the device, so that a CUDA graph can capture it, and never reads positions outside them. A program computes a block of
positions of one head, without tensor cores: one token is too little work for them. Heads that share keys and values
read them from the L2 cache. If there are few heads, several programs share a head (splits), and a second launch
combines their results. All arithmetic is float32.

``attend_and_write`` takes the token's key and value besides the cache. The kernel rotates query and key by their
position, and writes key and value into the cache, so that no other launches do.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.decode import launch
from gemq.kernels.triton_types import Pointer, Scalar, Tile

MAX_BLOCK_POSITIONS = 256
"""Positions that a program computes in one step."""

MIN_SPLIT_POSITIONS = 64
"""Positions that are worth a program of their own."""

MAX_PROGRAMS = 256
"""Up to this many programs, heads are split: two for each multiprocessor of a large GPU."""

ELEMENTS_PER_THREAD = 64
"""Elements of a block's keys, and of its values, that a thread holds."""


@triton.jit
def _attend_block(
    query: Tile,
    k: Pointer,
    v: Pointer,
    position: Tile,
    end: Scalar,
    d: Tile,
    inside: Tile,
    max_score: Scalar,
    total: Scalar,
    weighted_values: Tile,
    D: tl.constexpr,
):
    """Extend a running softmax by a block of cache positions.

    Args:
        query: [WIDTH] scaled query
        k: keys of the head
        v: values of the head
        position: [BLOCK] positions; those from ``end`` on are masked
        d: [WIDTH] columns of a head
        inside: [WIDTH] whether a column exists
        max_score: largest score so far
        total: sum of exp(score - max_score) so far
        weighted_values: [WIDTH] sum of values with these weights

    Returns:
        The new max_score, total and weighted_values.
    """
    visible = position < end
    mask = visible[:, None] & inside[None, :]
    element = position[:, None] * D + d[None, :]
    keys = tl.load(k + element, mask=mask, other=0.0)
    values = tl.load(v + element, mask=mask, other=0.0)
    scores = tl.where(visible, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
    new_max = tl.maximum(max_score, tl.max(scores, 0))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp(scores - base)
    decay = tl.exp(max_score - base)
    total = total * decay + tl.sum(weights, 0)
    weighted_values = weighted_values * decay + tl.sum(values.to(tl.float32) * weights[:, None], 0)
    return new_max, total, weighted_values


@triton.jit
def _load_rotated(x: Pointer, cos: Tile, sin: Tile, d: Tile, inside: Tile, D: tl.constexpr, ROTARY: tl.constexpr):
    """Load a query or key [WIDTH], rotated and rounded to its dtype if ROTARY, as float32."""
    value = tl.load(x + d, mask=inside, other=0.0)
    if not ROTARY:
        return value.to(tl.float32)
    partner = tl.load(x + (d + D // 2) % D, mask=inside, other=0.0).to(tl.float32)
    rotated = value.to(tl.float32) * cos + tl.where(d < D // 2, -partner, partner) * sin
    return rotated.to(value.dtype).to(tl.float32)


@triton.jit
def _attend_kernel(
    q: Pointer,  # [B, H, D]
    k: Pointer,  # [B, N, L, D]
    v: Pointer,
    new_k: Pointer,  # [B, N, D]
    new_v: Pointer,
    cos: Pointer,  # [1 or B, D]
    sin: Pointer,
    bounds: Pointer,  # [2] int32
    out: Pointer,  # [B, H, D], or float32 [B, H, SPLITS, D]
    max_scores: Pointer,  # float32 [B, H, SPLITS]
    totals: Pointer,
    scaling: Scalar,
    length: Scalar,
    q_stride: Scalar,  # of a sequence
    k_stride: Scalar,
    v_stride: Scalar,
    angle_stride: Scalar,
    HEADS: tl.constexpr,  # H
    HEADS_PER_GROUP: tl.constexpr,  # H / N
    WRITES: tl.constexpr,  # whether the token's key and value are in new_k and new_v, and are written into the cache
    ROTARY: tl.constexpr,  # whether query and new key are rotated
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D, rounded up
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # whether a block holds all positions of a program
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [B * H, SPLITS]. The last split of a head also takes the new key and value."""
    if PDL and WRITES:  # the launch overlaps the previous kernel
        gdc_wait()
    if PDL and (WRITES or SPLITS > 1):
        gdc_launch_dependents()
    head, split = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(bounds), tl.load(bounds + 1)
    if WRITES:
        end -= 1
    new_position = end
    split_positions = tl.cdiv(end - start, SPLITS)
    start += split * split_positions
    end = tl.minimum(start + split_positions, end)
    d = tl.arange(0, WIDTH)
    inside = d < D
    k += (head // HEADS_PER_GROUP).to(tl.int64) * length * D
    v += (head // HEADS_PER_GROUP).to(tl.int64) * length * D
    weighted_values = tl.zeros([WIDTH], tl.float32)
    max_score, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    sequence = head // HEADS
    c, s = weighted_values, weighted_values
    if ROTARY:
        c = tl.load(cos + sequence * angle_stride + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + sequence * angle_stride + d, mask=inside, other=0.0).to(tl.float32)
    query = _load_rotated(q + sequence * q_stride + head % HEADS * D, c, s, d, inside, D, ROTARY) * scaling
    if WRITES:  # noqa: SIM102 - a constant and a value cannot be combined
        if split == SPLITS - 1:
            group = head % HEADS // HEADS_PER_GROUP
            key = _load_rotated(new_k + sequence * k_stride + group * D, c, s, d, inside, D, ROTARY)
            new_v += sequence * v_stride + group * D
            weighted_values = tl.load(new_v + d, mask=inside, other=0.0).to(tl.float32)
            max_score = tl.sum(query * key, 0)
            total += 1.0
            if head % HEADS_PER_GROUP == 0:
                element = new_position.to(tl.int64) * D + d
                tl.store(k + element, key.to(k.dtype.element_ty), mask=inside)
                tl.store(v + element, weighted_values.to(v.dtype.element_ty), mask=inside)
    position = start + tl.arange(0, BLOCK)
    if ONE_BLOCK:
        max_score, total, weighted_values = _attend_block(
            query, k, v, position, end, d, inside, max_score, total, weighted_values, D
        )
    else:
        while start < end:
            max_score, total, weighted_values = _attend_block(
                query, k, v, position, end, d, inside, max_score, total, weighted_values, D
            )
            start += BLOCK
            position += BLOCK
    result = head * SPLITS + split
    if SPLITS == 1:
        tl.store(out + result * D + d, (weighted_values / total).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + result * D + d, weighted_values, mask=inside)
        tl.store(max_scores + result, max_score)
        tl.store(totals + result, total)


@triton.jit
def _combine_kernel(
    weighted_values: Pointer,
    max_scores: Pointer,
    totals: Pointer,
    out: Pointer,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [B * H]. Combines the splits of a head. SPLITS is a power of two."""
    if PDL:  # the launch overlaps the previous kernel
        gdc_wait()
    head = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    max_score = tl.load(max_scores + head * SPLITS + split)
    weight = tl.exp(max_score - tl.max(max_score, 0))
    weight /= tl.sum(weight * tl.load(totals + head * SPLITS + split), 0)
    element = (head * SPLITS + split)[:, None] * D + d[None, :]
    values = tl.load(weighted_values + element, mask=(d < D)[None, :], other=0.0)
    tl.store(out + head * D + d, tl.sum(values * weight[:, None], 0).to(out.dtype.element_ty), mask=d < D)


def num_splits(length: int, heads: int) -> int:
    """Return the number of programs, a power of two, that share each of ``heads`` heads over a cache of ``length``."""
    splits = max(1, min(MAX_PROGRAMS // heads, length // MIN_SPLIT_POSITIONS))
    return 1 << splits.bit_length() - 1


class NewToken(NamedTuple):
    """Key and value of the step's token, which are not in the cache yet.

    Attributes:
        key: [B, N, D], not rotated if there are angles
        value: [B, N, D]
        cos: [1 or B, D], or None
        sin: [1 or B, D], or None
    """

    key: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None


@torch.library.custom_op("gemq::decode_attention", mutates_args=())
def decode_attention(query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """Attend with one token of each sequence.

    Args:
        query: [B, H, D]
        keys: [B, N, L, D]
        values: [B, N, L, D]
        bounds: [2] int32, first visible position of the cache, and the position after the last
        scaling: factor of the scores

    Returns:
        [B, H, D]
    """
    return _launch(query.contiguous(), keys.contiguous(), values.contiguous(), None, bounds, scaling)


@decode_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """Return the shape of ``decode_attention``."""
    return torch.empty_like(query)


def attend_and_write(
    query: Tensor, keys: Tensor, values: Tensor, new: NewToken, bounds: Tensor, scaling: float
) -> Tensor:
    """Attend with one token of each sequence, and write its key and value at position ``bounds[1] - 1``.

    Args:
        query: [B, H, D], not rotated if ``new`` has angles. Heads of a sequence are contiguous
        keys: [B, N, L, D], contiguous
        values: [B, N, L, D], contiguous
        new: key and value of the token, heads of a sequence contiguous
        bounds: as for ``decode_attention``
        scaling: factor of the scores

    Returns:
        [B, H, D]
    """
    return _launch(query, keys, values, new, bounds, scaling)


def can_write(query: Tensor, keys: Tensor, values: Tensor, new: NewToken) -> bool:
    """Whether ``attend_and_write`` supports these strides and shapes."""
    size = query.shape[-1]
    rows = (query, new.key, new.value)
    angles = [angle for angle in (new.cos, new.sin) if angle is not None]
    return (
        all(x.stride(-1) == 1 and (x.shape[-2] == 1 or x.stride(-2) == size) for x in rows)
        and all(x.is_contiguous() and x.shape[-1] == size for x in (keys, values))
        and all(x.dtype == query.dtype for x in (*rows, keys, values, *angles))
        and all(angle.shape[-1] == size and angle.stride(-1) == 1 for angle in angles)
    )


def _launch(
    query: Tensor, keys: Tensor, values: Tensor, new: NewToken | None, bounds: Tensor, scaling: float
) -> Tensor:
    """Launch the kernels."""
    batch, heads, size = query.shape
    groups, length = keys.shape[1:3]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    splits = num_splits(length, batch * heads)
    if splits == 1:
        weighted_values = max_scores = totals = out
    else:
        weighted_values = query.new_empty(batch, heads, splits, size, dtype=torch.float32)
        max_scores = query.new_empty(batch, heads, splits, dtype=torch.float32)
        totals = torch.empty_like(max_scores)
    width, pdl = max(16, triton.next_power_of_2(size)), launch.supports_pdl(query.device)
    split_positions = triton.cdiv(length, splits)
    block = min(MAX_BLOCK_POSITIONS, triton.next_power_of_2(split_positions))
    has_angles = new is not None and new.cos is not None
    cos = new.cos if new is not None and new.cos is not None else query
    sin = new.sin if new is not None and new.sin is not None else query
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _attend_kernel[(batch * heads, splits)](
        query,
        keys,
        values,
        query if new is None else new.key,
        query if new is None else new.value,
        cos,
        sin,
        bounds,
        weighted_values,
        max_scores,
        totals,
        scaling,
        length,
        query.stride(0),
        0 if new is None else new.key.stride(0),
        0 if new is None else new.value.stride(0),
        cos.stride(0) if has_angles and len(cos) > 1 else 0,
        HEADS=heads,
        HEADS_PER_GROUP=heads // groups,
        WRITES=new is not None,
        ROTARY=has_angles,
        D=size,
        WIDTH=width,
        BLOCK=block,
        ONE_BLOCK=split_positions <= block,
        SPLITS=splits,
        PDL=pdl,
        num_warps=max(4, min(16, block * width // (32 * ELEMENTS_PER_THREAD))),
        **(options if new is not None else {}),
    )
    if splits > 1:
        _combine_kernel[(batch * heads,)](weighted_values, max_scores, totals, out, size, width, splits, pdl, **options)
    return out
