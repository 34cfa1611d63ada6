"""Triton kernels for a few tokens through experts with trellis codes, without tensor cores.

Legend: T tokens, K experts per token, P = T * K pairs of token and expert, E experts, C columns, N pairs of a program,
R rows of tiles of a program, J tiles of a step, S splits (programs that share a row).

``rotate_kernel`` rotates inputs; before that it applies the activation, so that it also stands between the two products
of an expert. ``rows_kernel`` multiplies. Each of its threads holds one period of R rows at a time: 32 threads cover a
tile, so the words of a load lie next to each other. It decodes a weight once for N pairs that chose the same expert.

Results do not depend on the order in which programs run. ``values`` decodes.
"""

# mypy: disable-error-code="assignment,has-type"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.activation_triton import activated, gated
from gemq.kernels.trellis.values import (
    FOLDED_ONE,
    FOLDED_UNIT,
    PERIODS,
    VALUE_UNIT,
    centered_sum,
    end_distance,
    folded_value,
    load_window,
    narrow_eighths,
    period_words,
    state,
)
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant import rotation
from gemq.quant.grid_kernel import decode_scale

CACHE_LINE = tl.constexpr(128)


@triton.constexpr_function
def _sign_word(number: int):
    """Return 32 of the signs of a block: bit i is set where the sign of input 32 * number + i is negative."""
    return (rotation.SIGN_BITS >> 32 * int(number)) & 0xFFFFFFFF


@triton.constexpr_function
def _log2(number: int):
    """Return the logarithm of a power of two."""
    return int(number).bit_length() - 1


@triton.jit
def _rotated(x: Tile, SIDE: tl.constexpr):
    """Rotate blocks x [B, SIDE] float32, as ``rotation.rotate`` does."""
    column = tl.arange(0, SIDE)
    word = tl.where(column < 64, _sign_word(0), _sign_word(2))
    odd_word = tl.where(column < 64, _sign_word(1), _sign_word(3))
    word = tl.where((column & 32) == 0, word, odd_word).to(tl.uint32)
    is_negative = ((word >> (column & 31).to(tl.uint32)) & 1) == 1
    x = tl.where(is_negative[None, :], -x, x)
    for stage in tl.static_range(_log2(SIDE)):
        partner = tl.gather(x, tl.broadcast_to((column ^ (1 << stage))[None, :], x.shape), 1)
        x = partner + tl.where(((column >> stage) & 1 == 1)[None, :], -x, x)
    return x * (SIDE**-0.5)


