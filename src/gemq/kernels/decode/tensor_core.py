"""Triton kernels for a few tokens through packed weights.

Legend: T tokens, K experts a token, E experts, U units (experts that a launch may meet), G group size, NG groups
of a row, M rows of a block, S groups taken at once, N columns (tokens, rounded up to 8 or 16).

One program computes M rows of one matrix for all N columns. All tokens are columns of every unit, whether they
chose its expert or not: the tensor cores have room for 8 anyway, and weights are read once. Nothing depends on
the order in which programs run. Knows nothing of modules, torch or launching (``launch`` does).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.activation_triton import activated, gated
from gemq.kernels.decode.matrices import of_three, place_of
from gemq.kernels.decode.tiles import any_width, rows_times_columns


@triton.jit
def _expert(unit, index, table, pairs, experts, BY_PAIR: tl.constexpr, P: tl.constexpr, EXPERTS: tl.constexpr):
    """(active, expert, levels, first byte, first scale) of a unit.

    BY_PAIR: unit u is the expert of pair u, unless an earlier pair has the same; else it is expert u. The whole
    table is read, so that its latency and the indices' overlap.
    """
    p = tl.arange(0, P)
    chosen = tl.load(index + p, mask=p < pairs, other=-1).to(tl.int32)
    e = tl.arange(0, EXPERTS)
    levels = tl.load(table + 3 * e, mask=e < experts, other=0)
    byte = tl.load(table + 3 * e + 1, mask=e < experts, other=0)
    scale = tl.load(table + 3 * e + 2, mask=e < experts, other=0)
    if BY_PAIR:
        expert = tl.sum(tl.where(p == unit, chosen, 0))
        earlier = tl.sum(((chosen == expert) & (p < unit)).to(tl.int32))
        active = (earlier == 0) & (expert >= 0) & (expert < experts)
    else:
        expert = unit
        active = tl.sum((chosen == expert).to(tl.int32)) > 0
    mine = e == expert
    byte = tl.sum(tl.where(mine, byte, 0))
    return (
        active,
        expert,
        tl.sum(tl.where(mine, levels, 0)).to(tl.int32),
        (byte // 16) * 16,  # so that the compiler knows: loads of 16 bytes
        tl.sum(tl.where(mine, scale, 0)),
    )


@triton.jit(do_not_specialize=["tokens", "limit", "alpha", "shift"])
def experts_up_kernel(
    x,  # [T, NG * G]
    index,  # [T, K] int
    codes,
    scales,
    offsets,
    table,  # [E, 3] int64
    bias,  # [E, rows]
    out,  # [T, K, rows / 2 if GATED else rows]
    tokens,
    rows,
    experts,
    limit,
    alpha,
    shift,
    K: tl.constexpr,
    P: tl.constexpr,  # T * K, rounded up
    EXPERTS: tl.constexpr,  # E, rounded up
    BY_PAIR: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTHS: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
):
    """Grid [U, blocks of M rows]. Tokens write to the slots in which they chose the unit's expert."""
    unit, block = tl.program_id(0), tl.program_id(1)
    active, expert, levels, byte, scale = _expert(unit, index, table, tokens * K, experts, BY_PAIR, P, EXPERTS)
    if active:
        # A block of gated rows is M / 2 of the gate followed by the same M / 2 of up.
        m = tl.arange(0, M)
        if GATED:
            HALF: tl.constexpr = M // 2
            inner = block * HALF + m % HALF
            row = inner * 2 + m // HALF if INTERLEAVED else inner + (m // HALF) * (rows // 2)
            row = tl.where(inner < rows // 2, row, 0)
        else:
            inner = block * M + m
            row = tl.where(inner < rows, inner, 0)
        t = tl.arange(0, N)
        y = any_width(
            levels,
            codes + byte,
            scales + scale,
            offsets + scale,
            row,
            x + t * (NG * G),
            t < tokens,
            WIDTHS,
            KIND,
            G,
            NG,
            S,
        )
        if HAS_BIAS:
            y += tl.load(bias + expert.to(tl.int64) * rows + row).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, HALF, N]), [1, 2, 0]))
            y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
            result = block * HALF + tl.arange(0, HALF)
            width = rows // 2
        else:
            y = activated(y, limit, alpha, ACTIVATION, CLAMP)
            result = inner
            width = rows
        for k in tl.static_range(K):
            here = tl.load(index + t * K + k, mask=t < tokens, other=-1) == expert
            at = (t * K + k)[None, :] * width + result[:, None]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=here[None, :] & (result < width)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def experts_down_kernel(
    h,  # [T, K, NG * G]
    index,  # [T, K] int
    weights,  # [T, K]
    codes,
    scales,
    offsets,
    table,  # [E, 3] int64
    bias,  # [E, rows]
    parts,  # [T, K, rows], zeros
    tokens,
    rows,
    experts,
    K: tl.constexpr,
    P: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTHS: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
):
    """Grid [U, blocks of M rows]. What is summed over K is summed by the caller, in the order of slots."""
    unit, block = tl.program_id(0), tl.program_id(1)
    active, expert, levels, byte, scale = _expert(unit, index, table, tokens * K, experts, BY_PAIR, P, EXPERTS)
    inner = block * M + tl.arange(0, M)
    row = tl.where(inner < rows, inner, 0)
    t = tl.arange(0, N)
    if active:
        slot = tl.full([N], -1, tl.int32)
        for k in tl.static_range(K):
            here = tl.load(index + t * K + k, mask=t < tokens, other=-1) == expert
            slot = tl.where(here, k, slot)
        y = any_width(
            levels,
            codes + byte,
            scales + scale,
            offsets + scale,
            row,
            h + (t * K + slot) * (NG * G),
            slot >= 0,
            WIDTHS,
            KIND,
            G,
            NG,
            S,
        )
        if HAS_BIAS:
            y += tl.load(bias + expert.to(tl.int64) * rows + row).to(tl.float32)[:, None]
        for k in tl.static_range(K):
            here = tl.load(index + t * K + k, mask=t < tokens, other=-1) == expert
            part = y
            if WEIGHTED:
                part *= tl.load(weights + t * K + k, mask=here, other=0.0).to(tl.float32)[None, :]
            at = (t * K + k)[None, :] * rows + inner[:, None]
            tl.store(parts + at, part.to(parts.dtype.element_ty), mask=here[None, :] & (inner < rows)[:, None])


