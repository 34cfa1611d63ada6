"""The Triton kernel for a few vectors of 16-bit floats through packed weights, without tensor cores.

Legend: T tokens, K experts a token, E experts, G group size, NG groups of a row, S groups that a warp takes at once,
J words of a group, M rows of a program, R rows of it at once.

One program computes M rows of one matrix for one vector: a pair of token and expert, or a row of x with a linear. The
vector is turned into fixed point once (``fixed``); a thread keeps the words that belong to its columns and goes from
row to row: weights pass from memory to registers and are multiplied there (``dots``). Only at the end of a group do
sums become floats and meet its scale. Pairs that share an expert read it from the cache.

Nothing depends on the order in which programs run. Knows nothing of modules, torch or launching (``launch`` does).
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.dots import dot
from gemq.kernels.fixed import fixed_point, groups_at_once, words_of
from gemq.kernels.gates import activated, gated
from gemq.kernels.tiles import group_bytes, window

RESIDENT = 32
"""Rows of up to so many groups have all their activations in registers at once."""

MOST_PREFETCHED = tl.constexpr(64 * 1024)
"""Bytes of codes that a program asks for before it needs them: those of all programs must not fill the L2 cache."""


@triton.constexpr_function
def is_resident(NG):
    return NG <= RESIDENT


@triton.constexpr_function
def rows_at_once(s, M, NG, threads):
    """R. With one scale for each thread, or fewer, Triton loads scales where they are used, without shared memory."""
    return min(M, max(1, threads // s) if is_resident(NG) else M)


@triton.jit
def _prefetch(base, first, count: tl.constexpr, end):
    """Asks for bytes ``first`` to ``first + count`` of a buffer of ``end``: all of them on their way at once, while the
    loop needs registers for a few."""
    LINES: tl.constexpr = triton.next_power_of_2(count // 128 + 1)
    at = tl.minimum(first + 128 * tl.arange(0, LINES), tl.minimum(first + count, end) - 1)
    at = (base.to(tl.pointer_type(tl.int8)) + at).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_rows(codes, scales, offsets, first, count: tl.constexpr, rows, CODES: tl.constexpr, GRID: tl.constexpr):
    """``count`` rows of CODES bytes, and of GRID bytes of scales and of offsets."""
    _prefetch(codes, first * CODES, count * CODES, rows * CODES)
    _prefetch(scales, first * GRID, count * GRID, rows * GRID)
    _prefetch(offsets, first * GRID, count * GRID, rows * GRID)


@triton.jit
def _load(codes, scales, offsets, group, row, j, zero, LEVELS: tl.constexpr, G: tl.constexpr, NG: tl.constexpr):
    """Words [S, R, J] (of 3 bits two), scales and offsets [S, R] of groups [S] of rows [R].

    zero: that the compiler does not know to be one
    """
    BYTES: tl.constexpr = group_bytes(LEVELS, G)
    J: tl.constexpr = words_of(LEVELS, G)
    at = group[:, None] + row[None, :] * NG
    if LEVELS == 3:
        ALIGN: tl.constexpr = window(LEVELS, G, NG)
        first = ((group * BYTES // ALIGN) * (ALIGN // 4))[:, None] + row[None, :] * (NG * BYTES // 4)
    elif LEVELS == 2 and BYTES % 8 == 0:
        first = (at * (BYTES // 8) + zero) * 2  # loads of 8 bytes: a thread with 16 would own 128 columns
    else:
        first = at * (BYTES // 4)
    w = tl.load(codes + first[:, :, None] + j[None, None, :])
    high = w
    if LEVELS == 8:
        high = tl.load(codes + (first + J)[:, :, None] + (j % (G // 32))[None, None, :])
    return w, high, tl.load(scales + at), tl.load(offsets + at)


@triton.jit
def _half(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def rows_times_vector(
    codes,
    scales,
    offsets,
    bias,  # [rows]
    x,  # [NG * G]
    out,  # [rows], or [rows / 2] if GATED
    rows,
    block,
    weight,
    limit,
    alpha,
    shift,
    LEVELS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """M rows of one matrix times x, then what comes after, stored."""
    J: tl.constexpr = words_of(LEVELS, G)
    S: tl.constexpr = groups_at_once(LEVELS, G, NG)
    R: tl.constexpr = rows_at_once(S, M, NG, THREADS)
    CHUNKS: tl.constexpr = (NG + S - 1) // S
    s, j, r = tl.arange(0, S), tl.arange(0, J), tl.arange(0, R)
    codes = codes.to(tl.pointer_type(tl.int32))
    CODES: tl.constexpr = group_bytes(LEVELS, G) * NG
    if PREFETCH and CODES * M <= MOST_PREFETCHED:
        if GATED and not INTERLEAVED:
            _prefetch_rows(codes, scales, offsets, block * (M // 2), M // 2, rows, CODES, NG * 2)
            _prefetch_rows(codes, scales, offsets, rows // 2 + block * (M // 2), M // 2, rows, CODES, NG * 2)
        else:
            _prefetch_rows(codes, scales, offsets, block * M, M, rows, CODES, NG * 2)
    half = (j // max(1, G // 32))[None, None, :] + tl.zeros([S, R, J], tl.int32)  # of 3 bits
    if WAIT:
        gdc_wait()
    words = ()
    if is_resident(NG):
        for c in tl.static_range(CHUNKS):
            words = words + (fixed_point(x, c * S, j, s, LEVELS, PLAIN, G, NG, S),)  # noqa: RUF005
    for start in range(0, M, R):
        if GATED:  # gates, then the ups that belong to them
            inner = block * (M // 2) + start // 2 + r % (R // 2)
            row = inner * 2 + r // (R // 2) if INTERLEAVED else inner + (r // (R // 2)) * (rows // 2)
            row = tl.where(inner < rows // 2, row, 0)
        else:
            inner = block * M + start + r
            row = tl.where(inner < rows, inner, 0)
        total = tl.zeros([S, R], tl.float32)
        if is_resident(NG):
            for c in tl.static_range(CHUNKS):
                group = tl.minimum(c * S + s, NG - 1) if (c + 1) * S > NG else c * S + s
                w, high, scale, offset = _load(codes, scales, offsets, group, row, j, rows >> 31, LEVELS, G, NG)
                d = tl.sum(dot(w, high, half, words[c][0], LEVELS, PLAIN), 2).to(tl.float32)
                total += _half(scale) * (d * words[c][1][:, None]) + _half(offset) * words[c][2][:, None]
        else:
            for c in range(CHUNKS):
                group = tl.minimum(c * S + s, NG - 1)  # beyond the last, x is zero
                w, high, scale, offset = _load(codes, scales, offsets, group, row, j, rows >> 31, LEVELS, G, NG)
                fixed, per_code, sums = fixed_point(x, c * S, j, s, LEVELS, PLAIN, G, NG, S)
                d = tl.sum(dot(w, high, half, fixed, LEVELS, PLAIN), 2).to(tl.float32)
                total += _half(scale) * (d * per_code[:, None]) + _half(offset) * sums[:, None]
        y = tl.sum(total, 0)
        if HAS_BIAS:
            y += tl.load(bias + row).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, R // 2]), [1, 0]))
            y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
            result = block * (M // 2) + start // 2 + tl.arange(0, R // 2)
            width = rows // 2
        else:
            y = activated(y, limit, alpha, ACTIVATION, CLAMP)
            result = inner
            width = rows
        if WEIGHTED:
            y *= weight
        tl.store(out + result, y.to(out.dtype.element_ty), mask=result < width)


@triton.jit(do_not_specialize=["limit", "alpha", "shift"])
def vectors_kernel(
    x,  # [T, NG * G], or [T, K, NG * G] if PER_PAIR
    index,  # [T, K] int
    weights,  # [T, K]
    codes,
    scales,
    offsets,
    table,  # [E, 3] int64
    bias,  # [E, rows]
    out,  # [T, K, rows], or half of them if GATED
    rows,
    experts,
    limit,
    alpha,
    shift,
    K: tl.constexpr,
    ROUTED: tl.constexpr,  # else one matrix, K = 1, no index, weights and table
    PER_PAIR: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,  # times weights, and zeros in unused slots, which else are not written
    WIDTHS: tl.constexpr,  # tuple of the levels that may occur
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,  # starts while the kernel before ends (Hopper)
):
    """Grid [T * K, blocks of M rows]."""
    pair, block = tl.program_id(0), tl.program_id(1)
    # The down kernel's index is older than the kernel before, which has waited for it.
    if PDL and not PER_PAIR and ROUTED:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    WAIT: tl.constexpr = PDL and (PER_PAIR or not ROUTED)
    weight = 1.0
    used = True
    if ROUTED:
        expert = tl.load(index + pair)
        used = (expert >= 0) & (expert < experts)
        if WEIGHTED:
            weight = tl.load(weights + pair).to(tl.float32)
    if used:
        levels = WIDTHS[0]
        if ROUTED:
            levels = tl.load(table + 3 * expert).to(tl.int32)
            first = tl.load(table + 3 * expert + 2)
            codes += tl.load(table + 3 * expert + 1) // 16 * 16  # so that the compiler knows: loads of 16 bytes
            scales += first
            offsets += first
            bias += expert * rows
        for i in tl.static_range(len(WIDTHS)):
            if levels == WIDTHS[i]:
                rows_times_vector(
                    codes,
                    scales,
                    offsets,
                    bias,
                    x + (pair if PER_PAIR else pair // K).to(tl.int64) * (NG * G),
                    out + pair.to(tl.int64) * (rows // 2 if GATED else rows),
                    rows,
                    block,
                    weight,
                    limit,
                    alpha,
                    shift,
                    WIDTHS[i],
                    PLAIN,
                    G,
                    NG,
                    M,
                    THREADS,
                    GATED,
                    INTERLEAVED,
                    ACTIVATION,
                    CLAMP,
                    HAS_BIAS,
                    WEIGHTED,
                    WAIT,
                    PREFETCH,
                )
    elif WEIGHTED:
        inner = block * M + tl.arange(0, M)
        tl.store(out + pair * rows + inner, tl.zeros([M], tl.float32).to(out.dtype.element_ty), mask=inner < rows)
        if WAIT:
            gdc_wait()
