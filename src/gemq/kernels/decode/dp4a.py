"""The Triton kernel for a few vectors of 16-bit floats through packed weights, without tensor cores.

Legend: T tokens, K experts a token, E experts, G group size, NG groups of a row, S groups taken at once, L lanes
(threads side by side that share S groups of a row, see ``fixed``), M rows of a program, P programs that share a row.

One program computes M rows of one matrix for one vector: a pair of token and expert, or a row of x with a linear. All
of its codes are asked for first: they pass from memory to registers while the vector is turned into fixed point, and
are multiplied there (``dots``). A lane's sums become floats and meet scale and offset; lanes add up once, at the end of
a row. Pairs that share an expert read it from the cache.

Nothing depends on the order in which programs run. Knows nothing of modules, torch or launching (``launch`` does).
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.activation_triton import NONE, activated, gated
from gemq.kernels.decode.dots import dot
from gemq.kernels.decode.fixed_point import fixed_point, groups_at_once, lanes_of_group, plane_words, words_at_once
from gemq.kernels.decode.matrices import of_three, place_of
from gemq.kernels.decode.tiles import group_bytes
from gemq.quant.grid_kernel import decode_offset, decode_scale


@triton.jit
def _load(codes, first, W: tl.constexpr, WIDE: tl.constexpr):
    """W words from ``first`` [L, M] on: tiles [L, M, WIDE]."""
    tiles = ()
    for i in tl.static_range(0, W, WIDE):
        at = first[:, :, None] + (i + tl.arange(0, WIDE))[None, None, :]
        tiles = tiles + (tl.load(codes + at),)  # noqa: RUF005 - Triton cannot unpack
    return tiles


@triton.jit
def _groups_times_vector(
    codes,
    scales,
    offsets,
    x,
    row,
    first,
    end,
    one,
    LEVELS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    FULL: tl.constexpr,
    S: tl.constexpr,
    SHARING: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Groups ``first`` to ``first + S``, before ``end``, of rows [M] times x: each lane's part, [L, M] float32.

    one: 1, unknown to the compiler
    """
    W: tl.constexpr = plane_words(LEVELS, G) // SHARING
    WIDE: tl.constexpr = words_at_once(LEVELS, G, W)
    BYTES: tl.constexpr = group_bytes(LEVELS, G)
    HALF: tl.constexpr = max(1, G // 32)  # words of the high plane of 3 bits
    lane = tl.arange(0, S * SHARING)
    share = lane % SHARING
    group = tl.minimum(first + lane // SHARING, NG - 1)  # from ``end`` on, x is zero
    upper = ()
    if LEVELS == 3:  # the window that holds the group starts at a multiple of 8 bytes
        words = _load(codes, (group * BYTES // 8 * 2)[:, None] + row[None, :] * (NG * BYTES // 4), W, WIDE)
        shift = tl.broadcast_to((group * BYTES % 8 * 8)[:, None, None], [S * SHARING, 1, WIDE])
    else:
        shift = tl.broadcast_to((share * W // HALF)[:, None, None], [S * SHARING, 1, WIDE])
        at = (row[None, :] * NG + group[:, None]) * (BYTES // 4)
        words = _load(codes, at + (share * W)[:, None], W, WIDE)
        if LEVELS == 8:
            upper = _load(codes, at + (G // 16 + share * W % HALF)[:, None], min(W, HALF), WIDE)
    # Scales that followed each other, for all that Triton knew, would go to other threads than their codes.
    at = row[None, :] * NG + (group * one)[:, None]
    scale_byte, offset_byte = tl.load(scales + at), tl.load(offsets + at)
    if WAIT:
        gdc_wait()
    high, low, per_code, sums = fixed_point(x, first, end, FULL, LEVELS, PLAIN, G, S, S * SHARING, WIDE)
    d = dot(words, upper, shift, high, low, LEVELS, HALF, WIDE, PLAIN).to(tl.float32)
    scale = decode_scale(scale_byte)
    return scale * (d * per_code) + decode_offset(offset_byte, scale, LEVELS - 1.0) * sums


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
    part,
    weight,
    limit,
    alpha,
    shift,
    LEVELS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WAIT: tl.constexpr,
):
    """M rows of one matrix times x, then what comes after, stored."""
    OWN: tl.constexpr = (NG + PARTS - 1) // PARTS  # groups of this program
    SHARING: tl.constexpr = lanes_of_group(LEVELS, G, COLUMNS)
    S: tl.constexpr = groups_at_once(LEVELS, G, OWN, COLUMNS)
    FULL: tl.constexpr = OWN * PARTS == NG and OWN % S == 0
    if GATED:  # gates, then the ups that belong to them
        r = tl.arange(0, M)
        inner = block * (M // 2) + r % (M // 2)
        up = r // (M // 2)
        row = tl.where(inner < rows // 2, inner * 2 + up if INTERLEAVED else inner + up * (rows // 2), 0)
        result = block * (M // 2) + tl.arange(0, M // 2)
        width = rows // 2
    else:
        result = block * M + tl.arange(0, M)
        row = tl.where(result < rows, result, 0)
        width = rows
    first, end, one = part * OWN, tl.minimum((part + 1) * OWN, NG), 1 + (rows >> 31)
    codes = codes.to(tl.pointer_type(tl.int32))
    total = _groups_times_vector(
        codes, scales, offsets, x, row, first, end, one, LEVELS, PLAIN, G, NG, FULL, S, SHARING, WAIT
    )
    if OWN > S:
        for chunk in range(1, (OWN + S - 1) // S):
            total += _groups_times_vector(
                codes,
                scales,
                offsets,
                x,
                row,
                first + chunk * S,
                end,
                one,
                LEVELS,
                PLAIN,
                G,
                NG,
                FULL,
                S,
                SHARING,
                False,
            )
    y = tl.sum(total, 0)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32) * (part == 0)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, M // 2]), [1, 0]))
        y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
    else:
        y = activated(y, limit, alpha, ACTIVATION, CLAMP)
    if WEIGHTED:
        y *= weight
    tl.store(out + result, y.to(out.dtype.element_ty), mask=result < width)


@triton.jit(do_not_specialize=["limit", "alpha", "shift"])
def experts_vectors_kernel(
    x,  # [T, NG * G], or [T, K, NG * G] if PER_PAIR
    index,  # [T, K] int
    weights,  # [T, K]
    codes,
    scales,
    offsets,
    table,  # [E, 3] int64
    bias,  # [E, rows]
    out,  # [T, K, P, rows], or half of them if GATED
    rows,
    experts,
    limit,
    alpha,
    shift,
    K: tl.constexpr,
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
    COLUMNS: tl.constexpr,  # of a group that a lane has
    PARTS: tl.constexpr,  # P; more than one only without gate and activation
    PDL: tl.constexpr,  # starts while the kernel before ends (Hopper)
):
    """Grid [T * K, blocks of M rows, P]."""
    pair, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The down kernel's index is older than the kernel before, which has waited for it.
    if PDL and not PER_PAIR:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    WAIT: tl.constexpr = PDL and PER_PAIR
    expert = tl.load(index + pair)
    used = (expert >= 0) & (expert < experts)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + pair).to(tl.float32)
    out += (pair.to(tl.int64) * PARTS + part) * (rows // 2 if GATED else rows)
    if used:
        levels = tl.load(table + 3 * expert).to(tl.int32)
        first = tl.load(table + 3 * expert + 2)
        codes += tl.load(table + 3 * expert + 1) // 16 * 16  # so that the compiler knows: loads of 16 bytes
        x += (pair if PER_PAIR else pair // K).to(tl.int64) * (NG * G)
        for i in tl.static_range(len(WIDTHS)):
            if levels == WIDTHS[i]:
                rows_times_vector(
                    codes,
                    scales + first,
                    offsets + first,
                    bias + expert * rows,
                    x,
                    out,
                    rows,
                    block,
                    part,
                    weight,
                    limit,
                    alpha,
                    shift,
                    WIDTHS[i],
                    PLAIN,
                    G,
                    NG,
                    M,
                    COLUMNS,
                    PARTS,
                    GATED,
                    INTERLEAVED,
                    ACTIVATION,
                    CLAMP,
                    HAS_BIAS,
                    WEIGHTED,
                    WAIT,
                )
    elif WEIGHTED:
        inner = block * M + tl.arange(0, M)
        tl.store(out + inner, tl.zeros([M], tl.float32).to(out.dtype.element_ty), mask=inner < rows)
        if WAIT:
            gdc_wait()


@triton.jit
def linears_vectors_kernel(
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
    rows_0,
    rows_1,  # 0 for a matrix that is not there
    rows_2,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    PLAIN: tl.constexpr,
    G: tl.constexpr,
    NG: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [T, blocks of M rows of each matrix]."""
    if PDL:
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    which, block, before = place_of(tl.program_id(1), rows_0, rows_1, M)
    rows_times_vector(
        of_three(which, codes_0, codes_1, codes_2),
        of_three(which, scales_0, scales_1, scales_2),
        of_three(which, offsets_0, offsets_1, offsets_2),
        of_three(which, bias_0, bias_1, bias_2),
        x + t * (NG * G),
        out + t * (rows_0 + rows_1 + rows_2) + before,
        of_three(which, block * 0 + rows_0, block * 0 + rows_1, block * 0 + rows_2),
        block,
        0,
        1.0,
        0.0,
        1.0,
        0.0,
        LEVELS,
        PLAIN,
        G,
        NG,
        M,
        COLUMNS,
        1,
        False,
        False,
        NONE,
        0,
        HAS_BIAS,
        False,
        PDL,
    )
