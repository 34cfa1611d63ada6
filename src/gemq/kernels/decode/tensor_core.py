"""Triton kernels for a few tokens through packed weights, on the tensor cores.

Legend: T tokens, K experts per token, E experts, U upper bound of the number of active experts, M rows of a block, N
tokens rounded up to 8 or 16.

One program computes M rows of one matrix for all N tokens. Every token is a column, whether or not it chose the expert:
the tensor cores have at least 8 columns, and weights are read once. Results do not depend on the order in which
programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.activation_triton import activated, gated
from gemq.kernels.decode.matrix_selection import locate_block, select
from gemq.kernels.decode.tiles import any_width, rows_times_columns
from gemq.kernels.triton_types import Pointer, Scalar


@triton.jit
def _find_expert(
    unit: Scalar,
    index: Pointer,
    table: Pointer,
    pairs: Scalar,
    experts: Scalar,
    BY_PAIR: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
):
    """Return the expert of a unit: whether it is active, its number, levels, first byte of codes and first scale.

    With BY_PAIR, unit u is the expert of pair u, unless an earlier pair has the same expert. Otherwise it is expert u.
    The whole table is read, so that its latency overlaps with that of the indices.
    """
    pair = tl.arange(0, PADDED_PAIRS)
    chosen = tl.load(index + pair, mask=pair < pairs, other=-1).to(tl.int32)
    e = tl.arange(0, PADDED_EXPERTS)
    levels = tl.load(table + 3 * e, mask=e < experts, other=0)
    byte = tl.load(table + 3 * e + 1, mask=e < experts, other=0)
    scale = tl.load(table + 3 * e + 2, mask=e < experts, other=0)
    if BY_PAIR:
        expert = tl.sum(tl.where(pair == unit, chosen, 0))
        earlier = tl.sum(((chosen == expert) & (pair < unit)).to(tl.int32))
        active = (earlier == 0) & (expert >= 0) & (expert < experts)
    else:
        expert = unit
        active = tl.sum((chosen == expert).to(tl.int32)) > 0
    is_expert = e == expert
    byte = tl.sum(tl.where(is_expert, byte, 0))
    return (
        active,
        expert,
        tl.sum(tl.where(is_expert, levels, 0)).to(tl.int32),
        (byte // 16) * 16,  # tells the compiler the alignment: loads of 16 bytes
        tl.sum(tl.where(is_expert, scale, 0)),
    )


@triton.jit(do_not_specialize=["tokens", "limit", "alpha", "shift"])
def experts_up_kernel(
    x: Pointer,  # [T, columns]
    index: Pointer,  # [T, K] int
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    table: Pointer,  # [E, 3] int64
    bias: Pointer,  # [E, rows]
    out: Pointer,  # [T, K, rows / 2 if GATED else rows]
    tokens: Scalar,
    rows: Scalar,
    experts: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    TOP_K: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,  # T * K, rounded up
    PADDED_EXPERTS: tl.constexpr,  # E, rounded up
    BY_PAIR: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPILED_LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Grid [U, blocks of rows]. Each token's result goes to the slots in which the token chose the unit's expert."""
    unit, block = tl.program_id(0), tl.program_id(1)
    active, expert, levels, byte, scale = _find_expert(
        unit, index, table, tokens * TOP_K, experts, BY_PAIR, PADDED_PAIRS, PADDED_EXPERTS
    )
    if active:
        # A block of gated rows is half a block of the gate followed by the matching rows of up.
        m = tl.arange(0, BLOCK_ROWS)
        if GATED:
            HALF: tl.constexpr = BLOCK_ROWS // 2
            inner = block * HALF + m % HALF
            row = inner * 2 + m // HALF if INTERLEAVED else inner + (m // HALF) * (rows // 2)
            row = tl.where(inner < rows // 2, row, 0)
        else:
            inner = block * BLOCK_ROWS + m
            row = tl.where(inner < rows, inner, 0)
        token = tl.arange(0, BLOCK_TOKENS)
        y = any_width(
            levels,
            codes + byte,
            scales + scale,
            offsets + scale,
            row,
            x + token * (NUM_GROUPS * GROUP_SIZE),
            token < tokens,
            COMPILED_LEVELS,
            OPERAND,
            GROUP_SIZE,
            NUM_GROUPS,
            STEP_GROUPS,
        )
        if HAS_BIAS:
            y += tl.load(bias + expert.to(tl.int64) * rows + row).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, HALF, BLOCK_TOKENS]), [1, 2, 0]))
            y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
            out_row = block * HALF + tl.arange(0, HALF)
            out_rows = rows // 2
        else:
            y = activated(y, limit, alpha, ACTIVATION, CLAMP)
            out_row = inner
            out_rows = rows
        for k in tl.static_range(TOP_K):
            is_chosen = tl.load(index + token * TOP_K + k, mask=token < tokens, other=-1) == expert
            element = (token * TOP_K + k)[None, :] * out_rows + out_row[:, None]
            tl.store(out + element, y.to(out.dtype.element_ty), mask=is_chosen[None, :] & (out_row < out_rows)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def experts_down_kernel(
    h: Pointer,  # [T, K, columns]
    index: Pointer,  # [T, K] int
    weights: Pointer,  # [T, K]
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    table: Pointer,  # [E, 3] int64
    bias: Pointer,  # [E, rows]
    out: Pointer,  # [T, K, rows], zeros
    tokens: Scalar,
    rows: Scalar,
    experts: Scalar,
    TOP_K: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COMPILED_LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Grid [U, blocks of rows]. The caller sums over K, in the order of slots."""
    unit, block = tl.program_id(0), tl.program_id(1)
    active, expert, levels, byte, scale = _find_expert(
        unit, index, table, tokens * TOP_K, experts, BY_PAIR, PADDED_PAIRS, PADDED_EXPERTS
    )
    inner = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.where(inner < rows, inner, 0)
    token = tl.arange(0, BLOCK_TOKENS)
    if active:
        slot = tl.full([BLOCK_TOKENS], -1, tl.int32)
        for k in tl.static_range(TOP_K):
            is_chosen = tl.load(index + token * TOP_K + k, mask=token < tokens, other=-1) == expert
            slot = tl.where(is_chosen, k, slot)
        y = any_width(
            levels,
            codes + byte,
            scales + scale,
            offsets + scale,
            row,
            h + (token * TOP_K + slot) * (NUM_GROUPS * GROUP_SIZE),
            slot >= 0,
            COMPILED_LEVELS,
            OPERAND,
            GROUP_SIZE,
            NUM_GROUPS,
            STEP_GROUPS,
        )
        if HAS_BIAS:
            y += tl.load(bias + expert.to(tl.int64) * rows + row).to(tl.float32)[:, None]
        for k in tl.static_range(TOP_K):
            is_chosen = tl.load(index + token * TOP_K + k, mask=token < tokens, other=-1) == expert
            result = y
            if WEIGHTED:
                result *= tl.load(weights + token * TOP_K + k, mask=is_chosen, other=0.0).to(tl.float32)[None, :]
            element = (token * TOP_K + k)[None, :] * rows + inner[:, None]
            tl.store(out + element, result.to(out.dtype.element_ty), mask=is_chosen[None, :] & (inner < rows)[:, None])


@triton.jit
def linears_kernel(
    x: Pointer,  # [T, columns]
    codes_0: Pointer,  # of up to three matrices, whose rows are concatenated in ``out``
    codes_1: Pointer,
    codes_2: Pointer,
    scales_0: Pointer,
    scales_1: Pointer,
    scales_2: Pointer,
    offsets_0: Pointer,
    offsets_1: Pointer,
    offsets_2: Pointer,
    bias_0: Pointer,  # [rows]
    bias_1: Pointer,
    bias_2: Pointer,
    out: Pointer,  # [T, rows of all]
    tokens: Scalar,
    rows_0: Scalar,
    rows_1: Scalar,  # 0 for a missing matrix
    rows_2: Scalar,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Grid [blocks of rows of each matrix]."""
    matrix, block, first_row = locate_block(tl.program_id(0), rows_0, rows_1, BLOCK_ROWS)
    rows = select(matrix, rows_0, rows_1, rows_2)
    inner = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.where(inner < rows, inner, 0)
    token = tl.arange(0, BLOCK_TOKENS)
    codes = select(matrix, codes_0, codes_1, codes_2)
    scales, offsets = select(matrix, scales_0, scales_1, scales_2), select(matrix, offsets_0, offsets_1, offsets_2)
    y = rows_times_columns(
        codes,
        scales,
        offsets,
        row,
        x + token * (NUM_GROUPS * GROUP_SIZE),
        token < tokens,
        LEVELS,
        OPERAND,
        GROUP_SIZE,
        NUM_GROUPS,
        STEP_GROUPS,
    )
    if HAS_BIAS:
        y += tl.load(select(matrix, bias_0, bias_1, bias_2) + row).to(tl.float32)[:, None]
    element = token[None, :] * (rows_0 + rows_1 + rows_2) + first_row + inner[:, None]
    tl.store(out + element, y.to(out.dtype.element_ty), mask=(token < tokens)[None, :] & (inner < rows)[:, None])
