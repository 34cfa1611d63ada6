"""A vector of 16-bit floats in fixed point, in words as ``dots`` takes them (Triton device functions).

Legend: G group size, NG groups of a row, S groups taken at once, J words of four bytes in a plane of a group (3 bits:
of its low plane; ternary: of the window that holds it).

Each group gets 16 bits by its largest value: the error is 2^-16 of that, while the floats came with 2^-9 of each
value. Does not know what the words are multiplied with.
"""

# mypy: disable-error-code="assignment,has-type"
from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.dots import fields_of
from gemq.kernels.tiles import group_bytes, window

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float plus this has the nearest integer in its low bits."""


@triton.constexpr_function
def words_of(levels, G):
    """J."""
    if levels == 3:
        return triton.next_power_of_2(group_bytes(levels, G) // 4 + 1)
    return (G // 4 if levels == 8 else group_bytes(levels, G)) // 4


@triton.constexpr_function
def groups_at_once(levels, G, NG):
    """S: what the 32 threads of a warp hold of a row with loads of 16 bytes, of 1 bit and ternary 8."""
    words = min(2 if levels in (2, 3) else 4, words_of(levels, G))
    return min(32 * words // words_of(levels, G), triton.next_power_of_2(NG))


@triton.constexpr_function
def covered(levels, G, NG):
    """Whether words of a plane start at multiples of four bytes and four columns share a word's place."""
    if levels == 3:
        return window(levels, G, NG) > 0 and group_bytes(levels, G) % 2 == 0
    return G % (32 if levels in (2, 8) else 16) == 0


@triton.jit
def _quarter(v, k: tl.constexpr, TYPE: tl.constexpr):
    """Number k of the floats in v, int32 or int64, as float32."""
    return (v >> (16 * k)).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def _load_four(
    x, first, j, s, FIELD: tl.constexpr, LEVELS: tl.constexpr, G: tl.constexpr, NG: tl.constexpr, S: tl.constexpr
):
    """Four tiles [S, J] of float32: the columns of field FIELD in each word of groups ``first + s``."""
    group = (first + s)[:, None]
    inside = group < NG
    if NG % S == 0:
        inside = group >= 0
    type: tl.constexpr = x.dtype.element_ty
    if LEVELS == 3:
        BYTES: tl.constexpr = group_bytes(LEVELS, G)
        byte = 4 * j[None, :] - group * BYTES % window(LEVELS, G, NG)
        column = byte + FIELD * BYTES
        pairs = x.to(tl.pointer_type(tl.int32)) + group * (G // 2)
        v0 = tl.load(pairs + column // 2, mask=inside & (byte >= 0) & (byte < BYTES) & (column < G), other=0)
        byte += 2
        column += 2
        v1 = tl.load(pairs + column // 2, mask=inside & (byte >= 0) & (byte < BYTES) & (column < G), other=0)
        return _quarter(v0, 0, type), _quarter(v0, 1, type), _quarter(v1, 0, type), _quarter(v1, 1, type)
    else:
        STEP: tl.constexpr = G // fields_of(LEVELS)
        fours = x.to(tl.pointer_type(tl.int64)) + group * (G // 4) + (FIELD * STEP // 4 + j[None, :])
        v = tl.load(fours) if NG % S == 0 else tl.load(fours, mask=inside, other=0)
        return _quarter(v, 0, type), _quarter(v, 1, type), _quarter(v, 2, type), _quarter(v, 3, type)


@triton.jit
def _pack(a, b, c, d, PLAIN: tl.constexpr):
    """Four tiles of float32, integers within 16 bits once MAGIC has been added -> words of high and of low bytes."""
    if PLAIN:
        a, b = (a - MAGIC).to(tl.int32), (b - MAGIC).to(tl.int32)
        c, d = (c - MAGIC).to(tl.int32), (d - MAGIC).to(tl.int32)
        low = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | ((d & 255) << 24)
        high = ((a >> 8) & 255) | (((b >> 8) & 255) << 8) | (((c >> 8) & 255) << 16) | (((d >> 8) & 255) << 24)
        return high, low
    else:
        return tl.inline_asm_elementwise(
            "{\n.reg .b32 s, t;\nprmt.b32 s, $2, $3, 0x5410;\nprmt.b32 t, $4, $5, 0x5410;\n"
            "prmt.b32 $0, s, t, 0x7531;\nprmt.b32 $1, s, t, 0x6420;\n}",
            "=&r,=r,r,r,r,r",
            (a, b, c, d),
            dtype=(tl.int32, tl.int32),
            is_pure=False,  # or Triton would compute it again in each warp to save a trip through shared memory
            pack=1,
        )


@triton.jit
def fixed_point(
    x, first, j, s, LEVELS: tl.constexpr, PLAIN: tl.constexpr, G: tl.constexpr, NG: tl.constexpr, S: tl.constexpr
):
    """Groups ``first + s`` of x -> words for ``dots.dot`` [S, 1, J] int64; their scale and the sum of x, [S]."""
    values = ()
    largest = tl.zeros([s.shape[0], j.shape[0]], tl.float32)
    total = tl.zeros([s.shape[0], j.shape[0]], tl.float32)
    for i in tl.static_range(fields_of(LEVELS)):
        a, b, c, d = _load_four(x, first, j, s, i, LEVELS, G, NG, S)
        largest = tl.maximum(largest, tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d))))
        total += (a + b) + (c + d)
        values = values + (a, b, c, d)  # noqa: RUF005
    # Combined activations of ternary must fit too: x_i - 3 x_(i-1).
    LIMIT: tl.constexpr = 8191.0 if LEVELS == 3 else 32767.0
    largest = tl.maximum(tl.max(largest, 1), 1e-30)
    per_one = (LIMIT / largest)[:, None]
    words = ()
    for i in tl.static_range(fields_of(LEVELS)):
        a = values[4 * i] * per_one + MAGIC
        b = values[4 * i + 1] * per_one + MAGIC
        c = values[4 * i + 2] * per_one + MAGIC
        d = values[4 * i + 3] * per_one + MAGIC
        if LEVELS == 3:
            a0, b0, c0, d0 = a - MAGIC, b - MAGIC, c - MAGIC, d - MAGIC
            if i > 0:
                a, b, c, d = a - 3.0 * pa, b - 3.0 * pb, c - 3.0 * pc, d - 3.0 * pd  # noqa: F821
            pa, pb, pc, pd = a0, b0, c0, d0  # noqa: F841
        high, low = _pack(a, b, c, d, PLAIN)
        # Both in one: a thread's words come from others through shared memory, and that costs by the trip.
        both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        words = words + (both[:, None, :],)  # noqa: RUF005
    return words, largest * (1.0 / LIMIT), tl.sum(total, 1)
