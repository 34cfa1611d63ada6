"""Triton kernels for a few tokens through experts with trellis codes, on the tensor cores.

Legend: T tokens, K experts per token, P = T * K pairs of token and expert, E experts, X vectors (T, or P), C columns,
G = ceil(C / 128) groups of columns, D digits of a vector's numbers, R rows of tiles of a program, J warps that share a
row, B sets of four vectors, S splits (programs that share a row).

``prepare.rotate_kernel`` rotates inputs, rounds them to fixed-point numbers of 8 D bits with a factor for each group,
and assigns pairs to slots. A slot is an expert with up to 4 B pairs. ``rows_kernel`` decodes a weight once for a slot.
Slots without pairs cost no more than the start of a program.

Results do not depend on the order in which programs run. ``values`` decodes, ``fragments`` multiplies.
"""

# mypy: disable-error-code="assignment,has-type,misc,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.trellis.fragments import add_product, repeat_byte
from gemq.kernels.trellis.prepare import GROUP, VECTORS
from gemq.kernels.trellis.values import (
    VALUE_UNIT,
    half_windows,
    narrow_eighths,
    period_products,
    period_words,
    state_shifts,
)
from gemq.kernels.triton_types import Pointer, Scalar, Tile, Tiles
from gemq.quant.grid_kernel import decode_scale

CACHE_LINE = tl.constexpr(128)


@triton.jit
def _prefetch(codes: Pointer, lines: Tile, PORTABLE: tl.constexpr):
    """Ask for cache lines at byte offsets ``lines``, so that they are in L2 when the previous kernel ends."""
    if not PORTABLE:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [codes + lines], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _advanced(pointer: Pointer, words: Scalar, PORTABLE: tl.constexpr):
    """Return ``pointer`` plus a number of words of 32 bits.

    The assembly keeps the compiler from giving each step and each load a pointer, for which registers are too few.
    """
    if PORTABLE:
        return pointer + words.to(tl.int64) * 4
    else:
        words = tl.broadcast_to(words, pointer.shape)
        address = tl.inline_asm_elementwise(
            "mad.wide.u32 $0, $1, 4, $2;", "=l,r,l", [words, pointer.to(tl.int64)], tl.int64, is_pure=True, pack=1
        )
        return address.to(pointer.dtype)


@triton.jit
def _load(pointer: Pointer, mask: Tile, EVEN: tl.constexpr):
    """Load words, zero where ``mask`` is false unless EVEN."""
    pointer = pointer.to(tl.pointer_type(tl.uint32))
    return tl.load(pointer) if EVEN else tl.load(pointer, mask=mask, other=0)


@triton.jit
def _load_upper(pointers: Tiles, words: Scalar, mask: Tile, EVEN: tl.constexpr, PORTABLE: tl.constexpr):
    """Load the words (uint32) of each thread's window, ``words`` after ``pointers``."""
    loaded = ()
    for i in tl.static_range(len(pointers)):
        loaded = loaded + (_load(_advanced(pointers[i], words, PORTABLE), mask, EVEN),)  # noqa: RUF005
    return loaded


@triton.jit
def _load_lower(
    pointer: Pointer, words: Scalar, mask: Tile, NARROW: tl.constexpr, EVEN: tl.constexpr, PORTABLE: tl.constexpr
):
    """Load the words of windows in the second half of a ring, which follow each other and end ``words`` later."""
    last = _advanced(pointer, words, PORTABLE)
    loaded = (_load(last, mask, EVEN), _load(last - 4, mask, EVEN))
    if NARROW:
        return loaded
    else:
        return (loaded[0], loaded[1], _load(last - 8, mask, EVEN))


@triton.jit
def _upper_pointers(first: Pointer, words: Tiles, NARROW: tl.constexpr):
    """Return pointers to the words of ``period_words`` in the ring at ``first``."""
    if NARROW:
        return (first + words[0] * 4, first + words[1] * 4)
    else:
        return (first + words[0] * 4, first + words[1] * 4, first + words[2] * 4)