@triton.jit
def linears_kernel(
    x,  # [T, NG * G]
    codes_0,  # of up to three matrices that follow each other in ``out``
    codes_1,
    codes_2,
    scales_0,
    scales_1,
    scales_2,
    offsets_0,
    offsets_1,
    offsets_2,
    bias_0,  # [rows]
    bias_1,
    bias_2,
    out,  # [T, rows of all]
    tokens,
    rows_0,
    rows_1,  # 0 for a matrix that is not there
    rows_2,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
):
    """Grid [blocks of M rows of each matrix]."""
    which, block, before = place_of(tl.program_id(0), rows_0, rows_1, M)
    rows = of_three(which, rows_0, rows_1, rows_2)
    inner = block * M + tl.arange(0, M)
    row = tl.where(inner < rows, inner, 0)
    t = tl.arange(0, N)
    codes = of_three(which, codes_0, codes_1, codes_2)
    scales, offsets = of_three(which, scales_0, scales_1, scales_2), of_three(which, offsets_0, offsets_1, offsets_2)
    y = rows_times_columns(codes, scales, offsets, row, x + t * (NG * G), t < tokens, LEVELS, KIND, G, NG, S)
    if HAS_BIAS:
        y += tl.load(of_three(which, bias_0, bias_1, bias_2) + row).to(tl.float32)[:, None]
    at = t[None, :] * (rows_0 + rows_1 + rows_2) + before + inner[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(t < tokens)[None, :] & (inner < rows)[:, None])
