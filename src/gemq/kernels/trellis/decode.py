"""Triton kernels for a few tokens through experts with trellis codes, on the tensor cores.

Legend: T tokens, K experts per token, P = T * K pairs of token and expert, E experts, X vectors (T, or P), C columns,
R rows of tiles of a program, J steps of 32 columns that the warps of a program share, S splits (programs that share a
row).

``rotate_kernel`` rotates inputs and rounds them to float16. Before that it adds splits and applies the activation, so
that it also stands between the two products of an expert. ``rows_kernel`` multiplies. It decodes a weight once for up
to eight pairs that chose the same expert: the tensor cores multiply with eight vectors in any case.

Results do not depend on the order in which programs run. ``values`` decodes, ``fragments`` multiplies.
"""

# mypy: disable-error-code="assignment,has-type,misc,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.activation_triton import activated, gated
from gemq.kernels.trellis.fragments import add_product
from gemq.kernels.trellis.rotation import signs
from gemq.kernels.trellis.values import (
    MEAN,
    VALUE_UNIT,
    end_distance,
    load_window,
    narrow_eighths,
    period_words,
    state,
    value_pair,
)
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant.grid_kernel import decode_scale

LARGEST = tl.constexpr(1024.0)
"""Vectors are scaled to this largest absolute value, far from the ends of float16."""

VECTORS = tl.constexpr(8)
"""Vectors of an instruction."""

OFFSET = tl.constexpr(1024.0)
"""``value_pair`` without centering is greater than the value by this plus MEAN."""


CACHE_LINE = tl.constexpr(128)


@triton.constexpr_function
def _log2(number: int):
    """Return the logarithm of a power of two."""
    return int(number).bit_length() - 1


@triton.jit
def _rotated(x: Tile, SIDE: tl.constexpr):
    """Rotate blocks x [B, SIDE] float32, as ``rotation.rotate`` does."""
    column = tl.arange(0, SIDE)
    x = tl.where((signs(column) == 1)[None, :], -x, x)
    for stage in tl.static_range(_log2(SIDE)):
        partner = tl.gather(x, tl.broadcast_to((column ^ (1 << stage))[None, :], x.shape), 1)
        x = partner + tl.where(((column >> stage) & 1 == 1)[None, :], -x, x)
    return x * (SIDE**-0.5)