@triton.jit
def _load_digits(digits: Pointer, mask: Tile, EVEN: tl.constexpr, PORTABLE: tl.constexpr):
    """Load eight digits of each pointer [32, J, 1] and return each four times, as a tuple of int32."""
    pointers = digits.to(tl.pointer_type(tl.int32))[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    words = tl.load(pointers) if EVEN else tl.load(pointers, mask=mask[:, :, :, None], other=0)
    halves = tl.split(words)
    repeated = ()
    for i in tl.static_range(8):
        repeated = repeated + (repeat_byte(halves[i // 4], i % 4, PORTABLE),)  # noqa: RUF005
    return repeated


@triton.jit
def _two_digits(high: Tile, low: Tile):
    """Return the number (float32) with the sums ``high`` and ``low`` of two digits. It fits into 32 bits."""
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _rows_times_vectors(
    codes: Pointer,  # the first tile of the split in the program's first row of tiles
    row_bytes: Tile,  # [1, 1, R] from the first row of tiles to each
    digits: Tiles,  # B tiles [32, J, 1] of int8 pointers, the first digit of each thread's vector
    heads: Tiles,  # B tiles [32, J, 1] of int32 pointers, the heads of the vector that the thread adds up
    eighths: Scalar,
    first_group: Scalar,
    end_group: Scalar,
    ROUNDS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    J: tl.constexpr,
    STATE_BITS: tl.constexpr,
    NARROW: tl.constexpr,
    DIGITS: tl.constexpr,
    EVEN: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Return the sums of rows g and g + 8 with vector q of each set in thread 4 g + q: a tuple of 2 B [32, J, R]."""
    R: tl.constexpr = row_bytes.shape[2]
    SETS: tl.constexpr = len(digits)
    # Triton gives neighboring elements of the first axis to neighboring threads.
    thread = tl.arange(0, 32)[:, None, None]
    warp = tl.arange(0, J)[None, :, None]
    g, q = thread // 4, thread % 4
    tile = warp * 8 + q // 2
    ring = codes + row_bytes + tile * (eighths * 4)
    words = period_words(2 * g + q % 2, eighths)
    upper_pointers, upper_shift = _upper_pointers(ring, words, NARROW), tl.broadcast_to(words[3], [32, J, R])
    words = period_words(2 * g + 16 + q % 2, eighths)
    lower_pointer, lower_shift = ring + words[0] * 4, tl.broadcast_to(words[3], [32, J, R])
    shifts = state_shifts(eighths, STATE_BITS, NARROW, MULTIPLIED)
    tile += first_group * 8
    mask = tl.broadcast_to((tile < TILES) & (first_group + warp < end_group), [32, J, R])
    upper = _load_upper(upper_pointers, 0 * eighths, mask, EVEN, PORTABLE)
    lower = _load_lower(lower_pointer, 0 * eighths, mask, NARROW, EVEN, PORTABLE)
    y = ()
    for _ in tl.static_range(2 * SETS):
        y = y + (tl.zeros([32, J, R], tl.float32),)  # noqa: RUF005
    for round in range(ROUNDS):
        group = first_group + round * J + warp
        is_group = group < end_group
        sums = ()
        for i in tl.static_range(SETS * DIGITS):
            start = heads[i // DIGITS] + (2 * DIGITS * group + i % DIGITS)
            start = tl.load(start) if EVEN else tl.load(start, mask=is_group, other=0)
            sums = sums + (tl.broadcast_to(start, [32, J, R]),)  # noqa: RUF005
        sums = _both_rows(sums, DIGITS)
        for step in tl.static_range(4):
            upper_words, lower_words = upper, lower
            # Words are loaded a step ahead, since that takes longer than decoding does.
            next_round = round if step < 3 else tl.minimum(round + 1, ROUNDS - 1)
            next_group = first_group + next_round * J + warp
            mask = (next_group * 8 + 2 * ((step + 1) % 4) + q // 2 < TILES) & (next_group < end_group)
            mask = tl.broadcast_to(mask, [32, J, R])
            advance = (next_round * (8 * J) + 2 * ((step + 1) % 4)) * eighths
            upper = _load_upper(upper_pointers, advance, mask, EVEN, PORTABLE)
            lower = _load_lower(lower_pointer, advance, mask, NARROW, EVEN, PORTABLE)
            first_word = lower_words[0] if NARROW else lower_words[2]
            lower_windows = half_windows(
                lower_words[0], lower_words[1], first_word, lower_shift, eighths, NARROW, PORTABLE
            )
            first_word = upper_words[0] if NARROW else upper_words[2]
            upper_windows = half_windows(
                upper_words[0], upper_words[1], first_word, upper_shift, eighths, NARROW, PORTABLE
            )
            a_upper = period_products(upper_windows, shifts, STATE_BITS, MULTIPLIED)
            a_lower = period_products(lower_windows, shifts, STATE_BITS, MULTIPLIED)
            added = ()
            for i in tl.static_range(SETS * DIGITS // 2):
                column = group * GROUP + (step * 32 + q * 8)
                digit_offset = i % (DIGITS // 2) * 2 * (GROUPS * GROUP)
                b = _load_digits(digits[2 * i // DIGITS] + (digit_offset + column), is_group, EVEN, PORTABLE)
                c = (sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
                for k in tl.static_range(4):
                    a0, a1, a2, a3 = a_upper[2 * k], a_lower[2 * k], a_upper[2 * k + 1], a_lower[2 * k + 1]
                    c = add_product(c, a0, a1, a2, a3, b[2 * k], b[2 * k + 1], PORTABLE)
                added = added + (c[0], c[1], c[2], c[3])  # noqa: RUF005
            sums = added
        totals = ()
        for i in tl.static_range(SETS):
            factor = heads[i] + (2 * DIGITS * group + DIGITS)
            factor = tl.load(factor) if EVEN else tl.load(factor, mask=is_group, other=0)
            factor = factor.to(tl.float32, bitcast=True)
            for row in tl.static_range(2):
                number = _two_digits(sums[2 * DIGITS * i + 2 * row], sums[2 * DIGITS * i + 2 * row + 1])
                if DIGITS == 4:
                    low = _two_digits(sums[2 * DIGITS * i + 2 * row + 4], sums[2 * DIGITS * i + 2 * row + 5])
                    number = number * 65536.0 + low
                totals = totals + (y[2 * i + row] + number * factor,)  # noqa: RUF005
        y = totals
    return y


@triton.jit
def _both_rows(starts: Tiles, DIGITS: tl.constexpr):
    """Return sums of two rows for every two digits."""
    sums = ()
    for i in tl.static_range(len(starts) // 2):
        high, low = starts[2 * i], starts[2 * i + 1]
        sums = sums + (high, low, high, low)  # noqa: RUF005
    return sums


@triton.jit
def rows_kernel(
    digits: Pointer,  # [X, D, G * 128] int8
    heads: Pointer,  # [X, G, 2 D] int32
    slots: Pointer,  # [slots, 1 + 4 B] int32; [P] experts if SINGLE
    weights: Pointer,  # [P]
    codes: Pointer,
    scales: Pointer,  # [E, rows] uint8
    table: Pointer,  # [E, 2] int32: eighths, first 16 bytes of codes
    bias: Pointer,  # [E, rows]
    out: Pointer,  # [P, S, rows]
    rows: Scalar,
    experts: Scalar,
    TOP_K: tl.constexpr,
    PER_PAIR: tl.constexpr,  # whether there is a vector for each pair, not for each token
    SINGLE: tl.constexpr,  # whether there is a single token: pair i is slot i
    EARLY: tl.constexpr,  # whether ``slots`` were written before the previous kernel
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,  # results times weights, and zeros for unused pairs, which otherwise are not written
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    SETS: tl.constexpr,
    DIGITS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    PORTABLE: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply rows of the experts with vectors. Grid [blocks of R rows of tiles, slots, S].

    With PDL the programs start when those of the previous kernel, a rotation, have waited for the kernel before it. The
    routing is complete then, and for the second product the slots are. Codes are requested while the rotation runs.
    """
    TILES: tl.constexpr = COLUMNS // 16
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    SPLIT_GROUPS: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
    ROUNDS: tl.constexpr = (SPLIT_GROUPS + J - 1) // J
    EVEN: tl.constexpr = GROUPS * GROUP == COLUMNS and GROUPS % (SPLITS * J) == 0
    block, slot, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    SIZE: tl.constexpr = 1 + VECTORS * SETS
    if SINGLE:
        expert = tl.load(slots + slot).to(tl.int32)
        is_used = (expert >= 0) & (expert < experts)
        is_idle = not is_used
    else:
        expert = tl.load(slots + slot * SIZE)
        is_used = (expert >= 0) & (expert < experts)
        is_idle = expert == experts
    first_group = split * SPLIT_GROUPS
    end_group = tl.minimum(first_group + SPLIT_GROUPS, GROUPS)
    safe_expert = tl.where(is_used, expert, 0)
    eighths = tl.load(table + 2 * safe_expert).to(tl.int32)
    codes += tl.load(table + 2 * safe_expert + 1).to(tl.int64) * 16
    tile_row = tl.minimum(block * R + tl.arange(0, R), rows // 16 - 1)
    first_row = tl.minimum(block * R, rows // 16 - 1)
    codes += (first_row.to(tl.int64) * TILES + first_group * 8) * (eighths * 4)
    row_bytes = (tile_row - first_row) * (TILES * eighths * 4)
    if PREFETCH and EARLY:
        LINES: tl.constexpr = triton.next_power_of_2(SPLIT_GROUPS * 8)
        if is_used:
            end_tile = tl.minimum(end_group * 8, TILES)
            line = tl.minimum(tl.arange(0, LINES) * CACHE_LINE, (end_tile - first_group * 8) * (4 * eighths) - 4)
            _prefetch(codes, row_bytes[:, None] + line[None, :], PORTABLE)
    if PDL and EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if is_used:
        thread = tl.arange(0, 32)
        g, q = thread // 4, thread % 4
        lane_digits, lane_heads = (), ()
        for i in tl.static_range(SETS):
            if SINGLE:
                input_pair, output_pair = slot + 0 * g, slot + 0 * q
            else:
                pair = slots + (slot * SIZE + 1 + VECTORS * i)
                input_pair, output_pair = tl.maximum(tl.load(pair + g // 2), 0), tl.maximum(tl.load(pair + q), 0)
            vector = (input_pair if PER_PAIR else input_pair // TOP_K).to(tl.int64)
            digit = digits + (vector * DIGITS + g % 2) * (GROUPS * GROUP)
            lane_digits = lane_digits + (digit[:, None, None],)  # noqa: RUF005
            vector = (output_pair if PER_PAIR else output_pair // TOP_K).to(tl.int64)
            lane_heads = lane_heads + ((heads + vector * (2 * DIGITS * GROUPS))[:, None, None],)  # noqa: RUF005
        row_offset = row_bytes[None, None, :]
        if eighths <= narrow_eighths(STATE_BITS):
            y = _rows_times_vectors(
                codes,
                row_offset,
                lane_digits,
                lane_heads,
                eighths,
                first_group,
                end_group,
                ROUNDS,
                TILES,
                GROUPS,
                J,
                STATE_BITS,
                True,
                DIGITS,
                EVEN,
                MULTIPLIED,
                PORTABLE,
            )
        else:
            y = _rows_times_vectors(
                codes,
                row_offset,
                lane_digits,
                lane_heads,
                eighths,
                first_group,
                end_group,
                ROUNDS,
                TILES,
                GROUPS,
                J,
                STATE_BITS,
                False,
                DIGITS,
                EVEN,
                MULTIPLIED,
                PORTABLE,
            )
        row = (block * R + tl.arange(0, R))[None, :, None] * 16 + (g[:, None, None] + 8 * tl.arange(0, 2))
        is_row = row < rows
        matrix_row = expert.to(tl.int64) * rows + row
        scale = decode_scale(tl.load(scales + matrix_row, mask=is_row, other=0)) * VALUE_UNIT
        for i in tl.static_range(SETS):
            total = tl.sum(tl.join(y[2 * i], y[2 * i + 1]), 1) * scale  # [32, R, 2]
            if HAS_BIAS:
                total += tl.load(bias + matrix_row, mask=is_row, other=0.0).to(tl.float32) * (split == 0)
            pair = tl.where(q == 0, slot, -1) if SINGLE else tl.load(slots + (slot * SIZE + 1 + VECTORS * i) + q)
            exists = (pair >= 0)[:, None, None]
            pair = tl.maximum(pair, 0)
            if WEIGHTED:
                total = total * tl.load(weights + pair).to(tl.float32)[:, None, None]
            element = (pair.to(tl.int64) * SPLITS + split)[:, None, None] * rows + row
            tl.store(out + element, total.to(out.dtype.element_ty), mask=is_row & exists)
    elif WEIGHTED:  # noqa: SIM102 - a constant and a value cannot be combined
        if is_idle:
            row = block * R * 16 + tl.arange(0, R * 16)
            zero = tl.zeros([R * 16], tl.float32).to(out.dtype.element_ty)
            for i in range(1 if SINGLE else VECTORS * SETS):
                pair = slot if SINGLE else tl.load(slots + slot * SIZE + 1 + i)
                element = (pair.to(tl.int64) * SPLITS + split) * rows + row
                tl.store(out + element, zero, mask=(row < rows) & (pair >= 0))
