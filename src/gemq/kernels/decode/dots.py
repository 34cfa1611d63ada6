"""Exact integer dot products of packed codes and fixed-point activations (Triton device functions).

An activation is a 16-bit integer, 256 * high + low, with a signed high byte and an unsigned low byte. The high bytes of
four columns form a word, and their low bytes another. A word of codes has fields of four columns each. A field is moved
to the bottom of its bytes and multiplied by instructions that add up four products of bytes (dp4a). This takes about
one instruction per code, and no number is converted.

Ternary bytes are not decoded into digits. With q_i = floor(byte / 3^i), digit i is q_i - 3 q_(i+1), so the sum of
digit_i x_i is the sum of q_i (x_i - 3 x_(i-1)). Activations are therefore combined once (``fixed_point``), and q_i are
the high bytes of 81 f, 27 f, 9 f and 3 f for f = ceil(256 byte / 243).

The assembly is NVIDIA's. PORTABLE uses ordinary arithmetic, for the interpreter and other GPUs.

Legend: L lanes, M rows, ``load_words`` words that one load brings to a thread (the last axis of tiles).
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.triton_types import Tile


@triton.constexpr_function
def fields_of(levels: int):
    """Return the columns that share a byte of codes: the words of activations for each word of codes."""
    return {2: 8, 3: 5, 4: 4, 8: 4, 16: 2, 256: 1}[int(levels)]


@triton.constexpr_function
def plane_asm(levels: int, words: int, load_words: int):
    """Return PTX for codes in one plane.

    Each operand has ``load_words`` elements. Operands are the words of codes, then high and low words of activations:
    those of the first field for all words of codes, then those of the second field, and so on.
    """
    bits = 8 // fields_of(levels)
    mask = ((1 << bits) - 1) * 0x01010101
    lines = []
    for k in range(words):
        for field in range(fields_of(levels)):
            codes = f"${load_words + k}"
            if field:
                lines.append(f"shr.b32 t, {codes}, {field * bits};")
                codes = "t"
            if bits < 8:
                lines.append(f"and.b32 t, {codes}, {mask:#010x};")
                codes = "t"
            is_first = k == 0 and field == 0
            lines += _dot_lines(codes, load_words + words, field * words + k, load_words, is_first)
    return _block(lines, load_words)


@triton.constexpr_function
def three_bit_asm(words: int, upper_words: int, half: int, load_words: int):
    """Return PTX for codes of 3 bits.

    Operands are those of ``plane_asm``, with the words of the high plane, and which half of their bits to use, after
    the codes. The high bit of field f is bit 2 f of its byte, where the field's low bits begin. Fields 0 and 2, and
    (shifted by two bits) 1 and 3, therefore become two words of nibbles with two operations each.

    Args:
        words: words of codes
        upper_words: words of the high plane
        half: words of a group's high plane, a multiple of ``load_words``
        load_words: elements of an operand
    """
    upper = load_words + words
    shift = upper + upper_words
    lines = []
    for k in range(words):
        lines.append(f"shr.b32 u, ${upper + k % upper_words}, ${shift};")
        if k // half:
            lines.append("shr.b32 u, u, 1;")
        lines.append("shl.b32 e, u, 2;")
        lines.append(f"shr.b32 o, ${load_words + k}, 2;")
        # the bits of the first operand where the mask has ones, else those of the second
        lines.append(f"lop3.b32 e, ${load_words + k}, e, 0x33333333, 0xe4;")
        lines.append("lop3.b32 o, o, u, 0x33333333, 0xe4;")
        for field, nibbles in enumerate(("e", "o", "e", "o")):
            codes = nibbles
            if field > 1:
                lines.append(f"shr.b32 t, {nibbles}, 4;")
                codes = "t"
            lines.append(f"and.b32 t, {codes}, 0x07070707;")
            is_first = k == 0 and field == 0
            lines += _dot_lines("t", shift + load_words, field * words + k, load_words, is_first)
    return _block(lines, load_words)


@triton.constexpr_function
def ternary_asm(load_words: int):
    """Return PTX for ternary codes.

    Operands are a window of 8 words of codes, the bit of the window at which the group starts, high and low words of
    activations in the order of columns, and then those that start two columns later.
    """
    shift = load_words + 8
    activations = shift + load_words
    lines = [f"setp.ge.u32 p, ${shift}, 32;", f"and.b32 u, ${shift}, 31;"]
    for k in range(8):
        lines.append(f"selp.b32 w{k}, ${load_words + min(k + 1, 7)}, ${load_words + k}, p;")
    for k in range(7):
        lines.append(f"shf.r.wrap.b32 w{k}, w{k}, w{k + 1}, u;")
        if k == 6:
            lines.append("and.b32 w6, w6, 0xffff;")  # 26 bytes end here
        lines += _dot_lines(f"w{k}", activations, k, load_words, k == 0)
        for register, start in (("e", f"and.b32 e, w{k}, 0x00ff00ff;"), ("o", f"prmt.b32 o, w{k}, 0, 0x4341;")):
            lines.append(start)
            # f = ceil(256 b / 243) = b + (110 b + 2006) // 2048
            lines.append(f"mad.lo.u32 t, {register}, 110, 0x07d607d6;")
            lines.append("shr.b32 t, t, 11;")
            lines.append("and.b32 t, t, 0x000f000f;")
            lines.append(f"add.u32 {register}, {register}, t;")
        for i, power in enumerate((81, 27, 9, 3), start=1):
            word = ternary_word(i, k)
            if word is not None:
                lines.append(f"mul.lo.u32 s, e, {power};")
                lines.append(f"mul.lo.u32 t, o, {power};")
                lines.append("prmt.b32 t, s, t, 0x7351;")
                lines += _dot_lines("t", activations, word, load_words, False)
    return _block(lines, load_words)


@triton.constexpr_function
def _assembly(levels: int, words: int, upper_words: int, half: int, load_words: int):
    """Return the PTX of a width."""
    if levels == 3:
        return ternary_asm(load_words)
    if levels == 8:
        return three_bit_asm(words, upper_words, half, load_words)
    return plane_asm(levels, words, load_words)


@triton.constexpr_function
def ternary_word(i: int, k: int):
    """Return the word of activations for digit i of word k of a group's codes, None if there is no such column.

    Digit i of byte b is column 26 i + b. Words from 32 on start two columns later than the first 32.
    """
    if i == 4 and k == 6:
        return None
    return 26 * i // 4 + k + (32 if i % 2 else 0)


@triton.constexpr_function
def _dot_lines(codes: str, activations: int, word: int, load_words: int, is_first: bool):
    """Return the instructions that multiply ``codes`` with a word of activations.

    Args:
        codes: register
        activations: first operand of the activations, tiles of ``load_words`` high words alternating with tiles of as
            many low words
        word: number of the word
        load_words: elements of an operand
        is_first: whether the sums begin with this product
    """
    high = activations + word // load_words * 2 * load_words + word % load_words
    low = high + load_words
    high_sum, low_sum = ("0", "0") if is_first else ("h", "l")
    return [f"dp4a.u32.s32 h, {codes}, ${high}, {high_sum};", f"dp4a.u32.u32 l, {codes}, ${low}, {low_sum};"]


@triton.constexpr_function
def _block(lines: list[str], load_words: int):
    """Return a block of PTX with its registers. The first output gets the sum, the others zero."""
    registers = "e, o, s, t, u, h, l, " + ", ".join(f"w{k}" for k in range(8))
    lines = [f".reg .b32 {registers};", ".reg .pred p;", *lines, "mad.lo.s32 $0, h, 256, l;"]
    return "{\n" + "\n".join(lines + [f"mov.b32 ${i}, 0;" for i in range(1, load_words)]) + "\n}"


@triton.constexpr_function
def _constraints(inputs: int, load_words: int):
    """Return the constraints of the assembly. Early clobber: outputs are written before all inputs are read."""
    return ",".join(["=&r"] * load_words + ["r"] * (inputs * load_words))


@triton.jit
def split(t: Tile, LOAD_WORDS: tl.constexpr):
    """[A, N] -> N / LOAD_WORDS tensors [A, LOAD_WORDS]."""
    if t.shape[1] == LOAD_WORDS:
        return (t,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(t, [t.shape[0], 2, t.shape[1] // 2]), [0, 2, 1]))
        return split(left, LOAD_WORDS) + split(right, LOAD_WORDS)


@triton.jit
def _dot_bytes(codes: Tile, high: Tile, low: Tile):
    """Return the sum of four products of unsigned bytes of ``codes`` and activations, in portable arithmetic."""
    total = (codes & 255) * (((high << 24) >> 24) * 256 + (low & 255))
    for b in tl.static_range(1, 4):
        total += ((codes >> (8 * b)) & 255) * (((high << (24 - 8 * b)) >> 24) * 256 + ((low >> (8 * b)) & 255))
    return total


@triton.jit
def _divide_bytes(w: Tile, i: tl.constexpr):
    """Divide every byte of w by 3^i."""
    quotients = w * 0
    for b in tl.static_range(4):
        quotients |= (((w >> (8 * b)) & 255) // (3**i)) << (8 * b)
    return quotients


@triton.jit
def _unsigned_shift(w: Tile, bits: Tile):
    """Shift int32 to the right and fill with zeros."""
    return (w.to(tl.uint32, bitcast=True) >> bits.to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def _portable_planes(
    codes: Tile,
    upper: Tile,
    code_shift: Tile,
    high: Tile,
    low: Tile,
    LEVELS: tl.constexpr,
    UPPER_WORDS: tl.constexpr,
    LOAD_WORDS: tl.constexpr,
):
    """Compute ``dot`` in portable arithmetic, for all widths but ternary."""
    total = codes[0] * 0
    for k in tl.static_range(len(codes)):
        for f in tl.static_range(fields_of(LEVELS)):
            if LEVELS == 8:
                half = _unsigned_shift(upper[k % len(upper)], code_shift + (2 * f + k * LOAD_WORDS // UPPER_WORDS))
                field = ((codes[k] >> (2 * f)) & 0x03030303) | ((half & 0x01010101) << 2)
            elif LEVELS == 256:
                field = codes[k]
            else:
                field = (codes[k] >> (8 // fields_of(LEVELS) * f)) & ((LEVELS - 1) * 0x01010101)
            total += _dot_bytes(field, high[f * len(codes) + k], low[f * len(codes) + k])
    return total


@triton.jit
def _element(tiles: Tile, i: tl.constexpr, LOAD_WORDS: tl.constexpr):
    """Return element i of the last axis of concatenated tiles [..., LOAD_WORDS]: [...]."""
    return tl.sum(tl.where(tl.arange(0, LOAD_WORDS) == i % LOAD_WORDS, tiles[i // LOAD_WORDS], 0), 2)


@triton.jit
def _portable_ternary(codes: Tile, code_shift: Tile, high: Tile, low: Tile, LOAD_WORDS: tl.constexpr):
    """Compute ``dot`` of ternary codes in portable arithmetic."""
    start = tl.max(code_shift, 2)
    total = start * 0
    for k in tl.static_range(7):
        word_0 = _element(codes, k, LOAD_WORDS)
        word_1 = _element(codes, k + 1, LOAD_WORDS)
        word_2 = _element(codes, min(k + 2, 7), LOAD_WORDS)
        low_word, high_word = tl.where(start >= 32, word_1, word_0), tl.where(start >= 32, word_2, word_1)
        w = tl.where(start % 32 == 16, _unsigned_shift(low_word, start * 0 + 16) | (high_word << 16), low_word)
        if k == 6:
            w &= 0xFFFF
        for i in tl.static_range(5):
            if ternary_word(i, k) is not None:
                x_high = _element(high, ternary_word(i, k), LOAD_WORDS)
                total += _dot_bytes(_divide_bytes(w, i), x_high, _element(low, ternary_word(i, k), LOAD_WORDS))
    return total


@triton.jit
def dot(
    codes: Tile,
    upper: Tile,
    code_shift: Tile,
    high: Tile,
    low: Tile,
    LEVELS: tl.constexpr,
    UPPER_WORDS: tl.constexpr,
    LOAD_WORDS: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Multiply codes with activations: the sum over all columns of code * (256 high + low), int32 [L, M].

    The assembly takes the LOAD_WORDS elements of a tile's last axis in one call. Triton does not guarantee which
    elements it groups, but has grouped those that a thread's load of LOAD_WORDS words has brought. ``launch`` checks
    this.

    Args:
        codes: tuple of int32 [L, M, LOAD_WORDS], words of codes; for ternary, the window of 8 words with the group
        upper: at 3 bits, words of the high plane for the same columns, tuple of tiles as above
        code_shift: int32 [L, 1, LOAD_WORDS]; at 3 bits, the half of the high plane's bits that belongs to the first
            word; for ternary, the bit of the window at which the group starts
        high: high words from ``fixed_point.fixed_point``, tuple of [L, 1, LOAD_WORDS]
        low: low words, likewise
        UPPER_WORDS: words of the high plane
    """
    if PORTABLE:
        if LEVELS == 3:
            return _portable_ternary(codes, code_shift, high, low, LOAD_WORDS)
        else:
            return tl.sum(_portable_planes(codes, upper, code_shift, high, low, LEVELS, UPPER_WORDS, LOAD_WORDS), 2)
    else:
        arguments = codes
        if LEVELS == 8:
            arguments = arguments + upper
        if LEVELS == 3 or LEVELS == 8:
            arguments = arguments + (code_shift,)  # noqa: RUF005 - Triton cannot unpack
        for i in tl.static_range(len(high)):
            arguments = arguments + (high[i], low[i])  # noqa: RUF005
        asm: tl.constexpr = _assembly(LEVELS, len(codes) * LOAD_WORDS, len(upper) * LOAD_WORDS, UPPER_WORDS, LOAD_WORDS)
        constraints: tl.constexpr = _constraints(len(arguments), LOAD_WORDS)
        sums = tl.inline_asm_elementwise(asm, constraints, arguments, tl.int32, is_pure=True, pack=LOAD_WORDS)
        return tl.sum(sums, 2)
