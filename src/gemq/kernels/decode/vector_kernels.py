"""Triton kernels for single vectors of 16-bit floats through packed weights, without tensor cores.

Legend: T tokens, K experts per token, E experts, L lanes (neighboring threads that share the groups of a step, see
``fixed_point``), M rows of a program, S splits (programs that share a row).

One program computes M rows of one matrix for one vector: of a pair of token and expert, or a row of x with a linear. It
first starts the loads of all its codes. While they are on their way to registers, it converts the vector to fixed
point; then it multiplies (``dots``). A lane's sums become floats and are multiplied with the scale, and the offset is
added. Lanes are summed once, at the end of a row. Pairs that share an expert read its weights from the cache.

Results do not depend on the order in which programs run.

How codes of a width are unpacked and multiplied is in ``dots`` and ``fixed_point``. Only the loads of its planes are
here. docs/add-a-width.md lists all places.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.activation_triton import NONE, activated, gated
from gemq.kernels.decode.dots import dot
from gemq.kernels.decode.fixed_point import (
    fixed_point,
    groups_per_step,
    lanes_per_group,
    plane_words,
    words_per_load,
)
from gemq.kernels.decode.matrix_selection import locate_block, select
from gemq.kernels.packed_layout import group_bytes
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant.grid_kernel import decode_offset, decode_scale


@triton.jit
def _load_words(codes: Pointer, start: Tile, WORDS: tl.constexpr, LOAD_WORDS: tl.constexpr):
    """Load the words ``start`` ... ``start + WORDS`` [L, M]: tuple of tiles [L, M, LOAD_WORDS]."""
    tiles = ()
    for i in tl.static_range(0, WORDS, LOAD_WORDS):
        word = start[:, :, None] + (i + tl.arange(0, LOAD_WORDS))[None, None, :]
        tiles = tiles + (tl.load(codes + word),)  # noqa: RUF005 - Triton cannot unpack
    return tiles


@triton.jit
def _groups_times_vector(
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    x: Pointer,
    row: Tile,
    first_group: Scalar,
    end_group: Scalar,
    runtime_one: Scalar,
    LEVELS: tl.constexpr,
    PORTABLE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    ALL_INSIDE: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    LANES_PER_GROUP: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Multiply groups ``first_group`` ... ``first_group + STEP_GROUPS``, below ``end_group``, of rows [M] with x.

    Args:
        codes: the matrix's codes, as words
        PORTABLE: whether to use ordinary arithmetic instead of NVIDIA's assembly
        runtime_one: 1, as a value that the compiler does not know
        WAIT: whether to wait for the previous kernel before reading x

    Returns:
        The part of each lane, [L, M] float32.
    """
    PLANE_WORDS: tl.constexpr = plane_words(LEVELS, GROUP_SIZE)
    WORDS: tl.constexpr = PLANE_WORDS // LANES_PER_GROUP
    LOAD_WORDS: tl.constexpr = words_per_load(LEVELS, GROUP_SIZE, WORDS)
    GROUP_BYTES: tl.constexpr = group_bytes(LEVELS, GROUP_SIZE)
    UPPER_WORDS: tl.constexpr = max(1, GROUP_SIZE // 32)  # words of the high plane of 3 bits
    LANES: tl.constexpr = STEP_GROUPS * LANES_PER_GROUP
    lane = tl.arange(0, LANES)
    lane_in_group = lane % LANES_PER_GROUP
    group = tl.minimum(first_group + lane // LANES_PER_GROUP, NUM_GROUPS - 1)  # from ``end_group`` on, x is zero
    upper = ()
    if LEVELS == 3:  # the window with the group starts at a multiple of 8 bytes
        first_word = (group * GROUP_BYTES // 8 * 2)[:, None] + row[None, :] * (NUM_GROUPS * GROUP_BYTES // 4)
        words = _load_words(codes, first_word, WORDS, LOAD_WORDS)
        code_shift = tl.broadcast_to((group * GROUP_BYTES % 8 * 8)[:, None, None], [LANES, 1, LOAD_WORDS])
    else:
        code_shift = tl.broadcast_to((lane_in_group * WORDS // UPPER_WORDS)[:, None, None], [LANES, 1, LOAD_WORDS])
        first_word = (row[None, :] * NUM_GROUPS + group[:, None]) * (GROUP_BYTES // 4)
        words = _load_words(codes, first_word + (lane_in_group * WORDS)[:, None], WORDS, LOAD_WORDS)
        if LEVELS == 8:
            upper_word = first_word + (PLANE_WORDS + lane_in_group * WORDS % UPPER_WORDS)[:, None]
            upper = _load_words(codes, upper_word, min(WORDS, UPPER_WORDS), LOAD_WORDS)
    # Without this factor, Triton sees that scales are contiguous, and loads them into other threads than their codes.
    scale_index = row[None, :] * NUM_GROUPS + (group * runtime_one)[:, None]
    scale_byte, offset_byte = tl.load(scales + scale_index), tl.load(offsets + scale_index)
    if WAIT:
        gdc_wait()
    high, low, x_scale, sums = fixed_point(
        x, first_group, end_group, ALL_INSIDE, LEVELS, PORTABLE, GROUP_SIZE, STEP_GROUPS, LANES, LOAD_WORDS
    )
    products = dot(words, upper, code_shift, high, low, LEVELS, UPPER_WORDS, LOAD_WORDS, PORTABLE).to(tl.float32)
    scale = decode_scale(scale_byte)
    return scale * (products * x_scale) + decode_offset(offset_byte, scale, LEVELS - 1.0) * sums


@triton.jit
def rows_times_vector(
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    bias: Pointer,
    x: Pointer,
    out: Pointer,
    rows: Scalar,
    block: Scalar,
    split: Scalar,
    weight: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    LEVELS: tl.constexpr,
    PORTABLE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS_PER_LANE: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Multiply a block of rows of one matrix with x, apply bias, activation and weight, and store the result.

    Args:
        bias: [rows]
        x: [columns]
        out: [rows], or [rows / 2] if GATED
        block: block of rows
        split: which part of the columns to compute
        weight: routing weight
        WAIT: whether to wait for the previous kernel before reading x
    """
    SPLIT_GROUPS: tl.constexpr = (NUM_GROUPS + SPLITS - 1) // SPLITS  # groups of this program
    LANES_PER_GROUP: tl.constexpr = lanes_per_group(LEVELS, GROUP_SIZE, COLUMNS_PER_LANE)
    STEP_GROUPS: tl.constexpr = groups_per_step(LEVELS, GROUP_SIZE, SPLIT_GROUPS, COLUMNS_PER_LANE)
    ALL_INSIDE: tl.constexpr = SPLIT_GROUPS * SPLITS == NUM_GROUPS and SPLIT_GROUPS % STEP_GROUPS == 0
    if GATED:  # gate rows, followed by the matching rows of up
        m = tl.arange(0, BLOCK_ROWS)
        inner = block * (BLOCK_ROWS // 2) + m % (BLOCK_ROWS // 2)
        is_up = m // (BLOCK_ROWS // 2)
        row = tl.where(inner < rows // 2, inner * 2 + is_up if INTERLEAVED else inner + is_up * (rows // 2), 0)
        out_row = block * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)
        out_rows = rows // 2
    else:
        out_row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = tl.where(out_row < rows, out_row, 0)
        out_rows = rows
    first_group = split * SPLIT_GROUPS
    end_group = tl.minimum((split + 1) * SPLIT_GROUPS, NUM_GROUPS)
    runtime_one = 1 + (rows >> 31)
    codes = codes.to(tl.pointer_type(tl.int32))
    total = _groups_times_vector(
        codes,
        scales,
        offsets,
        x,
        row,
        first_group,
        end_group,
        runtime_one,
        LEVELS,
        PORTABLE,
        GROUP_SIZE,
        NUM_GROUPS,
        ALL_INSIDE,
        STEP_GROUPS,
        LANES_PER_GROUP,
        WAIT,
    )
    if SPLIT_GROUPS > STEP_GROUPS:
        for step in range(1, (SPLIT_GROUPS + STEP_GROUPS - 1) // STEP_GROUPS):
            total += _groups_times_vector(
                codes,
                scales,
                offsets,
                x,
                row,
                first_group + step * STEP_GROUPS,
                end_group,
                runtime_one,
                LEVELS,
                PORTABLE,
                GROUP_SIZE,
                NUM_GROUPS,
                ALL_INSIDE,
                STEP_GROUPS,
                LANES_PER_GROUP,
                False,
            )
    y = tl.sum(total, 0)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32) * (split == 0)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, BLOCK_ROWS // 2]), [1, 0]))
        y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
    else:
        y = activated(y, limit, alpha, ACTIVATION, CLAMP)
    if WEIGHTED:
        y *= weight
    tl.store(out + out_row, y.to(out.dtype.element_ty), mask=out_row < out_rows)


@triton.jit(do_not_specialize=["limit", "alpha", "shift"])
def experts_vectors_kernel(
    x: Pointer,  # [T, columns], or [T, K, columns] if PER_PAIR
    index: Pointer,  # [T, K] int
    weights: Pointer,  # [T, K]
    codes: Pointer,
    scales: Pointer,
    offsets: Pointer,
    table: Pointer,  # [E, 3] int64
    bias: Pointer,  # [E, rows]
    out: Pointer,  # [T, K, S, rows], or half of the rows if GATED
    rows: Scalar,
    experts: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    TOP_K: tl.constexpr,
    PER_PAIR: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,  # results times weights, and zeros in unused slots, which otherwise are not written
    COMPILED_LEVELS: tl.constexpr,  # tuple: levels (numbers of code values) of the widths to compile for
    PORTABLE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS_PER_LANE: tl.constexpr,  # columns of a group that one lane computes
    SPLITS: tl.constexpr,  # more than one only without gate and activation
    PDL: tl.constexpr,  # starts while the previous kernel ends (Hopper)
):
    """Grid [T * K, blocks of rows, S]."""
    pair, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The down kernel may read its index early: it was written before the previous kernel, which has waited for it.
    if PDL and not PER_PAIR:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    WAIT: tl.constexpr = PDL and PER_PAIR
    expert = tl.load(index + pair)
    is_used = (expert >= 0) & (expert < experts)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + pair).to(tl.float32)
    out += (pair.to(tl.int64) * SPLITS + split) * (rows // 2 if GATED else rows)
    if is_used:
        levels = tl.load(table + 3 * expert).to(tl.int32)
        first_scale = tl.load(table + 3 * expert + 2)
        codes += tl.load(table + 3 * expert + 1) // 16 * 16  # tells the compiler the alignment: loads of 16 bytes
        x += (pair if PER_PAIR else pair // TOP_K).to(tl.int64) * (NUM_GROUPS * GROUP_SIZE)
        for i in tl.static_range(len(COMPILED_LEVELS)):
            if levels == COMPILED_LEVELS[i]:
                rows_times_vector(
                    codes,
                    scales + first_scale,
                    offsets + first_scale,
                    bias + expert * rows,
                    x,
                    out,
                    rows,
                    block,
                    split,
                    weight,
                    limit,
                    alpha,
                    shift,
                    COMPILED_LEVELS[i],
                    PORTABLE,
                    GROUP_SIZE,
                    NUM_GROUPS,
                    BLOCK_ROWS,
                    COLUMNS_PER_LANE,
                    SPLITS,
                    GATED,
                    INTERLEAVED,
                    ACTIVATION,
                    CLAMP,
                    HAS_BIAS,
                    WEIGHTED,
                    WAIT,
                )
    elif WEIGHTED:
        inner = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tl.store(out + inner, tl.zeros([BLOCK_ROWS], tl.float32).to(out.dtype.element_ty), mask=inner < rows)
        if WAIT:
            gdc_wait()


@triton.jit
def linears_vectors_kernel(
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
    rows_0: Scalar,
    rows_1: Scalar,  # 0 for a missing matrix
    rows_2: Scalar,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    PORTABLE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS_PER_LANE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [T, blocks of rows of each matrix]."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    matrix, block, first_row = locate_block(tl.program_id(1), rows_0, rows_1, BLOCK_ROWS)
    rows_times_vector(
        select(matrix, codes_0, codes_1, codes_2),
        select(matrix, scales_0, scales_1, scales_2),
        select(matrix, offsets_0, offsets_1, offsets_2),
        select(matrix, bias_0, bias_1, bias_2),
        x + token * (NUM_GROUPS * GROUP_SIZE),
        out + token * (rows_0 + rows_1 + rows_2) + first_row,
        select(matrix, block * 0 + rows_0, block * 0 + rows_1, block * 0 + rows_2),
        block,
        0,  # split
        1.0,  # weight
        0.0,  # limit
        1.0,  # alpha
        0.0,  # shift
        LEVELS,
        PORTABLE,
        GROUP_SIZE,
        NUM_GROUPS,
        BLOCK_ROWS,
        COLUMNS_PER_LANE,
        1,  # SPLITS
        False,  # GATED
        False,  # INTERLEAVED
        NONE,
        0,  # CLAMP
        HAS_BIAS,
        False,  # WEIGHTED
        PDL,
    )