@triton.jit(do_not_specialize=["limit", "alpha", "shift"])
def rotate_kernel(
    y: Pointer,  # [X, S, 2 C if GATED else C]
    out: Pointer,  # [X, C] float32
    sums: Pointer,  # [X, C / SIDE] float32, of the rotated blocks
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add splits, apply the activation, and rotate. Grid [X, blocks of the rotation / BLOCKS]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = group * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    is_inside = (block < COLUMNS // SIDE)[:, None] & (column >= 0)
    ROWS: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    first = y + row * (SPLITS * ROWS)
    first += 2 * column if GATED and INTERLEAVED else column
    x = tl.zeros([BLOCKS, SIDE], tl.float32)
    up = x
    UP: tl.constexpr = 1 if INTERLEAVED else COLUMNS
    for split in tl.static_range(SPLITS):
        x += tl.load(first + split * ROWS, mask=is_inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(first + (split * ROWS + UP), mask=is_inside, other=0.0).to(tl.float32)
    if GATED:  # noqa: SIM108 - one of them is compiled
        x = gated(x, up, limit, alpha, shift, ACTIVATION, CLAMP)
    else:
        x = activated(x, limit, alpha, ACTIVATION, CLAMP)
    x = _rotated(x, SIDE)
    tl.store(out + row * COLUMNS + column, x, mask=is_inside)
    tl.store(sums + row * (COLUMNS // SIDE) + block, tl.sum(x, 1), mask=block < COLUMNS // SIDE)


@triton.jit
def _same_expert(pair: Scalar, expert: Scalar, index: Pointer, pairs: Scalar, N: tl.constexpr, PADDED: tl.constexpr):
    """Return the N pairs of a program, and whether each exists. The first one of every N pairs has work.

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
    numbers, exist = (pair,), (rank % N == 0,)
    for n in tl.static_range(1, N):
        is_number = is_same & (order == rank + n)
        numbers = numbers + (tl.sum(tl.where(is_number, slot, 0)),)  # noqa: RUF005 - Triton cannot unpack
        exist = exist + (tl.sum(is_number.to(tl.int32)) > 0,)  # noqa: RUF005
    return numbers, exist


@triton.jit
def _load_fours(x: Pointer, mask: Tile, ALL_INSIDE: tl.constexpr):
    """Load 4 neighbours of each pointer [32, J, 1]: tuple of four tiles."""
    pointers = x[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    if ALL_INSIDE:
        fours = tl.load(pointers)
    else:
        fours = tl.load(pointers, mask=tl.broadcast_to(mask[:, :, :, None], pointers.shape), other=0.0)
    even, odd = tl.split(tl.reshape(fours, [x.shape[0], x.shape[1], 1, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _rows_times_vectors(
    rings: Pointer,  # [1, 1, R] the first tile of each row of tiles, uint32
    x: Pointer,  # float32
    starts: tl.tuple,  # the first element of each of N vectors in x
    eighths: Scalar,
    first_tile: Scalar,
    end_tile: Scalar,
    STEPS: tl.constexpr,
    J: tl.constexpr,
    ALL_INSIDE: tl.constexpr,
    STATE_BITS: tl.constexpr,
    NARROW: tl.constexpr,
    FOLDED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Return sums of products, before the constants of ``values``: N tiles [32, J, R] float32, a share per thread."""
    R: tl.constexpr = rings.shape[2]
    N: tl.constexpr = len(starts)
    # Triton gives neighbouring elements of the first axis to neighbouring threads.
    position = tl.arange(0, PERIODS)[:, None, None]
    word, previous, before_previous, shift = period_words(position, eighths)
    shift = tl.broadcast_to(shift, [PERIODS, J, R])
    last, previous, before_previous = rings + word, rings + previous, rings + before_previous
    half = position % 2 * 8
    totals = ()
    for _n in tl.static_range(N):
        totals = totals + (tl.zeros([PERIODS, J, R], tl.float32),)  # noqa: RUF005
    for step in range(STEPS):
        tile = (first_tile + step * J + tl.arange(0, J))[None, :, None]
        is_inside = tl.broadcast_to(tile < end_tile, [PERIODS, J, 1])
        tile = tl.minimum(tile, end_tile - 1)
        ring = tile * eighths
        high, low = load_window(last + ring, previous + ring, before_previous + ring, shift, NARROW, PORTABLE)
        for quarter in tl.static_range(2):
            columns = ()
            for n in tl.static_range(N):
                first_column = x + (starts[n] + (tile * 16 + half + 4 * quarter))
                columns = columns + (_load_fours(first_column, is_inside, ALL_INSIDE),)  # noqa: RUF005
            for i in tl.static_range(4):
                distance = end_distance(4 * quarter + i, eighths)
                states = state(high, low, distance, STATE_BITS, NARROW, PORTABLE)
                value = folded_value(states, PORTABLE) if FOLDED else centered_sum(states, PORTABLE)
                new_totals = ()
                for n in tl.static_range(N):
                    new_totals = new_totals + (totals[n] + value * columns[n][i],)  # noqa: RUF005
                totals = new_totals
    return totals


@triton.jit
def _prefetch(codes: Pointer, lines: Tile, PORTABLE: tl.constexpr):
    """Ask for cache lines at byte offsets ``lines``, so that they are in L2 when the previous kernel ends."""
    if not PORTABLE:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [codes + lines], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def rows_kernel(
    x: Pointer,  # [T, C] float32, or [P, C] if PER_PAIR
    sums: Pointer,  # [T or P, C / SIDE] float32, of the blocks of x
    index: Pointer,  # [P] int
    weights: Pointer,  # [P]
    codes: Pointer,
    scales: Pointer,  # [E, rows] uint8
    table: Pointer,  # [E, 2] int32: eighths, first 16 bytes of codes
    bias: Pointer,  # [E, rows]
    out: Pointer,  # [P, S, rows]
    pairs: Scalar,
    rows: Scalar,
    experts: Scalar,
    TOP_K: tl.constexpr,
    PER_PAIR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,  # results times weights, and zeros in unused slots, which otherwise are not written
    PADDED_PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    FOLDED: tl.constexpr,
    PORTABLE: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply rows of the experts with vectors. Grid [P, blocks of R rows of tiles, S]."""
    TILES: tl.constexpr = COLUMNS // 16
    BLOCKS: tl.constexpr = COLUMNS // SIDE
    SPLIT_BLOCKS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    SPLIT_TILES: tl.constexpr = SPLIT_BLOCKS * SIDE // 16
    STEPS: tl.constexpr = (SPLIT_TILES + J - 1) // J
    ALL_INSIDE: tl.constexpr = SPLIT_TILES % J == 0 and SPLIT_BLOCKS * SPLITS == BLOCKS
    pair, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(index + pair)
    is_used = (expert >= 0) & (expert < experts)
    tile_row = tl.minimum(block * R + tl.arange(0, R), rows // 16 - 1)
    row = (block * R + tl.arange(0, R))[None, :] * 16 + tl.arange(0, 16)[:, None]
    first_tile = split * SPLIT_TILES
    end_tile = tl.minimum(first_tile + SPLIT_TILES, TILES)
    safe_expert = tl.where(is_used, expert, 0)
    eighths = tl.load(table + 2 * safe_expert).to(tl.int32)
    codes += tl.load(table + 2 * safe_expert + 1).to(tl.int64) * 16
    if PREFETCH:
        LINES: tl.constexpr = triton.next_power_of_2(SPLIT_TILES)
        line = tl.minimum(tl.arange(0, LINES) * CACHE_LINE, SPLIT_TILES * eighths * 4 - 4)
        row_start = (tile_row * TILES + first_tile) * (eighths * 4)
        _prefetch(codes, row_start[:, None] + line[None, :], PORTABLE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if N > 1:
        numbers, exist = _same_expert(pair, expert, index, pairs, N, PADDED_PAIRS)
    else:
        numbers, exist = (pair,), (is_used,)
    if is_used & exist[0]:
        rings = codes.to(tl.pointer_type(tl.uint32)) + (tile_row * (TILES * eighths))[None, None, :]
        vectors, starts = (), ()
        for n in tl.static_range(N):
            vector = (numbers[n] if PER_PAIR else numbers[n] // TOP_K).to(tl.int64)
            vectors = vectors + (vector,)  # noqa: RUF005
            starts = starts + (vector * COLUMNS,)  # noqa: RUF005
        if eighths <= narrow_eighths(STATE_BITS):
            totals = _rows_times_vectors(
                rings,
                x,
                starts,
                eighths,
                first_tile,
                end_tile,
                STEPS,
                J,
                ALL_INSIDE,
                STATE_BITS,
                True,
                FOLDED,
                PORTABLE,
            )
        else:
            totals = _rows_times_vectors(
                rings,
                x,
                starts,
                eighths,
                first_tile,
                end_tile,
                STEPS,
                J,
                ALL_INSIDE,
                STATE_BITS,
                False,
                FOLDED,
                PORTABLE,
            )
        is_row = row < rows
        matrix_row = expert.to(tl.int64) * rows + row
        scale = decode_scale(tl.load(scales + matrix_row, mask=is_row, other=0))
        if HAS_BIAS:
            first_term = tl.load(bias + matrix_row, mask=is_row, other=0.0).to(tl.float32) * (split == 0)
        for n in tl.static_range(N):
            y = tl.sum(tl.sum(tl.reshape(totals[n], [16, 2, J, R]), 1), 1)  # [16, R]
            if FOLDED:
                b = tl.arange(0, triton.next_power_of_2(SPLIT_BLOCKS))
                is_block = (b < SPLIT_BLOCKS) & (split * SPLIT_BLOCKS + b < BLOCKS)
                first_sum = sums + (vectors[n] * BLOCKS + split * SPLIT_BLOCKS)
                y = (y - FOLDED_ONE * tl.sum(tl.load(first_sum + b, mask=is_block, other=0.0))) * (scale * FOLDED_UNIT)
            else:
                y = y * (scale * VALUE_UNIT)
            if HAS_BIAS:
                y += first_term
            if WEIGHTED:
                y = y * tl.load(weights + numbers[n]).to(tl.float32)
            element = (numbers[n].to(tl.int64) * SPLITS + split) * rows + row
            tl.store(out + element, y.to(out.dtype.element_ty), mask=is_row & exist[n])
    elif WEIGHTED:  # noqa: SIM102 - a constant and a value cannot be combined
        if not is_used:
            element = (pair.to(tl.int64) * SPLITS + split) * rows + row
            tl.store(out + element, tl.zeros([16, R], tl.float32).to(out.dtype.element_ty), mask=row < rows)