@triton.jit(do_not_specialize=["vectors", "limit", "alpha", "shift"])
def rotate_kernel(
    y: Pointer,  # [X, S, 2 C if GATED else C]
    out: Pointer,  # [TERMS, X, C] float16: the sum of the terms is the result / factor
    factors: Pointer,  # [X] float32
    sums: Pointer,  # [X, C / SIDE] float32, of the blocks of the first term
    vectors: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    TERMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add splits, apply the activation, rotate and round. Grid [X]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    vector = tl.program_id(0).to(tl.int64)
    NUM_BLOCKS: tl.constexpr = COLUMNS // SIDE
    block = tl.arange(0, triton.next_power_of_2(NUM_BLOCKS))
    column = block[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    is_inside = column < COLUMNS
    ROWS: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    UP: tl.constexpr = 1 if INTERLEAVED else COLUMNS
    first = y + vector * (SPLITS * ROWS)
    first += 2 * column if GATED and INTERLEAVED else column
    x = tl.zeros(column.shape, tl.float32)
    up = x
    for split in tl.static_range(SPLITS):
        x += tl.load(first + split * ROWS, mask=is_inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(first + (split * ROWS + UP), mask=is_inside, other=0.0).to(tl.float32)
    if GATED:  # noqa: SIM108 - one of them is compiled
        x = gated(x, up, limit, alpha, shift, ACTIVATION, CLAMP)
    else:
        x = activated(x, limit, alpha, ACTIVATION, CLAMP)
    x = _rotated(tl.where(is_inside, x, 0.0), SIDE)
    factor = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-30) * (1.0 / LARGEST)
    tl.store(factors + vector, factor)
    x = x * (1.0 / factor)
    rounded = x.to(tl.float16)
    tl.store(sums + vector * NUM_BLOCKS + block, tl.sum(rounded.to(tl.float32), 1), mask=block < NUM_BLOCKS)
    for term in tl.static_range(TERMS):
        tl.store(out + (term * vectors + vector) * COLUMNS + column, rounded, mask=is_inside)
        x = x - rounded.to(tl.float32)
        rounded = x.to(tl.float16)


@triton.jit
def _pairs_of_expert(pair: Scalar, expert: Scalar, index: Pointer, pairs: Scalar, PADDED: tl.constexpr):
    """Return the pairs of a program, [VECTORS] int32, -1 where there is none. The first of every eight has work.

    Args:
        pair: of the program
        expert: of the pair
        index: [P] experts
        pairs: P
        PADDED: P, rounded up to a power of two
    """
    slot = tl.arange(0, PADDED)
    is_same = (tl.load(index + slot, mask=slot < pairs, other=-1) == expert) & (slot < pairs)
    rank = tl.sum((is_same & (slot < pair)).to(tl.int32))
    order = tl.cumsum(is_same.to(tl.int32)) - 1
    is_number = is_same[None, :] & (order[None, :] == rank + tl.arange(0, VECTORS)[:, None])
    return tl.sum(tl.where(is_number, slot[None, :] + 1, 0), 1) - 1, rank % VECTORS == 0


@triton.jit
def _prefetch(codes: Pointer, lines: Tile, PORTABLE: tl.constexpr):
    """Ask for cache lines at byte offsets ``lines``, so that they are in L2 when the previous kernel ends."""
    if not PORTABLE:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [codes + lines], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _load_period(x: Pointer, mask: Tile):
    """Load eight float16 of each pointer [32, J, 1] as four words."""
    pointers = x.to(tl.pointer_type(tl.int32))[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    words = tl.load(pointers, mask=tl.broadcast_to(mask[:, :, :, None], pointers.shape), other=0)
    even, odd = tl.split(tl.reshape(words, [x.shape[0], x.shape[1], 1, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _rows_times_vectors(
    rings: Pointer,  # [1, 1, R] the first tile of each row of tiles, uint32
    x: Pointer,  # [32, 1, 1] float16, the vector of each thread
    term_stride: Scalar,  # elements from a term of x to the next
    eighths: Scalar,
    first_tile: Scalar,
    end_tile: Scalar,
    STEPS: tl.constexpr,
    J: tl.constexpr,
    STATE_BITS: tl.constexpr,
    NARROW: tl.constexpr,
    TERMS: tl.constexpr,
    CENTERED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Return the four sums of each thread (see ``fragments.add_product``) for every warp: [32, J, R] float32."""
    R: tl.constexpr = rings.shape[2]
    # Triton gives neighbouring elements of the first axis to neighbouring threads.
    thread = tl.arange(0, 32)[:, None, None]
    g, q = thread // 4, thread % 4
    word, previous, before_previous, shift = period_words(2 * g + q % 2, eighths)
    shift = tl.broadcast_to(shift, [32, J, R])
    low_last, low_middle, low_first = rings + word, rings + previous, rings + before_previous
    word, previous, before_previous, lower_shift = period_words(2 * g + 16 + q % 2, eighths)
    lower_shift = tl.broadcast_to(lower_shift, [32, J, R])
    high_last, high_middle, high_first = rings + word, rings + previous, rings + before_previous
    zero = tl.zeros([32, J, R], tl.float32)
    c0, c1, c2, c3 = zero, zero, zero, zero
    for step in range(STEPS):
        tile = first_tile + 2 * (step * J + tl.arange(0, J)[None, :, None]) + q // 2
        is_inside = tile < end_tile
        column = tile * 16 + q % 2 * 8
        ring = tl.minimum(tile, end_tile - 1) * eighths
        upper = load_window(low_last + ring, low_middle + ring, low_first + ring, shift, NARROW, PORTABLE)
        lower = load_window(high_last + ring, high_middle + ring, high_first + ring, lower_shift, NARROW, PORTABLE)
        b = ()
        for term in tl.static_range(TERMS):
            b = b + (_load_period(x + (term * term_stride + column), is_inside),)  # noqa: RUF005
        for half in tl.static_range(2):
            a = ()
            for pair in tl.static_range(2):
                for row in tl.static_range(2):
                    window = upper if row == 0 else lower
                    states = ()
                    for i in tl.static_range(2):
                        distance = end_distance(4 * half + 2 * pair + i, eighths)
                        states = states + (state(window[0], window[1], distance, STATE_BITS, NARROW, PORTABLE),)  # noqa: RUF005
                    a = a + (value_pair(states[0], states[1], CENTERED, PORTABLE),)  # noqa: RUF005
            for term in tl.static_range(TERMS):
                b0, b1 = b[term][2 * half], b[term][2 * half + 1]
                c0, c1, c2, c3 = add_product(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b0, b1, PORTABLE)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["vectors", "pairs"])
def rows_kernel(
    x: Pointer,  # [TERMS, T, C] float16, or [TERMS, P, C] if PER_PAIR
    factors: Pointer,  # [X] float32
    sums: Pointer,  # [X, C / SIDE] float32, of the blocks of x
    index: Pointer,  # [P] int
    weights: Pointer,  # [P]
    codes: Pointer,
    scales: Pointer,  # [E, rows] uint8
    table: Pointer,  # [E, 2] int32: eighths, first 16 bytes of codes
    bias: Pointer,  # [E, rows]
    out: Pointer,  # [P, S, rows]
    vectors: Scalar,  # X
    pairs: Scalar,
    rows: Scalar,
    experts: Scalar,
    TOP_K: tl.constexpr,
    PER_PAIR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,  # results times weights, and zeros in unused slots, which otherwise are not written
    PADDED_PAIRS: tl.constexpr,  # 1 for a single token, whose experts all differ
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    TERMS: tl.constexpr,
    CENTERED: tl.constexpr,
    PORTABLE: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply rows of the experts with vectors. Grid [P, blocks of R rows of tiles, S].

    With PDL the programs start when those of the previous kernel, a rotation, have waited for the kernel before it. The
    routing is complete then. Codes are requested while the rotation runs.
    """
    TILES: tl.constexpr = COLUMNS // 16
    BLOCKS: tl.constexpr = COLUMNS // SIDE
    SPLIT_BLOCKS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    SPLIT_TILES: tl.constexpr = SPLIT_BLOCKS * SIDE // 16
    STEPS: tl.constexpr = (SPLIT_TILES + 2 * J - 1) // (2 * J)
    pair, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The index may be read early: it was written before the previous kernel, which has waited for it.
    expert = tl.load(index + pair)
    is_used = (expert >= 0) & (expert < experts)
    tile_row = tl.minimum(block * R + tl.arange(0, R), rows // 16 - 1)
    first_tile = split * SPLIT_TILES
    end_tile = tl.minimum(first_tile + SPLIT_TILES, TILES)
    safe_expert = tl.where(is_used, expert, 0)
    eighths = tl.load(table + 2 * safe_expert).to(tl.int32)
    codes += tl.load(table + 2 * safe_expert + 1).to(tl.int64) * 16
    thread = tl.arange(0, 32)
    g, q = thread // 4, thread % 4
    # each thread holds sums of rows g and g + 8 and vectors 2 q and 2 q + 1: tiles [32, R, vector, row]
    parity = tl.arange(0, 2)
    if PADDED_PAIRS > 1:
        numbers, has_work = _pairs_of_expert(pair, expert, index, pairs, PADDED_PAIRS)
        input_number = tl.maximum(tl.gather(numbers, g, 0), 0)
        output_number = tl.join(tl.gather(numbers, 2 * q, 0), tl.gather(numbers, 2 * q + 1, 0))
    else:
        has_work = is_used
        input_number = pair + 0 * g
        output_number = tl.where(q[:, None] * 2 + parity[None, :] == 0, pair, -1)
    exists = output_number >= 0
    output_number = tl.maximum(output_number, 0)
    has_work = has_work & is_used
    if PREFETCH:
        LINES: tl.constexpr = triton.next_power_of_2(SPLIT_TILES)
        if has_work:
            line = tl.minimum(tl.arange(0, LINES) * CACHE_LINE, SPLIT_TILES * eighths * 4 - 4)
            row_start = (tile_row * TILES + first_tile) * (eighths * 4)
            _prefetch(codes, row_start[:, None] + line[None, :], PORTABLE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if has_work:
        rings = codes.to(tl.pointer_type(tl.uint32)) + (tile_row * (TILES * eighths))[None, None, :]
        input_vector = input_number if PER_PAIR else input_number // TOP_K
        first_column = (x + input_vector.to(tl.int64) * COLUMNS)[:, None, None]
        term_stride = vectors.to(tl.int64) * COLUMNS
        if eighths <= narrow_eighths(STATE_BITS):
            c0, c1, c2, c3 = _rows_times_vectors(
                rings,
                first_column,
                term_stride,
                eighths,
                first_tile,
                end_tile,
                STEPS,
                J,
                STATE_BITS,
                True,
                TERMS,
                CENTERED,
                PORTABLE,
            )
        else:
            c0, c1, c2, c3 = _rows_times_vectors(
                rings,
                first_column,
                term_stride,
                eighths,
                first_tile,
                end_tile,
                STEPS,
                J,
                STATE_BITS,
                False,
                TERMS,
                CENTERED,
                PORTABLE,
            )
        y = tl.sum(tl.join(tl.join(c0, c1), tl.join(c2, c3)), 1)  # [32, R, 2, 2]
        output_vector = output_number if PER_PAIR else output_number // TOP_K
        factor = tl.load(factors + output_vector)[:, None, :, None]
        if not CENTERED:
            b = tl.arange(0, triton.next_power_of_2(SPLIT_BLOCKS))
            is_block = (b < SPLIT_BLOCKS) & (split * SPLIT_BLOCKS + b < BLOCKS)
            first_sum = sums + (output_vector.to(tl.int64) * BLOCKS + split * SPLIT_BLOCKS)
            block_sums = tl.load(first_sum[:, :, None] + b[None, None, :], mask=is_block[None, None, :], other=0.0)
            y = y - (OFFSET + MEAN) * tl.sum(block_sums, 2)[:, None, :, None]
        row = (block * R + tl.arange(0, R))[None, :, None, None] * 16 + (g[:, None] + 8 * parity)[:, None, None, :]
        is_row = row < rows
        matrix_row = expert.to(tl.int64) * rows + row
        y = y * (decode_scale(tl.load(scales + matrix_row, mask=is_row, other=0)) * (factor * VALUE_UNIT))
        if HAS_BIAS:
            y += tl.load(bias + matrix_row, mask=is_row, other=0.0).to(tl.float32) * (split == 0)
        if WEIGHTED:
            y = y * tl.load(weights + output_number).to(tl.float32)[:, None, :, None]
        element = ((output_number.to(tl.int64) * SPLITS + split) * rows)[:, None, :, None] + row
        tl.store(out + element, y.to(out.dtype.element_ty), mask=is_row & exists[:, None, :, None])
    elif WEIGHTED:  # noqa: SIM102 - a constant and a value cannot be combined
        if not is_used:
            row = block * R * 16 + tl.arange(0, R * 16)
            element = (pair.to(tl.int64) * SPLITS + split) * rows + row
            tl.store(out + element, tl.zeros([R * 16], tl.float32).to(out.dtype.element_ty), mask=row < rows)
