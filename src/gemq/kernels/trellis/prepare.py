"""Triton kernel that prepares the inputs of ``decode.rows_kernel``: rotated fixed-point vectors, and slots.

Legend: T tokens, K experts per token, P = T * K pairs of token and expert, E experts, X vectors (T, or P), C columns,
G = ceil(C / 128) groups of columns, D digits of a vector's numbers, B sets of four vectors, S splits of a row.

A slot is an expert with up to 4 B pairs, for which a program decodes a weight once. Results do not depend on the order
in which programs run.
"""

# mypy: disable-error-code="assignment,has-type,misc,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.activation_triton import activated, gated
from gemq.kernels.trellis.rotation import signs
from gemq.kernels.triton_types import Pointer, Scalar, Tile
from gemq.quant import trellis

GROUP = tl.constexpr(128)
"""Columns that share a factor. Sums of a group with two digits fit into 32 bits."""

VECTORS = tl.constexpr(4)
"""Vectors of an instruction: its eight columns hold two digits of each."""

_MEAN = tl.constexpr(int(trellis.BYTES_MEAN))


@triton.constexpr_function
def _log2(number: int):
    """Return the logarithm of a power of two."""
    return int(number).bit_length() - 1


@triton.jit
def _rotated(x: Tile, SIDE: tl.constexpr):
    """Rotate blocks of SIDE columns of x [N, GROUP] float32, as ``rotation.rotate`` does."""
    column = tl.arange(0, GROUP)
    x = tl.where((signs(column & (SIDE - 1)) == 1)[None, :], -x, x)
    for stage in tl.static_range(_log2(SIDE)):
        partner = tl.gather(x, tl.broadcast_to((column ^ (1 << stage))[None, :], x.shape), 1)
        x = partner + tl.where(((column >> stage) & 1 == 1)[None, :], -x, x)
    return x * (SIDE**-0.5)


@triton.jit
def first_slot(expert: Scalar, pairs_below: Scalar, SPARSE: tl.constexpr, SETS: tl.constexpr):
    """Return the first slot of an expert, given the number of pairs of the experts below it.

    Args:
        expert: number of the expert
        pairs_below: pairs of experts with smaller numbers
        SPARSE: whether there is a slot for each pair; else each expert has a slot more than its pairs need
        SETS: B
    """
    if SPARSE:
        return pairs_below
    else:
        return pairs_below // (VECTORS * SETS) + expert


@triton.jit
def _assign_slots(
    index: Pointer,  # [P] experts
    slots: Pointer,  # [slots, 1 + 4 B] int32: the expert or -1, and its pairs or -1
    expert: Scalar,
    pairs: Scalar,
    experts: Scalar,
    PADDED: tl.constexpr,
    SPARSE: tl.constexpr,
    SETS: tl.constexpr,
):
    """Write the slots of one expert. Number E stands for all indices outside 0 ... E - 1."""
    SIZE: tl.constexpr = VECTORS * SETS
    pair = tl.arange(0, PADDED)
    chosen = tl.load(index + pair, mask=pair < pairs, other=0).to(tl.int32)
    chosen = tl.where((chosen < 0) | (chosen > experts), experts, chosen)
    is_pair = (pair < pairs) & (chosen == expert)
    below = tl.sum(((pair < pairs) & (chosen < expert)).to(tl.int32))
    count = tl.sum(is_pair.to(tl.int32))
    order = tl.where(is_pair, tl.cumsum(is_pair.to(tl.int32)) - 1, -1)
    first = first_slot(expert, below, SPARSE, SETS)
    end = first_slot(expert + 1, below + count, SPARSE, SETS)
    used = (count + SIZE - 1) // SIZE
    slot = first + used + pair
    tl.store(slots + slot * (1 + SIZE), tl.full([PADDED], -1, tl.int32), mask=slot < end)
    position = tl.arange(0, SIZE)
    start = 0
    while start < count:
        is_number = order[None, :] == (start + position)[:, None]
        numbers = tl.sum(tl.where(is_number, pair[None, :] + 1, 0), 1) - 1
        row = slots + (first + start // SIZE) * (1 + SIZE)
        tl.store(row, expert)
        tl.store(row + 1 + position, numbers)
        start += SIZE


@triton.jit
def _digits(x: Tile, DIGITS: tl.constexpr):
    """Return fixed-point numbers of x [N, GROUP] as int32 and their factors [N]. Without NaN, |x| / factor is exact."""
    highest: tl.constexpr = 127.0 * 256.0 ** (DIGITS - 1)
    factor = tl.maximum(tl.max(tl.abs(x), 1), 1e-25) * (1.0 / highest)
    scaled = x * (1.0 / factor)[:, None]
    numbers = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int32)
    return numbers, tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), factor)


@triton.jit(do_not_specialize=["vectors", "limit", "alpha", "shift", "pairs", "experts"])
def rotate_kernel(
    y: Pointer,  # [X, S, 2 C if GATED else C]
    index: Pointer,  # [P] experts
    digits: Pointer,  # [X, D, G * 128] int8
    heads: Pointer,  # [X, G, 2 D] int32: -MEAN times the sum of each digit, and the bits of the factor
    slots: Pointer,  # [slots, 1 + 4 B] int32
    vectors: Scalar,
    pairs: Scalar,
    experts: Scalar,
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
    DIGITS: tl.constexpr,
    BLOCKS: tl.constexpr,  # groups of a program
    PADDED_PAIRS: tl.constexpr,
    SPARSE: tl.constexpr,
    SETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add splits, apply the activation, rotate and round; assign pairs to slots.

    Grid [X, blocks of BLOCKS groups], or [X + E + 1, ...] to assign slots.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.program_id(0) >= vectors:
        if tl.program_id(1) == 0:
            expert = tl.program_id(0) - vectors
            _assign_slots(index, slots, expert, pairs, experts, PADDED_PAIRS, SPARSE, SETS)
        return
    vector = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    group = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
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
    numbers, factor = _digits(x, DIGITS)
    is_group = group < GROUPS
    head = heads + (vector * GROUPS + group) * (2 * DIGITS)
    tl.store(head + DIGITS, factor.to(tl.int32, bitcast=True), mask=is_group)
    for i in tl.static_range(DIGITS):
        # digits from -128 to 127, the lowest first
        digit = ((numbers + 128) & 255) - 128
        numbers = (numbers - digit) >> 8
        digit_row = vector * DIGITS + (DIGITS - 1 - i)
        tl.store(head + (DIGITS - 1 - i), tl.sum(digit, 1) * -_MEAN, mask=is_group)
        tl.store(digits + digit_row * (GROUPS * GROUP) + column, digit.to(tl.int8), mask=is_group[:, None])
