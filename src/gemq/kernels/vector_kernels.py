"""Triton kernels for a few vectors of 16-bit floats through packed weights, without tensor cores.

Legend: T tokens, K experts a token, E experts, G group size, NG groups of a row, M rows of a block.

One program computes M rows of one matrix for one vector: a pair of token and expert, or one token of a linear. Pairs
that share an expert read it from the cache. Nothing waits, nothing depends on the order in which programs run. Knows
nothing of modules, torch or launching (``launch`` does).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.decode_kernels import activated
from gemq.kernels.fixed import any_width, row_times_vector


@triton.jit(do_not_specialize=["limit", "alpha", "shift"])
def pairs_up_kernel(
    x,  # [T, NG * G]
    index,  # [T, K] int
    codes,
    scales,
    offsets,
    table,  # [E, 3] int64
    bias,  # [E, rows]
    out,  # [T, K, rows / 2 if GATED else rows]
    rows,
    experts,
    limit,
    alpha,
    shift,
    K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [T * K, blocks of M rows]."""
    if PDL:
        gdc_launch_dependents()
    pair, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(index + pair)
    if (expert >= 0) & (expert < experts):
        levels = tl.load(table + 3 * expert).to(tl.int32)
        byte = (tl.load(table + 3 * expert + 1) // 16) * 16  # so that the compiler knows: loads of 16 bytes
        scale = tl.load(table + 3 * expert + 2)
        m = tl.arange(0, M)
        if GATED:  # a gate's row and its up's are neighbours
            inner = block * (M // 2) + m // 2
            row = inner * 2 + m % 2 if INTERLEAVED else inner + (m % 2) * (rows // 2)
            row = tl.where(inner < rows // 2, row, 0)
        else:
            inner = block * M + m
            row = tl.where(inner < rows, inner, 0)
        at = x + (pair // K) * (NG * G)
        y = any_width(levels, codes + byte, scales + scale, offsets + scale, row, at, WIDTHS, PLAIN, G, NG, LANES)
        if HAS_BIAS:
            y += tl.load(bias + expert * rows + row).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(y, [M // 2, 2]))
            y = activated(gate, limit, alpha, ACTIVATION, CLAMP)
            if CLAMP != 0:
                up = tl.minimum(tl.maximum(up, -limit), limit)
            y *= up + shift
            result = block * (M // 2) + tl.arange(0, M // 2)
            width = rows // 2
        else:
            y = activated(y, limit, alpha, ACTIVATION, CLAMP)
            result = inner
            width = rows
        tl.store(out + pair * width + result, y.to(out.dtype.element_ty), mask=result < width)


@triton.jit
def pairs_down_kernel(
    h,  # [T, K, NG * G]
    index,  # [T, K] int
    weights,  # [T, K]
    codes,
    scales,
    offsets,
    table,  # [E, 3] int64
    bias,  # [E, rows]
    parts,  # [T, K, rows]
    rows,
    experts,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTHS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [T * K, blocks of M rows]. Unused slots are set to zero."""
    pair, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(index + pair)
    inner = block * M + tl.arange(0, M)
    row = tl.where(inner < rows, inner, 0)
    y = tl.zeros([M], tl.float32)
    if PDL:
        gdc_wait()
    if (expert >= 0) & (expert < experts):
        levels = tl.load(table + 3 * expert).to(tl.int32)
        byte = (tl.load(table + 3 * expert + 1) // 16) * 16
        scale = tl.load(table + 3 * expert + 2)
        y = any_width(
            levels,
            codes + byte,
            scales + scale,
            offsets + scale,
            row,
            h + pair * (NG * G),
            WIDTHS,
            PLAIN,
            G,
            NG,
            LANES,
        )
        if HAS_BIAS:
            y += tl.load(bias + expert * rows + row).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights + pair).to(tl.float32)
    tl.store(parts + pair * rows + inner, y.to(parts.dtype.element_ty), mask=inner < rows)


@triton.jit
def rows_kernel(
    x,  # [T, NG * G]
    codes,
    scales,
    offsets,
    bias,  # [rows]
    out,  # [T, rows]
    rows,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid [T, blocks of M rows]."""
    token = tl.program_id(0)
    inner = tl.program_id(1) * M + tl.arange(0, M)
    row = tl.where(inner < rows, inner, 0)
    y = row_times_vector(codes, scales, offsets, row, x + token * (NG * G), LEVELS, PLAIN, G, NG, LANES)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)
    tl.store(out + token * rows + inner, y.to(out.dtype.element_ty), mask=inner < rows)
